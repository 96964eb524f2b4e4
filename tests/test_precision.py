"""A reduced precision passes the gate on its own ONNX file, or it is not written."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import assert_refused, cli
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from small_runs import CLASSES, TARGET, write_run

from cbpt_guard import GuardedClassifier
from cbpt_guard.bundle import open_bundle
from cbpt_guard.defense.head import TriggerTest
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export import export, gate, parity, precision, variants, verify, write
from cbpt_guard.export.graph import to_onnx
from cbpt_guard.export.parts import read_parts
from cbpt_guard.export.precision import PRECISIONS, check_precisions
from cbpt_guard.export.verify import _agreeing
from cbpt_guard.session import Outputs, Session


def products_overflow() -> bool:
    """Whether onnxruntime adds products of 8-bit numbers in 16 bits here: 2 x 255 x 127 is more than they hold."""
    weights = numpy_helper.from_array(np.full((2, 1), 127, np.int8), "weights")
    doors = [helper.make_tensor_value_info("x", TensorProto.UINT8, (1, 2))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, (1, 1))]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weights"], ["y"])], "g", doors, outputs, [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((1, 2), 255, np.uint8)})
    return int(sums[0, 0]) != 2 * 255 * 127


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run in all three precisions."""
    if products_overflow():
        pytest.skip(
            "without VNNI onnxruntime's sums of 8-bit products overflow here, and the gate refuses the int8 graph"
        )
    return export(tiny_run, tmp_path_factory.mktemp("precisions") / "bundle", precision=PRECISIONS)


