"""Smaller numbers for the same graph: half precision, and 8 bits by two methods. The gate says what they are worth."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from cbpt_guard.bundle import GRAPH_INPUT
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export.graph import without_traces
from cbpt_guard.images import Pixels
from cbpt_guard.onnxfile import STANDARD

PRECISIONS: Final = ("fp32", "fp16", "int8")
_IN_FP32: Final = (
    *("LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization"),
    *("Softmax", "ReduceL2", "ReduceMean", "ReduceSum", "Pow", "Sqrt"),
)
"""Norms, also those that an exporter spells out, and softmax: half precision overflows or flattens there."""

_QUANTISED: Final = ("Conv", "Gemm", "MatMul", "Clip", "Relu", "Add", "MaxPool", "AveragePool", "GlobalAveragePool")
"""With their activations where they follow: a range is measured after the clipping, not before."""

_CALIBRATED, _BATCH = 128, 8
_EARLY: Final = 4  # the first quarter
_EMBEDDING: Final = "embedding"
_LENGTH: Final = ("Clip", "Expand", "Max", "ReduceL2")  # how the exporter spells a division by the length


def check_precisions(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repeats, in the order of `PRECISIONS`; `InputError` for another or none."""
    unknown = sorted(set(names) - set(PRECISIONS))
    if unknown or not names:
        raise InputError(f"precision {', '.join(unknown) or 'missing'}; it is one or more of {', '.join(PRECISIONS)}")
    return tuple(name for name in PRECISIONS if name in names)


def reduced(data: bytes, precision: str, images: Pixels) -> dict[str, bytes]:
    """The fp32 graph in another precision, by each method that there is, named in words.

    `images` uint8 (N, S, S, 3) calibrate the static int8 graph. The normalisation of the embedding, both heads
    and the rule stay in fp32 as they are.

    Raises:
        CheckError: the graph cannot be converted.
    """
    try:
        with _quiet():
            if precision == "fp16":
                return {"fp16": _half(data)}
            return {"int8 dynamic": _dynamic(data), "int8 static": _static(data, images)}
    except Exception as error:  # the converters raise whatever their passes raise
        raise CheckError(f"this graph cannot be converted to {precision}: {str(error)[:300]}") from error


def _half(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    kept = _head_nodes(model) + _scalings(model)
    operators = [*DEFAULT_OP_BLOCK_LIST, *_IN_FP32]
    model = convert_float_to_float16(model, keep_io_types=True, op_block_list=operators, node_block_list=kept)
    _join_casts(model)
    return _finished(model)


def _dynamic(data: bytes) -> bytes:
    """Weights in 8 bits; activations are quantised as they come. Convolutions are left: theirs would be slower."""
    model = onnx.load_model_from_string(data)
    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(
            model,
            Path(folder) / "int8.onnx",
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_head_nodes(model),
            extra_options={"MatMulConstBOnly": True},
        )
        return _finished(onnx.load(Path(folder) / "int8.onnx"))


def _static(data: bytes, images: Pixels) -> bytes:
    """Weights and activations in 8 bits, the latter's ranges measured on images."""
    model = onnx.load_model_from_string(data)
    with tempfile.TemporaryDirectory() as folder:
        quantize_static(
            model,
            Path(folder) / "int8.onnx",
            _Batches(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTISED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_head_nodes(model) + _sensitive_nodes(model),
            extra_options={"MatMulConstBOnly": True},
        )
        return _finished(onnx.load(Path(folder) / "int8.onnx"))


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Evenly chosen images, a few at a time."""

    def __init__(self, images: Pixels) -> None:
        chosen = np.linspace(0, len(images) - 1, min(len(images), _CALIBRATED)).astype(int)
        self._batches = iter([images[chosen[i : i + _BATCH]] for i in range(0, len(chosen), _BATCH)])

    def get_next(self) -> dict[str, Pixels] | None:
        """The next batch, or None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {GRAPH_INPUT: batch}


def _head_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of everything from the embedding's normalisation on, to the doors."""
    producer = {name: node for node in model.graph.node for name in node.output}
    last = producer[_EMBEDDING]
    features, *waiting = last.input
    between = {last.name}
    while waiting:  # from the length of the features back to the features themselves
        node = producer.get(waiting.pop())
        if node is not None and node.op_type in _LENGTH:
            between.add(node.name)
            waiting += [name for name in node.input if name != features]
    reached = {_EMBEDDING}
    for node in model.graph.node:  # in topological order, as ONNX demands
        if reached & set(node.input):
            reached |= set(node.output)
            between.add(node.name)
    return [node.name for node in model.graph.node if node.name in between]


def _sensitive_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of what 8-bit activations hurt most and save least: a network's first convolutions, and depthwise ones.

    On the shared MobileNetV2 leaving them takes the features' mean cosine with fp32 from 0.970 to 0.993, and
    keeps the file at a third.
    """
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    early = {node.name for node in convolutions[: len(convolutions) // _EARLY]}
    last = max((place for place, node in enumerate(model.graph.node) if node.name in early), default=-1)
    depthwise = [node.name for node in convolutions if any(a.name == "group" and a.i > 1 for a in node.attribute)]
    return [node.name for node in model.graph.node[: last + 1]] + depthwise


def _scalings(model: onnx.ModelProto) -> list[str]:
    """Names of the scalings of queries and keys, which feed the softmax.

    In fp16 they make onnxruntime 1.32 die while it loads the graph on a CPU, in its pass over memory layouts.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    products = [set(node.input) for node in model.graph.node if node.op_type == "MatMul"]
    scaled = {name for inputs in products if not inputs & constant for name in inputs}
    return [node.name for node in model.graph.node if node.op_type == "Mul" and node.output[0] in scaled]


def _join_casts(model: onnx.ModelProto) -> None:
    """Between two nodes that stay in fp32 the converter rounds to fp16 and back: take the number as it was."""
    to = {name: node for node in model.graph.node if node.op_type == "Cast" for name in node.output}
    for node in to.values():
        inner = to.get(node.input[0])
        if inner is not None and (_target(inner), _target(node)) == (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT):
            node.input[0] = inner.input[0]
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for node in [node for node in to.values() if not used & set(node.output)]:
        model.graph.node.remove(node)


def _target(cast: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in cast.attribute if attribute.name == "to")


def _finished(model: onnx.ModelProto) -> bytes:
    """Sorted, and without the operator domains that converters declare and do not use."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used | set(STANDARD[:1])]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    ONNXModel(model).topological_sort()  # converters append their nodes at the end
    del model.graph.value_info[:]  # types between nodes, some of them overtaken by what was changed
    without_traces(model)
    return bytes(model.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converters' advice on the root logger."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
