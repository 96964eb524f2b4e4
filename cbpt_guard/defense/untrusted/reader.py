"""What the confined child does: open an untrusted file, check its tensors, leave safetensors and a report."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cbpt_guard.defense.untrusted import archives, pickles, torchscript
from cbpt_guard.defense.untrusted.pickles import excerpt
from cbpt_guard.defense.untrusted.sandbox import confine
from cbpt_guard.errors import CheckpointError, UnsafeError

OUTPUT = "tensors.safetensors"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_PICKLE_HEADS = (b"PK\x03\x04", b"\x80")
_LONGEST_NAME = 256


@dataclass
class Loaded:
    """A file's named values before any check, and what kind of file it was."""

    values: dict[Any, Any]
    form: str
    quickgelu: bool | None = None


def main(arguments: list[str]) -> int:
    """Read `arguments[0]` under limits; a report on stdout says what was found or why it was refused."""
    source, memory, seconds = arguments
    confine(int(memory), int(seconds))
    sys.stdout.write(json.dumps(report_on(Path(source))))
    return 0


def report_on(source: Path) -> dict[str, object]:
    """Read one file and write its tensors beside it; whatever the bytes are, a report comes back."""
    try:
        loaded = open_file(source)
        tensors, dropped = plain_tensors(loaded.values)
        safetensors.torch.save_file(tensors, source.parent / OUTPUT)
    except UnsafeError as error:
        return {"refused": "unsafe", "message": str(error)}
    except CheckpointError as error:
        return {"refused": "malformed", "message": str(error)}
    except Exception as error:  # hostile bytes may raise anything; nothing that was read survives it
        return {"refused": "malformed", "message": _reason(error)}
    return {"form": loaded.form, "quickgelu": loaded.quickgelu, "dropped": dropped}


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "it asks for more memory than a checkpoint of its size needs; it is forged or damaged"
    return f"it is truncated or damaged ({type(error).__name__}: {excerpt(str(error))}); fetch it again"


def open_file(source: Path) -> Loaded:
    """Read a file by what it is, not by what it is called; only `.safetensors` must be what it says.

    Raises:
        UnsafeError: it would run code, or asks for foreign globals.
        CheckpointError: it is damaged, or of a kind that is not read.
    """
    with source.open("rb") as file:
        head = file.read(9)
    found = pickles.scan(source)
    script = torchscript.is_archive(source)
    # an archive without a readable directory is refused below, and may have been TorchScript
    pickles.refuse_code(found, torchscript.script_globals(found) if script or found.problem else frozenset())
    if head[8:] == b"{":
        return _safetensors(source)
    if source.suffix == ".safetensors":
        raise CheckpointError("it is called .safetensors but is none")
    if not head.startswith(_PICKLE_HEADS):
        raise CheckpointError("it is neither a PyTorch checkpoint nor safetensors")
    if found.problem is not None:
        raise CheckpointError(found.problem)
    if found.broken:
        raise CheckpointError("its pickle is truncated, damaged, or not written by torch.save")
    if script:
        tensors, quickgelu = torchscript.load(source)
        return Loaded(tensors, "TorchScript archive", quickgelu or None)
    loaded = _state_dict(pickles.load(source))
    _check_storages(loaded.values, archives.storage_sizes(source))
    return loaded


def _check_storages(values: dict[Any, Any], sizes: set[int] | None) -> None:
    """torch maps what a storage claims, whatever its entry holds: values would come from elsewhere in the file."""
    for name, value in dict.items(values):
        if sizes is not None and isinstance(value, Tensor) and value.layout == torch.strided:
            claimed = Tensor.untyped_storage(value).nbytes()
            if claimed and claimed not in sizes:
                raise CheckpointError(f"tensor {excerpt(str(name))} claims {claimed:,} bytes that no entry of it holds")


def _safetensors(source: Path) -> Loaded:
    try:
        return Loaded(safetensors.torch.load_file(source), "safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"its safetensors header or size is wrong: {excerpt(str(error))}") from error


def _state_dict(content: object) -> Loaded:
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {type(content).__name__}, not a state dict; save `model.state_dict()`")
    wrapped = [name for name in _WRAPPERS if isinstance(content.get(name), dict)]
    if len(wrapped) > 1:
        raise CheckpointError(f"it holds several state dicts ({', '.join(wrapped)}); save the one you mean by itself")
    if not wrapped:
        return Loaded(content, "state dict")
    form = "open_clip training checkpoint" if wrapped == ["state_dict"] else f"checkpoint (`{wrapped[0]}`)"
    return Loaded(content[wrapped[0]], form)


def plain_tensors(values: dict[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Dense, finite, contiguous and independent tensors, and the names of entries that are no weights.

    Raises:
        CheckpointError: there is no tensor, or one is of a kind that cannot be a weight; it is named.
    """
    tensors: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name, value in dict.items(values):  # unbound: a forged instance may carry an `items` of its own
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
            raise CheckpointError(f"it holds an entry with an impossible name, {excerpt(repr(name))}")
        mask = name.rpartition(".")[2] == "attn_mask"  # rebuilt by the model, and full of -inf
        if mask or not isinstance(value, Tensor):
            dropped.append(name)
        else:
            tensors[name] = _plain(name, value)
    if not tensors:
        raise CheckpointError("it holds no tensors; save `model.state_dict()`")
    return tensors, dropped


def _plain(name: str, value: Tensor) -> Tensor:
    tensor = Tensor.detach(value)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
        raise CheckpointError(f"tensor {name} is {kind}; save plain dense tensors")
    if tensor.dtype not in (*_FLOATS, *_WHOLE):
        raise CheckpointError(f"tensor {name} is {tensor.dtype}, which cannot be a weight here")
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    if tensor.dtype in _FLOATS and not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name} holds NaN or infinite values (as float32)")
    return tensor.clone(memory_format=torch.contiguous_format)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
