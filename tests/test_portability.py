"""Other implementations of ONNX read the served graph as onnxruntime does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small_clips
from onnx.reference import ReferenceEvaluator
from small_runs import write_run

from cbpt_guard.bundle import GRAPH_INPUT, GRAPH_OUTPUTS
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.export import gate, graph
from cbpt_guard.export.parts import Parts, read_parts
from cbpt_guard.session import Outputs, Session


@pytest.fixture(scope="module", params=["vit", "resnet"])
def served(
    request: pytest.FixtureRequest, tiny_run: Path, exported: Path, tmp_path_factory: Any
) -> tuple[Parts, bytes]:
    """Parts of a run and its ONNX file, for two families."""
    if request.param == "vit":
        return read_parts(PurifyRun.open(tiny_run)), (exported / "model.onnx").read_bytes()
    run = write_run(tmp_path_factory.mktemp("resnet") / "run", small_clips.RESNET)
    parts = read_parts(PurifyRun.open(run))
    return parts, graph.to_onnx(parts.graph, parts.images.shape[1], 18)


def pictures(parts: Parts) -> np.ndarray:
    """Three clean images and two under the found trigger: both branches of the rule."""
    (trigger,) = parts.bank
    return np.concatenate([parts.images[:3], gate.triggered(parts.images[3:5], trigger)])


def assert_alike(found: Outputs, wanted: Outputs) -> None:
    assert 0 < wanted.triggered.sum() < len(wanted.triggered)
    assert np.abs(found.logits - wanted.logits).max() < 5e-3
    assert np.abs(found.logits_original - wanted.logits_original).max() < 5e-3
    assert np.array_equal(found.triggered, wanted.triggered)
    assert np.abs(np.linalg.norm(found.embedding, axis=1) - 1).max() < 1e-5


def ours(parts: Parts, data: bytes, images: np.ndarray) -> Outputs:
    size, classes = parts.images.shape[1], len(parts.graph.head.classes)
    return Session(data, size=size, classes=classes, threads=1).run(images)


def test_onnx_reference_answers_alike(served: tuple[Parts, bytes]) -> None:
    parts, data = served
    evaluator = ReferenceEvaluator(onnx.load_model_from_string(data))
    images = pictures(parts)
    assert_alike(Outputs(*evaluator.run(list(GRAPH_OUTPUTS), {GRAPH_INPUT: images})), ours(parts, data, images))


def test_openvino_answers_alike_in_every_batch(served: tuple[Parts, bytes]) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    parts, data = served
    core = openvino.Core()
    # where a processor has bfloat16, OpenVINO takes it unasked: that is another precision, which no gate has seen
    compiled = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = pictures(parts)
    for batch in (1, 2, 5):
        found = [compiled(images[start : start + batch]) for start in range(0, len(images), batch)]
        columns = [np.concatenate([part[name] for part in found]) for name in GRAPH_OUTPUTS]
        assert_alike(Outputs(*columns), ours(parts, data, images))
