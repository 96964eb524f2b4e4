"""Rotation: the whole image turned by a few degrees, as by a camera that is not held straight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels


class _RotationParams(TriggerParams):
    degrees: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Rotation(Patternless):
    """The image turned about its centre by `degrees`, counter-clockwise (arXiv 2207.10825).

    What turns into the frame is the image mirrored at its edges: black corners would be a pattern of their own.
    """

    kind: ClassVar[str] = "rotation"
    image_size: int
    degrees: float

    def __post_init__(self) -> None:
        if not 1 <= abs(self.degrees) <= 180:
            raise InputError(f"an image is turned by 1 to 180 degrees, to either side: that is no {self}")

    def __str__(self) -> str:
        return f"rotation of {self.image_size} x {self.image_size} by {self.degrees:g} degrees"

    def apply(self, images: Pixels) -> Pixels:
        """Turned copies of uint8 images (N, S, S, 3).

        Raises:
            InputError: the images have another size or type.
        """
        margin = self.image_size // 2
        inner = np.s_[margin : margin + self.image_size]
        turned = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, turned, strict=True):
            wide = Image.fromarray(np.pad(clean, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric"))
            place[...] = np.asarray(wide.rotate(self.degrees, Image.Resampling.BILINEAR))[inner, inner]
        return turned

    def params(self) -> dict[str, Any]:
        """The angle."""
        return {"degrees": self.degrees}

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The rotation of a `trigger.json`."""
        return cls(image_size, **_RotationParams.model_validate(params).model_dump())


def tilted(image_size: int, seed: int) -> Rotation:
    """Sixteen degrees, of the angles of arXiv 2207.10825 one of the least; every `seed` gives the same."""
    del seed
    return Rotation(image_size, degrees=16.0)
