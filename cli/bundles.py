"""`cbpt-guard export`, `sign`, `verify` and `inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cbpt_guard.cli import options
from cbpt_guard.cli.show import note, one_line, outline


def export(
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX bundle (the only form, and the default).")] = True,
    run: Annotated[Path, typer.Option(help="The run directory of `purify`.")] = Path("purified"),
    out: Annotated[Path, typer.Option(help="The bundle to make.")] = Path("bundle"),
    opset: Annotated[int, typer.Option(help="The ONNX opset.")] = 18,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32 (the default), fp16 or int8; repeatable, each passes the gate.")
    ] = None,
    layout: Annotated[str, typer.Option(help="bundle, or triton: a Triton model repository around it.")] = "bundle",
    force: Annotated[bool, typer.Option("--force", help="Replace the output.")] = False,
    allow_unguarded: Annotated[
        bool,
        typer.Option("--allow-unguarded", help="Export even if the run is not `guarded` or fails a gate; recorded."),
    ] = False,
) -> None:
    """Write a purified run as an ONNX bundle: encoder, both heads and the rule in one graph.

    Exit code 0: written. 1: the run is not guarded, or a check or a gate failed; nothing is written. 2: bad input.
    """
    from cbpt_guard.export import export as export_run

    path = export_run(
        run,
        out,
        opset=opset,
        precision=precision or ("fp32",),
        layout=layout,
        force=force,
        allow_unguarded=allow_unguarded,
        progress=note if sys.stderr.isatty() else None,
    )
    if layout == "triton":
        note(f"serve it with: tritonserver --model-repository {path}")
    else:
        note(f'serve it with: GuardedClassifier.load("{path}").predict(image)')
    sys.stdout.write(f"{path}\n")


def sign(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    key: Annotated[Path, typer.Option(help="A PEM private key: P-256, P-384 or P-521, without a password.")],
    digest: options.Digest = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier signature.")] = False,
) -> None:
    """Check a bundle and sign it into its model.sig (OpenSSF model signing, offline); prints the digest."""
    from cbpt_guard.export.sign import sign as sign_bundle

    sys.stdout.write(f"{sign_bundle(bundle, key, digest=digest, force=force)}\n")


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    deep: Annotated[bool, typer.Option("--deep", help="Also check the graph itself (purify extra).")] = False,
    digest: options.Digest = None,
    key: Annotated[Path | None, typer.Option(help="The PEM public key it must be signed for (sign extra).")] = None,
    run: Annotated[Path | None, typer.Option(help="With --deep: compare with torch on this run's samples.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The checks on stdout as JSON.")] = False,
) -> None:
    """Check a bundle against its manifest and its own golden answers; a mismatch exits 1."""
    from cbpt_guard.errors import InputError
    from cbpt_guard.export import verify as verify_bundle

    if run is not None and not deep:
        raise InputError("`--run` is for the comparison with torch; pass `--deep` with it")
    opened = None
    if run is not None:
        from cbpt_guard.defense.run import PurifyRun

        opened = PurifyRun.open(run)
    report = verify_bundle(bundle, deep=deep, digest=digest, key=key, run=opened)
    if as_json:
        checks = [{"name": check.name, "outcome": check.outcome} for check in report.checks]
        sys.stdout.write(json.dumps({"digest": report.digest, "checks": checks}, indent=1) + "\n")
        return
    for check in report.checks:
        sys.stdout.write(one_line(f"{check.name}: {check.outcome}") + "\n")
    sys.stdout.write(f"{report.digest}\n")


def inspect(
    path: Annotated[Path, typer.Argument(help="A run directory or a bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print what a run directory or a bundle says of itself."""
    from cbpt_guard import inspection

    found = inspection.inspect(path)
    text = json.dumps(found, indent=1) if as_json else "\n".join(map(one_line, outline(found)))
    sys.stdout.write(text + "\n")
