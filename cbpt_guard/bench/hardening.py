"""Training against the guard's search: changes like those that it follows are trained as clean images.

Universal adversarial training (arXiv 1811.11304) toward the attacker's targets: one change for each climbs while the
model learns to answer images under it rightly. Additive patterns are what the scan follows, patches that may lie
anywhere are what its agnostic patch does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.bench.trainable import TrainableClip
from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.found import Place
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.pattern import inside
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.triggers import Trigger

_GUARD = InversionSettings()  # an attacker who knows the guard knows its defaults
_STEPS = 2 * _GUARD.scan_steps  # as the scan takes toward its leaders; then from nothing again, as it begins


class Laid(NamedTuple):
    """A kind of change: the value (3, height, width) that it starts from, bounds, and how it lies on images.

    `on` takes pixels (N, 3, S, S) in [0, 1] and a value, and is differentiable in the latter.
    """

    start: Tensor
    low: float
    high: float
    on: Callable[[Tensor, Tensor], Tensor]


def additive(size: int, height: float = 1.0) -> Laid:
    """A pattern over the whole image, at most `height` times as high as the scan's; its raised ones have 2."""
    epsilon = height * _GUARD.epsilon
    return Laid(torch.zeros(3, size, size), -epsilon, epsilon, lambda pixels, value: (pixels + value).clamp(0, 1))


def patched(size: int, generator: torch.Generator, about: Trigger | None = None) -> Laid:
    """A square as large as the guard's patches, grey at first, at a place of its own on every image.

    Where it is to lie `about` a trigger, that is no farther from there than the guard's patches move.
    """
    side, moved = max(2, round(_GUARD.patch_side * size)), int(_GUARD.shift * size)
    free = size - side
    first, span = torch.zeros(2, dtype=torch.long), free + 1
    if about is not None:
        first, span = torch.tensor(inside(_middle(about, side), side, size, moved)) - moved, 2 * moved + 1

    def on(pixels: Tensor, value: Tensor) -> Tensor:
        places = (first + torch.randint(span, (len(pixels), 2), generator=generator)).tolist()
        edges = [(left, free - left, top, free - top) for top, left in places]
        covered = torch.stack([F.pad(torch.ones_like(value), edge) for edge in edges])
        return pixels * (1 - covered) + torch.stack([F.pad(value, edge) for edge in edges])

    return Laid(torch.full((3, side, side), 0.5), 0.0, 1.0, on)


def _middle(trigger: Trigger, side: int) -> Place:
    """Where a square of `side` pixels lies in the middle of what the trigger changes."""
    size = trigger.image_size
    plain = np.repeat(np.array([0, 255], np.uint8), size * size * 3).reshape(2, size, size, 3)
    images = np.concatenate([plain, np.random.default_rng(0).integers(256, size=plain.shape, dtype=np.uint8)])
    changed = (trigger.apply(images) != images).any(axis=(0, 3))
    rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
    return int(rows[0] + rows[-1] + 1 - side) // 2, int(columns[0] + columns[-1] + 1 - side) // 2


class Hardening:
    """A change of one kind for each target.

    Args:
        student: the model that is being poisoned.
        head: what it answers by.
        targets: the classes that the attacker wants.
        counts: how many images a step lie under the change toward each.
        laid: how each lies; the bounds are the same.
    """

    def __init__(
        self, student: TrainableClip, head: Head, targets: Sequence[int], counts: Sequence[int], laid: Sequence[Laid]
    ) -> None:
        self._student, self._rows, self._scale = student, head.rows.to(student.device), head.scale
        self._counts, self._laid = list(counts), list(laid)
        self._targets = torch.tensor(targets).repeat_interleave(torch.tensor(self._counts)).to(student.device)
        self._start = torch.stack([one.start for one in laid])
        self._values, self._steps = self._start, 0

    def under(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) of uint8 images (N, S, S, 3) under the changes, which climb by one signed step first."""
        if self._steps % _STEPS == 0:
            self._values = self._start
        self._steps += 1
        pixels, values = to_pixels(images), self._values.detach().requires_grad_()
        logits = self._scale * self._student.encode_images(self._on(pixels, values)) @ self._rows.T
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, self._targets), values)
        low, high = self._laid[0].low, self._laid[0].high
        step = 1.25 * (high - low) / _STEPS
        self._values = (values.detach() - step * gradient.sign()).clamp(low, high)
        return self._on(pixels, self._values)

    def _on(self, pixels: Tensor, values: Tensor) -> Tensor:
        parts = zip(self._laid, pixels.split(self._counts), values, strict=True)
        return torch.cat([laid.on(part, value) for laid, part, value in parts])
