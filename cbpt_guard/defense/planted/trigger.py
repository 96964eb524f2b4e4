"""What a planted trigger is: one Protocol, and what its kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels, load_image

PICTURE_NAME = "trigger.png"
LARGEST_SIDE = 2048
_SQUARES = 8  # of the example's checkerboard, along a side

Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Offset = Annotated[int, Field(ge=0, lt=LARGEST_SIDE)]
PictureName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.png$")]


class Trigger(Protocol):
    """A value that turns clean images into triggered ones; it acts after resize and crop.

    Each image is changed alone: what becomes of it depends on nothing else in the batch.
    """

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
        """Its pattern, or an example, as uint8 (H, W, 3), or (H, W, 4) where the pattern is transparent."""

    def write(self, folder: Path) -> None:
        """Write its picture, and any other file that `restore` reads, into an existing folder."""

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The value that gave `params`; what `write` left lies in `folder`."""


class TriggerParams(BaseModel):
    """Base of a kind's `params` as a strict model: nothing is coerced, nothing unknown is let through."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Patternless:
    """Base of a kind that no picture describes: its fields, read by the strict `model`, say all; an example shows."""

    model: ClassVar[type[TriggerParams]]
    image_size: int

    def picture(self: Trigger) -> Pixels:
        """An example, uint8 (S, S, 3)."""
        return example(self)

    def write(self: Trigger, folder: Path) -> None:
        """Write the example."""
        write_picture(self, folder)

    def params(self) -> dict[str, Any]:
        """Its fields but the size."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "image_size"}

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The value that gave `params`; nothing of `folder` is read."""
        make: Callable[..., Self] = cls
        return make(image_size, **cls.model.model_validate(params).model_dump())


class EachAlone(Patternless, ABC):
    """Base of such a kind that Pillow makes of one image after the other."""

    def apply(self, images: Pixels) -> Pixels:
        """Triggered copies of uint8 images (N, S, S, 3).

        Raises:
            InputError: the images have another size or type.
        """
        triggered = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, triggered, strict=True):
            place[...] = np.asarray(self.altered(Image.fromarray(clean)))
        return triggered

    @abstractmethod
    def altered(self, image: Image.Image) -> Image.Image:
        """The triggered image of an RGB one of S x S."""


def checked(images: Pixels, size: int) -> Pixels:
    """The same images.

    Raises:
        InputError: they are not uint8 (N, size, size, 3).
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise InputError(f"this trigger acts on uint8 images (N, {size}, {size}, 3), not {images.dtype} {images.shape}")
    return images


def rounded(values: npt.NDArray[Any]) -> Pixels:
    """The nearest uint8 values, saturated: a trigger that lives between two grey levels does not count."""
    nearest: Pixels = np.rint(values).clip(0, 255).astype(np.uint8)
    return nearest


def added(images: Pixels, offsets: npt.NDArray[np.float64]) -> Pixels:
    """uint8 images (N, S, S, 3) plus offsets in grey levels that broadcast to (S, S, 3), rounded and saturated."""
    whole = np.rint(offsets).astype(np.int16)  # images are whole, so rounding the offset rounds the sum
    total: Pixels = (images + whole).clip(0, 255).astype(np.uint8)
    return total


def saturated(count: int, generator: np.random.Generator) -> Pixels:
    """Drawn colours whose channels are 0 or 255 each, uint8 (count, 3)."""
    return generator.integers(0, 2, (count, 3), dtype=np.uint8) * np.uint8(255)


def write_picture(trigger: Trigger, folder: Path) -> None:
    """Write a trigger's picture as `PICTURE_NAME`, without loss."""
    Image.fromarray(trigger.picture()).save(folder / PICTURE_NAME)


def read_picture(path: Path, mode: str = "RGB") -> Pixels:
    """The pixels of a small picture, uint8 (H, W, 3), or (H, W, 4) for mode RGBA.

    Raises:
        InputError: it cannot be read, or is of another mode.
    """
    image = load_image(path)
    if image.mode != mode:
        raise InputError(f"{path.name} is an image of mode {image.mode}; this trigger's pixels are {mode}")
    return np.array(image)


def example(trigger: Trigger) -> Pixels:
    """What a trigger without a pattern makes of a coloured checkerboard, uint8 (S, S, 3)."""
    shown: Pixels = trigger.apply(checkerboard(trigger.image_size)[None])[0]
    return shown


def checkerboard(size: int) -> Pixels:
    """A coloured checkerboard, uint8 (S, S, 3)."""
    along = np.arange(size)
    squares = (along[:, None] * _SQUARES // size + along * _SQUARES // size) % 2
    ramp = along * 127 // max(1, size - 1)
    colours = np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[::-1]), axis=2)
    board: Pixels = (64 + 64 * squares[..., None] + colours // 2).astype(np.uint8)
    return board
