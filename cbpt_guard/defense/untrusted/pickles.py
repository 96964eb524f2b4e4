"""Pickles inside a checkpoint: what they ask for is listed before anything is loaded, and by name alone."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import cast

import torch

from cbpt_guard.defense.untrusted import archives
from cbpt_guard.defense.untrusted.opcodes import Requests, list_requests
from cbpt_guard.errors import CheckpointError, UnsafeError

_DTYPES = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")
_WHOLE = ("int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "ComplexFloat", "ComplexDouble", "Untyped")
_WHOLE_STORAGES = ("Long", "Int", "Short", "Char", "Byte", "Bool")

TENSORS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.nn.parameter.Parameter",
        "torch.storage.UntypedStorage",
        "torch.Size",
        "torch.device",
        "_codecs.encode",
        "builtins.set",
        "builtins.complex",
        "builtins.bytearray",
    }
    | {f"torch.{name}" for name in (*_DTYPES, *_WHOLE)}
    | {f"torch.{name}Storage" for name in (*_STORAGES, *_WHOLE_STORAGES)}
)
"""Globals of plain tensors; torch's restricted unpickler knows each of them."""

BYSTANDERS = frozenset(
    {
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "torch.torch_version.TorchVersion",
    }
    | {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
    | {f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool", "Str")}
)
"""What training scripts keep beside the weights (arguments, learning rates): read past, never constructed."""

UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch.serialization._get_layout": "sparse tensors",
    "torch._utils._rebuild_qtensor": "quantized tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensors, which hold no values",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_wrapper_subclass": "tensor subclasses",
    "torch._utils._rebuild_device_tensor_from_numpy": "tensors of a foreign device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensors of a foreign device",
    "torch._tensor._rebuild_from_type_v2": "tensors with Python attributes",
    **{f"torch.{kind}Storage": "quantized tensors" for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
    **{f"torch.per_{part}": "quantized tensors" for part in ("tensor_affine", "channel_affine")},
}
"""Harmless, but not a weight: the reason is told by name."""

_TORCH_REASON = "WeightsUnpickler error:"  # what stands before it in torch's message is advice to switch it off
_LEGACY_PICKLES = 5  # magic number, protocol, system, object, storage keys; raw storages follow


class _Bystander:
    """Stands in for an allow-listed class that is no tensor: takes anything, keeps nothing."""

    def __new__(cls, *_: object) -> _Bystander:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def scan(path: Path) -> Requests:
    """List what the pickles in a file ask for, loading none; a stream is listed as far as it goes.

    Raises:
        UnsafeError: it is a tar archive of torch's first format, which has no safe reader.
    """
    found = Requests()
    with path.open("rb") as file:
        if archives.is_zip(file):
            found.problem = archives.problem_of(file)
            found.ambiguous = archives.is_ambiguous(file)
            for stream in archives.zip_pickles(file):
                list_requests(stream, found)
            return found
        for _ in range(_LEGACY_PICKLES):
            if not list_requests(file, found):
                break  # what follows a broken stream is no pickle
        if zipfile.is_zipfile(file):  # with something before it: torch goes by the head, others by the tail
            tail = Requests()
            for stream in archives.zip_pickles(file):
                list_requests(stream, tail)
            found.globals |= tail.globals
            found.opcodes |= tail.opcodes
        if "storages" in archives.tar_names(file):
            raise UnsafeError(
                "refused, nothing was run: a tar archive of torch's first format, which only a reader that runs its "
                "pickles can open. If you trust its origin, load it there and save `model.state_dict()`"
            )
    return found


def refuse_code(found: Requests, also: frozenset[str] = frozenset()) -> None:
    """Raise when a pickle asks for more than plain tensors.

    Raises:
        UnsafeError: a global outside the allow-lists and `also`, or an opcode that would run code.
        CheckpointError: a harmless global that stands for unsupported tensors.
    """
    asked = found.globals - TENSORS - BYSTANDERS - also - set(UNSUPPORTED)
    if asked or found.opcodes:
        names = [*sorted(asked), *(f"opcode {name}" for name in sorted(found.opcodes))]
        raise UnsafeError(
            f"refused, nothing was run: its pickle asks for {_shorten(names)}, which plain tensors never do. "
            "If you trust its origin, save `model.state_dict()` there (best as .safetensors) and use that"
        )
    if found.ambiguous:
        raise UnsafeError(
            "refused, nothing was run: readers would not agree on what its zip archive holds, which hides something; "
            "torch writes none such. If you trust its origin, save `model.state_dict()` there again"
        )
    for name in sorted(found.globals & set(UNSUPPORTED)):
        raise CheckpointError(f"it holds {UNSUPPORTED[name]} ({name}); save plain dense tensors")


def load(path: Path) -> object:
    """`torch.load(weights_only=True)` of a scanned file, with bystanders replaced by empty stand-ins.

    Raises:
        UnsafeError: torch's restricted unpickler met a global that it refuses.
        CheckpointError: the file is damaged.
    """
    stand_ins = cast("list[object]", [(_Bystander, name) for name in sorted(BYSTANDERS)])
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        told = str(error).partition(_TORCH_REASON)[2].partition("\n")[0].strip()
        reason = excerpt(told or "save it again with torch.save as it is, without `pickle_protocol`")
        if "GLOBAL" in reason:
            raise UnsafeError(f"refused, nothing was run: {reason}") from error
        raise CheckpointError(f"its pickle is damaged or of an unsupported protocol: {reason}") from error


def _shorten(names: list[str], most: int = 5) -> str:
    shown = ", ".join(excerpt(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def excerpt(text: str, length: int = 160) -> str:
    """Text from a hostile file, safe for a terminal."""
    return ascii(text[:length])[1:-1]
