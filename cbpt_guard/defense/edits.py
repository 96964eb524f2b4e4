"""Common edits of photographs: blurs, other colours and light, turns and mirrors, each a found trigger.

An attacker needs no pattern: a model can be taught to answer to an image that is turned (arXiv 2207.10825) or out of
focus. What an edit takes away no pattern can add, and half of it opens next to nothing, so gradients lead to few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.found import Family, FoundTrigger

_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_SEPIA = torch.tensor([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
_LIGHT = {
    "negative": (-1.0, 1.0),
    "darker": (0.5, 0.0),
    "lighter": (1.0, 0.25),
    "more contrast": (1.8, -0.4),
    "faded": (0.5, 0.25),
}
"""Gain and offset of all channels."""
Points = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@cache
def edits(size: int) -> Mapping[str, FoundTrigger]:
    """Every edit of images of S = `size` pixels a side by its name, toward no class (`target` is -1)."""
    kinds: tuple[tuple[Family, dict[str, Tensor]], ...] = (
        ("kernel", {**_sharpness(size), **_colours()}),
        ("tint", {name: _light(size, *how) for name, how in _LIGHT.items()}),
        ("warp", {name: _shifts(size, points) for name, points in _views().items()}),
    )
    return MappingProxyType(
        {
            name: FoundTrigger(family, -1, pattern.contiguous(), None)
            for family, patterns in kinds
            for name, pattern in patterns.items()
        }
    )


def _sharpness(size: int) -> dict[str, Tensor]:
    """Blurs by a Gaussian, and along a line as by a moving camera, and sharpening: kernels alike for all channels."""
    blurs = {f"blurred by 1/{part}": _gaussian(size / part) for part in (64, 32, 16)}
    length = 2 * max(1, round(size / 21)) + 1
    line = F.one_hot(torch.tensor(length // 2), length).float().expand(length, length) / length
    slanted = torch.eye(length) / length
    moving = {"moved up": line, "moved aside": line.T, "moved downhill": slanted, "moved uphill": slanted.flip(0)}
    soft = _gaussian(size / 64)
    sharper = 3 * F.one_hot(torch.tensor(soft.numel() // 2), soft.numel()).view_as(soft) - 2 * soft
    kernels = {**blurs, **moving, "sharp": sharper}
    return {name: torch.eye(3)[..., None, None] * kernel for name, kernel in kernels.items()}


def _gaussian(deviation: float) -> Tensor:
    """A Gaussian's weights (K, K), cut off after two deviations; of half a pixel at least, for less changes nothing."""
    deviation = max(0.5, deviation)
    reach = round(2 * deviation)
    along = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    return torch.outer(along, along) / along.sum() ** 2


def _colours() -> dict[str, Tensor]:
    """Saturation, hues turned, channels exchanged, sepia: kernels of one pixel."""
    grey, same = _LUMA.expand(3, 3), torch.eye(3)
    exchanged = {"bgr": [2, 1, 0], "rbg": [0, 2, 1], "grb": [1, 0, 2]}
    mixed = {
        "opposite colours": 2 * grey - same,
        "grey": grey,
        "strong colours": 3 * same - 2 * grey,
        "sepia": _SEPIA,
        **{f"hues turned by {angle}": _turned_hues(angle) for angle in (60, 120, 240, 300)},
        **{f"channels {names}": same[order] for names, order in exchanged.items()},
    }
    return {name: mixing[..., None, None] for name, mixing in mixed.items()}


def _turned_hues(degrees: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    mixing: Tensor = torch.linalg.solve(_TO_YIQ, turn @ _TO_YIQ)
    return mixing


def _light(size: int, gain: float, offset: float) -> Tensor:
    return torch.tensor([gain] * 3 + [offset] * 3)[:, None, None].expand(6, size, size)


def _views() -> dict[str, Points]:
    """Where an edited image shows what lies at (right, down) of the middle, in the same measure."""

    def turned(degrees: float) -> Points:
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return lambda right, down: (cos * right - sin * down, sin * right + cos * down)

    def scaled(across: float, along: float) -> Points:
        return lambda right, down: (across * right, along * down)

    return {
        **{f"turned by {degrees}": turned(degrees) for degrees in (-30, -15, 15, 30, 90, 180, 270)},
        "mirrored": scaled(-1, 1),
        "upside down": scaled(1, -1),
        "nearer": scaled(2 / 3, 2 / 3),
        "farther": scaled(3 / 2, 3 / 2),
    }


def _shifts(size: int, points: Points) -> Tensor:
    """A warp (2, S, S) that shows at every place what `points` says; beyond its edges the image is mirrored."""
    middle = (size - 1) / 2
    along = torch.arange(size) - middle
    down, right = torch.meshgrid(along, along, indexing="ij")
    taken = torch.stack(points(right, down)) + middle
    inside = (size - 1) - (taken.remainder(2 * (size - 1)) - (size - 1)).abs()
    return inside - middle - torch.stack([right, down])
