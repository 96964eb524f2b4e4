"""The suite: every group of a plan that has no lines yet is measured in a process of its own, line after line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cbpt_guard.bench.lines import Line, append_record, appending, read_lines, read_together
from cbpt_guard.bench.plan import Group, Places, Plan, Split
from cbpt_guard.bench.processes import Piece, Report, nothing, side_by_side, silent
from cbpt_guard.bench.settings import ABLATIONS, INDEPENDENT, TRUE_TRIGGER
from cbpt_guard.bench.table import OURS, PAPER
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.errors import InputError

READS, PLANTINGS = "test-reads.jsonl", "plantings.jsonl"
Asked = TypeVar("Asked", str, int)


def run_suite(
    plan: Plan,
    places: Places,
    out: Path,
    *,
    groups: Sequence[Group] | None = None,
    split: Split = "clean",
    device: str = "cpu",
    jobs: int = 1,
    start: Callable[[], None] = nothing,
    report: Report = silent,
) -> int:
    """Measure what `out` lacks, and append it line by line; returns how many lines were added.

    Args:
        plan: what is to be measured.
        places: where its paths and the cache lie.
        out: the lines; an interrupted suite goes on where it was.
        groups: what of the plan to measure, such as `picked(plan.shard(1, 8), defenses=["cbpt"])`; None means all.
            How each suspect was planted, and what it did, is kept in `plantings.jsonl` beside it.
        split: `test` reads the test images, and logs it in `test-reads.jsonl` beside `out`.
        device: where torch computes.
        jobs: how many processes measure side by side; both rules of CBPT, and defences of one's own, follow one another
            where suspect and shots are the same, since they may share a run.
        start: called first in every process that measures, such as to set its threads; it must be picklable.
        report: is told, in words, what is done next.

    Raises:
        CbptGuardError: as the defence or the counting raises it.
        SetupError: a process died, or another command appends to `out`.
    """
    once = plan.groups() if groups is None else list(dict.fromkeys(groups))  # one asked for twice would wait for itself
    asked = missing(plan, once, out, split)
    pieces = _pieces(plan, asked, places, split, device)
    added = 0
    with appending(out) as append:
        if split == "test" and asked:
            log_read(out.with_name(READS), plan)
        with closing(side_by_side(pieces, jobs=jobs, start=start, report=report)) as results:
            for piece, result in results:
                if piece.work is _measure:
                    append(result)
                    added += len(result)
                elif result is not None:
                    append_record(out.with_name(PLANTINGS), result)
    return added


def picked(
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
    """The groups of which `out` lacks a line, or has it from other settings or another version of CBPT's search."""
    done = {(line.key, line.settings) for line in read_lines(out) if of_this_search(line)}
    asked = {group: {(key, plan.settings(key)) for key in plan.keys(group, split)} for group in groups}
    return [group for group in groups if not asked[group] <= done and (split == "test" or not group.final_only)]


def of_this_search(line: Line) -> bool:
    """Whether today's search found the triggers that a line's defence answers from, if it needs any."""
    ablated = line.defense.startswith(ABLATIONS) and line.defense != TRUE_TRIGGER
    searched = line.defense in (OURS, PAPER) or ablated
    return line.search == SEARCH or (line.search is None and not searched)


def log_read(path: Path, plan: Plan) -> None:
    """Write down that the test images are read now, and by which plan."""
    record = {"when": datetime.now(UTC).isoformat(timespec="microseconds"), "split": "test", "plan": plan.digest}
    append_record(path, record)


def lines_in(folder: Path) -> list[Line]:
    """The lines of all files of lines in a folder, file after file by name; `InputError` as `read_together` has it."""
    return read_together(path for path in sorted(folder.glob("*.jsonl")) if path.name not in (READS, PLANTINGS))


def _pieces(plan: Plan, groups: Sequence[Group], places: Places, split: Split, device: str) -> list[Piece]:
    """Every group after what it needs: its implants, or their triggers, and, where defences of the same suspect and
    shots may share a run, the one before it. Ablations read the run that the first of them made, and nobody waits for
    them.
    """
    planted = {name for group in groups if not group.control for name in group.implants}
    pieces: dict[object, Piece] = {}
    sharing: dict[object, list[Group]] = {}
    for number, group in enumerate(groups, 1):
        needs: set[object] = set()
        for name in group.implants:
            make = _plant if name in planted else _triggers
            pieces.setdefault((make, name), Piece((make, name), make, (plan, name, places, device)))
            needs.add((make, name))
        if group.defense not in INDEPENDENT:
            before = sharing.setdefault((group.unit, group.seed, group.shots), [])
            reads = group.defense.startswith(ABLATIONS)
            needs.update(before[:1] if reads else before[-1:])
            if not (reads and before):
                before.append(group)
        what = f"{group.defense} on {group.unit}, seed {group.seed}, {group.shots} shots"
        arguments = (plan, group, places, split, device)
        pieces[group] = Piece(group, _measure, arguments, frozenset(needs), f"{number} of {len(groups)}: {what}")
    return list(pieces.values())


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
