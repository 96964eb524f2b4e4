"""`cbpt-guard demo`: the whole road on a small CLIP that is trained and poisoned on the spot."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cbpt_guard.cli.show import live, note, percent, table


def demo(
    out: Annotated[Path, typer.Option(help="Where every file of the demo goes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; the small CLIP gains nothing from more.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report on stdout as JSON.")] = False,
) -> None:
    """Poison a small CLIP of digits, purify it, export it, serve it, and count; offline, a few minutes."""
    from cbpt_guard.bench.demo import OURS, run_demo
    from cbpt_guard.cli.machine import prepare_torch
    from cbpt_guard.cli.purify import show_run
    from cbpt_guard.defense.run import PurifyRun
    from cbpt_guard.files import check_output

    prepare_torch(threads)
    check_output(out, force, OURS)  # before anything is announced
    started = time.monotonic()
    note("training a small CLIP on scikit-learn's digits, poisoning it, purifying it (a few minutes) ...")
    with live() as progress:
        report = run_demo(out, seed=seed, force=force, progress=progress)
    show_run(PurifyRun.open(out / "purified"))
    rows = [
        (name, percent(counts.ca), percent(counts.asr), percent(counts.pa))
        for name, counts in (("undefended", report.undefended), ("guarded", report.guarded))
    ]
    title = f"{report.images} test digits, {report.trigger}, target {report.target!r}; through the bundle, in %"
    table(title, ("classifier", "CA", "ASR", "PA"), rows)
    note(f"bundle: {report.bundle}   picture: {report.picture}   {time.monotonic() - started:.0f} s")
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=1) + "\n")
    else:
        for name, ca, asr, pa in rows:
            sys.stdout.write(f"{name}\tCA {ca} %\tASR {asr} %\tPA {pa} %\n")
    for failure in report.failures:
        note(failure)
    raise typer.Exit(1 if report.failures else 0)
