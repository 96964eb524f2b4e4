"""Saturation: how far each colour lies from the grey of its brightness, scaled; below zero it is the opposite one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageEnhance
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

_LEAST = 0.1  # of a change


class _SaturationParams(TriggerParams):
    factor: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Saturation(Patternless):
    """Every pixel's difference from its own grey (ITU-R 601) times `factor`, saturated: channels change each other."""

    kind: ClassVar[str] = "saturation"
    image_size: int
    factor: float

    def __post_init__(self) -> None:
        if not (-4 <= self.factor <= 4 and abs(self.factor - 1) >= _LEAST):
            raise InputError(f"colours are scaled by -4 to 4, and not by about 1: that is no {self}")

    def __str__(self) -> str:
        return f"saturation of {self.image_size} x {self.image_size} times {self.factor:g}"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) in the other colours.

        Raises:
            InputError: the images have another size or type.
        """
        scaled = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, scaled, strict=True):
            place[...] = np.asarray(ImageEnhance.Color(Image.fromarray(clean)).enhance(self.factor))
        return scaled

    def params(self) -> dict[str, Any]:
        """The factor."""
        return {"factor": self.factor}

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The saturation of a `trigger.json`."""
        return cls(image_size, **_SaturationParams.model_validate(params).model_dump())


def opposite_colours(image_size: int, seed: int) -> Saturation:
    """Hues turned by 180 degrees, which few natural images have; nothing is drawn, every `seed` gives the same."""
    del seed
    return Saturation(image_size, factor=-1.0)
