"""A whole bundle around a graph of a dozen nodes, made without torch: the mean colour is the embedding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cbpt_guard.bundle import (
    FileEntry,
    Gate,
    Graph,
    Manifest,
    ModelEntry,
    Parity,
    RuleEntry,
    Suspect,
    Variant,
    write_manifest,
)
from cbpt_guard.images import Preprocess

SIZE = 32
LABELS = ["red", "green", "blue", "yellow", "grey"]
COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.7, 0.7, 0.1], [0.58, 0.58, 0.58]], np.float32)
SCALE, THRESHOLD = 20.0, 4.0  # a saturated red has a zero-shot margin of 5.9, a reddish picture less


def tiny_model() -> bytes:
    """Both heads share the text rows; the rule leaves red out when its margin is above the threshold.

    A black image divides zero by zero, as a real graph may on hostile input: NaN.
    """
    rows = COLOURS / np.linalg.norm(COLOURS, axis=1, keepdims=True)
    constants = {
        "rows": rows.T * np.float32(SCALE),
        "left_out": np.array([[-1e4, 0, 0, 0, 0]], np.float32),
        "threshold": np.array(THRESHOLD, np.float32),
        "full": np.array(255, np.float32),
        "space": np.array([1, 2]),
        "channel": np.array([1]),
        "first": np.array([0]),
        "second": np.array([1]),
        "two": np.array([2]),
        "red": np.array([[0]]),
    }
    steps = [
        ("Cast", ["image"], ["raw"], {"to": TensorProto.FLOAT}),
        ("Div", ["raw", "full"], ["pixels"], {}),
        ("ReduceMean", ["pixels", "space"], ["colour"], {"keepdims": 0}),
        ("ReduceL2", ["colour", "channel"], ["norm"], {"keepdims": 1}),
        ("Div", ["colour", "norm"], ["embedding"], {}),
        ("MatMul", ["embedding", "rows"], ["logits_original"], {}),
        ("TopK", ["logits_original", "two"], ["best", "place"], {}),
        ("Gather", ["best", "first"], ["winner"], {"axis": 1}),
        ("Gather", ["best", "second"], ["runner_up"], {"axis": 1}),
        ("Sub", ["winner", "runner_up"], ["margin"], {}),
        ("Greater", ["margin", "threshold"], ["far"], {}),
        ("Gather", ["place", "first"], ["answer"], {"axis": 1}),
        ("Equal", ["answer", "red"], ["suspected"], {}),
        ("And", ["far", "suspected"], ["flag"], {}),
        ("Add", ["logits_original", "left_out"], ["guarded"], {}),
        ("Where", ["flag", "guarded", "logits_original"], ["logits"], {}),
        ("Squeeze", ["flag", "channel"], ["triggered"], {}),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, **attributes) for op, inputs, outputs, attributes in steps],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)]),
            helper.make_tensor_value_info("triggered", TensorProto.BOOL, ["batch"]),
            helper.make_tensor_value_info("logits_original", TensorProto.FLOAT, ["batch", len(LABELS)]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def tiny_manifest() -> Manifest:
    """What `write_manifest` completes with the files."""
    parity = Parity(images=4, max_logit_difference=0.0, bound=1e-3)
    gate = Gate(images=4, clean_accuracy=1.0, clean_accuracy_original=1.0, found_trigger_asr=0.0)
    return Manifest(
        cbpt_guard="0.1.0",
        created="2026-01-01T00:00:00Z",
        verdict="guarded",
        reasons=(),
        allow_unguarded=False,
        model=ModelEntry(architecture="tiny", source="tiny.pt", source_sha256="0" * 64, resolved={}),
        preprocess=Preprocess(size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        rule=RuleEntry(
            name="switch",
            suspects=(Suspect(label="red", index=0, threshold=THRESHOLD),),
            flagged_clean=0.0,
            flagged_found=1.0,
        ),
        graph=Graph(opset=18, input="image", outputs=("logits", "triggered", "logits_original", "embedding")),
        variants={"fp32": Variant(file="model.onnx", parity=parity, gate=gate)},
        golden_tolerance=1e-3,
        tools={"onnx": onnx.__version__},
        settings={"seed": 0},
        files={"stale": FileEntry(sha256="", size=0)},
    )


def write_tiny_bundle(folder: Path) -> str:
    """Fill `folder` with a complete bundle and return its digest."""
    folder.mkdir()
    model = tiny_model()
    (folder / "model.onnx").write_bytes(model)
    (folder / "labels.json").write_text(json.dumps(LABELS))
    (folder / "README.md").write_text("a tiny bundle\n")
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    images[0] = (255, 0, 0)
    names = ["logits", "logits_original", "triggered"]
    answers = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(names, {"image": images})
    np.savez(folder / "golden.npz", images=images, **dict(zip(names, answers, strict=True)))
    return write_manifest(folder, tiny_manifest())
