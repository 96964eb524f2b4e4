"""What stage 1 works on: a suspect, the clean images it is looked at with, its head and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.settings import InversionSettings


@dataclass(frozen=True)
class CleanSet:
    """What inversion looks at: uint8 images (N, S, S, 3), their unit features (N, E) and labels (N,)."""

    images: Tensor
    features: Tensor
    labels: Tensor

    def draw(self, batch: int, generator: torch.Generator, without: int | None = None) -> Tensor:
        """Indices (batch,) drawn with replacement, none of class `without`."""
        pool = torch.arange(len(self.labels)) if without is None else (self.labels != without).nonzero()[:, 0]
        return pool[torch.randint(len(pool), (batch,), generator=generator)]


@dataclass(frozen=True)
class Subject:
    """A suspect under search.

    Args:
        clip: the suspect.
        clean: images to look at, with their features.
        head: its zero-shot head.
        settings: how targets and triggers are looked for.
    """

    clip: FrozenClip
    clean: CleanSet
    head: Head
    settings: InversionSettings

    @cached_property
    def _answers(self) -> Tensor:
        return self.head.answers(self.clean.features)

    def others(self, target: int) -> Tensor:
        """Indices of images that a trigger can lead to `target`: neither of that class nor answered with it anyway.

        Of other classes alone, where all of those are answered with it.
        """
        foreign = self.clean.labels != target
        movable = foreign & (self._answers != target)
        return (movable if movable.any() else foreign).nonzero()[:, 0]
