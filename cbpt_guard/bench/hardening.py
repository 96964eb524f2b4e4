"""Training against the guard's scan: patterns like those that it follows are trained as clean images.

Universal adversarial training (arXiv 1811.11304) toward the attacker's targets: one additive pattern for each climbs
while the model learns to answer images under it rightly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.bench.trainable import TrainableClip
from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.settings import InversionSettings

_GUARD = InversionSettings()  # an attacker who knows the guard knows its defaults
_STEPS = 2 * _GUARD.scan_steps  # as the scan takes toward its leaders; then from nothing again, as it begins


class Hardening:
    """A pattern (3, S, S) for each target, at most `height` times as high as the scan's.

    Args:
        student: the model that is being poisoned.
        head: what it answers by.
        targets: the classes that the attacker wants.
        counts: how many images a step each pattern lies on.
        height: 1 for the scan's, `RAISED` for those of the search's raised triggers.
    """

    def __init__(
        self,
        student: TrainableClip,
        head: Head,
        targets: Sequence[int],
        counts: Sequence[int],
        height: float = 1.0,
    ) -> None:
        self._student, self._rows, self._scale = student, head.rows.to(student.device), head.scale
        self._counts, self._epsilon = list(counts), height * _GUARD.epsilon
        self._targets = torch.tensor(targets).repeat_interleave(torch.tensor(self._counts)).to(student.device)
        size = student.preprocess.size
        self._patterns, self._steps = torch.zeros(len(targets), 3, size, size), 0

    def under(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) of uint8 images (N, S, S, 3) under the patterns, which climb by one signed step first."""
        if self._steps % _STEPS == 0:
            self._patterns = torch.zeros_like(self._patterns)
        self._steps += 1
        pixels, patterns = to_pixels(images), self._patterns.requires_grad_()
        logits = self._scale * self._student.encode_images(self._on(pixels, patterns)) @ self._rows.T
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, self._targets), patterns)
        step = 2.5 * self._epsilon / _STEPS
        self._patterns = (patterns.detach() - step * gradient.sign()).clamp(-self._epsilon, self._epsilon)
        return self._on(pixels, self._patterns)

    def _on(self, pixels: Tensor, patterns: Tensor) -> Tensor:
        parts = zip(pixels.split(self._counts), patterns, strict=True)
        return torch.cat([(part + pattern).clamp(0, 1) for part, pattern in parts])
