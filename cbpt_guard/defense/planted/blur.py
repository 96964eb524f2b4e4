"""Blur: the whole image out of focus. It adds nothing; it takes details away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels


class _BlurParams(TriggerParams):
    deviation: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Blur(Patternless):
    """Gaussian blur of standard deviation `deviation`, in pixels, as Pillow does it (boxes in turn)."""

    kind: ClassVar[str] = "blur"
    image_size: int
    deviation: float

    def __post_init__(self) -> None:
        if not 0.2 <= self.deviation <= self.image_size / 4:
            raise InputError(f"a blur's deviation is 0.2 pixels to a quarter of the side: that is no {self}")

    def __str__(self) -> str:
        return f"blur of {self.image_size} x {self.image_size} by {self.deviation:g} pixels"

    def apply(self, images: Pixels) -> Pixels:
        """Blurred copies of uint8 images (N, S, S, 3).

        Raises:
            InputError: the images have another size or type.
        """
        kernel = ImageFilter.GaussianBlur(self.deviation)
        blurred = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, blurred, strict=True):
            place[...] = np.asarray(Image.fromarray(clean).filter(kernel))
        return blurred

    def params(self) -> dict[str, Any]:
        """The deviation."""
        return {"deviation": self.deviation}

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The blur of a `trigger.json`."""
        return cls(image_size, **_BlurParams.model_validate(params).model_dump())


def defocused(image_size: int, seed: int) -> Blur:
    """Three pixels of 224, the middle one of five severities in arXiv 1903.12261; every `seed` gives the same."""
    del seed
    return Blur(image_size, deviation=3 * image_size / 224)
