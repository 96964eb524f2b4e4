"""Runs for the runtime's measurements, made without purifying: real graphs in seconds, whatever the weights.

A random or a given image encoder, two heads over it, one suspected class whose trigger really reaches it. The
guard's work in the graph is the same as after a purification; what the answers are worth is measured elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cbpt_guard.defense import openclip
from cbpt_guard.defense.clip import ImageEncoder, to_pixels
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.head import GuardedHead, Head, TriggerTest
from cbpt_guard.defense.record import DataRecord, ModelRecord, RunMetrics, RunRecord, Verdict
from cbpt_guard.defense.settings import Settings
from cbpt_guard.export import export
from cbpt_guard.export.golden import draw
from cbpt_guard.images import Preprocess
from cbpt_guard.manifest import Suspect

SAMPLES, TARGET = 32, 2
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def write_bundle(
    folder: Path,
    architecture: str,
    config: dict[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    weights: dict[str, Tensor] | None = None,
    *,
    classes: int = 200,
    precision: tuple[str, ...] = ("fp32",),
) -> Path:
    """`folder/purified` and `folder/bundle` of an architecture; random weights where none are given."""
    config = config or openclip.named_config(architecture)
    preprocess = preprocess or Preprocess(size=config["vision_cfg"].get("image_size", 224), **OPENAI)
    torch.manual_seed(0)
    model: Any = openclip.build(config, device="cpu")
    if weights is not None:
        model.load_state_dict(weights)
    run = folder / "purified"
    _write_run(run, model, architecture, config, preprocess, tuple(f"class {i:04d}" for i in range(classes)))
    return export(run, folder / "bundle", allow_unguarded=True, force=True, precision=precision)


@torch.no_grad()
def _write_run(
    folder: Path, model: Any, name: str, config: dict[str, Any], preprocess: Preprocess, classes: tuple[str, ...]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(draw(preprocess.size, SAMPLES))
    trigger = _patch(preprocess.size)
    encoder = ImageEncoder(model.visual, preprocess).eval()
    clean, attacked = (encoder(pixels) for pixels in (to_pixels(images), trigger.apply(to_pixels(images))))
    head = _head(clean, attacked, classes)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    labels = head.original.logits(clean).argmax(1)
    np.savez(folder / "samples.npz", images=images.numpy(), labels=labels.numpy())
    head.save(folder / "heads.safetensors")
    TriggerBank((trigger,)).save(folder / "triggers.safetensors")
    save_file({"contexts": torch.zeros(len(classes), 1, 1)}, folder / "prompts.safetensors")
    (folder / "run.json").write_text(_record(name, config, preprocess, head).model_dump_json())
    (folder / "metrics.json").write_text(_metrics().model_dump_json())


def _patch(size: int) -> FoundTrigger:
    mask = torch.zeros(1, size, size)
    mask[:, : size // 2, :] = 1.0
    stripes = (torch.arange(size) % 2).float().expand(3, size, size).contiguous()
    return FoundTrigger("masked", TARGET, stripes, mask)


def _head(clean: Tensor, attacked: Tensor, classes: tuple[str, ...]) -> GuardedHead:
    """Rows spread over what tells the images apart; what all random features share decides nothing."""
    generator = torch.Generator().manual_seed(0)
    common = F.normalize(clean.mean(0), dim=0)
    weights = torch.randn(len(classes), len(clean), generator=generator)
    rows = weights @ (clean - clean.mean(0))
    rows[TARGET] = attacked.mean(0)
    rows = F.normalize(rows - (rows @ common)[:, None] * common, dim=1)
    test = TriggerTest.none(len(classes), rows.shape[1])
    test.directions[TARGET] = rows[TARGET]
    test.thresholds[TARGET] = ((clean.mean(0) + attacked.mean(0)) / 2 @ rows[TARGET]).item()
    guarded = F.normalize(rows + 0.3 * rows.roll(1, 0), dim=1)
    return GuardedHead(Head(rows, 100.0), Head(guarded, 100.0), test, classes, "switch")


def _record(name: str, config: dict[str, Any], preprocess: Preprocess, head: GuardedHead) -> RunRecord:
    suspect = Suspect(label=head.classes[TARGET], index=TARGET, threshold=head.test.thresholds[TARGET].item())
    return RunRecord(
        cbpt_guard="benchmark",
        created="2026-01-01T00:00:00+00:00",
        seed=0,
        template="a photo of a {}.",
        rule=head.rule,
        settings=Settings().model_dump(mode="json"),
        model=ModelRecord(
            source=f"{name}.pt",
            source_sha256="0" * 64,
            form="state dict",
            architecture=name,
            config=config,
            preprocess=preprocess,
            quickgelu=bool(config.get("quick_gelu", False)),
            tokenizer="none",
            resolved={},
            notes=(),
        ),
        data=DataRecord(shots={}, held_out=SAMPLES, without_images=(), skipped=(), triggered_images=0),
        candidates=(),
        suspects=(suspect,),
        verdict=Verdict(name="unverified", reasons=("never purified: made for a measurement",)),
        epoch=0,
        seconds={},
        warnings=(),
        versions={"torch": torch.__version__},
    )


def _metrics() -> RunMetrics:
    return RunMetrics(
        images=SAMPLES,
        held_out=True,
        clean_accuracy_before=1.0,
        clean_accuracy_after=1.0,
        clean_accuracy_prompts=1.0,
        flagged_clean=0.0,
        flagged_found=None,
        triggers=(),
        classes=(),
    )
