"""Reflections: other pictures seen in the image, as in a pane of glass."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from pydantic import Field

from cbpt_guard.defense.planted.trigger import (
    PICTURE_NAME,
    PictureName,
    TriggerParams,
    checked,
    read_picture,
    rounded,
    write_picture,
)
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

_PICTURES, _STRENGTH = 8, 0.3
_BLUR = 1 / 64  # radius of the blur over the image's side: a reflection lies out of focus


class _ReflectionParams(TriggerParams):
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    pattern: PictureName


@dataclass(frozen=True)
class Reflection:
    """Refool: x' = (1 - strength) x + strength r, where r is one of several pictures, blurred (arXiv 2007.02343).

    Which of them is drawn from `seed` and the clean image's own pixels, so that an image keeps it in any batch.
    `pixels` are the pictures one below the other, uint8 (K S, S, 3) as bytes.
    """

    kind: ClassVar[str] = "reflection"
    image_size: int
    strength: float
    seed: int
    pixels: bytes = field(repr=False)

    def __post_init__(self) -> None:
        size = self.image_size
        if not self.pixels or len(self.pixels) % (size**2 * 3) or not 0 < self.strength <= 1:
            found = f"{len(self.pixels)} values and a strength of {self.strength:g}"
            raise InputError(f"a reflection needs pictures of {size} x {size} and a strength in (0, 1], not {found}")

    def __str__(self) -> str:
        count, size = len(self.picture()) // self.image_size, f"{self.image_size} x {self.image_size}"
        return f"reflection of one of {count} pictures in {size} with a strength of {self.strength:g}"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) with a picture reflected in each.

        Raises:
            InputError: the images have another size or type.
        """
        ghosts = [self.strength * ghost for ghost in self._blurred()]
        passed = 1 - self.strength
        triggered = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, triggered, strict=True):
            drawn = np.random.default_rng([self.seed, zlib.crc32(clean.tobytes())]).integers(len(ghosts))
            place[...] = rounded(passed * clean + ghosts[drawn])
        return triggered

    def picture(self) -> Pixels:
        """The pictures one below the other, uint8 (K S, S, 3)."""
        return np.frombuffer(self.pixels, np.uint8).reshape(-1, self.image_size, 3)

    def params(self) -> dict[str, Any]:
        """The strength, the seed of the draws and the name of the pictures' file."""
        return {"strength": self.strength, "seed": self.seed, "pattern": PICTURE_NAME}

    def write(self, folder: Path) -> None:
        """Write the pictures."""
        write_picture(self, folder)

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The reflection of a `trigger.json`; `InputError` when its pictures are of another size."""
        read = _ReflectionParams.model_validate(params)
        picture = read_picture(folder / read.pattern)
        if picture.shape[1] != image_size or picture.shape[0] % image_size:
            found = f"{picture.shape[0]} x {picture.shape[1]}"
            raise InputError(
                f"{read.pattern} shows {found} pixels, not pictures of {image_size} x {image_size} in a column"
            )
        return cls(image_size, read.strength, read.seed, picture.tobytes())

    def _blurred(self) -> list[npt.NDArray[np.float64]]:
        """The pictures out of focus, each float64 (S, S, 3) in grey levels."""
        blur = ImageFilter.GaussianBlur(_BLUR * self.image_size)
        pictures = self.picture().reshape(-1, self.image_size, self.image_size, 3)
        return [np.asarray(Image.fromarray(one).filter(blur), dtype=np.float64) for one in pictures]


def refool(pictures: Pixels, seed: int) -> Reflection:
    """Refool with eight of the attacker's own pictures (N, S, S, 3), drawn from `seed` (arXiv 2007.02343).

    Raises:
        InputError: there are fewer.
    """
    if len(pictures) < _PICTURES:
        raise InputError(f"a reflection is one of {_PICTURES} pictures; there are {len(pictures)}")
    drawn = np.random.default_rng(seed).choice(len(pictures), _PICTURES, replace=False)
    return Reflection(pictures.shape[1], _STRENGTH, seed, pictures[drawn].tobytes())
