"""Pixelation: the whole image in fewer and larger pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels


class _PixelationParams(TriggerParams):
    pixels: Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class Pixelation(Patternless):
    """Means over areas, `pixels` a side, shown as large as the image was."""

    kind: ClassVar[str] = "pixelation"
    image_size: int
    pixels: int

    def __post_init__(self) -> None:
        if not 2 <= self.pixels <= 0.9 * self.image_size:
            raise InputError(f"an image is shown in 2 to nine tenths of its pixels a side: that is no {self}")

    def __str__(self) -> str:
        return f"pixelation of {self.image_size} x {self.image_size} to {self.pixels} a side"

    def apply(self, images: Pixels) -> Pixels:
        """Pixelated copies of uint8 images (N, S, S, 3).

        Raises:
            InputError: the images have another size or type.
        """
        fewer, side = (self.pixels, self.pixels), (self.image_size, self.image_size)
        pixelated = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, pixelated, strict=True):
            small = Image.fromarray(clean).resize(fewer, Image.Resampling.BOX)
            place[...] = np.asarray(small.resize(side, Image.Resampling.NEAREST))
        return pixelated

    def params(self) -> dict[str, Any]:
        """How many pixels a side."""
        return {"pixels": self.pixels}

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The pixelation of a `trigger.json`."""
        return cls(image_size, **_PixelationParams.model_validate(params).model_dump())


def large_pixels(image_size: int, seed: int) -> Pixelation:
    """Two fifths of the side, the middle one of five severities in arXiv 1903.12261; every `seed` gives the same."""
    del seed
    return Pixelation(image_size, pixels=round(0.4 * image_size))
