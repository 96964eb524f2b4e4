"""What verify passes, and each thing that it must not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_runs import write_run

from cbpt_guard.bundle import open_bundle, write_manifest
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.errors import BundleError, CheckError, InputError, SetupError
from cbpt_guard.export import verify
from cbpt_guard.manifest import Graph, Manifest, parse_manifest

Change = Callable[[onnx.ModelProto], None]


def relisted(bundle: Path) -> None:
    """Hash everything again, as an attacker would."""
    write_manifest(bundle, open_manifest(bundle))


def open_manifest(bundle: Path) -> Manifest:
    return parse_manifest((bundle / "manifest.json").read_bytes())


def changed_model(bundle: Path, change: Change) -> None:
    model = onnx.load(bundle / "model.onnx")
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    relisted(bundle)


def test_a_real_bundle_passes_every_check(exported: Path, tiny_run: Path) -> None:
    report = verify(exported, deep=True, run=PurifyRun.open(tiny_run))
    assert [check.name.partition(" ")[0] for check in report.checks] == [
        *("files", "schema", "golden", "graph", "reference", "torch")
    ]
    assert report.digest == open_bundle(exported).digest
    assert [check.name for check in verify(exported).checks] == ["files", "schema", "golden fp32"]


def test_the_digest_pins_the_bundle(tiny_bundle: Path) -> None:
    verify(tiny_bundle, digest=open_bundle(tiny_bundle).digest)
    with pytest.raises(BundleError, match="another bundle"):
        verify(tiny_bundle, digest="sha256:" + "0" * 64)


@pytest.mark.parametrize("name", ["golden.npz", "model.onnx", "labels.json", "README.md"])
def test_a_changed_byte(tiny_bundle: Path, name: str) -> None:
    data = bytearray((tiny_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tiny_bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        verify(tiny_bundle)


def test_a_manifest_of_another_schema(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text()
    (tiny_bundle / "manifest.json").write_text(text.replace('"verdict"', '"judgement"'))
    with pytest.raises(BundleError, match="verdict"):
        verify(tiny_bundle)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        verify(tmp_path / "missing")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        verify(tmp_path)


def test_golden_answers_that_the_graph_does_not_give(tiny_bundle: Path) -> None:
    golden = dict(np.load(tiny_bundle / "golden.npz"))
    golden["logits"][0, 0] += 0.1
    np.savez(tiny_bundle / "golden.npz", **golden)
    relisted(tiny_bundle)
    with pytest.raises(BundleError, match="self-test"):
        verify(tiny_bundle)


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Gelu", ["pixels"], ["unused"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def own_function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], body, [helper.make_opsetid("", 18)]))


def weights_elsewhere(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "elsewhere")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    model.graph.initializer.append(tensor)


def hidden_weights_elsewhere(model: onnx.ModelProto) -> None:
    tensor = helper.make_tensor("inner", TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    model.graph.node.append(helper.make_node("Constant", [], ["hidden"], value=tensor))


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, None))


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 4


def wrong_shape(model: onnx.ModelProto) -> None:
    model.graph.output[3].type.tensor_type.shape.dim[1].dim_value = 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (foreign_operator, r"com\.microsoft"),
        (own_function, "functions of its own"),
        (weights_elsewhere, "lie in other files"),
        (hidden_weights_elsewhere, "lie in other files"),
        (second_output, "doors"),
        (fixed_batch, "fixed batch"),
        (wrong_shape, "checker"),
    ],
)
def test_deep_refuses_a_graph_that_hashes_cannot_tell(
    tiny_bundle: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_model(tiny_bundle, change)
    # reading the bundle refuses some of these, and onnxruntime others; here the graph's own checks must
    monkeypatch.setattr("cbpt_guard.bundle.check_self_contained", lambda *_: None)
    monkeypatch.setattr(sys.modules[verify.__module__], "_check_golden", lambda *_: None)
    with pytest.raises(BundleError, match=message):
        verify(tiny_bundle, deep=True)


def test_deep_holds_the_opset_to_the_manifest(tiny_bundle: Path) -> None:
    manifest = open_manifest(tiny_bundle)
    graph = Graph(opset=19, input=manifest.graph.input, outputs=manifest.graph.outputs)
    write_manifest(tiny_bundle, manifest.model_copy(update={"graph": graph}))
    verify(tiny_bundle)
    with pytest.raises(BundleError, match=r"opset \[18\], expected 19"):
        verify(tiny_bundle, deep=True)


def test_deep_asks_a_second_implementation(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx.reference import ReferenceEvaluator

    run = ReferenceEvaluator.run
    monkeypatch.setattr(ReferenceEvaluator, "run", lambda *args: [out + 0.5 for out in run(*args)])
    with pytest.raises(BundleError, match=r"reference implementation differs by 0\.5"):
        verify(tiny_bundle, deep=True)


def test_deep_sees_a_flag_that_a_second_implementation_does_not_set(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnx.reference import ReferenceEvaluator

    run = ReferenceEvaluator.run

    def never(evaluator: object, names: list[str], feeds: object) -> list[object]:
        found = dict(zip(names, run(evaluator, names, feeds), strict=True))
        return [value & False if name == "triggered" else value for name, value in found.items()]

    monkeypatch.setattr(ReferenceEvaluator, "run", never)
    with pytest.raises(BundleError, match="sets another flag"):
        verify(tiny_bundle, deep=True)


def test_flagged_images_are_compared_with_the_run_and_counted_in_the_self_test(exported: Path, tiny_run: Path) -> None:
    checks = {check.name: check.outcome for check in verify(exported, deep=True, run=PurifyRun.open(tiny_run)).checks}
    assert checks["torch model.onnx"].startswith("56 images"), "40, and 16 once more under the found trigger"
    assert checks["golden fp32"].endswith("; 2 of them flagged")


def test_deep_without_the_extra(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cbpt_guard.export.checks", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    verify(tiny_bundle)
    with pytest.raises(SetupError, match=r"pip install 'cbpt-guard\[purify\]'"):
        verify(tiny_bundle, deep=True)


def test_another_run_is_told_apart(exported: Path, tiny_bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="other classes"):
        verify(tiny_bundle, deep=True, run=PurifyRun.open(tiny_run))
    other = PurifyRun.open(write_run(tmp_path / "run", rule="prompts"))
    with pytest.raises(CheckError, match="differs from torch"):
        verify(exported, deep=True, run=other)
