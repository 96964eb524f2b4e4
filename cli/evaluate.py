"""`cbpt-guard evaluate`: a user's own count of a bundle on their own images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_guard.cli import options
from cbpt_guard.cli.show import note, one_line, percent, table

if TYPE_CHECKING:
    from cbpt_guard.evaluation import Evaluation, Share


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    data: Annotated[Path, typer.Option(help="Labelled images: a folder of class folders, or a CSV (path,label).")],
    classes: Annotated[Path | None, typer.Option(help="UTF-8 lines folder<TAB>name that rename class folders.")] = None,
    trigger: Annotated[Path | None, typer.Option(help="A trigger.json: count ASR and PA under it, too.")] = None,
    target: Annotated[str | None, typer.Option(help="The class it aims at; the trigger's own when left out.")] = None,
    digest: options.Digest = None,
    precision: options.Precision = "fp32",
    provider: Annotated[list[str] | None, typer.Option(help="Where it runs: cpu, cuda, ...")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The counts on stdout as JSON.")] = False,
) -> None:
    """Count CA (and under a trigger ASR and PA) through a bundle, guarded and undefended, with 95 % intervals."""
    from cbpt_guard.classifier import GuardedClassifier
    from cbpt_guard.errors import InputError
    from cbpt_guard.evaluation import evaluate as count
    from cbpt_guard.listing import list_images

    apply = None
    if trigger is not None:
        from cbpt_guard.defense.triggers import load_trigger

        planted = load_trigger(trigger)
        apply, target = planted.trigger.apply, target or planted.target
    elif target is not None:
        raise InputError("`--target` says where a trigger aims; pass `--trigger` with it")
    guard = GuardedClassifier.load(bundle, providers=provider, digest=digest, precision=precision)
    found = count(guard, list_images(data, classes, fewest_classes=1), apply, target, seed=seed)
    if as_json:
        sys.stdout.write(json.dumps(found.model_dump(mode="json"), indent=1) + "\n")
    else:
        _show(found)


def _show(found: Evaluation) -> None:
    names = ("CA", "ASR", "PA", "largest share", "target's clean recall")
    rows = []
    for name, shares in (("undefended", found.undefended), ("guarded", found.guarded)):
        cells = [_cell(shares.ca), _cell(shares.asr), _cell(shares.pa), percent(shares.max_share)]
        rows.append((name, *cells, _cell(shares.target_recall)))
        sys.stdout.write("\t".join((name, *(f"{n} {c}" for n, c in zip(names, rows[-1][1:], strict=True)))) + "\n")
    under = f", triggered toward {one_line(found.target)!r}" if found.target is not None else ""
    table(f"{found.images} images{under}; in %, with 95 % intervals", ("classifier", *names), rows)
    flagged = "" if found.flag_triggered is None else f", {percent(found.flag_triggered)} % of triggered ones"
    note(f"verdict: {found.verdict}; flagged: {percent(found.flag_clean)} % of clean images{flagged}")


def _cell(share: Share | None) -> str:
    return "-" if share is None else f"{percent(share.share)} [{percent(share.low)}, {percent(share.high)}]"
