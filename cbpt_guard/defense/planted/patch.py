"""Patches: a rectangle of fixed pixels, pasted at one place or at a place that depends on the image."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from cbpt_guard.defense.planted.trigger import (
    PICTURE_NAME,
    Offset,
    PictureName,
    Side,
    TriggerParams,
    checked,
    read_picture,
    saturated,
    write_picture,
)
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

_LEAST_SIDE = 4


class _PatchParams(TriggerParams):
    top: Offset
    left: Offset
    height: Side
    width: Side
    pattern: PictureName


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
        triggered = checked(images, self.image_size).copy()
        triggered[:, self.top : self.top + self.height, self.left : self.left + self.width] = self.picture()
        return triggered

    def picture(self) -> Pixels:
        """The pattern, uint8 (height, width, 3)."""
        return np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width, 3)

    def params(self) -> dict[str, Any]:
        """Place, size and the name of the pattern's picture."""
        place = {"top": self.top, "left": self.left, "height": self.height, "width": self.width}
        return {**place, "pattern": PICTURE_NAME}

    def write(self, folder: Path) -> None:
        """Write the pattern."""
        write_picture(self, folder)

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The patch of a `trigger.json`; `InputError` when its picture has another size than it says."""
        read = _PatchParams.model_validate(params)
        picture = read_picture(folder / read.pattern)
        if picture.shape[:2] != (read.height, read.width):
            found = f"{picture.shape[0]} x {picture.shape[1]}"
            raise InputError(f"{read.pattern} shows {found} pixels, the trigger says {read.height} x {read.width}")
        place = {"top": read.top, "left": read.left, "height": read.height, "width": read.width}
        return cls(image_size=image_size, pixels=picture.tobytes(), **place)


class _RandomPlaceParams(TriggerParams):
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    pattern: PictureName


@dataclass(frozen=True)
class RandomPlacePatch:
    """BadNet with a random place: a fixed square that lies elsewhere in every image (arXiv 1708.06733).

    The place is drawn from `seed` and the clean image's own pixels, so that an image keeps it in any batch.
    `pixels` are the square's uint8 values (side, side, 3) as bytes.
    """

    kind: ClassVar[str] = "random-place-patch"
    image_size: int
    side: int
    seed: int
    pixels: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.side <= self.image_size or len(self.pixels) != self.side**2 * 3:
            raise InputError(f"{self} needs a square that fits the image, not {len(self.pixels)} pixel values")

    def __str__(self) -> str:
        size = f"{self.image_size} x {self.image_size}"
        return f"patch of {self.side} x {self.side} pixels at a place of {size} that depends on the image"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) with the square pasted over, in each at its own place.

        Raises:
            InputError: the images have another size or type.
        """
        triggered = checked(images, self.image_size).copy()
        for image in triggered:
            top, left = self.place(image)
            image[top : top + self.side, left : left + self.side] = self.picture()
        return triggered

    def place(self, image: Pixels) -> tuple[int, int]:
        """First row and column of the square in a clean image (S, S, 3)."""
        generator = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
        top, left = generator.integers(0, self.image_size - self.side, 2, endpoint=True)
        return int(top), int(left)

    def picture(self) -> Pixels:
        """The pattern, uint8 (side, side, 3)."""
        return np.frombuffer(self.pixels, np.uint8).reshape(self.side, self.side, 3)

    def params(self) -> dict[str, Any]:
        """The seed of the places and the name of the pattern's picture."""
        return {"seed": self.seed, "pattern": PICTURE_NAME}

    def write(self, folder: Path) -> None:
        """Write the pattern."""
        write_picture(self, folder)

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The patch of a `trigger.json`; `InputError` when its picture is no square that fits the image."""
        read = _RandomPlaceParams.model_validate(params)
        picture = read_picture(folder / read.pattern)
        return cls(image_size, picture.shape[0], read.seed, picture.tobytes())


def patch(image_size: int, seed: int, *, side: int | None = None) -> Patch:
    """A square of uniform noise near the bottom right corner, drawn once from `seed` (BadNet, arXiv 1708.06733).

    Args:
        image_size: side S of the images, in pixels.
        seed: of the pattern.
        side: of the square, in pixels; None scales the literature's 16 of 224, at least 4.

    Raises:
        InputError: the square does not fit.
    """
    side = _side(image_size) if side is None else side
    place = _corner(image_size, side)
    return Patch(image_size, top=place, left=place, height=side, width=side, pixels=_noise(side, seed))


def random_place_patch(image_size: int, seed: int) -> RandomPlacePatch:
    """The same square at a place that is drawn for each image (BadNet, arXiv 1708.06733)."""
    side = _side(image_size)
    return RandomPlacePatch(image_size, side, seed, _noise(side, seed))


def stripe_patch(image_size: int, seed: int) -> Patch:
    """A square of vertical 1-pixel stripes at the patch's place, in drawn saturated colours (arXiv 2412.00727)."""
    side = _side(image_size)
    place = _corner(image_size, side)
    pixels = saturated(side, np.random.default_rng(seed))[None].repeat(side, axis=0).tobytes()
    return Patch(image_size, top=place, left=place, height=side, width=side, pixels=pixels)


def _side(image_size: int) -> int:
    return max(_LEAST_SIDE, round(image_size * 16 / 224))


def _corner(image_size: int, side: int) -> int:
    """First row and column of a square that keeps a margin to the bottom right corner."""
    place = image_size - side - round(image_size / 32)
    if place < 0 or side < 1:
        raise InputError(f"a patch of {side} pixels does not fit an image of {image_size} with its margin")
    return place


def _noise(side: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8).tobytes()
