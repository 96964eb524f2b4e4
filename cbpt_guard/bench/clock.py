"""What a defence took. What defences of one task make once and share counts for each that uses it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from cbpt_guard.files import in_turn, remove, write_text


class Cost(BaseModel):
    """Wall and processor seconds, and the process's peak memory in MiB."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    cpu_seconds: float
    peak_mb: int


class _Moment(NamedTuple):
    wall: float
    processor: float

    @classmethod
    def now(cls) -> _Moment:
        """Processor seconds are this process's and its finished children's, on all cores."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used))


class Clock:
    """Runs from when it is made. Peak memory is the process's: measure one defence in each, and nothing before it."""

    def __init__(self) -> None:
        self._started = _Moment.now()
        self._shared: list[Cost] = []
        self._counted: set[Path] = set()

    def once(self, path: Path, make: Callable[[], object]) -> None:
        """Have `path` made if nobody has yet; its cost is kept beside it, and is added where it was there already.

        What lies there without its cost was left by a crash between the two, and is made anew. `make` calls no `once`
        itself: whoever finds `path` later would not pay for what that found. Waiting for another process that makes it
        costs nothing. The peak is that of whoever makes it, up to then: ask before anything that needs more memory.
        """
        if path in self._counted:
            return
        cost = path.with_name(f"{path.name}-cost.json")
        asked = time.perf_counter()
        with in_turn(path):
            waited = time.perf_counter() - asked
            self._started = self._started._replace(wall=self._started.wall + waited)
            if path.exists() and cost.exists():
                self._shared.append(Cost.model_validate_json(cost.read_bytes()))
            else:
                remove(path)
                started = _Moment.now()
                make()
                write_text(cost, _since(started).model_dump_json())
        self._counted.add(path)

    def read(self) -> Cost:
        """What has been used so far."""
        own = _since(self._started)
        return Cost(
            seconds=round(own.seconds + sum(one.seconds for one in self._shared), 2),
            cpu_seconds=round(own.cpu_seconds + sum(one.cpu_seconds for one in self._shared), 2),
            peak_mb=max(one.peak_mb for one in (own, *self._shared)),
        )


def _since(started: _Moment) -> Cost:
    now, peak = _Moment.now(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Cost(seconds=now.wall - started.wall, cpu_seconds=now.processor - started.processor, peak_mb=peak)
