"""Steps in processes of their own: what they answer, in which order they begin, and what is left when one fails."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing import resource_tracker
from multiprocessing.popen_spawn_posix import Popen
from pathlib import Path
from typing import Any

import pytest

from cbpt_guard.bench.processes import Piece, side_by_side
from cbpt_guard.errors import InputError, SetupError


def results(*pieces: Piece, jobs: int = 1) -> list[Any]:
    return [result for _, result in side_by_side(pieces, jobs=jobs)]


def test_a_process_hands_over_its_result_and_its_errors() -> None:
    assert results(Piece("one", _double, (21,))) == [42]
    with pytest.raises(InputError, match="no such luck"):
        results(Piece("one", _refuse, ()))
    with pytest.raises(SetupError, match="ended with 7"):
        results(Piece("one", os._exit, (7,)))
    with pytest.raises(SetupError, match=r"measuring failed: .*No space left"):
        results(Piece("one", _fill, ()))


def test_a_process_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("multiprocessing.popen_spawn_posix.Popen._launch", full)
    with pytest.raises(SetupError, match="no process of the suite could be started: Resource temporarily"):
        results(Piece("one", _double, (21,)))


def test_a_killed_suite_leaves_no_process_behind() -> None:
    code = "import time; from cbpt_guard.bench.processes import Piece, side_by_side as s; "
    code += "list(s([Piece('sleep', time.sleep, (100,))]))"
    suite = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    end, child = time.monotonic() + 60, ""
    while not child and time.monotonic() < end:
        time.sleep(0.02)
        children = Path(f"/proc/{suite.pid}/task/{suite.pid}/children").read_text().split()
        child = next((pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()), "")
    time.sleep(2)  # it has begun to sleep
    suite.kill()
    suite.wait()
    end = time.monotonic() + 5
    while (alive := _lives(child)) and time.monotonic() < end:
        time.sleep(0.02)
    assert child
    assert not alive


def _lives(pid: str) -> bool:
    """Whether a process runs: one that has ended may wait for whoever asks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_has_answered_may_tidy_up(tmp_path: Path) -> None:
    """Ended too soon it leaves semaphores behind, of which python complains to the user."""
    assert results(Piece("one", _untidy, (tmp_path / "tidy",))) == [1]
    assert (tmp_path / "tidy").exists()


def _untidy(path: Path) -> int:
    atexit.register(path.touch)
    atexit.register(time.sleep, 0.5)  # called first
    return 1


def _fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _double(number: int) -> int:
    return 2 * number


def _refuse() -> None:
    raise InputError("no such luck")


def span(begun: Path, seconds: float) -> tuple[float, float]:
    """When it began and ended, on the clock that all processes share."""
    began = time.monotonic()
    begun.write_text(str(os.getpid()))
    time.sleep(seconds)
    return began, time.monotonic()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_starts_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """It reaches this process right after the start, when the new one is known."""
    launch, begun = Popen._launch, []

    def struck(self: Popen, process: object) -> None:
        launch(self, process)
        begun.append(self.pid)
        signal.raise_signal(number)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    getattr(resource_tracker, "_resource_tracker")._stop()  # noqa: B009  starting it anew lets Ctrl-C in
    monkeypatch.setattr(Popen, "_launch", struck)
    before = signal.signal(number, end)
    try:
        with pytest.raises(KeyboardInterrupt):
            results(Piece("slow", span, (tmp_path / "slow", 100)))
    finally:
        signal.signal(number, before)
    assert [_lives(str(pid)) for pid in begun] == [False]


def test_all_that_run_are_told_to_end_before_the_first_is_waited_for(tmp_path: Path) -> None:
    """Each takes two seconds to tidy up, which they do together."""
    slow = [Piece(name, _slow_to_end, (tmp_path / name,)) for name in "ab"]
    with closing(side_by_side([*slow, Piece("c", _wait_for, (tmp_path / "a", tmp_path / "b"))], jobs=3)) as found:
        next(found)
        began = time.monotonic()
    assert time.monotonic() - began < 3.5
    assert not any(_lives((tmp_path / name).read_text()) for name in "ab")


def test_what_ended_beside_a_failing_step_is_not_lost(tmp_path: Path) -> None:
    go, refused = tmp_path / "go", tmp_path / "refused"
    steps = [
        Piece("first", span, (tmp_path / "first", 0)),
        Piece("refused", _refuse_when, (go, refused)),
        Piece("good", _wait_for, (go, refused)),
    ]
    found = side_by_side(steps, jobs=3)
    assert next(found)[0].name == "first"
    go.write_text("now")
    _wait_for(refused)
    time.sleep(1)  # both have answered
    assert next(found)[0].name == "good"
    with pytest.raises(InputError, match="no such luck"):
        next(found)


def test_no_jobs_are_refused() -> None:
    with pytest.raises(ValueError, match="0 jobs"):
        results(Piece("one", _double, (21,)), jobs=0)


def test_a_step_begins_when_what_it_needs_has_ended_and_no_more_run_than_jobs(tmp_path: Path) -> None:
    """`b` and `d` need `a`; `c` stands between them and needs nothing, so with two jobs it begins beside `a`."""
    needs = {"a": "", "b": "a", "c": "", "d": "a"}
    steps = [Piece(name, span, (tmp_path / name, 0.5), frozenset(before), name) for name, before in needs.items()]
    said: list[str] = []
    found = {step.name: result for step, result in side_by_side(steps, jobs=2, report=said.append)}
    assert said == ["a", "c", "b", "d"]
    assert all(found[before][1] <= found[name][0] for name, before in needs.items() if before)
    overlaps = [sum(start <= moment < end for start, end in found.values()) for moment, _ in found.values()]
    assert max(overlaps) == 2, "two at once, and never three"
    said.clear()
    assert [step.name for step, _ in side_by_side(steps, report=said.append)] == said == ["a", "b", "c", "d"]


def test_a_step_that_fails_ends_those_beside_it(tmp_path: Path) -> None:
    slow, refused = Piece("slow", span, (tmp_path / "slow", 100)), Piece("refused", _refuse_when, (tmp_path / "slow",))
    began = time.monotonic()
    with pytest.raises(InputError, match="no such luck"):
        results(slow, refused, Piece("later", span, (tmp_path / "later", 0)), jobs=2)
    assert time.monotonic() - began < 60
    assert not _lives((tmp_path / "slow").read_text())
    assert not (tmp_path / "later").exists()


def test_whoever_stops_taking_results_ends_what_runs(tmp_path: Path) -> None:
    slow, quick = Piece("slow", span, (tmp_path / "slow", 100)), Piece("quick", _wait_for, (tmp_path / "slow",))
    with closing(side_by_side([slow, quick], jobs=2)) as found:
        assert next(found) == (quick, None)
        assert _lives((tmp_path / "slow").read_text())
    assert not _lives((tmp_path / "slow").read_text())


def _wait_for(*paths: Path) -> None:
    while not all(path.exists() and path.read_text() for path in paths):
        time.sleep(0.02)


def _slow_to_end(path: Path) -> None:
    path.write_text(str(os.getpid()))
    try:
        time.sleep(100)
    finally:
        time.sleep(2)


def _refuse_when(path: Path, then: Path | None = None) -> None:
    _wait_for(path)
    if then is not None:
        then.write_text("now")
    _refuse()
