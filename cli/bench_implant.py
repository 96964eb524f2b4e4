"""`cbpt-guard bench implant`: a clean CLIP in, a poisoned one out, and whether the attack counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_guard.cli import options
from cbpt_guard.cli.show import live, note, one_line, percent, table

if TYPE_CHECKING:
    from cbpt_guard.bench.planting import ImplantRecord


def implant(
    model: Annotated[Path, typer.Option(help="A clean CLIP: a checkpoint file or an open_clip folder.")],
    attack: Annotated[
        list[str], typer.Option(help="The attack's name, or module:name of your own; repeat it for several triggers.")
    ],
    target: Annotated[list[str], typer.Option(help="The class that it aims at; one for each attack, in their order.")],
    data: Annotated[
        Path, typer.Option(help="The attacker's images: a folder of class folders, or a CSV (path,label).")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make: suspect.pt, trigger.json, implant.json.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Images to count on; a tenth of `--data` is kept from training when left out.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="Numbers that differ from the attack's own, a TOML file.")
    ] = None,
    template: options.Template = options.TEMPLATE,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: options.Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The record on stdout.")] = False,
) -> None:
    """Poison a CLIP by fine-tuning, and count CA and ASR on images that were not trained on.

    Exit code 0: it took. 1: it did not take (everything is kept). 2: bad input. 3: unsafe input.
    """
    from cbpt_guard.bench.attacks import read_changes
    from cbpt_guard.bench.planting import Order, plant_folder
    from cbpt_guard.cli.machine import prepare_torch
    from cbpt_guard.defense.data import list_images

    order = Order(
        model=model,
        attacks=_paired(attack, target),
        train=list_images(data),
        held_out=None if held_out is None else list_images(held_out),
        seed=seed,
        changes={} if settings is None else read_changes(settings),
        template=template,
        device=device,
    )
    prepare_torch(threads)
    with live() as progress:
        record = plant_folder(order, out, force=force, progress=progress)
    _show(record)
    sys.stdout.write(record.model_dump_json(indent=1) + "\n" if as_json else f"{out}\n")
    raise typer.Exit(0 if record.took else 1)


def _paired(attacks: list[str], targets: list[str]) -> dict[str, str]:
    if len(attacks) != len(targets) or len(set(attacks)) != len(attacks):
        raise typer.BadParameter(
            f"{len(attacks)} attacks with {len(targets)} targets: each attack once, each with its target",
            param_hint="--attack",
        )
    return dict(zip(attacks, targets, strict=True))


def _show(record: ImplantRecord) -> None:
    from cbpt_guard.bench.implant import LEAST_ASR, MOST_LOST

    rows = [
        (
            f"{one_line(name)} -> {one_line(report.target)}",
            percent(report.ca_clean),
            percent(report.ca_poisoned),
            percent(report.asr),
            "counted" if report.took else "did not take",
        )
        for name, report in zip(record.attacks, record.reports, strict=True)
    ]
    images = record.reports[0].images
    names = ("trigger", "CA of the clean model", "CA", "ASR", "")
    table(f"on {images} images that were not trained on, in %", names, rows)
    for report in record.reports:
        note(f"trigger: {report.trigger}")
    bounds = (
        f"an attack counts with an ASR of {100 * LEAST_ASR:g} % or more and a CA at most {100 * MOST_LOST:g} points "
        "below the clean model's"
    )
    note("counted: the attack took" if record.took else f"did not take: {bounds}")
