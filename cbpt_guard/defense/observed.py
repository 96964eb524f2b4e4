"""Observed attack images: what a team that was attacked can add to the search and to the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.head import Head
from cbpt_guard.errors import InputError

_CLEAR_SHARE = 0.1


@dataclass(frozen=True)
class Observed:
    """Features (K, E) of observed attack images by the target they answer: one half to fit on, one to judge by."""

    fitting: dict[int, Tensor] = field(default_factory=dict)
    judging: dict[int, Tensor] = field(default_factory=dict)

    @property
    def targets(self) -> list[int]:
        """Targets that the images show."""
        return list(self.fitting)


def moved_to(found: Tensor, bank: TriggerBank, observed: Mapping[int, Tensor]) -> Tensor:
    """Features (K, N, E) under found triggers, each trigger's mean moved to that of the observed images (M, E).

    What keeps anchored rows from answering the true trigger's images as well as the found ones' is the distance of
    their mean features: one direction, which a handful of attack images show. Triggers toward targets of which none
    was observed stay.
    """
    if not observed:
        return found  # a copy would be as large as all of stage 2
    return torch.stack(
        [
            F.normalize(features + observed[trigger.target].mean(0) - features.mean(0), dim=1)
            if trigger.target in observed
            else features
            for trigger, features in zip(bank, found, strict=True)
        ]
    )


def observe(features: Tensor | None, original: Head, clean: Tensor) -> Observed:
    """Sort observed attack images (N, E) by their zero-shot answers.

    The answer that most of them share is a target, and so is any that a tenth of them share beyond its natural share,
    that among the answers to `clean` features (M, E): with few classes a failed attack is often answered rightly.

    Raises:
        InputError: fewer than two images, or no answer that a tenth of them share.
    """
    if features is None:
        return Observed()
    answers = original.answers(features)
    counts = answers.bincount(minlength=len(original.rows))
    natural = original.answers(clean).bincount(minlength=len(original.rows)) / len(clean)
    leader = int(counts.argmax())
    targets = [
        int(c)
        for c in counts.argsort(descending=True, stable=True)
        if counts[c] >= max(2, (_CLEAR_SHARE + (0 if c == leader else natural[c])) * len(features))
    ]
    if not targets:
        raise InputError(
            f"the {len(features)} observed attack images share no answer; they need two or more that succeeded"
        )
    by_target = {target: features[answers == target] for target in targets}
    return Observed(
        {target: images[::2] for target, images in by_target.items()},
        {target: images[1::2] for target, images in by_target.items()},
    )
