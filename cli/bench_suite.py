"""`cbpt-guard bench run`, `table` and `plot`: a plan in, lines of evidence out, Markdown and a picture of them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_guard.cli import options
from cbpt_guard.cli.bench_implant import implant
from cbpt_guard.cli.machine import prepare_torch, threads_of_each
from cbpt_guard.cli.show import note

if TYPE_CHECKING:
    from cbpt_guard.bench.lines import Line
    from cbpt_guard.bench.plan import Group, Plan

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The evidence: run a plan, print and draw its lines."
)
app.command("implant")(implant)
_Files = Annotated[list[Path], typer.Argument(help="Files of lines, in their order.")]


@app.command("run")
def run(
    plan: Annotated[Path, typer.Option(help="What is measured: a TOML file.")],
    out: Annotated[Path, typer.Option(help="The lines; what they hold already is not measured again.")],
    work: Annotated[Path, typer.Option(help="Where implants, features and runs are kept.")],
    root: Annotated[list[Path] | None, typer.Option(help="Where the plan's paths are sought; may be repeated.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: only that part; no suspect is in two.")] = "1/1",
    only: Annotated[list[str] | None, typer.Option(help="A suspect, as --dry-run names it; may be repeated.")] = None,
    defense: Annotated[list[str] | None, typer.Option(help="Only this defence; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be repeated.")] = None,
    final: Annotated[bool, typer.Option("--final", help="Count on the test images; each such read is logged.")] = False,
    device: options.Device = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch, of each job; an equal part of the cores where several.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that measure side by side.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, and its hours.")] = False,
) -> None:
    """Measure every attack x defence x seed of a plan that the lines lack, a process each; go on where it stopped.

    With several jobs lines come in the order in which cells end.
    """
    from cbpt_guard.bench.plan import Places, Plan, Split
    from cbpt_guard.bench.suite import missing, picked, run_suite

    read = Plan.read(plan)
    number, of = _shard(shard)
    split: Split = "test" if final else "clean"
    groups = picked(read.shard(number, of), suspects=only or (), defenses=defense or (), seeds=seed or ())
    if dry_run:
        sys.stdout.write(_priced(read, missing(read, groups, out, split)))
        return
    places = Places(tuple(root or [Path()]), work)
    start = partial(prepare_torch, threads or threads_of_each(jobs))
    try:
        added = run_suite(
            read, places, out, groups=groups, split=split, device=device, jobs=jobs, start=start, report=note
        )
    except BaseException as error:
        error.add_note("`bench run` goes on where it was")
        raise
    note(f"{added} lines added")
    sys.stdout.write(f"{out}\n")


@app.command("table")
def table(files: _Files) -> None:
    """Print the lines as Markdown: mean and spread over seeds, cells that CBPT loses, sanity checks, cost."""
    from cbpt_guard.bench.table import table as drawn

    sys.stdout.write(drawn(_lines(files)) + "\n")


@app.command("plot")
def plot(files: _Files, out: Annotated[Path, typer.Option(help="The picture, an SVG.")] = Path("evidence.svg")) -> None:
    """Draw CA against ASR, a point for each attack and defence (needs the bench extra)."""
    from cbpt_guard.bench.plot import plot as draw

    sys.stdout.write(f"{draw(_lines(files), out)}\n")


def _lines(files: list[Path]) -> list[Line]:
    from cbpt_guard.bench.lines import read_together
    from cbpt_guard.bench.suite import PLANTINGS, READS
    from cbpt_guard.errors import InputError

    for path in files:
        if not path.is_file():
            raise InputError(f"{path} does not exist; `cbpt-guard bench run` makes it")
    # the logs beside lines hold none: whoever passes `*.jsonl` means the others
    return read_together(path for path in files if path.name not in (READS, PLANTINGS))


def _shard(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise typer.BadParameter(f"{text!r} is no part of a whole, such as 1/8", param_hint="--shard")
    return int(number), int(of)


def _priced(plan: Plan, groups: list[Group]) -> str:
    """One line for each suspect, and the sum."""
    units: dict[str, list[Group]] = {}
    for group in groups:
        units.setdefault(group.unit, []).append(group)
    rows = [f"{plan.hours(part):.2f} h\t{unit}\t{len(part)} defences\n" for unit, part in units.items()]
    return (
        "".join(rows)
        + f"{plan.hours(groups):.2f} h\tin all, expected on two cores with --jobs 2\t{len(groups)} defences\n"
    )
