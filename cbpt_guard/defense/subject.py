"""What stage 1 works on: a suspect, the clean images it is looked at with, its head and the settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.settings import InversionSettings

RAISED = 2.0
"""Times `epsilon` that additive patterns may be where the usual ones may have been trained against."""
_ENOUGH = 0.2  # the cosine that nobody need lead by more than


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

    @cached_property
    def raised(self) -> Subject:
        """The same with additive patterns `RAISED` times as high."""
        return self.with_settings(epsilon=min(1.0, RAISED * self.settings.epsilon))

    def with_settings(self, **changes: float) -> Subject:
        """The same with some settings changed."""
        return replace(self, settings=self.settings.model_copy(update=changes))

    def usual_lead(self, share: float) -> float:
        """By how many logits a class must lead to be answered surely.

        That `share` in [0, 1] of the right answers on clean images lead by less; 0 where none is right, and no more
        than a fifth of the logit scale.
        """
        leads = self.head.leads(self.clean.features).gather(1, self.clean.labels[:, None])[:, 0]
        right = leads[leads > 0]
        return min(_ENOUGH * self.head.scale, float(right.quantile(share))) if len(right) else 0.0

    def others(self, target: int) -> Tensor:
        """Indices of images that a trigger can lead to `target`: neither of that class nor answered with it anyway.

        Of other classes alone, where all of those are answered with it.
        """
        foreign = self.clean.labels != target
        movable = foreign & (self._answers != target)
        return (movable if movable.any() else foreign).nonzero()[:, 0]
