"""scan: is a suspect poisoned, toward which classes, how sure; the look that `purify` begins with, and no more."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cbpt_guard import __version__
from cbpt_guard.defense.accuracy import check_accuracy
from cbpt_guard.defense.calibration import Looked, Standing, calibration
from cbpt_guard.defense.data import split
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.job import Job, prepare, tool_versions
from cbpt_guard.defense.journal import Scratch
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.record import Candidate, ModelRecord
from cbpt_guard.defense.search import searching

_LIKELIEST = 10


class ScanReport(BaseModel):
    """What a scan found.

    `candidates` are those of `purify` with the same images, settings and seed, but for areas that nothing hung on.
    `score` is the largest of theirs. `likeliest` ranks classes: the candidates, then the others as readily as additive
    triggers reach them. `images` were looked at, of which the class with fewest and the one with most had
    `images_of_a_class`. `standing` counts the calibration models beside the score; where it is None, `uncalibrated`
    says why.
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
    images_of_a_class: tuple[int, int]
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
    """Look for targets in a suspect; nothing is kept but the report.

    Args:
        job: as for `purify`; observed attack images and earlier runs have no part in it.
        progress: called after every step.

    Raises:
        UnsafeError: the checkpoint would run code.
        InputError: an input is missing, malformed or does not fit the others.
        SetupError: there is no room for the temporary copy of the checkpoint.
    """
    started = time.monotonic()
    prepared = prepare(job, progress)
    data = prepared.data
    features = encode(prepared.suspect.clip, data.images, progress=progress)
    warnings = check_accuracy(prepared.original, features, data)
    kept, _ = split(data.labels, job.settings.tuning.held_out, job.seed)
    search = searching(prepared, features, kept, Scratch(), progress)
    candidates = search.look()
    ranking = search.ranking(candidates)
    counts = data.labels[kept].bincount(minlength=len(data.classes))
    span = (int(counts.min()), int(counts.max()))
    score = max(candidate.score for candidate in candidates)
    looked = Looked(
        config=prepared.suspect.record.config,
        settings=job.settings.inversion,
        template=job.template,
        classes=len(data.classes),
        images=span,
    )
    standing = calibration().standing(score, looked)
    return ScanReport(
        cbpt_guard=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=job.seed,
        template=job.template,
        settings=job.settings.model_dump(mode="json", include={"inversion": True, "tuning": {"held_out"}}),
        model=prepared.suspect.record,
        classes=len(data.classes),
        images=len(kept),
        images_of_a_class=span,
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
