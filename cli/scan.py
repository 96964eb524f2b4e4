"""`cbpt-guard scan`: is a suspect poisoned, toward which classes, how sure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_guard.cli.candidates import show_candidates
from cbpt_guard.cli.show import live, note, one_line

if TYPE_CHECKING:
    from cbpt_guard.defense.scan import ScanReport


def scan(
    model: Annotated[Path, typer.Option(help="The suspect: a checkpoint file or an open_clip folder.")],
    data: Annotated[Path, typer.Option(help="Clean images: a folder of class folders, or a CSV (path,label).")],
    classes: Annotated[
        Path | None,
        typer.Option(help="UTF-8 lines: folder<TAB>name renames, a line without TAB adds a class."),
    ] = None,
    template: Annotated[str, typer.Option(help="The prompt, with {} for the class name.")] = "a photo of a {}.",
    shots: Annotated[int | None, typer.Option(min=1, help="At most so many images of each class.")] = None,
    settings: Annotated[Path | None, typer.Option(help="The recipe's numbers, a TOML file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw; the same seed gives the same scan.")] = 0,
    device: Annotated[str, typer.Option(help="Where torch computes.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")] = False,
    arch: Annotated[str | None, typer.Option(help="The architecture: open_clip's name or a JSON file.")] = None,
    quickgelu: Annotated[
        bool | None, typer.Option(help="Whether the towers use QuickGELU; asked for where the file cannot tell.")
    ] = None,
    preprocess: Annotated[
        str | None, typer.Option(help="The preprocessing: openai, siglip, ... or a JSON file.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with the tokenizer's files, for models that bring their own.")
    ] = None,
    fail_on: Annotated[float | None, typer.Option(help="Exit with 1 if the score is as high.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report on stdout.")] = False,
) -> None:
    """Scan a suspect for targets of a backdoor; nothing is written.

    That nothing stands out does not make a model clean: purify it all the same. Exit code 0 whatever is found, 1 from
    the score of `--fail-on`, 2: bad input, 3: unsafe input.
    """
    from cbpt_guard.cli.machine import prepare_torch
    from cbpt_guard.defense.job import Job
    from cbpt_guard.defense.scan import scan as scanned
    from cbpt_guard.defense.settings import Settings
    from cbpt_guard.defense.suspect import ModelFlags

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
        sys.stdout.write(report.model_dump_json(indent=1) + "\n")
    else:
        found = ", ".join(map(one_line, report.suspects)) or "nothing"
        sys.stdout.write(f"score {report.score:.2f}\tstands out: {found}\n")
    raise typer.Exit(1 if fail_on is not None and report.score >= fail_on else 0)


def _show(report: ScanReport) -> None:
    for text in report.warnings:
        note(one_line(f"note: {text}"))
    if report.skipped:
        note(f"{len(report.skipped)} images could not be read and were left out")
    show_candidates(report.candidates, report.settings)
    note(one_line(f"likeliest: {', '.join(report.likeliest)}"))
    note(one_line(f"{report.standing}" if report.standing else f"uncalibrated: {report.uncalibrated}"))