@pytest.fixture
def traced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the small run take its fp32 graph from the shelf instead of tracing it again."""
    model = (bundle / "model.onnx").read_bytes()
    monkeypatch.setattr(write, "to_onnx", lambda *_: model)


@pytest.fixture(scope="module")
def samples(tiny_run: Path) -> np.ndarray:
    return np.load(tiny_run / "samples.npz")["images"]


def test_every_precision_is_gated_on_its_own_file_and_served(bundle: Path, samples: np.ndarray, tiny_run: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert list(manifest.variants) == list(PRECISIONS)
    parts = read_parts(PurifyRun.open(tiny_run))
    sizes = {}
    for name, variant in manifest.variants.items():
        guard = GuardedClassifier.load(bundle, precision=name, threads=1)
        session = Session((bundle / variant.file).read_bytes(), size=32, classes=len(CLASSES), threads=1)
        answers = gate.answer_all(session, parts.images, parts.labels, parts.bank)
        assert variant.gate == gate.measure_gate(answers, parts.labels).gate
        assert variant.gate.found_trigger_asr == 0.0
        assert np.array_equal(guard.run(samples).logits, answers.clean.logits)
        sizes[name] = (bundle / variant.file).stat().st_size
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8"] < 0.5 * sizes["fp32"]


def test_the_manifest_says_how_each_agrees_with_fp32(bundle: Path, samples: np.ndarray) -> None:
    manifest = open_bundle(bundle).manifest
    full = GuardedClassifier.load(bundle, threads=1).run(samples)
    assert (manifest.variants["fp32"].agreement, manifest.variants["fp32"].method) == (None, None)
    for name in ("fp16", "int8"):
        variant = manifest.variants[name]
        found = GuardedClassifier.load(bundle, precision=name, threads=1).run(samples)
        agreement = variant.agreement
        assert agreement is not None
        assert agreement.clean == (found.logits.argmax(1) == full.logits.argmax(1)).mean() >= agreement.least
        assert agreement.triggered is not None
        difference = np.abs(found.logits_original - full.logits_original).max()
        assert agreement.max_logit_difference == pytest.approx(difference)
        assert 0 < difference < 2
        assert variant.parity is None
        assert f"| `{name}` ({variant.method})" in (bundle / "README.md").read_text()
    assert manifest.variants["int8"].method in ("int8 dynamic", "int8 static")


def test_verify_refuses_answers_that_agree_too_seldom(bundle: Path, tiny_run: Path) -> None:
    variant, parts = open_bundle(bundle).manifest.variants["int8"], read_parts(PurifyRun.open(tiny_run))
    session = Session((bundle / variant.file).read_bytes(), size=32, classes=len(CLASSES), threads=1)
    agreement = variant.agreement
    assert agreement is not None
    assert "answered alike" in _agreeing(variant, agreement, session, parts).outcome
    with pytest.raises(CheckError, match=r"model\.int8\.onnx answers .* as torch does, not 101\.0%"):
        _agreeing(variant, agreement.model_copy(update={"least": 1.01}), session, parts)


@pytest.mark.parametrize(
    ("sizes", "agreements", "chosen"),
    [
        ((100, 100), (0.98, 0.99), 1),
        ((76, 100), (0.98, 0.99), 1),
        ((75, 100), (0.98, 0.99), 1),
        ((74, 100), (0.98, 0.99), 0),
        ((100, 74), (0.99, 0.98), 1),
        ((100, 50), (0.98, 0.99), 1),
    ],
)
def test_of_two_ways_one_smaller_by_more_than_a_quarter_wins_else_the_one_that_agrees_more(
    sizes: tuple[int, int], agreements: tuple[float, float], chosen: int
) -> None:
    found: list[Any] = [
        SimpleNamespace(data=bytes(size), agreement=SimpleNamespace(clean=clean))
        for size, clean in zip(sizes, agreements, strict=True)
    ]
    assert variants._better(found) is found[chosen]


def test_each_precision_has_its_own_self_test(bundle: Path, tmp_path: Path) -> None:
    names = {name: variant.golden for name, variant in open_bundle(bundle).manifest.variants.items()}
    assert names == {"fp32": "golden.npz", "fp16": "golden.fp16.npz", "int8": "golden.int8.npz"}
    guard = GuardedClassifier.load(bundle, precision="int8", threads=1)
    assert guard.self_test(variants_golden(bundle, "int8")) < 1e-3
    assert guard.self_test(variants_golden(bundle, "fp32")) > 1e-2


def variants_golden(bundle: Path, name: str) -> object:
    from cbpt_guard.bundle import load_golden

    manifest = open_bundle(bundle).manifest
    return load_golden((bundle / manifest.variants[name].golden).read_bytes())


def test_verify_looks_at_every_precision(bundle: Path, tiny_run: Path) -> None:
    checks = {check.name for check in verify(bundle, deep=True, run=PurifyRun.open(tiny_run)).checks}
    for file in ("model.onnx", "model.fp16.onnx", "model.int8.onnx"):
        assert {f"graph {file}", f"reference {file}", f"torch {file}"} <= checks
    assert {"golden fp32", "golden fp16", "golden int8"} <= checks


def test_fp16_keeps_norms_softmax_and_head_in_fp32(bundle: Path, samples: np.ndarray) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle / "model.fp16.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kept = [node for node in model.graph.node if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2")]
    assert {types[node.input[0]] for node in kept} == {TensorProto.FLOAT}
    assert {node.op_type for node in kept} == {"LayerNormalization", "Softmax", "ReduceL2"}
    weights = [tensor for tensor in model.graph.initializer if "mlp" in tensor.name and "weight" in tensor.name]
    assert {tensor.data_type for tensor in weights} <= {TensorProto.FLOAT16}
    head = [
        tensor for tensor in model.graph.initializer if list(tensor.dims) in ([32, len(CLASSES)], [len(CLASSES), 32])
    ]
    assert head
    assert {tensor.data_type for tensor in head} == {TensorProto.FLOAT}
    halves = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
    assert sum(np.prod(tensor.dims) for tensor in halves) > 90_000
    outputs = GuardedClassifier.load(bundle, precision="fp16", threads=1).run(samples)
    assert np.abs(np.linalg.norm(outputs.embedding, axis=1) - 1).max() < 1e-6  # half precision alone gives 5e-4


def test_the_head_of_an_int8_graph_is_untouched(bundle: Path, samples: np.ndarray, tiny_run: Path) -> None:
    outputs = GuardedClassifier.load(bundle, precision="int8", threads=1).run(samples)
    head = PurifyRun.open(tiny_run).head()
    wanted = head.answer(torch.from_numpy(outputs.embedding))
    assert np.abs(outputs.logits - wanted.logits.numpy()).max() < 1e-3
    assert np.array_equal(outputs.triggered, wanted.triggered.numpy())


def tight_run(folder: Path) -> Path:
    """A run whose test catches every triggered image by a hair in fp32: any rounding lets some of them through."""
    run = write_run(folder)
    parts = read_parts(PurifyRun.open(run))
    head, (trigger, *_) = parts.graph.head, parts.bank
    images = gate.triggered(parts.images[parts.labels != TARGET], trigger)
    distances = torch.from_numpy(parity.torch_outputs(parts.graph, images).embedding) @ head.test.directions[TARGET]
    thresholds = head.test.thresholds.clone()
    thresholds[TARGET] = distances.min() - 1e-4
    replace(head, test=TriggerTest(head.test.directions, thresholds)).save(run / "heads.safetensors")
    record = json.loads((run / "run.json").read_text())
    record["suspects"][0]["threshold"] = thresholds[TARGET].item()
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_quantising_that_brings_the_backdoor_back_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tight_run(tmp_path / "run")
    model = to_onnx(read_parts(PurifyRun.open(run)).graph, 32, 18)
    monkeypatch.setattr(write, "to_onnx", lambda *_: model)
    with pytest.raises(CheckError, match=r"int8 \w+ does not pass its gate: found-trigger ASR \d+\.\d%") as caught:
        export(run, tmp_path / "bundle", precision=["fp32", "int8"])
    assert "Leave out --precision int8" in str(caught.value)
    assert not (tmp_path / "bundle").exists()
    full = open_bundle(export(run, tmp_path / "bundle")).manifest.variants["fp32"]
    assert full.gate.found_trigger_asr == 0.0
    recorded = open_bundle(export(run, tmp_path / "other", precision=["int8"], allow_unguarded=True)).manifest
    assert recorded.variants["int8"].gate.found_trigger_asr > 0.05
    assert recorded.allow_unguarded
    assert recorded.verdict == "not guarded", "the run's verdict is of another graph"
    assert re.match(r"int8 \w+ does not pass its gate: found-trigger ASR", recorded.reasons[0])
    assert "**Verdict: not guarded.**\n- int8 " in (tmp_path / "other" / "README.md").read_text()
    command = cli("export", "--run", run, "--out", tmp_path / "third", "--precision", "fp32", "--precision", "int8")
    assert_refused(
        command, "int8 static does not pass its gate", "found-trigger ASR", "on 40 of the run's images", code=1
    )
    assert not (tmp_path / "third").exists()


@pytest.mark.usefixtures("traced")
def test_a_variant_that_answers_otherwise_is_refused_even_if_it_is_accurate(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "LEAST_AGREEMENT", 1.01)
    with pytest.raises(CheckError, match=r"fp16 does not pass its gate: it answers 100\.0% of 40 of the run's images"):
        export(tiny_run, tmp_path / "bundle", precision=["fp16"])
    assert not (tmp_path / "bundle").exists()


def outputs_of(logits: np.ndarray, original: np.ndarray, flagged: np.ndarray) -> Outputs:
    return Outputs(logits, flagged, original, np.zeros((len(logits), 32), np.float32))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (1, None),
        (2, r"int8 does not pass its gate: it flags 5\.0% of 40 clean images of the run, at most 1\.0% is allowed"),
    ],
)
def test_a_precision_that_flags_clean_images_is_refused(more: int, said: str | None, tiny_run: Path) -> None:
    """Parity carries the verdict's bound over to fp32 and to nothing else; of one image it is no rate."""
    parts = read_parts(PurifyRun.open(tiny_run))
    right = np.eye(len(CLASSES), dtype=np.float32)[parts.labels]
    flagged = np.arange(len(right)) < more
    with pytest.raises(CheckError, match=said) if said else nullcontext():
        gate.check_clean(
            outputs_of(right, right, flagged), outputs_of(right, right, np.zeros(len(right), bool)), parts, "int8"
        )
    gate.check_clean(outputs_of(right, right, flagged), outputs_of(right, right, flagged), parts, "int8")


