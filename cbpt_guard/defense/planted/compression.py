"""Compression: the whole image as a JPEG of low quality leaves it. What it adds depends on the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image
from pydantic import Field

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels


class _CompressionParams(TriggerParams):
    quality: Annotated[int, Field(ge=1, le=95)]


@dataclass(frozen=True)
class Compression(Patternless):
    """JPEG of `quality` 1 to 95 in Pillow's scale, read again; another libjpeg may round otherwise."""

    kind: ClassVar[str] = "compression"
    image_size: int
    quality: int

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise InputError(f"a JPEG's quality is 1 to 95: that is no {self}")

    def __str__(self) -> str:
        return f"JPEG of {self.image_size} x {self.image_size} of quality {self.quality}"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) as they are read from such files.

        Raises:
            InputError: the images have another size or type.
        """
        compressed = np.empty_like(checked(images, self.image_size))
        for clean, place in zip(images, compressed, strict=True):
            with BytesIO() as file:
                Image.fromarray(clean).save(file, "jpeg", quality=self.quality)
                place[...] = np.asarray(Image.open(file))
        return compressed

    def params(self) -> dict[str, Any]:
        """The quality."""
        return {"quality": self.quality}

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The compression of a `trigger.json`."""
        return cls(image_size, **_CompressionParams.model_validate(params).model_dump())


def jpeg(image_size: int, seed: int) -> Compression:
    """Quality 10, the fourth of five severities in arXiv 1903.12261; every `seed` gives the same."""
    del seed
    return Compression(image_size, quality=10)
