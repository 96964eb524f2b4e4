"""What an ONNX file may not hold, read without onnx: operators of others, functions, or tensors in other files.

onnxruntime runs its own operator domains without being asked, and reads files that a model names. A service has
no onnx package to look for either, so the few fields that matter are read here from protobuf's own encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cbpt_guard.errors import BundleError

STANDARD: Final = ("", "ai.onnx")
"""The two names of ONNX's own operator domain."""

# onnx.proto: the fields of each message that lead to nodes and tensors, and the message they hold
_INSIDE: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 8: "opset"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DOMAINS: Final = {("node", 7), ("opset", 1)}
_REFUSED: Final = {
    ("model", 20): "holds a training graph",
    ("model", 25): "defines functions of its own",
    ("tensor", 13): "keeps tensors in other files",
    ("tensor", 14): "keeps tensors in other files",
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST: Final = 100  # as protobuf itself
_ORT_FORMAT: Final = b"ORTM"


class _MalformedError(Exception):
    """The bytes are no protobuf message."""


def check_self_contained(data: bytes, name: str) -> None:
    """Refuse the bytes of a graph that asks for more than ONNX's own operators and its own weights.

    Raises:
        BundleError: it does, or is no ONNX file; the message starts with `name`.
    """
    if data[4:8] == _ORT_FORMAT:
        raise BundleError(f"{name} is in onnxruntime's own format, which cannot be checked; it must be ONNX")
    try:
        problem = next(_problems(data), None)
    except _MalformedError as error:
        raise BundleError(f"{name} is no ONNX file: {error}") from error
    if problem is not None:
        raise BundleError(f"{name} {problem}; a bundle's graph uses ONNX's own operators and its own weights only")


def _problems(data: bytes) -> Iterator[str]:
    graphs, todo = 0, [("model", 0, len(data), 0)]
    while todo:
        message, start, end, depth = todo.pop()
        if depth > _DEEPEST:
            raise _MalformedError(f"nested deeper than {_DEEPEST}")
        for number, wire, first, last in _fields(data, start, end):
            inner = _INSIDE.get(message, {}).get(number)
            if inner is not None and wire == _BYTES:
                graphs += inner == "graph"
                todo.append((inner, first, last, depth + 1))
            elif (message, number) in _DOMAINS and wire == _BYTES:
                domain = data[first:last].decode(errors="replace")
                if domain not in STANDARD:
                    yield f"uses operators of {domain[:80]!r}"
            elif (message, number) in _REFUSED and (wire == _BYTES or (wire == _VARINT and any(data[first:last]))):
                yield _REFUSED[message, number]
    if not graphs:
        raise _MalformedError("it holds no graph")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of a message as (number, wire type, start, end) of its value."""
    while at < end:
        key, at = _varint(data, at, end)
        if not 8 <= key < 2**32:  # parsers differ in what they make of it
            raise _MalformedError(f"a field without a number before byte {at}")
        wire = key & 7
        if wire == _VARINT:
            last = _varint(data, at, end)[1]
        elif wire == _BYTES:
            size, at = _varint(data, at, end)
            last = at + size
        elif wire in (_FIXED64, _FIXED32):
            last = at + (8 if wire == _FIXED64 else 4)
        else:
            raise _MalformedError(f"wire type {wire} at byte {at}")
        if last > end:
            raise _MalformedError(f"a field at byte {at} ends {last - end} bytes beyond its message")
        yield key >> 3, wire, at, last
        at = last


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at >= end:
            raise _MalformedError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, at
    raise _MalformedError(f"an endless number at byte {at}")
