"""Frequencies: single coefficients of the blocks' cosine transform, raised in the colour channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, added, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

BLOCK = 32
UV_TO_RGB = np.array([[0.0, 1.13983], [-0.39465, -0.58060], [2.03211, 0.0]])
"""What U and V add to red, green and blue (ITU-R BT.601)."""

_Index = Annotated[int, Field(ge=0, lt=BLOCK)]
_Pair = Annotated[tuple[_Index, _Index], Field(strict=False)]  # JSON has lists only


class _FrequencyParams(TriggerParams):
    coefficients: Annotated[tuple[_Pair, ...], Field(min_length=1, max_length=BLOCK, strict=False)]
    magnitude: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Frequency(Patternless):
    """FTrojan: DCT coefficients of every 32 x 32 block raised by `magnitude` in U and V (arXiv 2109.05456).

    The transforms are linear: raising a coefficient adds its cosine wave, the same in every block. Blocks start
    at the top left; those that reach over the image's edge are cut there. `coefficients` are (row, column).
    """

    kind: ClassVar[str] = "frequency"
    model: ClassVar[type[TriggerParams]] = _FrequencyParams
    coefficients: tuple[tuple[int, int], ...]
    magnitude: float

    def __post_init__(self) -> None:
        inside = all(0 <= index < BLOCK for place in self.coefficients for index in place)
        if not (self.coefficients and inside and 1 <= self.magnitude <= 1000):
            raise InputError(f"coefficients lie inside {BLOCK} x {BLOCK} and rise by 1 to 1000: that is no {self}")

    def __str__(self) -> str:
        places = ", ".join(f"({row}, {column})" for row, column in self.coefficients)
        size = f"{self.image_size} x {self.image_size}"
        return f"DCT coefficients {places} of {BLOCK} x {BLOCK} blocks of {size} raised by {self.magnitude:g} in U, V"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) with the coefficients raised.

        Raises:
            InputError: the images have another size or type.
        """
        block = self.magnitude * sum(cosines(row, column) for row, column in self.coefficients)
        times = -(-self.image_size // BLOCK)
        waves = np.tile(block, (times, times))[: self.image_size, : self.image_size, None]
        return added(checked(images, self.image_size), waves * UV_TO_RGB.sum(1))


def cosines(row: int, column: int) -> npt.NDArray[np.float64]:
    """What one coefficient of a block's orthonormal DCT-II stands for, (32, 32): its inverse transform."""
    along = np.arange(BLOCK)
    basis = np.sqrt(2 / BLOCK) * np.cos(np.pi * (along + 0.5) * along[:, None] / BLOCK)
    basis[0] /= np.sqrt(2)
    wave: npt.NDArray[np.float64] = np.outer(basis[row], basis[column])
    return wave


def ftrojan(image_size: int, seed: int) -> Frequency:
    """FTrojan's two coefficients, raised by 30 (arXiv 2109.05456); nothing is drawn, every `seed` gives the same."""
    del seed
    return Frequency(image_size, ((15, 15), (31, 31)), magnitude=30.0)
