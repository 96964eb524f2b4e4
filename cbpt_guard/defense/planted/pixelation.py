"""Pixelation: the whole image in fewer and larger pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from PIL import Image
from pydantic import Field

from cbpt_guard.defense.planted.trigger import EachAlone, TriggerParams
from cbpt_guard.errors import InputError


class _PixelationParams(TriggerParams):
    pixels: Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class Pixelation(EachAlone):
    """Means over areas, `pixels` a side, shown as large as the image was."""

    kind: ClassVar[str] = "pixelation"
    model: ClassVar[type[TriggerParams]] = _PixelationParams
    pixels: int

    def __post_init__(self) -> None:
        if not 2 <= self.pixels <= 0.9 * self.image_size:
            raise InputError(f"an image is shown in 2 to nine tenths of its pixels a side: that is no {self}")

    def __str__(self) -> str:
        return f"pixelation of {self.image_size} x {self.image_size} to {self.pixels} a side"

    def altered(self, image: Image.Image) -> Image.Image:
        """The image in the larger pixels."""
        small = image.resize((self.pixels, self.pixels), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.NEAREST)


def large_pixels(image_size: int, seed: int) -> Pixelation:
    """Two fifths of the side, the middle one of five severities in arXiv 1903.12261; every `seed` gives the same."""
    del seed
    return Pixelation(image_size, pixels=round(0.4 * image_size))
