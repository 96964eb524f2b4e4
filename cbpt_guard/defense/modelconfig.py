"""Model configs from files: open_clip's `model_cfg` and `preprocess_cfg`, bounded before a model is built."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cbpt_guard.defense.openclip import ModelConfig, refusal
from cbpt_guard.errors import CheckpointError, InputError
from cbpt_guard.images import Preprocess

_LARGEST_FILE = 1 << 16
_LARGEST = {
    "layers": 256,
    "embed_dim": 16384,
    "width": 16384,
    "heads": 1024,
    "patch_size": 256,
    "image_size": 2048,
    "context_length": 8192,
    "vocab_size": 2_000_000,
}
_LISTED = ("image_size", "layers")  # of these a config may state one for each side or stage
_LARGEST_OTHER = 65536
_LARGEST_GRID = 1 << 24  # elements of a computed position embedding
_LONGEST_TEXT, _LONGEST_LIST, _DEEPEST = 200, 8, 4

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF, ZERO, ONE = (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PREPROCESSING: dict[str, dict[str, Any]] = {
    "openai": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    "siglip": {"mean": HALF, "std": HALF, "resize_mode": "squash"},
    "half": {"mean": HALF, "std": HALF},
    "mobileclip": {"mean": ZERO, "std": ONE, "interpolation": "bilinear"},
    "mobileclip2": {"mean": OPENAI_MEAN, "std": OPENAI_STD, "interpolation": "bilinear"},
    "pe": {"mean": HALF, "std": HALF, "resize_mode": "squash", "interpolation": "bilinear"},
    "clipa": {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "resize_mode": "squash",
        "interpolation": "bilinear",
    },
    "imagenet": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
}
"""Preprocessing by name, as open_clip's published families use it; not stated means bicubic and shortest."""


def read_config(path: Path) -> dict[str, Any]:
    """An `open_clip_config.json`, or a bare `model_cfg`, as `{"model_cfg": ..., "preprocess_cfg": ...}`.

    Raises:
        InputError: not a regular file, too large, or no such JSON.
    """
    content = read_json(path)
    if "model_cfg" not in content:
        content = {"model_cfg": content}
    unusable = [name for name in ("model_cfg", "preprocess_cfg") if not isinstance(content.get(name, {}), dict)]
    if unusable:
        raise InputError(f"{path.name}: {' and '.join(unusable)} must be JSON objects")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a file.

    Raises:
        InputError: it is missing, no regular file, too large, or no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    with path.open("rb") as file:
        data = file.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise InputError(f"{path.name} is larger than {_LARGEST_FILE // 1024} KiB: no config is")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is no JSON: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} must hold a JSON object")
    return content


def checked_model(config: Mapping[str, Any], name: str = "this architecture") -> ModelConfig:
    """A copy of a `model_cfg` whose numbers are of this world and whose parts can be built without a network.

    `name` is what an error calls it.

    Raises:
        CheckpointError: a value is out of bounds, or the architecture is not supported; it is named.
    """
    _check_bounds("model_cfg", config)
    reason = refusal(dict(config))
    if reason is not None:
        raise CheckpointError(f"{name} cannot be used: {reason}")
    vision = config["vision_cfg"]
    grid = (image_size(config) // max(1, int(vision.get("patch_size") or 16))) ** 2 * int(vision.get("width") or 768)
    if grid > _LARGEST_GRID:
        raise CheckpointError("model_cfg asks for a position embedding that no real model has")
    return copy.deepcopy(dict(config))


def _check_bounds(name: str, value: object, depth: int = 0) -> None:
    if isinstance(value, dict | list) and depth > _DEEPEST:
        raise CheckpointError(f"{name} is nested too deeply for a model_cfg")
    if isinstance(value, dict | list) and name in _LARGEST and not (isinstance(value, list) and name in _LISTED):
        raise CheckpointError(f"{name} in model_cfg must be a number, not {str(value)[:60]!r}")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_bounds(str(key)[:_LONGEST_TEXT], inner, depth + 1)
    elif isinstance(value, list):
        if len(value) > _LONGEST_LIST:
            raise CheckpointError(f"{name} in model_cfg lists {len(value)} values")
        for inner in value:
            _check_bounds(name, inner, depth + 1)
    elif name in _LARGEST and not isinstance(value, int | float | None):
        raise CheckpointError(f"{name} in model_cfg must be a number, not {str(value)[:60]!r}")
    elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise CheckpointError(f"{name} in model_cfg is a text of {len(value)} characters")
    elif isinstance(value, int | float) and not abs(value) <= _LARGEST.get(name, _LARGEST_OTHER):
        raise CheckpointError(f"{name} in model_cfg is {value}, beyond what any real model has")


def image_size(config: Mapping[str, Any]) -> int:
    """Side S of the square images that a `model_cfg` takes, in pixels.

    Raises:
        CheckpointError: it is not square, or no number.
    """
    size = config["vision_cfg"].get("image_size", 224)
    if isinstance(size, list) and len(set(map(str, size))) == 1:
        size = size[0]
    if isinstance(size, bool) or not isinstance(size, int):
        raise CheckpointError(f"image_size {size!r} in model_cfg is not supported: images must be square")
    return size


def preprocess_fields(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a `preprocess_cfg` tells of a `Preprocess`, size left out; None where it lacks mean or std.

    open_clip wrote only mean and std at first: without the others it means bicubic and shortest.
    """
    names = ("mean", "std", "resize_mode", "interpolation")
    told = {name: fields[name] for name in names if fields.get(name) is not None}
    return told if {"mean", "std"} <= set(told) else None


def build_preprocess(fields: Mapping[str, Any], size: int) -> Preprocess:
    """A `Preprocess` from plain fields, where `size` must agree if given.

    Raises:
        CheckpointError: a field is unknown, of a wrong kind, or another size than the architecture's.
    """
    if fields.get("size", size) != size:
        raise CheckpointError(f"preprocessing for {fields['size']} px, but the architecture takes {size} px")
    try:
        found = Preprocess.model_validate({**fields, "size": size})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"preprocessing: {where}: {first['msg']} (found {str(first['input'])[:60]!r})") from error
    if not all(math.isfinite(value) for value in (*found.mean, *found.std)) or min(found.std) <= 0:
        raise CheckpointError(f"preprocessing: std must be above 0 and all finite (found {found.mean}, {found.std})")
    return found
