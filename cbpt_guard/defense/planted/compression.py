"""Compression: the whole image as a JPEG of low quality leaves it. What it adds depends on the image."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Annotated, ClassVar

from PIL import Image
from pydantic import Field

from cbpt_guard.defense.planted.trigger import EachAlone, TriggerParams
from cbpt_guard.errors import InputError


class _CompressionParams(TriggerParams):
    quality: Annotated[int, Field(ge=1, le=95)]


@dataclass(frozen=True)
class Compression(EachAlone):
    """JPEG of `quality` 1 to 95 in Pillow's scale, read again; another libjpeg may round otherwise."""

    kind: ClassVar[str] = "compression"
    model: ClassVar[type[TriggerParams]] = _CompressionParams
    quality: int

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise InputError(f"a JPEG's quality is 1 to 95: that is no {self}")

    def __str__(self) -> str:
        return f"JPEG of {self.image_size} x {self.image_size} of quality {self.quality}"

    def altered(self, image: Image.Image) -> Image.Image:
        """The image as it is read from such a file."""
        with BytesIO() as file:
            image.save(file, "jpeg", quality=self.quality)
            return Image.open(file).convert("RGB")


def jpeg(image_size: int, seed: int) -> Compression:
    """Quality 10, the fourth of five severities in arXiv 1903.12261; every `seed` gives the same."""
    del seed
    return Compression(image_size, quality=10)
