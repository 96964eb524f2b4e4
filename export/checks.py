"""What a bundle's ONNX file must be: valid, whole, of ONNX's own operators, with the promised doors."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError, Message

from cbpt_guard.errors import BundleError
from cbpt_guard.manifest import Graph
from cbpt_guard.onnxfile import STANDARD


def check_graph(data: bytes, graph: Graph) -> None:
    """Check the bytes of an ONNX file against the manifest's entry for its graph.

    Raises:
        BundleError: it is no valid ONNX model, needs operators or files from elsewhere, or has other doors.
    """
    model = _parse(data)
    _check_standard_only(model)
    _check_self_contained(model)
    _check_doors(model, graph)
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise BundleError(f"onnx's checker refuses the graph: {str(error)[:300]}") from error


def _parse(data: bytes) -> onnx.ModelProto:
    try:
        return onnx.load_model_from_string(data)
    except DecodeError as error:
        raise BundleError(f"the graph is no ONNX file: {error}") from error


def _check_standard_only(model: onnx.ModelProto) -> None:
    """Operators of another domain may be anything, and a local function may replace a standard one."""
    messages = list(_messages(model))
    used = {node.domain for node in messages if isinstance(node, onnx.NodeProto)}
    imported = {entry.domain for entry in model.opset_import}
    foreign = sorted((used | imported) - set(STANDARD))
    if foreign:
        raise BundleError(f"the graph uses operators of {', '.join(foreign)}; only ONNX's own are allowed")
    if model.functions:
        raise BundleError(f"the graph defines {len(model.functions)} functions of its own; none are allowed")


def _check_self_contained(model: onnx.ModelProto) -> None:
    tensors = (message for message in _messages(model) if isinstance(message, onnx.TensorProto))
    outside = [t.name for t in tensors if t.external_data or t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise BundleError(f"{len(outside)} tensors lie in other files ({outside[0]}, ...); none may")


def _check_doors(model: onnx.ModelProto, graph: Graph) -> None:
    opsets = {entry.version for entry in model.opset_import}
    if opsets != {graph.opset}:
        raise BundleError(f"the graph is of opset {sorted(opsets)}, expected {graph.opset}")
    initial = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in initial]
    outputs = tuple(value.name for value in model.graph.output)
    if inputs != [graph.input] or outputs != graph.outputs:
        raise BundleError(f"the graph's doors are {inputs} and {outputs}, expected {graph.input!r}, {graph.outputs}")
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if not dimensions or not dimensions[0].dim_param:
            raise BundleError(f"the graph's {value.name} has a fixed batch")


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _messages(part)
