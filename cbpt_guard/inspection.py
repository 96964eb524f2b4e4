"""What a run directory or a bundle says of itself, read from its JSON alone; nothing is checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cbpt_guard.bundle import LABELS, MANIFEST
from cbpt_guard.errors import InputError
from cbpt_guard.manifest import parse_manifest

Summary = dict[str, Any]

_RECORD, _METRICS = "run.json", "metrics.json"
_OF_MODEL = ("source", "source_sha256", "architecture", "resolved", "preprocess")
_OF_RECORD = (
    "cbpt_guard",
    "created",
    "seed",
    "template",
    "rule",
    "suspects",
    "candidates",
    "epoch",
    "settings",
    "data",
    "warnings",
    "versions",
)
_MAX_JSON = 64 * 1024**2


def inspect(path: str | os.PathLike[str]) -> Summary:
    """A summary of a run directory or a bundle as plain JSON values; `kind` says which it is.

    Raises:
        BundleError: the bundle's manifest is malformed.
        InputError: the folder is neither, or the run's files are malformed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; pass a run directory or a bundle")
    if (folder / MANIFEST).is_file():
        return _bundle(folder)
    if (folder / _RECORD).is_file():
        return _run(folder)
    raise InputError(f"{folder} is neither a run directory (no {_RECORD}) nor a bundle (no {MANIFEST})")


def _bundle(folder: Path) -> Summary:
    manifest = parse_manifest(_bytes(folder / MANIFEST))
    shown = manifest.model_dump(mode="json")
    return {
        "kind": "bundle",
        "path": str(folder),
        "classes": len(_json(folder / LABELS, list)),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        **{name: value for name, value in shown.items() if name != "format"},
    }


def _run(folder: Path) -> Summary:
    record, metrics = _json(folder / _RECORD, dict), _json(folder / _METRICS, dict)
    try:
        return {
            "kind": "run",
            "path": str(folder),
            "classes": len(metrics["classes"]),
            "verdict": record["verdict"]["name"],
            "reasons": record["verdict"]["reasons"],
            "model": {name: record["model"][name] for name in _OF_MODEL},
            **{name: record[name] for name in _OF_RECORD},
            "metrics": {name: value for name, value in metrics.items() if name not in ("format", "classes")},
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / _RECORD} or {_METRICS} is malformed: {error} is missing") from error


def _json(path: Path, kind: type[Any]) -> Any:
    try:
        value = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} must hold a JSON {kind.__name__}")
    return value


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_JSON:
        raise InputError(f"{path} is over {_MAX_JSON:,} bytes and cannot be what it claims")
    return data
