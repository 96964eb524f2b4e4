"""`export --layout triton`: a repository whose config fits Triton's own schema and the ONNX file's own doors."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import cli
from google.protobuf import text_format
from small_runs import CLASSES

from cbpt_guard import GuardedClassifier
from cbpt_guard.errors import InputError
from cbpt_guard.export import export, triton, verify, write


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's `ModelConfig`, from the client's generated module; its package would also want gRPC."""
    try:
        path = next(file for file in files("tritonclient") or () if file.name == "model_config_pb2.py")
    except PackageNotFoundError:
        pytest.skip("tritonclient is not installed; it carries the schema of config.pbtxt")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path.locate())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


@pytest.fixture
def traced(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the small run take its graph from the shelf."""
    model = (exported / "model.onnx").read_bytes()
    monkeypatch.setattr(write, "to_onnx", lambda *_: model)


@pytest.fixture
def repository(traced: None, tiny_run: Path, tmp_path: Path) -> Path:
    return export(tiny_run, tmp_path / "models", layout="triton")


def test_the_config_fits_tritons_schema_and_the_graph(repository: Path, schema: Any) -> None:
    config = text_format.Parse((repository / "guarded" / "config.pbtxt").read_text(), schema())
    assert (config.name, config.backend, config.max_batch_size) == ("guarded", "onnxruntime", 32)
    assert config.HasField("dynamic_batching")
    model = onnx.load(repository / "guarded" / "1" / config.default_model_filename)
    kinds = {
        onnx.TensorProto.UINT8: "TYPE_UINT8",
        onnx.TensorProto.FLOAT: "TYPE_FP32",
        onnx.TensorProto.BOOL: "TYPE_BOOL",
    }
    for ours, theirs in ((config.input, model.graph.input), (config.output, model.graph.output)):
        assert [door.name for door in ours] == [value.name for value in theirs]
        for door, value in zip(ours, theirs, strict=True):
            tensor = value.type.tensor_type
            batch, *rest = tensor.shape.dim
            assert batch.dim_param  # what max_batch_size and dynamic batching need
            kind = type(door).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[door.data_type].name
            assert kind == kinds[tensor.elem_type]
            shape = list(door.reshape.shape) if door.HasField("reshape") else list(door.dims)
            assert shape == [dimension.dim_value for dimension in rest]
            assert door.dims  # Triton takes no empty one
    assert list(config.input[0].dims) == [32, 32, 3]
    labelled = {door.name for door in config.output if door.label_filename == "labels.txt"}
    assert labelled == {"logits", "logits_original"}


def test_the_schema_would_notice(schema: Any) -> None:
    for wrong in ('max_batch_size: "8"', "input [ { name: 'x' data_type: TYPE_UINT9 dims: [ 1 ] } ]", "batching { }"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, schema())


def test_labels_stand_one_a_line(repository: Path) -> None:
    assert (repository / "guarded" / "labels.txt").read_text(encoding="utf-8").splitlines() == list(CLASSES)


def test_the_version_is_a_bundle(repository: Path, exported: Path) -> None:
    version = repository / triton.VERSION
    assert verify(version).digest == verify(exported).digest
    images = np.zeros((2, 32, 32, 3), np.uint8)
    ours = GuardedClassifier.load(version, threads=1).run(images)
    assert np.array_equal(ours.logits, GuardedClassifier.load(exported, threads=1).run(images).logits)


def test_a_repository_is_replaced_by_force_only(repository: Path, tiny_run: Path) -> None:
    with pytest.raises(InputError, match="--force"):
        export(tiny_run, repository, layout="triton")
    export(tiny_run, repository, layout="triton", force=True)
    assert verify(repository / triton.VERSION).checks


@pytest.mark.parametrize("name", ["resnet", "guarded/2", "guarded/warm.json"])
def test_force_costs_no_other_model_of_the_repository(repository: Path, tiny_run: Path, name: str) -> None:
    (repository / name).mkdir()
    for layout in ("triton", "bundle"):
        with pytest.raises(InputError, match="not replaced"):
            export(tiny_run, repository, layout=layout, force=True)
    assert (repository / name).is_dir()
    assert verify(repository / triton.VERSION).checks


def test_a_model_that_came_meanwhile_is_not_replaced_either(
    repository: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote = write.write_repository

    def meanwhile(*args: Any) -> None:
        (repository / "resnet").mkdir()
        wrote(*args)

    monkeypatch.setattr(write, "write_repository", meanwhile)
    with pytest.raises(InputError, match="resnet"):
        export(tiny_run, repository, layout="triton", force=True)
    assert (repository / "resnet").is_dir()
    assert verify(repository / triton.VERSION).checks


@pytest.mark.usefixtures("traced")
def test_one_precision_and_a_known_layout(tiny_run: Path, tmp_path: Path, schema: Any) -> None:
    with pytest.raises(InputError, match="serves one precision, not fp32, int8"):
        export(tiny_run, tmp_path / "models", layout="triton", precision=["fp32", "int8"])
    with pytest.raises(InputError, match="bundle or triton"):
        export(tiny_run, tmp_path / "models", layout="torchserve")
    assert not (tmp_path / "models").exists()
    # allowed to fail its gate: that is about the processor's 8-bit products (tests/test_precision.py), not the layout
    out = export(tiny_run, tmp_path / "models", layout="triton", precision=["int8"], allow_unguarded=True)
    config = text_format.Parse((out / "guarded" / "config.pbtxt").read_text(), schema())
    assert config.default_model_filename == "model.int8.onnx"
    assert (out / "guarded" / "1" / "model.int8.onnx").is_file()


@pytest.mark.usefixtures("traced")
def test_the_command(tiny_run: Path, tmp_path: Path) -> None:
    result = cli("export", "--run", tiny_run, "--out", tmp_path / "models", "--layout", "triton")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'models'}\n")
    assert "tritonserver --model-repository" in result.stderr
