"""The runtime's promises, on a whole bundle that was made without torch."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tiny import LABELS, SIZE, tiny_manifest, tiny_model

from cbpt_guard import GuardedClassifier, Prediction
from cbpt_guard.bundle import load_golden, write_manifest
from cbpt_guard.errors import BundleError, CheckError, ImageError, InputError, SetupError
from cbpt_guard.images import ImageLimits
from cbpt_guard.session import Session


def flat(*colour: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), colour, np.uint8)


RED, GREEN, BLUE, GREY, BLACK = (
    flat(255, 0, 0),
    flat(0, 255, 0),
    flat(0, 0, 255),
    flat(128, 128, 128),
    flat(0, 0, 0),
)


@pytest.fixture(scope="module")
def guard(pristine_bundle: Path) -> GuardedClassifier:
    return GuardedClassifier.load(pristine_bundle, threads=1, batch_size=4)


def replace_model(bundle: Path, model: onnx.ModelProto) -> Path:
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(bundle, tiny_manifest())
    return bundle


def test_a_prediction(guard: GuardedClassifier) -> None:
    prediction = guard.predict(GREEN)
    logits = guard.run(GREEN[None]).logits[0].astype(float)
    scores = np.exp(logits) / np.exp(logits).sum()
    assert (prediction.label, prediction.index, prediction.error) == ("green", 1, None)
    assert prediction.score == pytest.approx(scores.max())
    assert [label for label, _ in prediction.top] == [LABELS[i] for i in np.argsort(-logits, kind="stable")]
    assert prediction.top[0] == ("green", prediction.score)
    assert (prediction.changed, prediction.triggered) == (False, False)
    assert prediction.digest == guard.digest
    assert json.loads(json.dumps(prediction.to_dict()))["top"][0] == {
        "label": "green",
        "score": prediction.score,
    }
    with pytest.raises(FrozenInstanceError):
        prediction.label = "red"  # type: ignore[misc]


def test_a_triggered_image_is_flagged_and_answered_otherwise(guard: GuardedClassifier) -> None:
    prediction = guard.predict(RED)
    assert (prediction.triggered, prediction.changed, prediction.label) == (True, True, "yellow")
    assert prediction.top[-1] == ("red", 0.0)
    assert not guard.predict(flat(255, 60, 60)).triggered


def test_every_kind_of_source_gives_the_same_answer(guard: GuardedClassifier, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 71, 3), dtype=np.uint8))
    path = tmp_path / "image.png"
    image.save(path)
    sources = [path, str(path), path.read_bytes(), image, np.asarray(image), Image.open(path)]
    assert len({guard.predict(source) for source in sources}) == 1
    assert np.ptp(guard.predict_proba(sources), axis=0).max() < 1e-6
    assert guard.predict(GREY) == guard.predict(Image.open(io.BytesIO(png(GREY))))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_list_keeps_its_order_and_one_bad_image_costs_the_others_nothing(guard: GuardedClassifier) -> None:
    images: list[Any] = [GREEN, b"no image", BLUE, "nowhere.png", RED, BLACK, GREY, None, GREEN, (1, 2), BLUE]
    predictions = guard.predict(images)
    labels = [p.label for p in predictions]
    assert labels == ["green", None, "blue", None, "yellow", None, "grey", None, "green", None, "blue"]
    for place, words in {1: "no image", 3: "nowhere.png", 5: "not finite", 7: "NoneType", 9: "tuple"}.items():
        failed = predictions[place]
        assert words in (failed.error or "")
        assert failed == Prediction(None, None, None, (), False, False, guard.digest, failed.error)
    assert [p.error for p in predictions if p.label is not None] == [None] * 6
    assert predictions[4] == guard.predict(RED)


def test_a_list_of_bad_images_only(guard: GuardedClassifier) -> None:
    assert [p.label for p in guard.predict([b"", b""])] == [None, None]


def test_empty_lists(guard: GuardedClassifier) -> None:
    assert guard.predict([]) == []
    assert guard.predict_proba([]).shape == (0, len(LABELS))
    assert guard.run(np.zeros((0, SIZE, SIZE, 3), np.uint8)).embedding.shape == (0, 3)


def test_predict_proba_and_classes(guard: GuardedClassifier) -> None:
    images = [GREEN, BLUE, RED, GREY, GREEN]
    scores = guard.predict_proba(images)
    assert scores.shape == (5, len(LABELS))
    assert np.allclose(scores.sum(axis=1), 1)
    assert guard.classes_.tolist() == LABELS
    predictions = guard.predict(images)
    assert guard.classes_[scores.argmax(axis=1)].tolist() == [p.label for p in predictions]
    assert scores.max(axis=1).tolist() == [p.score for p in predictions]


def test_single_calls_raise(guard: GuardedClassifier) -> None:
    with pytest.raises(ImageError, match="no image"):
        guard.predict(b"no image")
    with pytest.raises(CheckError, match="not finite"):
        guard.predict(BLACK)
    with pytest.raises(CheckError, match="not finite"):
        guard.predict_proba([GREEN, BLACK])
    with pytest.raises(ImageError, match="image 5: "):
        guard.predict_proba([GREEN] * 5 + [b"no image"])
    with pytest.raises(ImageError, match="takes a list"):
        guard.predict_proba(GREEN)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="passed as a list"):
        guard.predict(np.stack([GREEN, BLUE]))
    with pytest.raises(ImageError, match="type tuple"):
        guard.predict((GREEN, BLUE))  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"takes uint8 \(N, 32, 32, 3\), not uint8 \(1, 33, 32, 3\)"):
        guard.run(np.zeros((1, 33, 32, 3), np.uint8))


def test_abstaining_keeps_what_it_would_have_said(pristine_bundle: Path, guard: GuardedClassifier) -> None:
    careful = GuardedClassifier.load(pristine_bundle, threads=1, abstain=0.95)
    sure, unsure = careful.predict([GREEN, GREY])
    assert sure == guard.predict(GREEN)
    assert (unsure.label, unsure.index, unsure.error) == (None, None, None)
    assert (unsure.score, unsure.top) == (guard.predict(GREY).score, guard.predict(GREY).top)
    assert unsure.score is not None
    assert unsure.score < 0.95
    assert GuardedClassifier.load(pristine_bundle, threads=1, abstain=unsure.score).predict(GREY).label == "grey"


def test_options(pristine_bundle: Path) -> None:
    guard = GuardedClassifier.load(pristine_bundle, threads=2, top=2, limits=ImageLimits(max_pixels=2000))
    assert len(guard.predict(GREEN).top) == 2
    with pytest.raises(ImageError, match="2,000 pixels"):
        guard.predict(Image.new("RGB", (100, 100)))
    assert len(GuardedClassifier.load(pristine_bundle, top=99).predict(GREEN).top) == len(LABELS)
    assert guard.digest in repr(guard)
    for option in ({"batch_size": 0}, {"top": 0}, {"threads": 0}, {"abstain": 1.5}, {"abstain": math.nan}):
        with pytest.raises(InputError):
            GuardedClassifier.load(pristine_bundle, **option)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no 'int8' graph"):
        GuardedClassifier.load(pristine_bundle, precision="int8")


def test_answers_do_not_depend_on_the_batch(pristine_bundle: Path, guard: GuardedClassifier) -> None:
    images = list(np.random.default_rng(5).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8))
    one = GuardedClassifier.load(pristine_bundle, threads=1, batch_size=1)
    assert np.allclose(one.predict_proba(images), guard.predict_proba(images), atol=1e-6)
    assert np.allclose(guard.predict_proba(images[::-1])[::-1], guard.predict_proba(images), atol=1e-6)


def test_eight_threads_get_what_one_gets(guard: GuardedClassifier) -> None:
    generator = np.random.default_rng(7)
    images = [Image.open(io.BytesIO(png(p))) for p in generator.integers(0, 256, (24, 45, 37, 3), dtype=np.uint8)]
    lists = [[*images[i:], *images[:i], b"bad"] for i in range(24)]  # the same lazily opened images in every list
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(guard.predict, lists))
    assert together == [guard.predict(items) for items in lists]


def test_the_digest_pins(pristine_bundle: Path, guard: GuardedClassifier) -> None:
    assert GuardedClassifier.load(pristine_bundle, digest=guard.digest).digest == guard.digest
    with pytest.raises(BundleError, match="is another bundle"):
        GuardedClassifier.load(pristine_bundle, digest="sha256:" + "0" * 64)


def test_providers_are_asked_for_by_name(pristine_bundle: Path) -> None:
    assert GuardedClassifier.load(pristine_bundle, providers=["cpu"]).predict(GREEN).label == "green"
    for wrong in ("gpu", "CPUExecutionProvider", []):
        with pytest.raises(InputError, match="unknown provider"):
            GuardedClassifier.load(pristine_bundle, providers=wrong)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is there")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_an_absent_provider_is_never_replaced_silently(pristine_bundle: Path, monkeypatch: Any) -> None:
    with pytest.raises(SetupError, match=r"lacks cuda; it has .*CPUExecutionProvider"):
        GuardedClassifier.load(pristine_bundle, providers=["cuda", "cpu"])
    # a GPU build on a machine without the driver: it claims CUDA and then serves on the CPU
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(SetupError, match="asked for cuda, but onnxruntime chose CPUExecutionProvider"):
        GuardedClassifier.load(pristine_bundle, providers="cuda")


def test_without_onnxruntime_the_message_names_the_pip_line(pristine_bundle: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SetupError, match=r"pip install 'cbpt-guard\[cpu\]'"):
        GuardedClassifier.load(pristine_bundle)


def scaled(factor: float) -> onnx.ModelProto:
    model = onnx.load_from_string(tiny_model())
    rows = next(tensor for tensor in model.graph.initializer if tensor.name == "rows")
    rows.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(rows) * np.float32(factor), "rows"))
    return model


def test_the_self_test_catches_a_graph_that_answers_otherwise(tiny_bundle: Path) -> None:
    """Its hashes all fit: somebody rewrote the manifest, or this machine computes something else."""
    GuardedClassifier.load(replace_model(tiny_bundle, scaled(1.00001)))
    with pytest.raises(BundleError, match=r"self-test failed: logits differ by 0\.0"):
        GuardedClassifier.load(replace_model(tiny_bundle, scaled(1.001)))
    assert GuardedClassifier.load(tiny_bundle, check=False).predict(GREEN).label == "green"
    with pytest.raises(BundleError, match="differ by nan"):
        GuardedClassifier.load(replace_model(tiny_bundle, scaled(math.nan)))


@pytest.mark.parametrize("output", ["logits", "logits_original"])
def test_the_self_test_looks_at_both_heads(tiny_bundle: Path, output: str) -> None:
    """`changed` is told by the zero-shot logits alone."""
    guard = GuardedClassifier.load(tiny_bundle)
    golden = load_golden((tiny_bundle / "golden.npz").read_bytes())
    guard.self_test(golden)
    with pytest.raises(BundleError, match=r"logits differ by 0\.1"):
        guard.self_test(replace(golden, **{output: getattr(golden, output) + np.float32(0.1)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triggered": np.array([True, False, False, True])}, "flags differ"),
        ({"images": np.zeros((4, 16, 16, 3), np.uint8)}, "does not fit 32 pixels"),
        (
            {"logits": np.zeros((4, 3), np.float32), "logits_original": np.zeros((4, 3), np.float32)},
            "5 classes",
        ),
    ],
)
def test_the_self_test_catches_other_golden_answers(tiny_bundle: Path, change: Any, message: str) -> None:
    with np.load(tiny_bundle / "golden.npz") as golden:
        np.savez(tiny_bundle / "golden.npz", **dict(golden) | change)
    write_manifest(tiny_bundle, tiny_manifest())
    with pytest.raises(BundleError, match=message):
        GuardedClassifier.load(tiny_bundle)


def test_a_graph_with_other_doors_is_refused(tiny_bundle: Path) -> None:
    model = onnx.load_from_string(tiny_model())
    model.graph.output.pop()
    with pytest.raises(BundleError, match="no output named embedding"):
        GuardedClassifier.load(replace_model(tiny_bundle, model), check=False)
    model = onnx.load_from_string(tiny_model())
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64
    with pytest.raises(BundleError, match="the graph's input is"):
        GuardedClassifier.load(replace_model(tiny_bundle, model), check=False)
    (tiny_bundle / "labels.json").write_text('["red", "green"]')
    with pytest.raises(BundleError, match=r"answers \[\(1, 5\), .* for 1 images of 2 classes"):
        GuardedClassifier.load(replace_model(tiny_bundle, scaled(1)), check=False).predict(GREEN)


def test_bytes_that_are_no_graph_are_refused(tiny_bundle: Path) -> None:
    (tiny_bundle / "model.onnx").write_bytes(b"no graph")
    write_manifest(tiny_bundle, tiny_manifest())
    with pytest.raises(BundleError, match=r"model\.onnx is no ONNX file"):
        GuardedClassifier.load(tiny_bundle)
    with pytest.raises(BundleError, match="cannot load the graph"):
        Session(b"no graph", size=SIZE, classes=len(LABELS))
    foreign = onnx.load_from_string(tiny_model())
    foreign.graph.node[0].domain = "org.example"
    foreign.opset_import.append(helper.make_opsetid("org.example", 1))
    with pytest.raises(BundleError, match=r"org\.example"):
        GuardedClassifier.load(replace_model(tiny_bundle, foreign))


def test_a_graph_cannot_reach_files_outside_itself(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    """onnxruntime by itself; that reading the bundle refuses it before is tested in test_trust_bundle.py."""
    monkeypatch.setattr("cbpt_guard.bundle.check_self_contained", lambda *_: None)
    (tmp_path / "secret.bin").write_bytes(bytes(4))
    monkeypatch.chdir(tmp_path)
    for location in ("secret.bin", "../secret.bin", str(tmp_path / "secret.bin")):
        model = onnx.load_from_string(tiny_model())
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "threshold")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        with pytest.raises(BundleError, match="cannot load the graph"):
            GuardedClassifier.load(replace_model(tiny_bundle, model), check=False)
    assert capfd.readouterr() == ("", "")


def test_the_process_holds_neither_torch_nor_onnx(pristine_bundle: Path) -> None:
    code = f"""
import sys
for name in ("torch", "torchvision", "open_clip", "onnx", "safetensors", "sklearn", "timm"):
    sys.modules[name] = None
import numpy as np
import cbpt_guard
assert "onnxruntime" not in sys.modules, "onnxruntime is imported before it is needed"
guard = cbpt_guard.GuardedClassifier.load({str(pristine_bundle)!r}, threads=1)
print(guard.predict(np.full((40, 50, 3), (0, 0, 255), np.uint8)).label)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert (result.stdout, result.stderr) == ("blue\n", "")
