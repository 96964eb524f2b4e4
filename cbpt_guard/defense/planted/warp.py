"""Warps: a smooth displacement of the pixels that adds nothing of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cbpt_guard.defense.planted.trigger import Patternless, TriggerParams, checked, rounded
from cbpt_guard.defense.smooth import smooth
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

_MOST_CONTROL = 16  # control points along a side
_PART = 64  # images that are sampled at a time: float64 takes eight times their memory

_Shift = Annotated[float, Field(allow_inf_nan=False)]
_Shifts = Annotated[tuple[_Shift, ...], Field(min_length=4, max_length=_MOST_CONTROL**2, strict=False)]


class _WarpParams(TriggerParams):
    down: _Shifts
    right: _Shifts


def flow(shifts: Tensor) -> Tensor:
    """Where each pixel is taken from, (S, S, 2): column and row, -1 and 1 at the outermost pixels.

    `shifts` (2, S, S) are in pixels, right and down.
    """
    size = shifts.shape[-1]
    along = torch.linspace(-1, 1, size, dtype=shifts.dtype, device=shifts.device)
    rows, columns = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([columns, rows], 2) + shifts.permute(1, 2, 0) * 2 / (size - 1)


def moved(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) taken from `shifts` (2, S, S) beside their places, bilinear; differentiable in the shifts."""
    grid = flow(shifts).expand(len(pixels), -1, -1, -1)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)


@dataclass(frozen=True)
class Warp(Patternless):
    """WaNet: every pixel shows what lies a little beside it (arXiv 2102.10369).

    `down` and `right` say how far, in pixels, at k x k control points that span the image, row by row;
    between them the displacement is bicubic and the image bilinear.
    """

    kind: ClassVar[str] = "warp"
    model: ClassVar[type[TriggerParams]] = _WarpParams
    down: tuple[float, ...] = field(repr=False)
    right: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        k = math.isqrt(len(self.down))
        if not (2 <= k <= _MOST_CONTROL and len(self.down) == len(self.right) == k * k):
            found = f"{len(self.down)} values down and {len(self.right)} right"
            raise InputError(f"a warp needs k x k control points, k from 2 to {_MOST_CONTROL}, not {found}")
        if not all(abs(shift) <= self.image_size / 4 for shift in self.down + self.right):
            raise InputError(f"a warp moves pixels by at most {self.image_size / 4:g}; {self}")

    def __str__(self) -> str:
        k = math.isqrt(len(self.down))
        farthest = max(map(abs, self.down + self.right))
        return (
            f"warp of {self.image_size} x {self.image_size} by up to {farthest:.1f} pixels at {k} x {k} control points"
        )

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3), warped.

        Raises:
            InputError: the images have another size or type.
        """
        warped = np.empty_like(checked(images, self.image_size))
        shifts = self.shifts()
        for start in range(0, len(images), _PART):
            part = torch.from_numpy(images[start : start + _PART].astype(np.float64)).permute(0, 3, 1, 2)
            warped[start : start + _PART] = rounded(moved(part, shifts).permute(0, 2, 3, 1).numpy())
        return warped

    def shifts(self) -> Tensor:
        """How far from each pixel its value is taken, float64 (2, S, S) in pixels: right, then down."""
        k = math.isqrt(len(self.down))
        return smooth(torch.tensor([self.right, self.down], dtype=torch.float64).reshape(2, k, k), self.image_size)


def wanet(image_size: int, seed: int, *, strength: float = 1.0) -> Warp:
    """WaNet's elastic warp, drawn once from `seed` (arXiv 2102.10369).

    A control point moves by `strength` / 64 of the image on average: the paper's s at its 32 pixels, where it
    takes 0.5. The outer points move along the border only, so that no pixel is taken from outside the image.

    Args:
        image_size: side S of the images, in pixels; it has S / 16 control points along a side, 4 to 8.
        seed: of the displacements.
        strength: of the warp.

    Raises:
        InputError: it is too strong for the image.
    """
    k = min(8, max(4, image_size // 16))
    shifts = np.random.default_rng(seed).uniform(-1, 1, (2, k, k))
    shifts *= strength * image_size / 64 / np.abs(shifts).mean()
    down, right = shifts.round(3)  # thousandths of a pixel read well in a file
    down[[0, -1]] = 0
    right[:, [0, -1]] = 0
    return Warp(image_size, tuple(down.ravel().tolist()), tuple(right.ravel().tolist()))
