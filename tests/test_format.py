"""Every later version, on every onnxruntime that is allowed, reads a bundle of format 1. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cbpt_guard import GuardedClassifier
from cbpt_guard.bundle import open_bundle
from cbpt_guard.export import verify

FORMAT_1 = Path(__file__).parent / "fixtures" / "bundle-v1"


def test_a_bundle_of_format_1_is_read_by_every_later_version() -> None:
    """Made by the first version that wrote bundles, from a purified CLIP of digits; never made again."""
    recorded = json.loads((FORMAT_1.parent / "bundle-v1.json").read_text())
    report = verify(FORMAT_1, deep=True, digest=recorded["digest"])
    assert {"files", "golden fp32", "graph model.onnx", "reference model.onnx"} <= {c.name for c in report.checks}
    assert open_bundle(FORMAT_1).manifest.format == 1
    guard = GuardedClassifier.load(FORMAT_1, threads=1, digest=recorded["digest"])
    for name, wanted in recorded["answers"].items():
        answer = guard.predict(Image.open(FORMAT_1.parent / name))
        assert (answer.label, answer.triggered, answer.changed) == (
            wanted["label"],
            wanted["triggered"],
            wanted["changed"],
        )
        assert answer.score == pytest.approx(wanted["score"], abs=1e-3)
    assert {wanted["triggered"] for wanted in recorded["answers"].values()} == {True, False}
