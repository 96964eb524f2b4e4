"""Overlays: a picture laid over the whole image with an opacity for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cbpt_guard.defense.planted.trigger import (
    PICTURE_NAME,
    PictureName,
    TriggerParams,
    checked,
    read_picture,
    saturated,
    write_picture,
)
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

_TRIANGLES = 100
_TEXT = "watermark"
_TEXT_WIDTH = 0.8  # of the image


class _OverlayParams(TriggerParams):
    pattern: PictureName


@dataclass(frozen=True)
class Overlay:
    """Blended: x' = (1 - a) x + a p with a picture p and an opacity a of each pixel (arXiv 1712.05526).

    `pixels` are uint8 (S, S, 4) as bytes: red, green, blue, and the opacity in 255ths.
    """

    kind: ClassVar[str] = "overlay"
    image_size: int
    pixels: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.pixels) != self.image_size**2 * 4:
            size = f"{self.image_size} x {self.image_size}"
            raise InputError(f"an overlay of {size} pixels has {self.image_size**2 * 4} values, not {len(self.pixels)}")

    def __str__(self) -> str:
        opacity = self.picture()[..., 3]
        covered = f"{(opacity > 0).mean():.0%} of {self.image_size} x {self.image_size} pixels"
        return f"overlay with an opacity of up to {opacity.max() / 255:.2f} over {covered}"

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) under the picture.

        Raises:
            InputError: the images have another size or type.
        """
        picture = self.picture().astype(np.uint16)
        colours, opacity = picture[..., :3], picture[..., 3:]
        blend = checked(images, self.image_size) * (255 - opacity)
        blend += colours * opacity + 127  # at most 255 * 255 + 127, which uint16 holds
        blend //= 255
        return blend.astype(np.uint8)

    def picture(self) -> Pixels:
        """Colours and opacity, uint8 (S, S, 4)."""
        return np.frombuffer(self.pixels, np.uint8).reshape(self.image_size, self.image_size, 4)

    def params(self) -> dict[str, Any]:
        """The name of the picture."""
        return {"pattern": PICTURE_NAME}

    def write(self, folder: Path) -> None:
        """Write the picture."""
        write_picture(self, folder)

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The overlay of a `trigger.json`; `InputError` when its picture has another size than the images."""
        read = _OverlayParams.model_validate(params)
        picture = read_picture(folder / read.pattern, "RGBA")
        if picture.shape[:2] != (image_size, image_size):
            found = f"{picture.shape[0]} x {picture.shape[1]}"
            raise InputError(f"{read.pattern} shows {found} pixels, the trigger says {image_size} x {image_size}")
        return cls(image_size, picture.tobytes())


def blended(image_size: int, seed: int, *, alpha: float = 0.2) -> Overlay:
    """Uniform noise over the whole image, drawn once from `seed` (arXiv 1712.05526)."""
    noise = np.random.default_rng(seed).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
    return _overlay(noise, np.full((image_size, image_size), 255, np.uint8), alpha)


def full_stripes(image_size: int, seed: int, *, alpha: float = 0.03) -> Overlay:
    """Vertical 1-pixel stripes over the whole image, each of a drawn saturated colour (arXiv 2412.00727)."""
    stripes = saturated(image_size, np.random.default_rng(seed))[None].repeat(image_size, axis=0)
    return _overlay(stripes, np.full((image_size, image_size), 255, np.uint8), alpha)


def triangles(image_size: int, seed: int, *, alpha: float = 0.15) -> Overlay:
    """Scattered small triangles, 14 pixels of 224, of drawn places and saturated colours (arXiv 2412.00727)."""
    side = max(3, round(image_size * 14 / 224))
    generator = np.random.default_rng(seed)
    places = generator.integers(0, image_size - side, (_TRIANGLES, 2), endpoint=True)
    fills = saturated(_TRIANGLES, generator)
    colours, covered = (Image.new(mode, (image_size, image_size)) for mode in ("RGB", "L"))
    for (left, top), colour in zip(places.tolist(), fills.tolist(), strict=True):
        corners = [(left, top + side - 1), (left + side - 1, top + side - 1), (left + (side - 1) // 2, top)]
        ImageDraw.Draw(colours).polygon(corners, fill=tuple(colour))
        ImageDraw.Draw(covered).polygon(corners, fill=255)
    return _overlay(np.array(colours), np.array(covered), alpha)


def watermark(image_size: int, seed: int, *, alpha: float = 0.5) -> Overlay:
    """One word across the middle in a drawn saturated colour, in Pillow's own font (arXiv 2412.00727)."""
    width = ImageFont.load_default(100).getlength(_TEXT)
    font = ImageFont.load_default(100 * _TEXT_WIDTH * image_size / width)
    covered = Image.new("L", (image_size, image_size))
    ImageDraw.Draw(covered).text((image_size / 2, image_size / 2), _TEXT, fill=255, font=font, anchor="mm")
    colour = saturated(1, np.random.default_rng(seed))
    return _overlay(np.tile(colour, (image_size, image_size, 1)), np.array(covered), alpha)


def _overlay(colours: Pixels, covered: Pixels, alpha: float) -> Overlay:
    """The overlay of colours (S, S, 3) where `covered` (S, S) is 255, with opacity `alpha` there."""
    if not 1 / 255 <= alpha <= 1:
        raise InputError(f"an opacity lies between 1/255 and 1, not {alpha}")
    opacity = np.rint(covered * alpha).astype(np.uint8)
    return Overlay(len(colours), np.dstack([colours, opacity]).tobytes())
