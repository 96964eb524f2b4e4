"""`cbpt-guard predict`: a bundle's answers in a shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cbpt_guard.cli import options
from cbpt_guard.cli.show import note, one_line


def predict(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    digest: options.Digest = None,
    precision: options.Precision = "fp32",
    provider: Annotated[list[str] | None, typer.Option(help="Where it runs: cpu, cuda, ...")] = None,
    abstain: Annotated[float | None, typer.Option(help="No label below this score.")] = None,
) -> None:
    """Classify images; all are tried, and the exit code is 1 if one failed."""
    from cbpt_guard.classifier import GuardedClassifier

    guard = GuardedClassifier.load(bundle, providers=provider, digest=digest, precision=precision, abstain=abstain)
    failed = 0
    for path, answer in zip(images, guard.predict_stream(images), strict=True):
        failed += answer.error is not None
        if as_json:
            sys.stdout.write(json.dumps({"path": str(path)} | answer.to_dict()) + "\n")
        elif answer.error is not None:
            note(one_line(f"{path}: {answer.error}"))
        else:
            flags = [name for name in ("changed", "triggered") if getattr(answer, name)]
            fields = (str(path), answer.label or "-", f"{answer.score:.4f}", *flags)
            sys.stdout.write("\t".join(map(one_line, fields)) + "\n")
    if failed:
        note(f"{failed} of {len(images)} images failed")
        raise typer.Exit(1)
