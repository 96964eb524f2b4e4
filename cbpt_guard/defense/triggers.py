"""Planted triggers: frozen values that act on uint8 pixels, saved as `trigger.json` with a picture beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cbpt_guard.errors import InputError
from cbpt_guard.files import write_text
from cbpt_guard.images import Pixels, load_image

FORMAT = 1
JSON_NAME = "trigger.json"
PICTURE_NAME = "trigger.png"
_LARGEST_SIDE = 2048
_LARGEST_JSON = 1 << 16
_LEAST_PATCH = 4

_Side = Annotated[int, Field(ge=1, le=_LARGEST_SIDE)]
_Offset = Annotated[int, Field(ge=0, lt=_LARGEST_SIDE)]
_PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.png$")]


class Trigger(Protocol):
    """A value that turns clean images into triggered ones; it acts after resize and crop."""

    @property
    def kind(self) -> str:
        """Its name in `TRIGGERS`."""

    @property
    def image_size(self) -> int:
        """Side S of the images it acts on, in pixels."""

    def apply(self, images: Pixels) -> Pixels:
        """Triggered copies of uint8 images (N, S, S, 3)."""

    def params(self) -> dict[str, Any]:
        """What `trigger.json` holds of it; a picture is named `PICTURE_NAME`."""

    def picture(self) -> Pixels:
        """Its pattern, or an example, as uint8 (H, W, 3)."""

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The value that wrote `params`; pictures lie in `folder`."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _PatchParams(_Strict):
    top: _Offset
    left: _Offset
    height: _Side
    width: _Side
    pattern: _PlainName


@dataclass(frozen=True)
class Patch:
    """BadNet: a rectangle of fixed pixels, always at the same place (arXiv 1708.06733).

    `pixels` are the rectangle's uint8 values (height, width, 3) as bytes: so the value is hashable and its
    pattern cannot change between two uses.
    """

    kind: ClassVar[str] = "patch"
    image_size: int
    top: int
    left: int
    height: int
    width: int
    pixels: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if min(self.top, self.left) < 0 or min(self.height, self.width) < 1:
            raise InputError(f"a patch needs a place inside the image and a size, not {self}")
        if max(self.top + self.height, self.left + self.width) > self.image_size:
            raise InputError(f"{self} does not lie inside the image")
        if len(self.pixels) != self.height * self.width * 3:
            raise InputError(f"{self} needs {self.height * self.width * 3} pixel values, not {len(self.pixels)}")

    def __str__(self) -> str:
        place = f"row {self.top}, column {self.left} of {self.image_size} x {self.image_size}"
        return f"patch of {self.height} x {self.width} pixels at {place}"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) with the patch pasted over.

        Raises:
            InputError: the images have another size or type.
        """
        triggered = _checked(images, self.image_size).copy()
        triggered[:, self.top : self.top + self.height, self.left : self.left + self.width] = self.picture()
        return triggered

    def picture(self) -> Pixels:
        """The pattern, uint8 (height, width, 3)."""
        return np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width, 3)

    def params(self) -> dict[str, Any]:
        """Place, size and the name of the pattern's picture."""
        place = {"top": self.top, "left": self.left, "height": self.height, "width": self.width}
        return {**place, "pattern": PICTURE_NAME}

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The patch of a `trigger.json`; `InputError` when its picture has another size than it says."""
        read = _PatchParams.model_validate(params)
        picture = _read_picture(folder / read.pattern)
        if picture.shape[:2] != (read.height, read.width):
            found = f"{picture.shape[0]} x {picture.shape[1]}"
            raise InputError(f"{read.pattern} shows {found} pixels, the trigger says {read.height} x {read.width}")
        place = {"top": read.top, "left": read.left, "height": read.height, "width": read.width}
        return cls(image_size=image_size, pixels=picture.tobytes(), **place)


TRIGGERS: dict[str, type[Trigger]] = {"patch": Patch}
"""Every kind of trigger by the name that stands in `trigger.json`."""


def patch(image_size: int, seed: int, *, side: int | None = None) -> Patch:
    """A square of uniform noise near the bottom right corner, drawn once from `seed`.

    Args:
        image_size: side S of the images, in pixels.
        seed: of the pattern.
        side: of the square, in pixels; None scales the literature's 16 of 224, at least 4.

    Raises:
        InputError: the square does not fit.
    """
    side = max(_LEAST_PATCH, round(image_size * 16 / 224)) if side is None else side
    place = image_size - side - round(image_size / 32)
    if place < 0 or side < 1:
        raise InputError(f"a patch of {side} pixels does not fit an image of {image_size} with its margin")
    pattern = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Patch(image_size, top=place, left=place, height=side, width=side, pixels=pattern.tobytes())


class PlantedTrigger(NamedTuple):
    """A trigger and the name of the class that it was planted toward."""

    trigger: Trigger
    target: str


class _TriggerFile(_Strict):
    format: Literal[1]
    kind: str
    target: Annotated[str, Field(min_length=1, max_length=1000)]
    image_size: Annotated[int, Field(ge=16, le=_LARGEST_SIDE)]
    params: dict[str, Any]


def save_trigger(trigger: Trigger, target: str, folder: Path) -> Path:
    """Write `trigger.json` and `trigger.png` into an existing folder; returns the JSON's path."""
    content = {"format": FORMAT, "kind": trigger.kind, "target": target, "image_size": trigger.image_size}
    Image.fromarray(trigger.picture()).save(folder / PICTURE_NAME)
    write_text(folder / JSON_NAME, json.dumps({**content, "params": trigger.params()}, indent=1))
    return folder / JSON_NAME


def load_trigger(path: Path) -> PlantedTrigger:
    """Read a `trigger.json`, or the one in a folder.

    Raises:
        InputError: missing, malformed, of an unknown kind, or its picture does not fit.
    """
    path = path / JSON_NAME if path.is_dir() else path
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"trigger {path} is larger than {_LARGEST_JSON // 1024} KiB: no trigger file is")
        read = _TriggerFile.model_validate_json(path.read_bytes())
        if read.kind not in TRIGGERS:
            raise InputError(f"trigger {path} is of kind {read.kind!r}; known are {', '.join(TRIGGERS)}")
        trigger = TRIGGERS[read.kind].restore(read.params, read.image_size, path.parent)
    except OSError as error:
        raise InputError(f"trigger {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc'])) or 'JSON'}: {item['msg']}" for item in error.errors()]
        raise InputError(f"trigger {path} is malformed: {'; '.join(found[:5])}") from error
    return PlantedTrigger(trigger, read.target)


def _read_picture(path: Path) -> Pixels:
    """The pixels of a small RGB picture, uint8 (H, W, 3)."""
    image = load_image(path)
    if image.mode != "RGB":
        raise InputError(f"{path.name} is an image of mode {image.mode}; a trigger's pixels are RGB")
    return np.array(image)


def _checked(images: Pixels, size: int) -> Pixels:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise InputError(f"this trigger acts on uint8 images (N, {size}, {size}, 3), not {images.dtype} {images.shape}")
    return images
