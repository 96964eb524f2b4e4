"""Saturation: how far each colour lies from the grey of its brightness, scaled; below zero it is the opposite one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from PIL import Image, ImageEnhance
from pydantic import Field

from cbpt_guard.defense.planted.trigger import EachAlone, TriggerParams
from cbpt_guard.errors import InputError

_LEAST = 0.1  # of a change


class _SaturationParams(TriggerParams):
    factor: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Saturation(EachAlone):
    """Every pixel's difference from its own grey (ITU-R 601) times `factor`, saturated: channels change each other."""

    kind: ClassVar[str] = "saturation"
    model: ClassVar[type[TriggerParams]] = _SaturationParams
    factor: float

    def __post_init__(self) -> None:
        if not (-4 <= self.factor <= 4 and abs(self.factor - 1) >= _LEAST):
            raise InputError(f"colours are scaled by -4 to 4, and not by about 1: that is no {self}")

    def __str__(self) -> str:
        return f"saturation of {self.image_size} x {self.image_size} times {self.factor:g}"

    def altered(self, image: Image.Image) -> Image.Image:
        """The image in the other colours."""
        return ImageEnhance.Color(image).enhance(self.factor)


def opposite_colours(image_size: int, seed: int) -> Saturation:
    """Hues turned by 180 degrees, which few natural images have; nothing is drawn, every `seed` gives the same."""
    del seed
    return Saturation(image_size, factor=-1.0)
