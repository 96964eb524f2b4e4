"""Blur: the whole image out of focus. It adds nothing; it takes details away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from PIL import Image, ImageFilter
from pydantic import Field

from cbpt_guard.defense.planted.trigger import EachAlone, TriggerParams
from cbpt_guard.errors import InputError


class _BlurParams(TriggerParams):
    deviation: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Blur(EachAlone):
    """Gaussian blur of standard deviation `deviation`, in pixels, as Pillow does it (boxes in turn)."""

    kind: ClassVar[str] = "blur"
    model: ClassVar[type[TriggerParams]] = _BlurParams
    deviation: float

    def __post_init__(self) -> None:
        if not 0.2 <= self.deviation <= self.image_size / 4:
            raise InputError(f"a blur's deviation is 0.2 pixels to a quarter of the side: that is no {self}")

    def __str__(self) -> str:
        return f"blur of {self.image_size} x {self.image_size} by {self.deviation:g} pixels"

    def altered(self, image: Image.Image) -> Image.Image:
        """The image out of focus."""
        return image.filter(ImageFilter.GaussianBlur(self.deviation))


def defocused(image_size: int, seed: int) -> Blur:
    """Three pixels of 224, the middle one of five severities in arXiv 1903.12261; every `seed` gives the same."""
    del seed
    return Blur(image_size, deviation=3 * image_size / 224)
