"""`cbpt-guard scan`: is a suspect poisoned, toward which classes, how sure."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_guard.cli import options
from cbpt_guard.cli.findings import show_candidates, show_model
from cbpt_guard.cli.show import live, note, one_line

if TYPE_CHECKING:
    from cbpt_guard.defense.scan import ScanReport


def scan(
    model: options.Model,
    data: options.Data,
    classes: options.Classes = None,
    template: options.Template = options.TEMPLATE,
    shots: options.Shots = None,
    settings: options.SettingsFile = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    skip_bad: options.SkipBad = False,
    arch: options.Arch = None,
    quickgelu: options.QuickGelu = None,
    preprocess: options.Preprocess = None,
    tokenizer: options.Tokenizer = None,
    fail_on: Annotated[float | None, typer.Option(help="Exit with 1 if the score is at least this.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report on stdout.")] = False,
) -> None:
    """Scan a suspect for targets of a backdoor; nothing is kept but what is printed.

    That nothing stands out does not make a model clean; `purify` with the same inputs would then end unverified. Exit
    code 0 whatever is found, 1 from the score of `--fail-on`, 2: bad input, 3: unsafe input.
    """
    from cbpt_guard.cli.machine import prepare_torch
    from cbpt_guard.defense.job import Job
    from cbpt_guard.defense.scan import scan as scanned
    from cbpt_guard.defense.settings import Settings
    from cbpt_guard.defense.suspect import ModelFlags

    if fail_on is not None and not 0 <= fail_on < math.inf:  # not a number is neither
        raise typer.BadParameter(f"{fail_on} is no score", param_hint="--fail-on")
    prepare_torch(threads)
    job = Job(
        model=model,
        data=data,
        classes=classes,
        template=template,
        shots=shots,
        settings=Settings.read(settings) if settings else Settings(),
        seed=seed,
        device=device,
        skip_bad=skip_bad,
        flags=ModelFlags(arch, quickgelu, preprocess, tokenizer),
    )
    with live() as progress:
        report = scanned(job, progress)
    _show(report)
    if as_json:
        sys.stdout.write(json.dumps(report.model_dump(mode="json"), indent=1) + "\n")
    else:
        found = ", ".join(map(one_line, report.suspects)) or "nothing"
        sys.stdout.write(f"score {report.score:.2f}\tstands out: {found}\n")
    raise typer.Exit(1 if fail_on is not None and report.score >= fail_on else 0)


def _show(report: ScanReport) -> None:
    show_model(report.model, report.warnings)
    if report.skipped:
        note(f"{len(report.skipped)} images could not be read and were left out")
    show_candidates(report.candidates, report.settings["inversion"])
    note(one_line(f"likeliest: {', '.join(report.likeliest)}"))
    note(one_line(f"{report.standing}" if report.standing else f"uncalibrated: {report.uncalibrated}"))
