"""What a defence is said to take: its own work, and what another one left for it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cbpt_guard.bench.clock import Clock, Cost
from cbpt_guard.errors import CheckError

SLOW = 0.2


def busy(seconds: float = SLOW) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def slowly(path: Path) -> None:
    busy()
    path.write_text("made")


def test_own_work_counts_on_the_clock_and_for_the_processor() -> None:
    clock = Clock()
    busy()
    time.sleep(SLOW)
    cost = clock.read()
    assert cost.seconds >= 2 * SLOW
    assert SLOW <= cost.cpu_seconds < cost.seconds
    assert cost.peak_mb > 0


def test_what_is_shared_is_made_once_and_counts_for_each(tmp_path: Path) -> None:
    path, first, second = tmp_path / "shared", Clock(), Clock()
    first.once(path, lambda: slowly(path))
    second.once(path, lambda: pytest.fail("it is there already"))
    for cost in (first.read(), second.read()):
        assert cost.cpu_seconds >= SLOW
        assert cost.seconds >= SLOW


def test_the_larger_peak_counts(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("made")
    huge = Cost(seconds=1, cpu_seconds=1, peak_mb=10**9)
    (tmp_path / "run-cost.json").write_text(huge.model_dump_json())
    clock = Clock()
    clock.once(path, lambda: pytest.fail("it is there already"))
    assert clock.read().peak_mb == 10**9


def test_what_has_no_cost_beside_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("made")
    with pytest.raises(CheckError, match="run-cost"):
        Clock().once(tmp_path / "run", lambda: None)


def test_what_failed_leaves_no_cost(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Clock().once(tmp_path / "run", lambda: 1 // 0)
    assert list(tmp_path.iterdir()) == []
