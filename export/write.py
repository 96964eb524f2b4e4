"""The recipe of an export: a purified run becomes a bundle, or nothing at all."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, cast

from torch import nn

import cbpt_guard
from cbpt_guard.bundle import (
    CARD,
    GOLDEN,
    GRAPH_INPUT,
    GRAPH_OUTPUTS,
    LABELS,
    MANIFEST,
    PROMPTS,
    SBOM,
    file_entry,
    write_manifest,
)
from cbpt_guard.defense.openclip import build
from cbpt_guard.defense.run import PROMPTS as RUN_PROMPTS
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export.card import card
from cbpt_guard.export.checks import check_graph
from cbpt_guard.export.gate import with_triggered
from cbpt_guard.export.golden import golden_tolerance, save_golden
from cbpt_guard.export.graph import check_opset, check_size, to_onnx
from cbpt_guard.export.parity import measure_parity
from cbpt_guard.export.parts import Parts, read_parts
from cbpt_guard.export.precision import check_precisions
from cbpt_guard.export.sbom import sbom
from cbpt_guard.export.triton import NAME, VERSION, check_layout, others, write_repository
from cbpt_guard.export.variants import Built, build_full, build_reduced
from cbpt_guard.files import holds, staged
from cbpt_guard.manifest import Graph, Manifest, ModelEntry, RuleEntry
from cbpt_guard.session import Session, builds_here

FULL: Final = "fp32"
_MARKS: Final = (MANIFEST, LABELS, GOLDEN)  # many a web page has a manifest.json
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "numpy", "pillow")


def export(
    run: PurifyRun | str | Path,
    out: str | Path = "bundle",
    *,
    opset: int = 18,
    precision: Sequence[str] = (FULL,),
    layout: str = "bundle",
    force: bool = False,
    allow_unguarded: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a run as a bundle: an ONNX file of encoder, heads and rule, checked against torch and the gate.

    Args:
        run: a run, or the path of its directory.
        out: the bundle's folder; it appears at the end, complete, or not at all.
        opset: of ONNX; 18 is understood by every provider, 23 and above use its `Attention`.
        precision: which graphs: "fp32", "fp16" (for GPUs), "int8" (for processors with int8 dot products).
        layout: "bundle", or "triton": a Triton model repository whose version folder is the bundle.
        force: replace an earlier bundle.
        allow_unguarded: export a run that is not "guarded", or a graph that fails the gate: the manifest records it,
            and calls such a graph's bundle "not guarded".
        progress: is told, in words, what is done next.

    Returns:
        `out`: the bundle's folder, or the repository.

    Raises:
        CheckError: the run is not "guarded", or an ONNX file fails parity or the gate.
        InputError: the run is malformed, the opset is out of range, a precision is unknown, or `out` exists.
        SetupError: the disk refuses, or another process writes the same output.
    """
    run = run if isinstance(run, PurifyRun) else PurifyRun.open(run)
    target = Path(out)
    _check_verdict(run, allow_unguarded)
    check_opset(opset)
    precisions = check_precisions(precision)
    check_layout(layout, precisions)
    _check_model(run)
    _check_target(run, target, layout)
    with staged(target, force=force) as folder:
        bundle = folder / VERSION if layout == "triton" else folder
        bundle.mkdir(parents=True, exist_ok=True)
        manifest = _write(run, bundle, opset, precisions, allow_unguarded, progress or _silent)
        if layout == "triton":
            write_repository(folder, manifest, run.head().classes)
        _check_target(run, target, layout)  # minutes have passed
    return target


