"""A Triton model repository around a bundle: the version folder is the bundle itself, and stays verifiable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx

from cbpt_guard.errors import InputError
from cbpt_guard.manifest import Manifest

NAME: Final = "guarded"
"""The model's name in the repository."""
VERSION: Final = Path(NAME) / "1"
"""Where the bundle lies in the repository; `cbpt-guard verify` and `GuardedClassifier.load` take that folder."""

_CONFIGURED, _LABELS = "config.pbtxt", "labels.txt"
_MAX_BATCH, _QUEUE_DELAY = 32, 2000  # microseconds: what a request may wait for others
_TYPES: Final[dict[int, str]] = {
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}
_LABELLED: Final = ("logits", "logits_original")

_CONFIG = """\
name: "{name}"
backend: "onnxruntime"
default_model_filename: "{file}"
max_batch_size: {max_batch}
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay}
}}
"""


def check_layout(layout: str, precisions: Sequence[str]) -> None:
    """Refuse an unknown layout, and several precisions where one model is served, with `InputError`."""
    if layout not in ("bundle", "triton"):
        raise InputError(f"layout {layout!r} is unknown; it is bundle or triton")
    if layout == "triton" and len(precisions) > 1:
        raise InputError(f"a Triton model serves one precision, not {', '.join(precisions)}; export each by itself")


def write_repository(repository: Path, manifest: Manifest, classes: Sequence[str]) -> None:
    """Write `config.pbtxt` and `labels.txt` beside the bundle that lies in `repository / VERSION`."""
    folder = repository / NAME
    (variant,) = manifest.variants.values()
    model = onnx.load(repository / VERSION / variant.file)
    (folder / _CONFIGURED).write_text(_config(model, variant.file), encoding="utf-8")
    # Triton reads one label a line, and hands it to clients that may print it
    lines = [" ".join("".join(c if c.isprintable() else " " for c in label).split()) for label in classes]
    (folder / _LABELS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def others(repository: Path) -> list[str]:
    """What a repository holds besides ours, by name: other models, and other versions or files of this one."""
    ours = {Path(NAME), VERSION, *(Path(NAME) / name for name in (_CONFIGURED, _LABELS))}
    found = {item.relative_to(repository) for pattern in ("*", f"{NAME}/*") for item in repository.glob(pattern)}
    return sorted(map(str, found - ours))


def _config(model: onnx.ModelProto, file: str) -> str:
    return _CONFIG.format(
        name=NAME,
        file=file,
        max_batch=_MAX_BATCH,
        inputs=",\n".join(map(_door, model.graph.input)),
        outputs=",\n".join(map(_door, model.graph.output)),
        delay=_QUEUE_DELAY,
    )


def _door(value: onnx.ValueInfoProto) -> str:
    """One input or output; the batch is Triton's own dimension, and a number an image has no other."""
    tensor = value.type.tensor_type
    dimensions = [dimension.dim_value for dimension in tensor.shape.dim][1:]
    fields = [f'name: "{value.name}"', f"data_type: {_TYPES[tensor.elem_type]}"]
    fields += [f"dims: [ {', '.join(map(str, dimensions or [1]))} ]"]
    if not dimensions:
        fields.append("reshape { shape: [ ] }")
    if value.name in _LABELLED:
        fields.append(f'label_filename: "{_LABELS}"')
    return "  {\n" + "".join(f"    {field}\n" for field in fields) + "  }"