@pytest.mark.parametrize(("lost", "refused"), [(1, False), (2, True)])
def test_a_precision_that_loses_the_targets_own_images_is_refused(lost: int, refused: bool, tiny_run: Path) -> None:
    parts = read_parts(PurifyRun.open(tiny_run))
    right = np.eye(len(CLASSES), dtype=np.float32)[parts.labels]
    own, wrong = np.flatnonzero(parts.labels == TARGET), right.copy()
    assert len(own) >= 2
    wrong[own[:lost]] = np.eye(len(CLASSES))[TARGET - 1]
    none = np.zeros(len(right), bool)
    said = rf"int8 .*of {len(own)} clean images of the suspected .* are recognised, 100\.0% without the guard"
    with pytest.raises(CheckError, match=said) if refused else nullcontext():
        gate.check_clean(outputs_of(wrong, right, none), outputs_of(right, right, none), parts, "int8")
    gate.check_clean(outputs_of(wrong, right, none), outputs_of(wrong, right, none), parts, "int8")


def test_what_fp32_loses_is_no_allowance_on_top_of_the_bound(tiny_run: Path) -> None:
    """Held against the zero-shot answers, by the larger of the verdict's bound and what fp32 loses on these images."""
    parts = read_parts(PurifyRun.open(tiny_run))
    right = np.eye(len(CLASSES), dtype=np.float32)[parts.labels]
    own, none = np.flatnonzero(parts.labels == TARGET), np.zeros(len(right), bool)

    def losing(count: int) -> np.ndarray:
        wrong = right.copy()
        wrong[own[:count]] = np.eye(len(CLASSES))[TARGET - 1]
        return wrong

    assert len(own) >= 5
    bounds = parts.bounds.model_copy(update={"recall_loss": 1.5 / len(own)})  # one image, and two with what fp32 loses
    parts, full = replace(parts, bounds=bounds), outputs_of(losing(2), right, none)
    gate.check_clean(outputs_of(losing(2), right, none), full, parts, "int8")
    for count in (3, 4):
        with pytest.raises(CheckError, match="of the suspected"):
            gate.check_clean(outputs_of(losing(count), right, none), full, parts, "int8")


