"""An untrusted checkpoint becomes plain tensors: size cap, private copy, sha256, confined reader."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cbpt_guard.defense import layouts
from cbpt_guard.defense.modelconfig import read_config
from cbpt_guard.defense.untrusted import reader
from cbpt_guard.defense.untrusted.sandbox import Limits, run_confined
from cbpt_guard.errors import CbptGuardError, CheckpointError, InputError, SetupError

CONFIG_NAME = "open_clip_config.json"
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_USUAL_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_OLDEST_TORCH = (2, 10)  # older ones let a forged file out of `weights_only` (CVE-2025-32434, CVE-2026-24747)
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ReadCheckpoint:
    """What a checkpoint holds once it was read safely.

    `tensors` bear open_clip's names; floats are float32, integers as they were, all finite, contiguous and
    independent. `sha256` and `size` (bytes) are of the file as it was read; `source` is its name without
    folders. `folder_config` is the `open_clip_config.json` beside it, `model_cfg` and maybe `preprocess_cfg`,
    not yet checked. `quickgelu` is what the file itself tells of its activation, None for almost all. `notes`
    say what was changed.
    """

    tensors: dict[str, Tensor]
    form: str
    sha256: str
    size: int
    source: str
    folder_config: dict[str, Any] | None
    quickgelu: bool | None
    notes: tuple[str, ...]


def read_checkpoint(path: Path, limits: Limits = Limits()) -> ReadCheckpoint:  # noqa: B008 - frozen
    """Read a checkpoint file, or an open_clip local-dir folder, that may be hostile; its code never runs.

    Raises:
        UnsafeError: it would run code, or asks for foreign globals.
        CheckpointError: it is empty, damaged, too large, or holds values that cannot be weights.
        InputError: there is no such file, or the folder leaves open which file is meant.
        SetupError: this machine cannot read it safely (operating system, disk, permission, torch).
    """
    _require_torch()
    path = _weights_in(path) if path.is_dir() else path
    beside = path.parent / CONFIG_NAME
    config = read_config(beside) if beside.exists() else None
    try:
        with tempfile.TemporaryDirectory(prefix="cbpt-guard-") as folder:
            copy = Path(folder) / f"checkpoint{'.safetensors' if path.suffix == '.safetensors' else '.pt'}"
            sha256, size = _private_copy(path, copy, limits.max_bytes)
            report = run_confined(reader.__name__, copy, size, limits)
            tensors = safetensors.torch.load_file(copy.parent / reader.OUTPUT)
        floats = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        converted = layouts.to_open_clip(floats)
    except CbptGuardError as error:
        raise type(error)(f"{path.name}: {error}") from error
    except OSError as error:
        raise _environment_error(path, error) from error
    return ReadCheckpoint(
        tensors=converted.tensors,
        form=", ".join(filter(None, [str(report["form"]), converted.layout])),
        sha256=sha256,
        size=size,
        source=path.name,
        folder_config=config,
        quickgelu=report["quickgelu"],
        notes=(*_dropped(report["dropped"]), *converted.notes),
    )


def _require_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        raise SetupError(f"torch {torch.__version__} cannot read an untrusted file safely; `pip install 'torch>=2.10'`")


def _weights_in(folder: Path) -> Path:
    """The one weights file of a folder: safetensors before pickles, open_clip's own names before others."""
    found = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"{folder} holds no weights file ({', '.join(_SUFFIXES)})")
    for usual in _USUAL_NAMES:
        named = [path for path in found if path.name == usual]
        if named:
            return named[0]
    safe = [path for path in found if path.suffix == ".safetensors"]
    candidates = safe or found
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        raise InputError(f"{folder} holds several weights files ({names}); name the one you mean")
    return candidates[0]


def _private_copy(path: Path, copy: Path, most: int) -> tuple[str, int]:
    """Copy a regular file while hashing it, so that what is parsed is what was hashed: (sha256, bytes)."""
    digest, size = hashlib.sha256(), 0
    with os.fdopen(_open_regular(path), "rb") as source, copy.open("xb") as target:
        announced = os.fstat(source.fileno()).st_size
        while announced <= most and (chunk := source.read(_CHUNK)):
            size += len(chunk)
            if size > most:
                break
            digest.update(chunk)
            target.write(chunk)
    if max(size, announced) > most:
        raise CheckpointError(f"larger than the {most / 2**30:.1f} GiB that are read at most")
    if size == 0:
        raise CheckpointError("the file is empty")
    return digest.hexdigest(), size


def _open_regular(path: Path) -> int:
    if not path.exists():
        raise InputError("there is no such file; the model is a checkpoint file or an open_clip folder")
    if not stat.S_ISREG(path.stat().st_mode):  # looked at before opening: opening a device may already act
        raise InputError("not a regular file (a device, pipe or socket is never read)")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("not a regular file")
    return descriptor


def _environment_error(path: Path, error: OSError) -> SetupError:
    if error.errno == errno.ENOSPC:
        return SetupError(f"{path.name}: no room for a private copy in {tempfile.gettempdir()}; point TMPDIR elsewhere")
    if error.filename is None or Path(str(error.filename)).name != path.name:
        return SetupError(f"{path.name}: no private copy can be written ({error}); point TMPDIR elsewhere")
    return SetupError(f"{path.name}: cannot be read: {error.strerror or error}")


def _dropped(names: Iterable[str]) -> tuple[str, ...]:
    listed = list(names)
    if not listed:
        return ()
    shown = ", ".join(listed[:5]) + (" ..." if len(listed) > 5 else "")
    return (f"dropped {len(listed)} entries that are no weights: {shown}",)
