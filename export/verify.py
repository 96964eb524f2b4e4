"""Is a bundle what it was when it was made? Hashes and self-test always; the graph itself when asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cbpt_guard.bundle import Golden, OpenedBundle, load_golden, open_bundle
from cbpt_guard.classifier import GuardedClassifier
from cbpt_guard.errors import BundleError, CheckError, SetupError
from cbpt_guard.manifest import Agreement, Variant
from cbpt_guard.session import Session

if TYPE_CHECKING:
    from cbpt_guard.defense.run import PurifyRun
    from cbpt_guard.export.parts import Parts

_EXTRA = "pip install 'cbpt-guard[purify]'"


@dataclass(frozen=True)
class Check:
    """One check that passed, and what it saw."""

    name: str
    outcome: str


@dataclass(frozen=True)
class VerifyReport:
    """Every check of a bundle that passed; the first that does not is raised instead."""

    digest: str
    checks: tuple[Check, ...]


def verify(
    path: str | os.PathLike[str],
    deep: bool = False,
    *,
    digest: str | None = None,
    key: str | os.PathLike[str] | None = None,
    run: PurifyRun | None = None,
) -> VerifyReport:
    """Check a bundle: files against the manifest, schema, and golden answers through onnxruntime.

    Args:
        path: the bundle's folder.
        deep: also check each graph by onnx's checker, its operator domains and doors, and compare it with
            onnx's reference implementation, which needs no onnxruntime; takes the `purify` extra.
        digest: "sha256:..." of the manifest.json that it must be.
        key: the public key (PEM) that it must be signed for; takes the `sign` extra.
        run: the run that it was made from; `deep` then also compares with torch on its samples.

    Raises:
        BundleError: a check failed.
        CheckError: the graph differs from the run's torch model.
        InputError: there is no such bundle or key, or the run is malformed.
        SetupError: onnxruntime or the extra is missing.
    """
    bundle = open_bundle(path, digest)
    signed = [] if key is None else [_check_key(path, bundle, key)]
    manifest = bundle.manifest
    checks = [
        Check("files", f"{len(manifest.files)} files as the manifest lists them"),
        Check("schema", f"format {manifest.format}, {len(bundle.labels)} classes"),
        *signed,
    ]
    for precision, variant in manifest.variants.items():
        golden = load_golden(bundle.contents[variant.golden])
        checks.append(_check_golden(path, bundle, golden, precision))
        if deep:
            checks += _deep(bundle, golden, variant, run)
    return VerifyReport(bundle.digest, tuple(checks))


def _check_key(path: str | os.PathLike[str], bundle: OpenedBundle, key: str | os.PathLike[str]) -> Check:
    from cbpt_guard.export.sign import check_signature

    return Check("signature", f"{check_signature(path, bundle, key)} files signed for {os.fspath(key)}")


def _check_golden(path: str | os.PathLike[str], bundle: OpenedBundle, golden: Golden, precision: str) -> Check:
    guard = GuardedClassifier.load(path, digest=bundle.digest, precision=precision, check=False)
    allowed = bundle.manifest.tolerance(bundle.manifest.variants[precision])
    check = _compared(f"golden {precision}", len(golden.images), guard.self_test(golden), allowed)
    return Check(check.name, f"{check.outcome}; {int(golden.triggered.sum())} of them flagged")


def _deep(bundle: OpenedBundle, golden: Golden, variant: Variant, run: PurifyRun | None) -> list[Check]:
    try:
        from cbpt_guard.export.checks import check_graph
    except ImportError as error:
        raise SetupError(f"a deep check needs onnx: {_EXTRA}") from error
    data, manifest = bundle.contents[variant.file], bundle.manifest
    check_graph(data, manifest.graph)
    valid = f"valid, opset {manifest.graph.opset}, ONNX's own operators only, nothing outside the file"
    checks = [
        Check(f"graph {variant.file}", valid),
        _second_opinion(data, golden, variant, manifest.tolerance(variant)),
    ]
    return checks if run is None else [*checks, _against_torch(bundle, data, variant, run)]


def _second_opinion(data: bytes, golden: Golden, variant: Variant, allowed: float) -> Check:
    """Another implementation of every operator, in plain numpy; one image, for it is slow."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(onnx.load_model_from_string(data))
        *found, flags = evaluator.run(["logits", "logits_original", "triggered"], {"image": golden.images[:1]})
    except Exception as error:  # the reference implementation raises whatever its numpy code raises
        raise BundleError(f"onnx's reference implementation cannot run {variant.file}: {error}") from error
    wanted = (golden.logits[:1], golden.logits_original[:1])
    worst = float(np.max([np.abs(ours - theirs).max() for ours, theirs in zip(found, wanted, strict=True)]))
    if not worst <= allowed:
        raise BundleError(f"{variant.file}: onnx's reference implementation differs by {worst:.3g} logits")
    if not np.array_equal(flags, golden.triggered[:1]):
        raise BundleError(f"{variant.file}: onnx's reference implementation sets another flag")
    return _compared(f"reference {variant.file}", 1, worst, allowed)


def _against_torch(bundle: OpenedBundle, data: bytes, variant: Variant, run: PurifyRun) -> Check:
    try:
        from cbpt_guard.export.gate import with_triggered
        from cbpt_guard.export.parity import measure_parity
        from cbpt_guard.export.parts import read_parts
    except ImportError as error:
        raise SetupError(f"a comparison with torch needs the purify extra: {_EXTRA}") from error
    parts = read_parts(run)
    if parts.graph.head.classes != bundle.labels:
        raise BundleError(f"{run.path} has other classes than the bundle: it was not made from this run")
    session = Session(data, size=bundle.manifest.preprocess.size, classes=len(bundle.labels))
    if variant.agreement is not None:
        return _agreeing(variant, variant.agreement, session, parts)
    parity = measure_parity(parts.graph, session, with_triggered(parts.images, parts.bank))
    return _compared(f"torch {variant.file}", parity.images, parity.max_logit_difference, parity.bound)


def _agreeing(variant: Variant, agreement: Agreement, session: Session, parts: Parts) -> Check:
    """A reduced precision keeps no bound on logits: its answers are compared."""
    from cbpt_guard.export.parity import torch_outputs

    wanted = torch_outputs(parts.graph, parts.images).logits.argmax(axis=1)
    same = float((session.run(parts.images).logits.argmax(axis=1) == wanted).mean())
    if same < agreement.least:
        raise CheckError(f"{variant.file} answers {same:.1%} of the images as torch does, not {agreement.least:.1%}")
    return Check(f"torch {variant.file}", f"{len(wanted)} images, {same:.1%} answered alike")


def _compared(name: str, images: int, worst: float, allowed: float) -> Check:
    return Check(name, f"{images} images, logits differ by {worst:.2g}, allowed {allowed:.2g}")