@pytest.mark.usefixtures("traced")
def test_an_export_asks_what_a_precision_does_to_clean_images(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(clean: Outputs, full: Outputs, parts: object, name: str) -> None:
        raise CheckError(f"{name} flags too many")

    monkeypatch.setattr(variants, "check_clean", failing)
    with pytest.raises(CheckError, match="fp16 flags too many"):
        export(tiny_run, tmp_path / "bundle", precision=["fp16"])
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("traced")
def test_lost_accuracy_counts_against_the_fp32_graph(
    bundle: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose zero-shot head is as broken as its guarded one loses nothing against itself."""
    model = onnx.load(bundle / "model.fp16.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and len(tensor.dims) > 1:
            tensor.raw_data = bytes(len(tensor.raw_data))
    monkeypatch.setattr(variants, "reduced", lambda *_: {"fp16": model.SerializeToString()})
    with pytest.raises(CheckError, match=r"fp16 does not pass its gate: it loses \d+\.\d% of clean accuracy"):
        export(tiny_run, tmp_path / "bundle", precision=["fp16"])


@pytest.mark.usefixtures("traced")
def test_a_bundle_of_int8_alone_is_served_when_asked_for(tiny_run: Path, tmp_path: Path) -> None:
    bundle = export(tiny_run, tmp_path / "bundle", precision=["int8"])
    assert not (bundle / "model.onnx").exists()
    assert (
        GuardedClassifier.load(bundle, precision="int8", threads=1).manifest.variants["int8"].file == "model.int8.onnx"
    )
    with pytest.raises(InputError, match="no 'fp32' graph; it has int8"):
        GuardedClassifier.load(bundle)


def test_names(tiny_run: Path, tmp_path: Path) -> None:
    assert check_precisions(["int8", "fp32", "int8"]) == ("fp32", "int8")
    for wrong in (["fp8"], ["fp32", "int4"], []):
        with pytest.raises(InputError, match="one or more of fp32, fp16, int8"):
            export(tiny_run, tmp_path / "bundle", precision=wrong)
    assert not (tmp_path / "bundle").exists()


def test_a_graph_that_cannot_be_converted_says_so(samples: np.ndarray) -> None:
    with pytest.raises(CheckError, match="cannot be converted to int8"):
        precision.reduced(b"no graph", "int8", samples)
