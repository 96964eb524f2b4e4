"""`cbpt-guard purify`: options in, a run directory and a verdict out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbpt_guard.cli import options
from cbpt_guard.cli.findings import show_candidates, show_model
from cbpt_guard.cli.show import live, note, one_line, percent, plain, table

if TYPE_CHECKING:
    from cbpt_guard.defense.record import RunMetrics
    from cbpt_guard.defense.run import PurifyRun

_MOST_CLASSES = 12


def purify(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="The run directory to make.")] = Path("purified"),
    classes: options.Classes = None,
    template: options.Template = options.TEMPLATE,
    shots: options.Shots = None,
    settings: options.SettingsFile = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    triggered: Annotated[Path | None, typer.Option(help="Observed attack images, two or more that succeeded.")] = None,
    reuse: Annotated[Path | None, typer.Option(help="An earlier run, whose found triggers are taken.")] = None,
    skip_bad: options.SkipBad = False,
    arch: options.Arch = None,
    quickgelu: options.QuickGelu = None,
    preprocess: options.Preprocess = None,
    tokenizer: options.Tokenizer = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The record and the metrics on stdout.")] = False,
) -> None:
    """Purify a suspect: find its triggers, fit the guard, judge it.

    Exit code 0: guarded. 1: not guarded or unverified (the run is kept). 2: bad input. 3: unsafe input.
    """
    from cbpt_guard.cli.machine import prepare_torch
    from cbpt_guard.defense.job import Job
    from cbpt_guard.defense.plan import plan
    from cbpt_guard.defense.purify import purify_job
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
        triggered=triggered,
        reuse=reuse,
        skip_bad=skip_bad,
        flags=ModelFlags(arch, quickgelu, preprocess, tokenizer),
    )
    with live() as progress:
        if dry_run:
            planned = plan(job, out, force=force, progress=progress)
        else:
            run = purify_job(job, out, resume=resume, force=force, progress=progress)
    if dry_run:
        sys.stdout.write(
            json.dumps(planned.model_dump(mode="json"), indent=1) + "\n" if as_json else plain(planned.describe())
        )
        return
    show_run(run)
    if as_json:
        sys.stdout.write(json.dumps(_as_json(run), indent=1) + "\n")
    else:
        sys.stdout.write(f"{run.path}\n")
    raise typer.Exit(0 if run.record.verdict.name == "guarded" else 1)


def show_run(run: PurifyRun) -> None:
    """Model, candidates, triggers, classes and the verdict, on stderr."""
    record, metrics = run.record, run.metrics
    show_model(record.model, record.warnings)
    if record.data.without_images:
        note(f"classes without images keep their original rows: {', '.join(map(one_line, record.data.without_images))}")
    if record.data.skipped:
        note(f"{len(record.data.skipped)} images could not be read and were left out")
    show_candidates(record.candidates, record.settings["inversion"])
    if not any(candidate.stands_out for candidate in record.candidates):
        note("no class stands out: the default rule changes no answer; the prompts met the likeliest one's triggers")
    _show_triggers(metrics)
    _show_classes(metrics, [suspect.label for suspect in record.suspects])
    _show_verdict(run)


def _show_triggers(metrics: RunMetrics) -> None:
    rows = [
        (
            " ".join((t.origin, t.family, *([f"({t.against} model)"] if t.against else []), "->", t.target)),
            str(t.images),
            *(
                percent(share)
                for share in (t.asr_before, t.asr_after, t.asr_prompts, t.pa_before, t.pa_after, t.pa_prompts)
            ),
        )
        for t in metrics.triggers
    ]
    rule = ("images", "ASR before", "ASR after", "ASR prompts", "PA before", "PA after", "PA prompts")
    table(
        "under each trigger, in %; `prompts`: the tuned prompts answer everything",
        ("trigger", *rule),
        rows,
    )


def _show_classes(metrics: RunMetrics, suspects: list[str]) -> None:
    """Suspects first, then the classes that lost most."""
    known = [c for c in metrics.classes if c.before is not None and c.after is not None]
    order = sorted(known, key=lambda c: (c.label not in suspects, (c.after or 0) - (c.before or 0)))
    rows = [
        (c.label, str(c.images), percent(c.before), percent(c.after), percent(c.after_prompts))
        for c in order[:_MOST_CLASSES]
    ]
    rows.append(
        (
            f"all {len(metrics.classes)} classes",
            str(metrics.images),
            percent(metrics.clean_accuracy_before),
            percent(metrics.clean_accuracy_after),
            percent(metrics.clean_accuracy_prompts),
        )
    )
    seen = "held-out" if metrics.held_out else "tuned-on (none held out)"
    table(f"clean recall on {seen} images, in %", ("class", "images", "before", "after", "prompts"), rows)


def _show_verdict(run: PurifyRun) -> None:
    verdict = run.record.verdict
    note(f"verdict: {verdict.name.upper()}")
    for reason in verdict.reasons:
        note(one_line(f"  {reason}"))
    note(f"pictures of the found triggers: {run.path / 'pictures'}")


def _as_json(run: PurifyRun) -> dict[str, Any]:
    return {"run": run.record.model_dump(mode="json"), "metrics": run.metrics.model_dump(mode="json")}
