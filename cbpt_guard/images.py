"""Any image to uint8 (S, S, 3), resized and cropped exactly as open_clip would; all the limits live here.

What open_clip does, this does, because the guard was measured on the same pixels: EXIF rotation is ignored,
16-bit images saturate, transparency is dropped, and of an animation only the first frame is decoded.
"""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from cbpt_guard.errors import ImageError

Triple = tuple[float, float, float]
Pixels = npt.NDArray[np.uint8]
ImageSource = str | os.PathLike[str] | bytes | Image.Image | Pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_OPENED_AS = (*FORMATS, "MPO")  # Pillow's JPEG reader calls a JPEG with a second picture inside MPO
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+:/")
_ONE_LOADS = threading.Lock()  # a lazily opened image may stand in a list twice, and its load is not thread-safe


class Preprocess(BaseModel):
    """How a CLIP wants its images: geometry is Pillow's part, mean and std the encoder's and the graph's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=16, le=2048)]
    resize_mode: Literal["shortest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: Triple
    std: Triple


class ImageLimits(BaseModel):
    """What one image may cost: file size in bytes, decoded pixels, and pixels of the (half-)resized image.

    Pillow's own limits are left alone and hold too, so `max_pixels` cannot be raised beyond them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: Annotated[int, Field(gt=0)] = 64 * 1024**2
    max_pixels: Annotated[int, Field(gt=0)] = 80_000_000
    max_resized_pixels: Annotated[int, Field(gt=0)] = 50_000_000


DEFAULT_LIMITS = ImageLimits()


def load_image(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """A decoded picture of a file's path, a file's bytes, a Pillow image, or an RGB uint8 array (H, W, 3).

    Files may be JPEG, PNG, WebP, GIF, BMP or TIFF. Nothing is ever fetched from a network.

    Raises:
        ImageError: it is something else, cannot be decoded, or exceeds a limit.
    """
    if isinstance(source, Image.Image):
        with _ONE_LOADS:
            return _load(source, limits)
    if isinstance(source, np.ndarray):
        return _load(Image.fromarray(_checked_array(source, limits)), limits)
    if isinstance(source, bytes):
        return _decode(source, limits)
    if isinstance(source, str | os.PathLike):
        return _decode(_read(os.fsdecode(source), limits), limits)
    raise ImageError(
        f"cannot take an image of type {type(source).__name__}; pass a path, bytes, a Pillow image or "
        "an RGB uint8 array (H, W, 3), and several images as a list"
    )


def prepare(image: Image.Image, preprocess: Preprocess, limits: ImageLimits = DEFAULT_LIMITS) -> Pixels:
    """Resized, cropped RGB pixels, uint8 (S, S, 3): open_clip's evaluation transform without mean and std.

    Conversion to RGB comes last, as there: palette and transparency resize differently.

    Raises:
        ImageError: the resize would exceed the limits, or Pillow cannot turn this kind of image into RGB.
    """
    width, height = _resized_size(image, preprocess, limits)
    left, top = round((width - preprocess.size) / 2), round((height - preprocess.size) / 2)
    method = Image.Resampling[preprocess.interpolation.upper()]
    try:
        resized = image.resize((width, height), method)
        cropped = resized.crop((left, top, left + preprocess.size, top + preprocess.size))
        return np.array(cropped.convert("RGB"))
    except Exception as error:  # also Pillow's warnings, where the caller turns warnings into errors
        raise ImageError(f"an image of mode {image.mode} cannot be resized to RGB: {error}") from error


def _resized_size(image: Image.Image, preprocess: Preprocess, limits: ImageLimits) -> tuple[int, int]:
    size = preprocess.size
    if preprocess.resize_mode == "squash":
        width, height = size, size
    elif image.width <= image.height:
        width, height = size, int(size * image.height / image.width)
    else:
        width, height = int(size * image.width / image.height), size
    # Pillow resizes the width first, so that an image of new width and old height exists for a moment
    cost = width * max(height, image.height)
    if cost > limits.max_resized_pixels:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels is too elongated: its resize takes "
            f"{cost:,} pixels, over the limit of {limits.max_resized_pixels:,}; crop it first"
        )
    return width, height


def _read(path: str, limits: ImageLimits) -> bytes:
    if _URL.match(path):
        raise ImageError(f"{path} is a URL; nothing is ever fetched, pass a path or bytes")
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ImageError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return data


def _decode(data: bytes, limits: ImageLimits) -> Image.Image:
    if len(data) > limits.max_bytes:
        raise ImageError(f"the file is over the limit of {limits.max_bytes:,} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{len(data):,} bytes that are no image of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise anything on malformed bytes
        raise ImageError(f"the file cannot be opened as an image: {error}") from error
    return _load(image, limits)


def _load(image: Image.Image, limits: ImageLimits) -> Image.Image:
    """The same image with its pixels decoded, after its size has been judged by the header alone."""
    if image.format is not None and image.format not in _OPENED_AS:
        raise ImageError(f"an image of format {image.format}; allowed are {', '.join(FORMATS)}")
    pixels = image.width * image.height
    if pixels == 0:
        raise ImageError(f"an empty image of {image.width} x {image.height} pixels")
    if pixels > limits.max_pixels:
        raise ImageError(
            f"an image of {image.width} x {image.height} is over the limit of {limits.max_pixels:,} pixels"
        )
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise anything on malformed bytes
        raise ImageError(f"the {image.format or 'image'} data cannot be decoded: {error}") from error
    return image


def _checked_array(array: npt.NDArray[Any], limits: ImageLimits) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        hint = "; several images are passed as a list" if array.ndim == 4 else ""
        raise ImageError(f"an array of {array.dtype} {array.shape}; expected RGB uint8 (H, W, 3){hint}")
    if array.shape[0] * array.shape[1] > limits.max_pixels:  # before the copy: a view may repeat a few bytes for ever
        raise ImageError(f"an array of {array.shape} is over the limit of {limits.max_pixels:,} pixels")
    return np.ascontiguousarray(array)
