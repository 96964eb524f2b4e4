"""How the runtime's measurements are taken: interleaved runs, medians of ratios, and nobody else at the processor."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

Work = Callable[[], object]
_MOMENT = 0.01  # seconds


class Watch:
    """How many cores other processes took on average, from its making on."""

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.monotonic(), _busy_seconds(), own_seconds()

    def others(self) -> float:
        """Cores, 0.0 on a machine of one's own. Children count as one's own once they have ended."""
        taken = (_busy_seconds() - self._busy) - (own_seconds() - self._own)
        return max(0.0, taken / (time.monotonic() - self._started))


def _busy_seconds() -> float:
    """What all processors together have computed since the machine started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = (int(part) for part in file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process, its threads and the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def interleaved(ours: Work, theirs: Work, rounds: int) -> dict[str, Any]:
    """The median ratio of `ours` over `theirs`, run in turns, and the medians in milliseconds."""
    times: dict[Work, list[float]] = {ours: [], theirs: []}
    ours(), theirs()
    for number in range(rounds):
        for work in (ours, theirs) if number % 2 else (theirs, ours):
            _settle()
            started = time.perf_counter()
            work()
            times[work].append(1000 * (time.perf_counter() - started))
    ratios = [mine / other for mine, other in zip(times[ours], times[theirs], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ours_ms": round(statistics.median(times[ours]), 3),
        "theirs_ms": round(statistics.median(times[theirs]), 3),
        "rounds": rounds,
    }


def _settle() -> None:
    """Wait until this process rests: a session's threads spin for 40 ms after a run, and the other must not pay."""
    spent = 1.0
    while spent > _MOMENT / 10:
        before = time.process_time()
        time.sleep(_MOMENT)
        spent = time.process_time() - before


def processor_ms(work: Work) -> float:
    """Milliseconds of processor time, all threads together, the median of three."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        work()
        taken.append(1000 * (time.process_time() - started))
    return statistics.median(taken)


def fresh(code: str, *arguments: object) -> float:
    """The number that Python code prints in a process of its own; `sys.argv[1:]` are the arguments."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def in_turns(ours: str, theirs: str, arguments: tuple[object, ...], rounds: int, unit: str) -> dict[str, Any]:
    """As `interleaved`, for two programs that print what they measured of themselves."""
    pairs = [(fresh(ours, *arguments), fresh(theirs, *arguments)) for _ in range(rounds)]
    return {
        "ratio": round(statistics.median(mine / other for mine, other in pairs), 4),
        f"ours_{unit}": round(statistics.median(pair[0] for pair in pairs), 3),
        f"theirs_{unit}": round(statistics.median(pair[1] for pair in pairs), 3),
        "rounds": rounds,
    }
