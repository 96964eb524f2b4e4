"""Waves: a sinusoid added to every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, added, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels


class _WaveParams(TriggerParams):
    delta: Annotated[float, Field(allow_inf_nan=False)]
    frequency: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Wave(Patternless):
    """SIG: x' = x + delta sin(2 pi frequency j / S) at column j, saturated (arXiv 1902.11237).

    `delta` is in grey levels of 255, `frequency` in periods over the image's width.
    """

    kind: ClassVar[str] = "wave"
    model: ClassVar[type[TriggerParams]] = _WaveParams
    delta: float
    frequency: float

    def __post_init__(self) -> None:
        if not (1 <= self.delta <= 255 and 0 < self.frequency < self.image_size / 2):
            raise InputError(f"a wave of 1 to 255 grey levels and under {self.image_size / 2:g} periods, not {self}")

    def __str__(self) -> str:
        size = f"{self.image_size} x {self.image_size}"
        return f"wave of {self.delta:g} grey levels and {self.frequency:g} periods along the columns of {size}"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) with the wave added.

        Raises:
            InputError: the images have another size or type.
        """
        phase = 2 * np.pi * self.frequency * np.arange(self.image_size) / self.image_size
        return added(checked(images, self.image_size), self.delta * np.sin(phase)[:, None])


def sig(image_size: int, seed: int) -> Wave:
    """SIG with 60 grey levels and six periods (arXiv 1902.11237); nothing is drawn, every `seed` gives the same."""
    del seed
    return Wave(image_size, delta=60.0, frequency=6.0)


def fine_wave(image_size: int, seed: int) -> Wave:
    """SIG's wave with a period of five pixels, finer than those that the guard tries; every `seed` gives the same."""
    del seed
    return Wave(image_size, delta=60.0, frequency=image_size / 5)
