"""scan: is a suspect poisoned, toward which classes, how sure; the look that `purify` begins with, and no more."""

from __future__ import annotations

import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cbpt_guard.defense.calibration import Standing, calibration
from cbpt_guard.defense.data import split
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.job import Job, Prepared, prepare, tool_versions
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.record import Candidate, ModelRecord
from cbpt_guard.defense.search import searching
from cbpt_guard.defense.verdict import check_accuracy

_LIKELIEST = 10


class ScanReport(BaseModel):
    """What a scan found.

    `candidates` are those of `purify` with the same images, settings and seed. `score` is the largest of theirs.
    `likeliest` ranks classes: the candidates, then the others as readily as additive triggers reach them.
    `standing` counts the calibration models beside it; where it is None, `uncalibrated` says why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    cbpt_guard: str
    created: str
    seed: int
    template: str
    settings: dict[str, Any]
    model: ModelRecord
    classes: int
    images: int
    skipped: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    likeliest: tuple[str, ...]
    score: float
    standing: Standing | None
    uncalibrated: str | None
    warnings: tuple[str, ...]
    seconds: float
    versions: dict[str, str]

    @property
    def suspects(self) -> tuple[str, ...]:
        """Classes that stand out as targets; none of them means that nothing was found, not that nothing is there."""
        return tuple(candidate.label for candidate in self.candidates if candidate.stands_out)


def scan(job: Job, progress: Progress = silent) -> ScanReport:
    """Look for targets in a suspect; nothing is written.

    Args:
        job: as for `purify`; observed attack images and earlier runs have no part in it.
        progress: called after every step.

    Raises:
        UnsafeError: the checkpoint would run code.
        InputError: an input is missing, malformed or does not fit the others.
        SetupError: the temporary folder cannot be written.
    """
    started = time.monotonic()
    prepared = prepare(job, progress)
    data = prepared.data
    features = encode(prepared.suspect.clip, data.images, progress=progress)
    warnings = check_accuracy(prepared.original, features, data)
    kept, _ = split(data.labels, job.settings.tuning.held_out, job.seed)
    with tempfile.TemporaryDirectory(prefix="cbpt-guard-") as folder:
        search = searching(prepared, features, kept, Journal(Path(folder), prepared.key()), progress)
        candidates = search.look()
        ranking = search.ranking(candidates)
    score = max(candidate.score for candidate in candidates)
    standing = _standing(prepared, score)
    return ScanReport(
        cbpt_guard=version("cbpt-guard"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=job.seed,
        template=job.template,
        settings=job.settings.inversion.model_dump(mode="json"),
        model=prepared.suspect.record,
        classes=len(data.classes),
        images=len(data.labels),
        skipped=prepared.skipped,
        candidates=candidates,
        likeliest=tuple(data.classes[index] for index in ranking[:_LIKELIEST]),
        score=score,
        standing=None if isinstance(standing, str) else standing,
        uncalibrated=standing if isinstance(standing, str) else None,
        warnings=warnings,
        seconds=round(time.monotonic() - started, 1),
        versions=tool_versions(),
    )


def _standing(prepared: Prepared, score: float) -> Standing | str:
    counts = prepared.data.labels.bincount(minlength=len(prepared.data.classes))
    fewest = int(counts[counts > 0].min())
    config, settings = prepared.suspect.record.config, prepared.job.settings.inversion
    return calibration().standing(score, config, settings, len(counts), fewest)
