"""A job: everything that `purify` needs, read and checked before anything is computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cbpt_guard.defense.data import LabelledImages, list_images, load_images, load_triggered
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.prompts import check_prompts
from cbpt_guard.defense.run import OURS, PurifyRun
from cbpt_guard.defense.settings import TEMPLATE, Settings
from cbpt_guard.defense.suspect import ModelFlags, Suspect, check_device, open_suspect, zero_shot_head
from cbpt_guard.errors import InputError
from cbpt_guard.files import check_output, holds

_RECIPE = 14  # raised whenever a part of an interrupted run would come out otherwise under the same settings
_TOOLS = ("torch", "open_clip_torch", "numpy", "pillow", "safetensors", "scikit-learn")


@dataclass(frozen=True)
class Job:
    """What a user asks of `purify`, which explains each field."""

    model: Path
    data: Path
    classes: Path | None = None
    template: str = TEMPLATE
    shots: int | None = None
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    device: str = "cpu"
    triggered: Path | None = None
    reuse: Path | None = None
    skip_bad: bool = False
    flags: ModelFlags = field(default_factory=ModelFlags)


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are read: the frozen suspect, its zero-shot head, images and attack images."""

    job: Job
    suspect: Suspect
    original: Head
    data: LabelledImages
    observed: LabelledImages | None
    reused: PurifyRun | None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that could not be read and were left out."""
        return self.data.skipped + (() if self.observed is None else self.observed.skipped)

    def key(self) -> dict[str, Any]:
        """All that a run's parts depend on: an interrupted run may only be continued under the same key."""
        pixels = hashlib.sha256(self.data.images.numpy().data)
        pixels.update(self.data.labels.numpy().data)
        if self.observed is not None:
            pixels.update(self.observed.images.numpy().data)
        return {
            "model": self.suspect.record.source_sha256,
            "understanding of the model": self.suspect.record.understanding(),
            "data": pixels.hexdigest(),
            "classes": list(self.data.classes),
            "template": self.job.template,
            "settings": self.job.settings.model_dump(mode="json"),
            "seed": self.job.seed,
            "device": self.job.device,
            "reuse": None if self.reused is None else self.reused.record.created,
            "recipe": _RECIPE,
            "versions": tool_versions(),
        }


def check_places(job: Job, out: Path, force: bool) -> None:
    """Refuse an output that may not be made or would replace what the job reads; raises as `check_output` does."""
    check_output(out, force, OURS)
    inputs = {
        "--model": job.model, "--data": job.data, "--classes": job.classes, "--triggered": job.triggered,
        "--reuse": job.reuse, "--tokenizer": job.flags.tokenizer,
    }  # fmt: skip
    for flag, path in inputs.items():
        if path is not None and holds(out, path):
            raise InputError(f"{out} holds `{flag}` {path} and would replace it; pass another `--out`")


def prepare(job: Job, progress: Progress = silent) -> Prepared:
    """Read model and images; raises as `purify` does."""
    device = check_device(job.device)
    listing = list_images(job.data, job.classes).drawn(job.shots, job.seed)
    suspect = open_suspect(job.model, job.flags, listing, job.template, device)
    check_prompts(suspect.clip, listing.classes, job.template)
    reused = None if job.reuse is None else _open_reused(job.reuse, suspect)
    original = zero_shot_head(suspect.clip, listing.classes, job.template)
    preprocess = suspect.record.preprocess
    data = load_images(listing, preprocess, skip_bad=job.skip_bad, progress=progress)
    observed = None if job.triggered is None else load_triggered(job.triggered, preprocess, skip_bad=job.skip_bad)
    return Prepared(job, suspect, original, data, observed, reused)


def tool_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a run depends on."""
    return {name: version(name) for name in _TOOLS}


def _open_reused(path: Path, suspect: Suspect) -> PurifyRun:
    run = PurifyRun.open(path)
    if run.record.model.source_sha256 != suspect.record.source_sha256:
        raise InputError(
            f"{path} was made from another checkpoint (sha256 {run.record.model.source_sha256[:12]}...); "
            "its triggers say nothing about this one"
        )
    before, now = run.record.model.understanding(), suspect.record.understanding()
    other = [name for name in now if name != "tokenizer" and before[name] != now[name]]  # triggers act on images
    if other:
        raise InputError(f"{path} was made with another {' and '.join(other)}; run without `--reuse`")
    return run
