"""Tensors of a TorchScript archive (OpenAI's CLIP files) without running, compiling or importing its code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbpt_guard.defense.untrusted import archives
from cbpt_guard.defense.untrusted.opcodes import Requests
from cbpt_guard.defense.untrusted.pickles import excerpt
from cbpt_guard.errors import CheckpointError, UnsafeError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


class ScriptTensors(NamedTuple):
    """Named tensors, and whether a module of the archive is called QuickGELU."""

    tensors: dict[str, Tensor]
    quickgelu: bool


class _Module:
    """A scripted module reduced to its fields."""

    def __init__(self) -> None:
        self.fields: dict[Any, Any] = {}

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.fields = state


class _QuickGelu(_Module):
    """A scripted module whose class is called QuickGELU."""


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip that carries code."""
    with path.open("rb") as file:
        if not archives.is_zip(file):
            return False
        try:
            return any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(file).namelist())
        except Exception:  # zipfile raises more than BadZipFile on forged fields; the scan tells what is wrong
            return False


def script_globals(found: Requests) -> frozenset[str]:
    """Those globals of a scan that a TorchScript archive may ask for: its own modules and typed lists."""
    own = {name for name in found.globals if name.startswith("__torch__.")}
    return frozenset(own | {f"torch.jit._pickle.{name}" for name in (*_LISTS, "restore_type_tag")})


def load(path: Path) -> ScriptTensors:
    """Read every tensor field of the archive's module tree, float and integer alike.

    Raises:
        UnsafeError: `data.pkl` asks for anything but modules, lists and tensors.
        CheckpointError: the archive is damaged, or big-endian.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = next(name for name in names if name.endswith("/constants.pkl")).rpartition("/")[0]
        if f"{root}/data.pkl" not in names:
            raise CheckpointError("this TorchScript archive has no data.pkl")
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise CheckpointError("this TorchScript archive is big-endian; save it again on this machine")
        reader = _Reader(archive, root)
        tree = reader.load()
    if not isinstance(tree, _Module):
        raise CheckpointError("this TorchScript archive holds no module")
    tensors: dict[str, Tensor] = {}
    _collect(tree, "", tensors, set())
    return ScriptTensors(tensors, reader.quickgelu)


class _Reader(pickle.Unpickler):
    """An unpickler that knows modules without behaviour, lists and tensors: nothing that it calls can act."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}
        self.quickgelu = False

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for here; `UnsafeError` for any that tensors do not need."""
        if module == "__torch__" or module.startswith("__torch__."):
            self.quickgelu = self.quickgelu or name == "QuickGELU"
            return _QuickGelu if name == "QuickGELU" else _Module
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return lambda items: items
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _: value
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        asked = excerpt(f"{module}.{name}")
        raise UnsafeError(f"refused, nothing was run: this TorchScript archive asks for {asked}")

    def persistent_load(self, identity: Any) -> Tensor:
        match identity:
            case ("storage", str(kind), str(key), _, _) if kind in _DTYPES and key.isalnum():
                if key not in self._storages:
                    data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
                    self._storages[key] = _flat(data, _DTYPES[kind])
                return self._storages[key]
        raise CheckpointError("this TorchScript archive refers to something that is no storage")


def _flat(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _view(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A tensor over a storage; `as_strided` refuses what would reach beyond it."""
    return torch.as_strided(flat, size, stride, offset)


def _collect(module: _Module, prefix: str, into: dict[str, Tensor], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    for name, value in module.fields.items():
        if isinstance(value, Tensor):
            into[f"{prefix}{name}"] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", into, seen)
