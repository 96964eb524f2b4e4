"""The suite: every group of a plan that has no lines yet is measured in a process of its own, line after line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from cbpt_guard.bench.lines import Line, append_record, appending, read_lines, read_together
from cbpt_guard.bench.plan import Group, Places, Plan, Split
from cbpt_guard.errors import CbptGuardError, InputError, SetupError

READS, PLANTINGS = "test-reads.jsonl", "plantings.jsonl"
_PATIENCE = 10.0  # seconds for a process that was told to end
Result = TypeVar("Result")
Asked = TypeVar("Asked", str, int)
Report = Callable[[str], None]


def nothing() -> None:
    """Prepare nothing."""


def silent(message: str) -> None:
    """Report nothing."""


def run_suite(
    plan: Plan,
    places: Places,
    out: Path,
    *,
    groups: Sequence[Group] | None = None,
    split: Split = "clean",
    device: str = "cpu",
    start: Callable[[], None] = nothing,
    report: Report = silent,
) -> int:
    """Measure what `out` lacks, and append it line by line; returns how many lines were added.

    Args:
        plan: what is to be measured.
        places: where its paths and the cache lie.
        out: the lines; an interrupted suite goes on where it was.
        groups: what of the plan to measure, such as `chosen(plan.shard(1, 8), defenses=["cbpt"])`; None means all.
            How each suspect was planted, and what it did, is kept in `plantings.jsonl` beside it.
        split: `test` reads the test images, and logs it in `test-reads.jsonl` beside `out`.
        device: where torch computes.
        start: called first in every process that measures, such as to set its threads; it must be picklable.
        report: is told, in words, what is done next.

    Raises:
        CbptGuardError: as the defence or the counting raises it.
        SetupError: a process died, or another command appends to `out`.
    """
    asked = missing(plan, plan.groups() if groups is None else groups, out, split)
    added, ready = 0, set[tuple[str, bool]]()
    with appending(out) as append:
        if split == "test" and asked:
            log_read(out.with_name(READS), plan)
        for number, group in enumerate(asked, 1):
            for name in (name for name in group.implants if (name, group.control) not in ready):
                planting = alone(_triggers if group.control else _plant, (plan, name, places, device), start)
                if planting is not None:
                    append_record(out.with_name(PLANTINGS), planting)
                ready.add((name, group.control))
            what = f"{group.defense} on {group.unit}, seed {group.seed}, {group.shots} shots"
            report(f"{number} of {len(asked)}: {what}")
            lines = alone(_measure, (plan, group, places, split, device), start)
            append(lines)
            added += len(lines)
    return added


def chosen(
    groups: Sequence[Group], *, suspects: Sequence[str] = (), defenses: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Group]:
    """The groups of some suspects, defences and seeds; where none is named, of all. `InputError` for an unknown one."""
    units = _known("suspect", suspects, [group.unit for group in groups])
    names = _known("defence", defenses, [group.defense for group in groups])
    draws = _known("seed", seeds, [group.seed for group in groups])
    return [group for group in groups if group.unit in units and group.defense in names and group.seed in draws]


def _known(what: str, asked: Sequence[Asked], found: Sequence[Asked]) -> Sequence[Asked]:
    there = list(dict.fromkeys(found))
    for name in asked:
        if name not in there:
            raise InputError(f"{name!r} is no {what} of this plan or part; there are {', '.join(map(str, there))}")
    return asked or there


def missing(plan: Plan, groups: Sequence[Group], out: Path, split: Split) -> list[Group]:
    """The groups of which `out` lacks a line, or has it from other settings."""
    done = {(line.key, line.settings) for line in read_lines(out)}
    asked = {group: {(key, plan.settings(key)) for key in plan.keys(group, split)} for group in groups}
    return [group for group in groups if not asked[group] <= done and (split == "test" or not group.final_only)]


def log_read(path: Path, plan: Plan) -> None:
    """Write down that the test images are read now, and by which plan."""
    record = {"when": datetime.now(UTC).isoformat(timespec="microseconds"), "split": "test", "plan": plan.digest}
    append_record(path, record)


def lines_in(folder: Path) -> list[Line]:
    """The lines of all files of lines in a folder, file after file by name; `InputError` as `read_together` has it."""
    return read_together(path for path in sorted(folder.glob("*.jsonl")) if path.name not in (READS, PLANTINGS))


def alone(work: Callable[..., Result], arguments: tuple[object, ...], start: Callable[[], None]) -> Result:
    """The result of `work` in a fresh process, so that its peak memory is its own.

    Raises:
        CbptGuardError: as `work` raises it.
        SetupError: the process died.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answering, args=(theirs, work, arguments, start))
    try:
        with _deaf_to_ctrl_c():
            process.start()
    except OSError as error:
        raise SetupError(f"no process of the suite could be started: {error.strerror}") from error
    theirs.close()
    try:
        result: Result | CbptGuardError = ours.recv()
        process.join(_PATIENCE)  # it has answered, and tidies up
    except EOFError as error:
        process.join()
        raise SetupError(
            f"a process of the suite ended with {process.exitcode} before it answered; its messages stand above, "
            "and where there are none the system killed it, most likely for memory"
        ) from error
    finally:
        ours.close()
        process.terminate()  # does nothing to one that has ended
        process.join(_PATIENCE)
        process.kill()
        process.join()
    if isinstance(result, CbptGuardError):
        raise result
    return result


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Whatever starts meanwhile never sees Ctrl-C, which a terminal sends to all: this process ends it, in few words.

    Blocked, not ignored: a Ctrl-C that comes meanwhile reaches this process right afterwards.
    """
    resource_tracker.ensure_running()  # which unblocks Ctrl-C, and would do so between here and the start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answering(
    answer: Connection, work: Callable[..., object], arguments: tuple[object, ...], start: Callable[[], None]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _end)
    start()
    try:
        result = work(*arguments)
    except CbptGuardError as error:
        result = error
    except OSError as error:  # a full disk, a folder that was taken away
        result = SetupError(f"measuring failed: {error}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to tidy up
    answer.send(result)


def _end(*_: object) -> None:
    """An orderly end, once: temporary files and children go with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_with_parent() -> None:
    """A killed suite must not leave a process behind that goes on writing to its folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _plant(plan: Plan, name: str, places: Places, device: str) -> dict[str, Any] | None:
    from cbpt_guard.bench.suspects import plant  # here, so that the parent process loads no torch

    return plant(plan, name, places, device)


def _triggers(plan: Plan, name: str, places: Places, device: str) -> None:
    from cbpt_guard.bench.suspects import make_triggers

    make_triggers(plan, name, places, device)


def _measure(plan: Plan, group: Group, places: Places, split: Split, device: str) -> list[Line]:
    from cbpt_guard.bench.cell import measure
    from cbpt_guard.bench.suspects import provide

    return measure(provide(plan, group, places, split, device))
