"""What a process may do with a loaded graph, and what onnxruntime's builds and threads are told."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from tiny import LABELS, SIZE, tiny_model

from cbpt_guard import GuardedClassifier, session
from cbpt_guard.errors import BundleError, SetupError
from cbpt_guard.session import Session

FORKED = """
import os, sys
import numpy as np
from cbpt_guard import CbptGuardError, GuardedClassifier

image = np.full((32, 32, 3), (0, 255, 0), np.uint8)
guard = GuardedClassifier.load(sys.argv[1])
if os.fork() == 0:
    try:
        print(guard.predict(image).label, flush=True)
    except CbptGuardError as error:
        print(type(error).__name__, error, flush=True)
    print(GuardedClassifier.load(sys.argv[1]).predict(image).label, flush=True)
    os._exit(0)
os.wait()
print(guard.predict(image).label)
"""


def test_use_after_a_fork_is_a_clear_error_and_loading_there_helps(pristine_bundle: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(pristine_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    said, again, parent = done.stdout.splitlines()
    assert said.startswith("SetupError the graph was loaded in process ")
    assert "load the bundle after forking" in said
    assert (again, parent, done.stderr) == ("green", "green", "")


def test_a_loaded_classifier_does_not_travel(pristine_bundle: Path) -> None:
    guard = GuardedClassifier.load(pristine_bundle, threads=1)
    for travel in (pickle.dumps, copy.deepcopy):
        with pytest.raises(SetupError, match="load the bundle in each process"):
            travel(guard)


def test_the_bytes_are_not_kept_beside_the_weights(pristine_bundle: Path) -> None:
    """onnxruntime keeps them for a fallback; on a large model that is as much memory as the model."""
    session = Session((pristine_bundle / "model.onnx").read_bytes(), size=SIZE, classes=len(LABELS))
    assert session._session._model_bytes is None


BOUNDED = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 26)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[onnxruntime.SessionOptions]:
    """The options of every session that is created."""
    seen: list[onnxruntime.SessionOptions] = []
    real = onnxruntime.InferenceSession

    def create(model: bytes, given: onnxruntime.SessionOptions, **others: object) -> object:
        seen.append(given)
        return real(model, given, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", create)
    return seen


def spinning(options: onnxruntime.SessionOptions) -> tuple[str, str]:
    """Whether threads may spin, and for how long."""
    found = []
    for key in ("allow_spinning", "spin_duration_us"):
        try:
            found.append(options.get_session_config_entry(f"session.intra_op.{key}"))
        except RuntimeError:  # never set
            found.append("")
    return found[0], found[1]


def test_threads_spinning_and_arena_are_arguments(
    pristine_bundle: Path, options: list[onnxruntime.SessionOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    GuardedClassifier.load(pristine_bundle)
    GuardedClassifier.load(pristine_bundle, threads=3, spin=True, arena=False)
    default, chosen = options
    brief = ("1", "50") if BOUNDED else ("0", "")
    assert (spinning(default), default.enable_cpu_mem_arena) == (brief, True)
    assert (chosen.intra_op_num_threads, spinning(chosen), chosen.enable_cpu_mem_arena) == (3, ("1", ""), False)
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.1")
    GuardedClassifier.load(pristine_bundle)  # it knows no bound, and would spin as long as it likes
    assert spinning(options[-1]) == ("0", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    GuardedClassifier.load(pristine_bundle)  # one of 64 processors: onnxruntime would start 64 threads
    assert options[-1].intra_op_num_threads == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    GuardedClassifier.load(pristine_bundle)
    assert options[-1].intra_op_num_threads == 0


def test_a_smaller_batch_limit_changes_no_answer(pristine_bundle: Path) -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8))
    few, many = (GuardedClassifier.load(pristine_bundle, batch_size=size, decoders=1) for size in (2, 100))
    assert [p.label for p in few.predict(images)] == [p.label for p in many.predict(images)]


def test_a_run_leaves_no_thread_spinning(pristine_bundle: Path) -> None:
    """Whoever has work next finds the processor free."""
    guard = GuardedClassifier.load(pristine_bundle, threads=2)
    images = np.zeros((8, SIZE, SIZE, 3), np.uint8)
    spent = []
    for _ in range(5):
        guard.run(images)
        before = time.process_time()
        time.sleep(0.05)
        spent.append(time.process_time() - before)
    assert sorted(spent)[2] < 0.01


@pytest.mark.parametrize(("output", "shape"), [("triggered", []), ("triggered", [4]), ("embedding", [2])])
def test_a_graph_whose_answers_have_odd_shapes_is_a_broken_bundle(output: str, shape: list[int]) -> None:
    model = onnx.load_from_string(tiny_model())
    node = next(node for node in model.graph.node if output in node.output)
    kind = TensorProto.BOOL if output == "triggered" else TensorProto.FLOAT
    odd = helper.make_node("Constant", [], [output], value=helper.make_tensor("v", kind, shape, [0] * math.prod(shape)))
    node.output[list(node.output).index(output)] = "unused"
    for other in model.graph.node:
        other.input[:] = ["unused" if name == output else name for name in other.input]
    model.graph.node.insert(0, odd)
    with pytest.raises(BundleError, match="the graph answers"):
        Session(model.SerializeToString(), size=SIZE, classes=5).run(np.full((3, SIZE, SIZE, 3), 200, np.uint8))


def test_a_later_batch_of_another_length_is_a_broken_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Session(tiny_model(), size=SIZE, classes=5)
    whole = loaded._session

    class Stuck:
        """Answers as many images as it was given first."""

        def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            (pixels,) = feeds.values()
            return list(whole.run(names, {name: np.resize(pixels, (2, *pixels.shape[1:])) for name in feeds}))

    monkeypatch.setattr(loaded, "_session", Stuck())
    images = np.full((3, SIZE, SIZE, 3), 200, np.uint8)
    assert len(loaded.run(images[:2], 2).logits) == 2
    with pytest.raises(BundleError, match="for 1 images of 5 classes"):
        loaded.run(images, 2)


@pytest.mark.parametrize("build", ["onnxruntime", "onnxruntime-gpu"])
def test_the_build_that_is_installed_is_the_one_that_is_told(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def only(name: str) -> str:
        if name != build:
            raise PackageNotFoundError(name)
        return "1.20.0"

    monkeypatch.setattr(session, "version", only)
    assert session.builds_here() == {build: "1.20.0"}


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is there")
def test_two_builds_of_onnxruntime_are_named(
    pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip lets both own one folder and says nothing; only their records tell."""
    with pytest.raises(SetupError, match="lacks cuda") as alone:
        GuardedClassifier.load(pristine_bundle, providers="cuda")
    record = tmp_path / "onnxruntime_gpu-1.20.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.20.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SetupError, match="onnxruntime and onnxruntime-gpu are both installed") as both:
        GuardedClassifier.load(pristine_bundle, providers="cuda")
    with pytest.warns(RuntimeWarning, match="onnxruntime and onnxruntime-gpu are both installed"):
        GuardedClassifier.load(pristine_bundle)  # it works, and is not what anybody installed
    assert "both installed" not in str(alone.value)
    assert "uninstall all, install one" in str(both.value)
