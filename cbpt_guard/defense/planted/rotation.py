"""Rotation: the whole image turned by a few degrees, as by a camera that is not held straight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from cbpt_guard.defense.planted.trigger import EachAlone, TriggerParams
from cbpt_guard.errors import InputError


class _RotationParams(TriggerParams):
    degrees: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Rotation(EachAlone):
    """The image turned about its centre by `degrees`, counter-clockwise (arXiv 2207.10825).

    What turns into the frame is the image mirrored at its edges: black corners would be a pattern of their own.
    """

    kind: ClassVar[str] = "rotation"
    model: ClassVar[type[TriggerParams]] = _RotationParams
    degrees: float

    def __post_init__(self) -> None:
        if not 1 <= abs(self.degrees) <= 180:
            raise InputError(f"an image is turned by 1 to 180 degrees, to either side: that is no {self}")

    def __str__(self) -> str:
        return f"rotation of {self.image_size} x {self.image_size} by {self.degrees:g} degrees"

    def altered(self, image: Image.Image) -> Image.Image:
        """The turned image."""
        margin, end = self.image_size // 2, self.image_size // 2 + self.image_size
        mirrored = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
        turned = Image.fromarray(mirrored).rotate(self.degrees, Image.Resampling.BILINEAR)
        return turned.crop((margin, margin, end, end))


def tilted(image_size: int, seed: int) -> Rotation:
    """Sixteen degrees, of the angles of arXiv 2207.10825 one of the least; every `seed` gives the same."""
    del seed
    return Rotation(image_size, degrees=16.0)
