"""What a run would do and cost, measured by doing a little of it (`purify --dry-run`)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from cbpt_guard.defense.accuracy import check_accuracy
from cbpt_guard.defense.classscan import scan_images
from cbpt_guard.defense.data import split
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.inversion import NARROW, PATIENCE, invert_agnostic
from cbpt_guard.defense.job import Job, Prepared, check_places, prepare
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.tried import tried_images
from cbpt_guard.defense.waves import heard_images
from cbpt_guard.defense.workshop import NARROW_STEPS

_TRIGGERS = 4  # masked, additive, agnostic and one of a narrow family toward one suspect, at most the usual bank


class Plan(BaseModel):
    """A run's inputs and its expected cost for one suspected class; memory in MB, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    resolved: dict[str, str]
    classes: int
    images: int
    held_out: int
    skipped: int
    output: str
    seconds: dict[str, float]
    memory_mb: int

    def describe(self) -> str:
        """For people."""
        rows = [
            f"model: {self.architecture}",
            *(f"  {what}: {how}" for what, how in self.resolved.items()),
            f"data: {self.images} images of {self.classes} classes, {self.held_out} of them held out",
            f"would write: {self.output}",
            f"expected: {sum(self.seconds.values()) / 60:.1f} minutes, {self.memory_mb} MB",
            *(f"  {stage}: {seconds:.0f} s" for stage, seconds in self.seconds.items()),
        ]
        return "\n".join(rows) + "\n"


def plan(job: Job, out: Path, *, force: bool = False, progress: Progress = silent) -> Plan:
    """Check a job as `purify` would, time a few batches, and multiply; raises as `purify` does."""
    check_places(job, out, force)
    prepared = prepare(job, progress)
    data, settings = prepared.data, job.settings
    kept, held = split(data.labels, settings.tuning.held_out, job.seed)
    costs = _measure(prepared)
    return Plan(
        architecture=prepared.suspect.record.architecture,
        resolved=prepared.suspect.record.resolved,
        classes=len(data.classes),
        images=len(data.labels),
        held_out=len(held),
        skipped=len(prepared.skipped),
        output=str(out),
        seconds=_expected(prepared, len(kept), len(held), costs, inverted=job.reuse is None),
        memory_mb=_memory_mb(prepared),
    )


def _measure(prepared: Prepared) -> tuple[float, float, float]:
    """Seconds per image forward, per image forward and backward, and per step of prompt tuning."""
    clip, data, settings = prepared.suspect.clip, prepared.data, prepared.job.settings
    few = data.images[torch.linspace(0, len(data.images) - 1, min(len(data.images), 128)).long()]
    features, forward = _timed(lambda: encode(clip, few))
    check_accuracy(prepared.original, encode(clip, data.images), data)
    batch = settings.inversion.agnostic_batch
    brief = settings.inversion.model_copy(update={"agnostic_steps": 2})
    clean = CleanSet(few, features, torch.zeros(len(few), dtype=torch.long))
    subject = Subject(clip, clean, prepared.original, brief)
    _, backward = _timed(lambda: invert_agnostic(subject, generator(0, "plan"), silent))
    prompts = ClassPrompts(clip, list(data.classes), prepared.job.template, data.labels.unique(), settings.tuning.chunk)
    _, text = _timed(lambda: prompts.backward(torch.zeros_like(prompts.rows())))
    return forward / len(few), backward / (2 * batch), text


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The second of two runs: the first pays for warming up."""
    work()
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _expected(
    prepared: Prepared, kept: int, held: int, costs: tuple[float, float, float], *, inverted: bool
) -> dict[str, float]:
    """Seconds by stage where no class stands out at once, so that masks are compared, and no narrow trigger hints."""
    settings, classes, size = prepared.job.settings, len(prepared.data.classes), prepared.suspect.clip.image_size
    forward, backward, text = costs
    stage1, stage2 = settings.inversion, settings.tuning
    steps = stage2.epochs * math.ceil(kept / stage2.batch)
    masked, patience = stage1.masked_steps * stage1.batch * backward, min(PATIENCE, stage1.additive_steps // 2)
    agnostic = (1.5 + NARROW_STEPS * len(NARROW)) * stage1.agnostic_steps * stage1.agnostic_batch
    inversion = (
        (agnostic + _scanned(stage1, classes)) * backward
        + (heard_images(size, stage1) + tried_images(size, classes)) * forward
        + (1 + stage1.scanned + 1 + stage1.references) * masked
        + stage1.additive_steps * stage1.batch * backward
        + len(NARROW) * patience * stage1.batch * backward
    )
    return {
        "features": (kept + held) * forward,
        "stage 1: inversion": inversion if inverted else 0.0,
        "features under found triggers": _TRIGGERS * (kept + held) * forward,
        "stage 2: prompts": steps * text,
        "verdict": 2 * masked + 2 * (held or kept) * forward,
    }


def _scanned(settings: InversionSettings, classes: int) -> int:
    """Images that the scan of every class looks at, in both heats; fainter patterns may be tried beside these."""
    first, finalists = scan_images(classes, settings), min(settings.finalists, classes)
    second = max(first, settings.batch // 2)
    return classes * first * (settings.scan_steps + 1) + finalists * second * (2 * settings.scan_steps + 1)


def _memory_mb(prepared: Prepared) -> int:
    """The peak so far, which includes a step of inversion, and the features still to come."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    width = prepared.original.rows.shape[1]
    features = 4 * (2 + _TRIGGERS) * len(prepared.data.labels) * width
    return math.ceil((peak + features) / 2**20)
