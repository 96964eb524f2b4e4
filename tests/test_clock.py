"""What a defence is said to take: its own work, and what another one left for it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cbpt_guard.bench.clock import Clock, Cost

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


def test_two_that_ask_at_once_make_it_once_and_waiting_costs_nothing(tmp_path: Path) -> None:
    path, made = tmp_path / "shared", threading.Event()

    def make() -> None:
        made.set()
        time.sleep(2 * SLOW)
        path.write_text("made")

    def second() -> Cost:
        made.wait()
        clock = Clock()
        clock.once(path, lambda: pytest.fail("it is being made"))
        return clock.read()

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(second)
        Clock().once(path, make)
        cost = found.result()
    assert 2 * SLOW <= cost.seconds < 3 * SLOW, "what it took, and not the wait for it"


def test_the_larger_peak_counts(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("made")
    huge = Cost(seconds=1, cpu_seconds=1, peak_mb=10**9)
    (tmp_path / "run-cost.json").write_text(huge.model_dump_json())
    clock = Clock()
    clock.once(path, lambda: pytest.fail("it is there already"))
    assert clock.read().peak_mb == 10**9


def test_what_a_crash_left_without_its_cost_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "half").write_text("made")
    clock = Clock()
    clock.once(path, lambda: slowly(path))
    assert path.read_text() == "made"
    assert clock.read().cpu_seconds >= SLOW


def test_what_is_asked_for_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    for _ in range(2):
        clock = Clock()
        for _ in range(2):
            clock.once(path, lambda: slowly(path))
        assert SLOW <= clock.read().cpu_seconds < 2 * SLOW


def test_what_failed_leaves_no_cost(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Clock().once(tmp_path / "run", lambda: 1 // 0)
    assert list(tmp_path.iterdir()) == []
