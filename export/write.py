"""The recipe of an export: a purified run becomes a bundle, or nothing at all."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import cbpt_guard
from cbpt_guard.bundle import (
    CARD,
    GOLDEN,
    GRAPH_INPUT,
    GRAPH_OUTPUTS,
    LABELS,
    MANIFEST,
    MODEL,
    PROMPTS,
    write_manifest,
)
from cbpt_guard.defense.run import PROMPTS as RUN_PROMPTS
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export.card import card
from cbpt_guard.export.checks import check_graph
from cbpt_guard.export.gate import Measured, check_gate, measure_gate
from cbpt_guard.export.golden import golden_tolerance, make_golden, save_golden
from cbpt_guard.export.graph import check_opset, to_onnx
from cbpt_guard.export.parity import measure_parity
from cbpt_guard.export.parts import Parts, read_parts
from cbpt_guard.files import staged
from cbpt_guard.manifest import Graph, Manifest, ModelEntry, Parity, RuleEntry, Variant
from cbpt_guard.session import Session

PRECISION: Final = "fp32"
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


def export(
    run: PurifyRun | str | Path,
    out: str | Path = "bundle",
    *,
    opset: int = 18,
    force: bool = False,
    allow_unguarded: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a run as a bundle: one ONNX file of encoder, heads and rule, checked against torch and the gate.

    Args:
        run: a run, or the path of its directory.
        out: the bundle's folder; it appears at the end, complete, or not at all.
        opset: of ONNX; 18 is understood by every provider, 23 and above use its `Attention`.
        force: replace an earlier bundle.
        allow_unguarded: export a run that is not "guarded" or fails the gate; the manifest records it.
        progress: is told, in words, what is done next.

    Returns:
        The bundle's folder.

    Raises:
        CheckError: the run is not "guarded", or the ONNX file fails parity or the gate.
        InputError: the run is malformed, the opset is out of range, or `out` exists.
        SetupError: the disk refuses, or another process writes the same output.
    """
    run = run if isinstance(run, PurifyRun) else PurifyRun.open(run)
    target = Path(out)
    _check_verdict(run, allow_unguarded)
    check_opset(opset)
    _check_target(run, target)
    with staged(target, force=force) as folder:
        _write(run, folder, opset, allow_unguarded, progress or _silent)
    return target


def _write(run: PurifyRun, folder: Path, opset: int, allow_unguarded: bool, progress: Callable[[str], None]) -> None:
    progress("reading the run")
    parts = read_parts(run)
    head, size = parts.graph.head, run.record.model.preprocess.size
    progress("writing the graph")
    data = to_onnx(parts.graph, size, opset)
    doors = Graph(opset=opset, input=GRAPH_INPUT, outputs=GRAPH_OUTPUTS)
    check_graph(data, doors)
    session = Session(data, size=size, classes=len(head.classes))
    progress(f"comparing it with torch on {len(parts.images)} images")
    parity = measure_parity(parts.graph, session, parts.images)
    progress(f"measuring the gate under {len(parts.bank)} found triggers")
    measured = measure_gate(session, parts.images, parts.labels, parts.bank)
    if not allow_unguarded:
        check_gate(measured.gate, parts.bounds)
    progress("writing the bundle")
    manifest = _manifest(run, parts, doors=doors, parity=parity, measured=measured, allow_unguarded=allow_unguarded)
    (folder / MODEL).write_bytes(data)
    (folder / LABELS).write_text(json.dumps(head.classes, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    save_golden(make_golden(session, head), folder / GOLDEN)
    shutil.copyfile(run.path / RUN_PROMPTS, folder / PROMPTS)
    (folder / CARD).write_text(card(manifest, head.classes), encoding="utf-8")
    write_manifest(folder, manifest)


def _manifest(
    run: PurifyRun, parts: Parts, *, doors: Graph, parity: Parity, measured: Measured, allow_unguarded: bool
) -> Manifest:
    record = run.record
    return Manifest(
        cbpt_guard=cbpt_guard.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=record.verdict.name,
        reasons=record.verdict.reasons,
        allow_unguarded=allow_unguarded,
        model=ModelEntry(
            architecture=record.model.architecture,
            source=Path(record.model.source).name,
            source_sha256=record.model.source_sha256,
            resolved=record.model.resolved,
        ),
        preprocess=record.model.preprocess,
        rule=RuleEntry(
            name=record.rule,
            suspects=record.suspects,
            flagged_clean=measured.flagged_clean,
            flagged_found=measured.flagged_found,
        ),
        graph=doors,
        variants={PRECISION: Variant(file=MODEL, parity=parity, gate=measured.gate)},
        golden_tolerance=golden_tolerance(parts.graph.head),
        tools={"python": platform.python_version(), **{name: version(name) for name in _TOOLS}},
        settings={"seed": record.seed, "template": record.template, **record.settings},
        files={},
    )


def _check_verdict(run: PurifyRun, allow_unguarded: bool) -> None:
    verdict = run.record.verdict
    if verdict.name != "guarded" and not allow_unguarded:
        reasons = "; ".join(verdict.reasons) or "no reason is recorded"
        raise CheckError(
            f"{run.path} is {verdict.name} ({reasons}); purify again with other settings or more images, "
            "or pass `--allow-unguarded` to export it all the same"
        )


def _check_target(run: PurifyRun, out: Path) -> None:
    """`force` replaces a whole folder: it must be a bundle, and never the run itself."""
    if run.path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} holds the run that is to be exported; pass another `--out`")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise InputError(f"{out} exists and is no bundle, so it is not replaced; pass another `--out`")


def _silent(message: str) -> None:
    """Report nothing."""
