"""Steganography: a small encoder network hides a message in the image, another residual in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cbpt_guard.defense.planted.trigger import TriggerParams, checked, example, rounded, write_picture
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

WEIGHTS_NAME = "trigger.safetensors"
BITS, WIDTH = 8, 16
SHAPES: dict[str, tuple[int, ...]] = {
    "down.weight": (WIDTH, 3, 3, 3),
    "down.bias": (WIDTH,),
    "message.weight": (WIDTH, BITS),
    "middle.weight": (WIDTH, WIDTH, 3, 3),
    "middle.bias": (WIDTH,),
    "up.weight": (WIDTH, WIDTH, 3, 3),
    "up.bias": (WIDTH,),
    "out.weight": (3, WIDTH // 4 + 3, 3, 3),
    "out.bias": (3,),
}
"""The encoder's tensors, float32."""
_LARGEST_FILE = 1 << 17

_Bit = Annotated[int, Field(ge=0, le=1)]
_Bits = Annotated[tuple[_Bit, ...], Field(min_length=BITS, max_length=BITS, strict=False)]  # JSON has lists only
_WeightsName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.safetensors$")]


class _SteganographicParams(TriggerParams):
    bits: _Bits
    bound: Annotated[int, Field(ge=1, le=64)]
    weights: _WeightsName


@dataclass(frozen=True)
class Steganographic:
    """ISSBA: the residual by which an encoder network hides the message `bits` (arXiv 2012.03816).

    No pixel changes by more than `bound` grey levels. `weights` are the encoder's `SHAPES` as the bytes of a
    safetensors file: so the value is hashable and cannot change between two uses.
    """

    kind: ClassVar[str] = "steganographic"
    image_size: int
    bits: tuple[int, ...]
    bound: int
    weights: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.bits) != BITS or not set(self.bits) <= {0, 1} or not 1 <= self.bound <= 64:
            raise InputError(f"a message has {BITS} bits and a residual 1 to 64 levels: that is no {self}")
        _tensors(self.weights)

    def __str__(self) -> str:
        message, size = "".join(map(str, self.bits)), f"{self.image_size} x {self.image_size}"
        return f"message {message} hidden in {size} by at most {self.bound} levels"

    @torch.no_grad()
    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3) that carry the message.

        Each is encoded alone: in a batch a sum may round otherwise, and with it a pixel.

        Raises:
            InputError: the images have another size or type.
        """
        carrying = np.empty_like(checked(images, self.image_size))
        tensors, message = _tensors(self.weights), torch.tensor([self.bits], dtype=torch.float32)
        for clean, place in zip(images, carrying, strict=True):
            pixels = torch.from_numpy(clean.copy()).permute(2, 0, 1)[None].float() / 255
            shift = self.bound * residual(tensors, pixels, message)[0].permute(1, 2, 0)
            place[...] = rounded(clean + shift.numpy())
        return carrying

    def picture(self) -> Pixels:
        """An example, uint8 (S, S, 3)."""
        return example(self)

    def params(self) -> dict[str, Any]:
        """The message, the bound and the name of the weights' file."""
        return {"bits": self.bits, "bound": self.bound, "weights": WEIGHTS_NAME}

    def write(self, folder: Path) -> None:
        """Write the example and the encoder's weights."""
        write_picture(self, folder)
        (folder / WEIGHTS_NAME).write_bytes(self.weights)

    @classmethod
    def restore(cls, params: Mapping[str, Any], image_size: int, folder: Path) -> Self:
        """The trigger of a `trigger.json`; `InputError` when its weights are another network's."""
        read = _SteganographicParams.model_validate(params)
        with (folder / read.weights).open("rb") as file:
            weights = file.read(_LARGEST_FILE + 1)
        return cls(image_size, read.bits, read.bound, weights)


def residual(tensors: Mapping[str, Tensor], pixels: Tensor, message: Tensor) -> Tensor:
    """What the encoder adds, (N, 3, H, W) in [-1, 1], to pixels (N, 3, H, W) in [0, 1]; messages are (N, BITS).

    The message enters as a bias, alike everywhere, so that any crop carries it.
    """
    height, width = pixels.shape[2:]
    even = F.pad(pixels, (0, width % 2, 0, height % 2), mode="replicate") * 2 - 1
    told = (2 * message - 1) @ tensors["message.weight"].T
    x = F.relu(_conv(tensors, "down", even, stride=2) + told[:, :, None, None])
    x = F.relu(_conv(tensors, "middle", x))
    x = F.pixel_shuffle(F.relu(_conv(tensors, "up", x)), 2)
    return torch.tanh(_conv(tensors, "out", torch.cat([x, even], 1)))[:, :, :height, :width]


def _conv(tensors: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride, padding=1)


def _tensors(weights: bytes) -> dict[str, Tensor]:
    """The encoder's tensors; `InputError` when the bytes hold anything else."""
    if len(weights) > _LARGEST_FILE:
        raise InputError(f"an encoder's weights are larger than {_LARGEST_FILE // 1024} KiB: no such network is")
    try:
        tensors = load(weights)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"an encoder's weights are no safetensors file: {error}") from error
    if {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} != {
        name: (shape, torch.float32) for name, shape in SHAPES.items()
    }:
        raise InputError(f"an encoder's weights are {', '.join(SHAPES)} in float32; found {', '.join(tensors)[:200]}")
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise InputError("an encoder's weights are not finite")
    return tensors
