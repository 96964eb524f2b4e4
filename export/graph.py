"""The served graph: encoder, both heads and the rule in one ONNX model with uint8 pixels at its door."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from cbpt_guard.bundle import GRAPH_INPUT, GRAPH_OUTPUTS
from cbpt_guard.defense.clip import ImageEncoder, to_pixels
from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export.plainer import plainer

OPSETS: Final = range(18, 26)
"""From the exporter's own opset to the last that onnxscript converts to; beyond, it mislabels the model."""

_ONE_FILE = 2 * 1024**3 - 64 * 1024**2  # protobuf's limit, less what the nodes themselves take
_EXAMPLE_BATCH = 2  # with one image the exporter bakes the 1 into a graph that claims to be dynamic
_NOISY = ("torch", "onnxscript", "onnx_ir")
_LOCAL_TRACES = ("metadata_props", "doc_string")  # where the exporter leaves stack traces with local paths


class GuardedGraph(nn.Module):
    """Encoder, heads and rule as one module; the maths of heads and rule is `GuardedHead`'s own."""

    def __init__(self, encoder: ImageEncoder, head: GuardedHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of uint8 (N, S, S, 3): guarded logits (N, C), flags (N,), zero-shot logits (N, C), features (N, E)."""
        embedding = self.encoder(to_pixels(image))
        answer = self.head.answer(embedding)
        return answer.logits, answer.triggered, answer.original, embedding


def check_opset(opset: int) -> None:
    """Refuse an opset that the exporter does not write, with `InputError`."""
    if opset not in OPSETS:
        raise InputError(f"opset {opset} cannot be exported; pass {OPSETS[0]} to {OPSETS[-1]}")


def to_onnx(graph: GuardedGraph, size: int, opset: int) -> bytes:
    """The ONNX model of the graph for images of side `size`: a dynamic batch, and no trace of this machine.

    Raises:
        CheckError: the exporter cannot express this architecture.
        InputError: the opset is out of range, or the weights are too large for one ONNX file.
    """
    check_opset(opset)
    check_size(graph)
    example = torch.zeros(_EXAMPLE_BATCH, size, size, 3, dtype=torch.uint8)
    with _quiet(), plainer(graph):
        try:
            program: Any = torch.onnx.export(
                graph,
                (example,),
                input_names=[GRAPH_INPUT],
                output_names=list(GRAPH_OUTPUTS),
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter wraps whatever its passes raise
            first = str(error).strip().partition("\n")[0]
            raise CheckError(f"this architecture cannot be exported to ONNX: {first[:300]}") from error
    model = program.model_proto
    without_traces(model)
    return bytes(model.SerializeToString())


def check_size(module: nn.Module, name: str = "this model") -> None:
    """Refuse an image encoder whose weights no ONNX file can hold, with `InputError`; `meta` tensors will do."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if size > _ONE_FILE:
        raise InputError(
            f"{name} cannot be exported: its image encoder's weights take {size / 1e9:.1f} GB; one ONNX file holds at "
            "most 2 GB and weights beside it are not supported"
        )


def without_traces(message: Message) -> None:
    """Clear what tools write about themselves and this machine into a model's nodes."""
    for field, value in message.ListFields():
        if field.name in _LOCAL_TRACES:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                without_traces(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's log lines and warnings: what matters of them is checked afterwards."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
