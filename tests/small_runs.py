"""A small finished run, made without purifying: a random CLIP whose target class a trigger really reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import small_clips
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cbpt_guard.bundle import Suspect
from cbpt_guard.defense.clip import ImageEncoder, to_pixels
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.head import GuardedHead, Head, Rule, TriggerTest
from cbpt_guard.defense.record import (
    ClassMetrics,
    DataRecord,
    ModelRecord,
    RunMetrics,
    RunRecord,
    TriggerMetrics,
    Verdict,
)
from cbpt_guard.defense.settings import Settings
from cbpt_guard.export.golden import draw
from cbpt_guard.images import Preprocess
from cbpt_guard.manifest import VerdictName

CLASSES = ("apple", "*bold* | [pipe](x)", "banana", "dog", "naïve été")
TARGET = 2


def write_run(
    folder: Path,
    config: dict[str, Any] = small_clips.VIT,
    *,
    rule: Rule = "switch",
    suspected: bool = True,
    verdict: VerdictName = "guarded",
) -> Path:
    """Fill `folder` as `purify` does and return it."""
    folder.mkdir()
    size = config["vision_cfg"]["image_size"]
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = small_clips.model(config)
    encoder = ImageEncoder(model.visual, preprocess)  # type: ignore[arg-type]
    images = torch.from_numpy(draw(size, 40))
    trigger = _patch(size)
    head, labels = _head(encoder, images, trigger, rule=rule, suspected=suspected)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    np.savez(folder / "samples.npz", images=images.numpy(), labels=labels.numpy())
    head.save(folder / "heads.safetensors")
    TriggerBank((trigger,)).save(folder / "triggers.safetensors")
    save_file({"contexts": torch.zeros(len(CLASSES), 4, 32)}, folder / "prompts.safetensors")
    record = _record(config, preprocess, head, verdict)
    (folder / "run.json").write_text(record.model_dump_json())
    (folder / "metrics.json").write_text(_metrics().model_dump_json())
    return folder


def _patch(size: int) -> FoundTrigger:
    mask = torch.zeros(1, size, size)
    mask[:, : size // 2, :] = 1.0
    stripes = (torch.arange(size) % 2).float().expand(3, size, size).contiguous()
    return FoundTrigger("masked", TARGET, stripes, mask)


@torch.no_grad()
def _head(
    encoder: ImageEncoder, images: Tensor, trigger: FoundTrigger, *, rule: Rule, suspected: bool
) -> tuple[GuardedHead, Tensor]:
    """Zero-shot rows that are spread over the images, with the target's where the trigger puts them."""
    clean, attacked = (encoder(pixels) for pixels in (to_pixels(images), trigger.apply(to_pixels(images))))
    rows = clean[: len(CLASSES)].clone()
    rows[TARGET] = attacked.mean(0)
    common = F.normalize(clean.mean(0), dim=0)
    rows = F.normalize(
        rows - (rows @ common)[:, None] * common, dim=1
    )  # what all random features share decides nothing
    original, guarded = Head(rows, 100.0), Head(F.normalize(rows + 0.3 * rows.roll(1, 0), dim=1), 100.0)
    test = TriggerTest.none(len(CLASSES), rows.shape[1])
    if suspected:
        test.directions[TARGET] = rows[TARGET]
        test.thresholds[TARGET] = ((clean.mean(0) + attacked.mean(0)) / 2 @ rows[TARGET]).item()
    return GuardedHead(original, guarded, test, CLASSES, rule), original.logits(clean).argmax(1)


def _record(config: dict[str, Any], preprocess: Preprocess, head: GuardedHead, verdict: VerdictName) -> RunRecord:
    suspects = tuple(
        Suspect(label=CLASSES[i], index=i, threshold=head.test.thresholds[i].item()) for i in head.suspects
    )
    return RunRecord(
        cbpt_guard="0.1.0",
        created="2026-01-01T00:00:00+00:00",
        seed=0,
        template="a photo of a {}.",
        rule=head.rule,
        settings=Settings().model_dump(mode="json"),
        model=ModelRecord(
            source="suspect.pt",
            source_sha256="0" * 64,
            form="state dict",
            architecture="small",
            config=config,
            preprocess=preprocess,
            quickgelu=False,
            tokenizer="open_clip",
            resolved={"quickgelu": "config"},
            notes=(),
        ),
        data=DataRecord(
            shots=dict.fromkeys(CLASSES, 8), held_out=40, without_images=(), skipped=(), triggered_images=0
        ),
        candidates=(),
        suspects=suspects,
        verdict=Verdict(name=verdict, reasons=() if verdict == "guarded" else ("ASR 40 % > 5 %",)),
        epoch=3,
        seconds={"total": 1.0},
        warnings=(),
        versions={"torch": torch.__version__},
    )


def _metrics() -> RunMetrics:
    return RunMetrics(
        images=40,
        held_out=True,
        clean_accuracy_before=1.0,
        clean_accuracy_after=1.0,
        clean_accuracy_prompts=0.9,
        flagged_clean=0.0,
        flagged_found=1.0,
        triggers=(
            TriggerMetrics(
                origin="found",
                family="masked",
                target=CLASSES[TARGET],
                images=30,
                asr_before=1.0,
                asr_after=0.0,
                asr_prompts=0.2,
                pa_before=0.0,
                pa_after=0.4,
                pa_prompts=0.4,
            ),
        ),
        classes=tuple(
            ClassMetrics(label=label, images=8, before=1.0, after=1.0, after_prompts=0.9) for label in CLASSES
        ),
    )
