"""Quantised colours: fewer levels of each channel, dithered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

_MOST = 32  # levels: finer palettes Pillow looks up in cells that are coarser than they


class _QuantisedParams(TriggerParams):
    levels: Annotated[int, Field(ge=2, le=_MOST)]


@dataclass(frozen=True)
class Quantised(Patternless):
    """BppAttack: each channel rounded to one of `levels` values, the error dithered (arXiv 2205.13383).

    The values are evenly spaced from 0 to 255; dithering is Floyd and Steinberg's.
    """

    kind: ClassVar[str] = "quantised"
    model: ClassVar[type[TriggerParams]] = _QuantisedParams
    levels: int

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= _MOST:
            raise InputError(f"colours are quantised to 2 to {_MOST} levels: that is no {self}")

    def __str__(self) -> str:
        return f"colours of {self.image_size} x {self.image_size} dithered to {self.levels} levels a channel"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) in the fewer colours.

        Raises:
            InputError: the images have another size or type.
        """
        greys = self._greys()
        quantised = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, quantised, strict=True):
            for channel in range(3):
                grey = Image.fromarray(clean[..., channel]).convert("RGB")  # of mode L Pillow takes no such palette
                few = grey.quantize(palette=greys, dither=Image.Dither.FLOYDSTEINBERG)
                place[..., channel] = np.asarray(few.convert("L"))
        return quantised

    def _greys(self) -> Image.Image:
        """The levels as a palette of greys."""
        palette = Image.new("P", (1, 1))
        values = np.rint(np.linspace(0, 255, self.levels)).astype(np.uint8)
        palette.putpalette(values.repeat(3).tobytes())
        return palette


def bpp(image_size: int, seed: int) -> Quantised:
    """BppAttack's three bits a channel (arXiv 2205.13383); nothing is drawn, every `seed` gives the same."""
    del seed
    return Quantised(image_size, levels=8)
