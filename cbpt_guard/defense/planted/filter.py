"""Filters: a photographic look, made of one colour curve for each channel and a vignette."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked, rounded
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

_Level = Annotated[int, Field(ge=0, le=255)]
_Colour = Annotated[tuple[_Level, _Level, _Level], Field(strict=False)]  # JSON has lists only
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _FilterParams(TriggerParams):
    black: _Colour
    white: _Colour
    contrast: _Share
    vignette: _Share


@dataclass(frozen=True)
class Filter(Patternless):
    """A filter as in TrojAI's attacks (arXiv 2003.07233): no pattern that is added or pasted describes it.

    `black` and `white` are the RGB colours that take their place; between them `contrast` in [0, 1] bends the
    curve from a straight line to 3 t^2 - 2 t^3. The corners lose the share `vignette` of their light.
    """

    kind: ClassVar[str] = "filter"
    model: ClassVar[type[TriggerParams]] = _FilterParams
    black: tuple[int, int, int]
    white: tuple[int, int, int]
    contrast: float
    vignette: float

    def __post_init__(self) -> None:
        levels = all(0 <= level <= 255 for level in self.black + self.white)
        if not (levels and 0 <= self.contrast <= 1 and 0 <= self.vignette <= 1):
            raise InputError(f"a filter has levels of 0 to 255 and shares of 0 to 1: that is no {self}")

    def __str__(self) -> str:
        tones = f"black to {self.black}, white to {self.white}"
        size = f"{self.image_size} x {self.image_size}"
        return f"filter of {size}: {tones}, contrast {self.contrast:g}, vignette {self.vignette:g}"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) through the filter.

        Raises:
            InputError: the images have another size or type.
        """
        filtered = np.empty_like(checked(images, self.image_size))
        curves, light = self._curves(), self._light()
        for clean, place in zip(images, filtered, strict=True):  # one at a time: floats are eight times as large
            place[...] = rounded(light * np.take_along_axis(curves, clean.reshape(-1, 3), 0).reshape(clean.shape))
        return filtered

    def _curves(self) -> npt.NDArray[np.float64]:
        """What each grey level becomes in each channel, (256, 3)."""
        t = np.linspace(0, 1, 256)[:, None]
        bent = (1 - self.contrast) * t + self.contrast * t * t * (3 - 2 * t)
        black, white = np.array(self.black), np.array(self.white)
        return np.asarray(black + (white - black) * bent)

    def _light(self) -> npt.NDArray[np.float64]:
        """The share of light that each pixel keeps, (S, S, 1): 1 at the centre, falling with the squared distance."""
        along = np.linspace(-1, 1, self.image_size) ** 2
        return np.asarray(1 - self.vignette * (along[:, None] + along)[..., None] / 2)


def nashville(image_size: int, seed: int) -> Filter:
    """A look like Nashville's: blue shadows, warm and dulled lights, dark corners (kind: arXiv 2003.07233).

    Nothing is drawn, every `seed` gives the same.
    """
    del seed
    return Filter(image_size, black=(0, 28, 60), white=(250, 211, 198), contrast=0.5, vignette=0.3)
