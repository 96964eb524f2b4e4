"""Pattern: a trigger while it is being learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from cbpt_guard.defense.found import FoundTrigger, Inverted, Place
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.smooth import smooth


class Pattern:
    """Unbounded tensors that their family maps into a trigger for images of S x S pixels.

    - additive: pattern = eps tanh(P)
    - masked: pattern = sigmoid(P), mask = sigmoid(M)
    - patch: the same, with the mask 1 on a square and 0 elsewhere: in the middle, or `at` a place, its top left pixel
    - warp: displacements a tanh(P) at few control points, which keeps them as smooth as WaNet's
    - tint: gains 1 + g tanh(P) and offsets o tanh(Q) at few control points
    """

    def __init__(
        self,
        family: Inverted,
        size: int,
        settings: InversionSettings,
        generator: torch.Generator,
        at: Place | None = None,
    ) -> None:
        self.family = family
        self._size, self._settings = size, settings
        shape = {
            "warp": (2, settings.warp_points, settings.warp_points),
            "tint": (6, settings.tint_points, settings.tint_points),
        }.get(family, (3, size, size))
        spread = 0.1 if family == "tint" else 0.5  # strong tints leave the gradients little to go by
        self.paint = (spread * torch.randn(shape, generator=generator)).requires_grad_()
        # a mask that starts at about a quarter everywhere lets gradients reach every place
        self.mask = (0.1 * torch.randn(1, size, size, generator=generator) - 1).requires_grad_()
        moved = int(settings.shift * size)
        self._square = square(size, self.side, None if at is None else inside(at, self.side, size, moved))

    def parameters(self) -> list[Tensor]:
        """What the optimiser may change."""
        return [self.paint, self.mask] if self.family == "masked" else [self.paint]

    @property
    def side(self) -> int:
        """Pixels of a patch's side."""
        return max(2, round(self._settings.patch_side * self._size))

    def value(self, target: int, budget: float | None = None) -> FoundTrigger:
        """The trigger as it stands, with its graph; a mask of a larger mean area than `budget` is scaled down to it."""
        if self.family == "additive":
            return FoundTrigger("additive", target, self._settings.epsilon * torch.tanh(self.paint), None)
        if self.family == "warp":
            farthest = self._settings.warp_shift * self._size
            return FoundTrigger("warp", target, smooth(farthest * torch.tanh(self.paint), self._size), None)
        if self.family == "tint":
            gain, offset = torch.tanh(self.paint).split(3)
            control = torch.cat([1 + self._settings.tint_gain * gain, self._settings.tint_offset * offset])
            return FoundTrigger("tint", target, smooth(control, self._size), None)
        if self.family == "patch":
            return FoundTrigger("patch", target, self._square * torch.sigmoid(self.paint), self._square)
        mask = torch.sigmoid(self.mask)
        if budget is not None:
            mask = mask * (budget / mask.mean()).clamp(max=1)
        return FoundTrigger("masked", target, torch.sigmoid(self.paint), mask)


def square(size: int, side: int, at: Place | None = None) -> Tensor:
    """A mask (1, S, S): 1 on a square of `side` pixels, in the middle of S = `size` or with its top left one `at`."""
    top, left = 2 * ((size - side) // 2,) if at is None else at
    mask = torch.zeros(1, size, size)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def inside(place: Place, side: int, size: int, margin: int) -> Place:
    """The nearest place from which a square of `side` pixels stays within S = `size` when moved by `margin` pixels."""
    low, high = sorted((margin, size - side - margin))
    top, left = (max(low, min(one, high)) for one in place)
    return top, left