def _write(
    run: PurifyRun,
    folder: Path,
    opset: int,
    precisions: tuple[str, ...],
    allow_unguarded: bool,
    progress: Callable[[str], None],
) -> Manifest:
    progress("reading the run")
    parts = read_parts(run)
    head, size = parts.graph.head, run.record.model.preprocess.size
    progress("writing the graph")
    data = to_onnx(parts.graph, size, opset)
    doors = Graph(opset=opset, input=GRAPH_INPUT, outputs=GRAPH_OUTPUTS)
    check_graph(data, doors)
    session = Session(data, size=size, classes=len(head.classes))
    images = with_triggered(parts.images, parts.bank)
    progress(f"comparing it with torch on {len(images)} images")
    parity = measure_parity(parts.graph, session, images)
    del images
    progress(f"measuring the gate under {len(parts.bank)} found triggers")
    full = build_full(data, session, parts, parity)
    if full.failure is not None and not allow_unguarded:
        raise CheckError(full.failure)
    built = {FULL: full} if FULL in precisions else {}
    for name in precisions:
        if name != FULL:
            progress(f"measuring {name}")
            built[name] = build_reduced(name, full, parts, doors, strict=not allow_unguarded)
    progress("writing the bundle")
    manifest = _manifest(run, parts, doors=doors, built=built, allow_unguarded=allow_unguarded)
    for made in built.values():
        (folder / made.variant.file).write_bytes(made.data)
        save_golden(made.golden, folder / made.variant.golden)
    if not (folder / GOLDEN).is_file():  # every bundle has one; without fp32 it is the first graph's
        shutil.copyfile(folder / next(iter(built.values())).variant.golden, folder / GOLDEN)
    (folder / LABELS).write_text(json.dumps(head.classes, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(run.path / RUN_PROMPTS, folder / PROMPTS)
    (folder / CARD).write_text(card(manifest, head.classes, held_out=run.metrics.held_out), encoding="utf-8")
    hashes = {v.file: file_entry(folder / v.file).sha256 for v in manifest.variants.values()}
    (folder / SBOM).write_text(sbom(manifest, hashes), encoding="utf-8")
    write_manifest(folder, manifest)
    return manifest


def _manifest(
    run: PurifyRun, parts: Parts, *, doors: Graph, built: dict[str, Built], allow_unguarded: bool
) -> Manifest:
    record, measured = run.record, next(iter(built.values())).measured
    # where nothing is suspected nothing is guarded, and triggers toward the likeliest class may well work
    failures = [made.failure for made in built.values() if made.failure is not None and record.suspects]
    return Manifest(
        cbpt_guard=cbpt_guard.__version__,
        created=record.created,  # the run's: two exports of one run are equal to the byte
        verdict="not guarded" if failures else record.verdict.name,  # the run's says nothing of a graph that failed
        reasons=(*failures, *record.verdict.reasons),
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
        variants={name: made.variant for name, made in built.items()},
        golden_tolerance=golden_tolerance(parts.graph.head),
        tools={"python": platform.python_version(), **{name: version(name) for name in _TOOLS}, **builds_here()},
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


def _check_model(run: PurifyRun) -> None:
    """Refuse an image encoder that no ONNX file can hold by its name, before its weights are read."""
    model = run.record.model
    check_size(cast(nn.Module, build(model.config).visual), model.architecture)


def _check_target(run: PurifyRun, out: Path, layout: str) -> None:
    """`force` replaces a whole folder: it must be an earlier output of this layout, and never the run itself."""
    if holds(out, run.path):
        raise InputError(f"{out} holds the run that is to be exported; pass another `--out`")
    if not out.is_dir() or not any(out.iterdir()):
        return
    what, bundle = ("model repository of ours", out / VERSION) if layout == "triton" else ("bundle", out)
    if not all((bundle / name).is_file() for name in _MARKS):
        raise InputError(f"{out} exists and is no {what}, so it is not replaced; pass another `--out`")
    strange = others(out) if layout == "triton" else []
    if strange:
        raise InputError(
            f"{out} holds {strange[0]} besides what this command wrote, so it is not replaced; pass another `--out`, "
            f"and move {NAME} from there"
        )


def _silent(message: str) -> None:
    """Report nothing."""
