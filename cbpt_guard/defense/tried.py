"""Which classes common edits lead to: every edit is tried on clean images, with forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cbpt_guard.defense.edits import edits
from cbpt_guard.defense.found import FoundTrigger, encode
from cbpt_guard.defense.odds import odds_of
from cbpt_guard.defense.progress import Progress
from cbpt_guard.defense.settings import MANY
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.together import Tally, together
from cbpt_guard.defense.waves import SURELY

_FIRST, _MORE = 16, 128  # images that every edit is tried on, and those that are worth a closer look
_FAIR = 0.25  # of the first images, that such a one leads to one class


def tried_images(size: int, classes: int) -> int:
    """Images that are looked at under edits of a model that none leads to a class."""
    return _FIRST * len(edits(size)) if classes >= MANY else 0


@dataclass(frozen=True)
class Tried:
    """The edits that led to some class.

    Their numbers (W,) in `edits`; how much each class is reached, (W, C); by how many logits it leads in the median
    over images of other classes, (W, C); and by how many it must, so that the edit is telling of it.
    """

    numbers: Tensor
    reached: Tensor
    leads: Tensor
    usual: float

    @property
    def odds(self) -> Tensor:
        """The odds of each class under the edit, of those telling of it, that reaches it most, (C,); or 0."""
        none = torch.zeros(1, self.reached.shape[1])  # there may be no edit
        return torch.cat([none, torch.where(self.leads > self.usual, odds_of(self.reached), 0.0)]).amax(0)

    def triggers(self, target: int, size: int, least: float) -> list[FoundTrigger]:
        """The edits that are telling of `target` and reach it with odds of `least` or more, the surest first."""
        leads, odds = self.leads[:, target], odds_of(self.reached[:, target])
        order = [place for place in leads.argsort(descending=True, stable=True).tolist() if leads[place] > self.usual]
        every = list(edits(size).values())
        return [replace(every[int(self.numbers[place])], target=target) for place in order if odds[place] >= least]

    @classmethod
    def unpacked(cls, tensor: Tensor, usual: float) -> Tried:
        """As `packed` made it, (W, 1 + 2 C)."""
        reached, leads = tensor[:, 1:].chunk(2, dim=1)
        return cls(tensor[:, 0].long(), reached, leads, usual)

    def packed(self) -> Tensor:
        """One tensor (W, 1 + 2 C), for the journal."""
        return torch.cat([self.numbers[:, None].float(), self.reached, self.leads], 1)


def try_edits(subject: Subject, generator: torch.Generator, progress: Progress) -> Tried:
    """Try every edit on a few images, and those on more that lead a fair share of them to one class."""
    clip, clean, head = subject.clip, subject.clean, subject.head
    few, more = (clean.draw(count, generator) for count in (_FIRST, _MORE))
    every = list(edits(clip.image_size).values())

    def under(number: int, index: Tensor) -> Tensor:
        return encode(clip, clean.images[index], every[number])

    def first(number: int) -> Tensor:
        return head.reached(under(number, few), clean.features[few], clean.labels[few]).share

    def second(number: int) -> Tensor:
        features = under(number, more)
        reached, leads = head.reached(features, clean.features[more], clean.labels[more]), head.leads(features)
        leads[torch.arange(len(more)), clean.labels[more]] = math.nan
        return torch.stack([reached.surely, leads.nanmedian(0).values])

    def look(stage: str, numbers: Sequence[int], closely: bool) -> list[Tensor]:
        """What each of the edits does to the few images, (C,), or to more, (2, C)."""
        tally = Tally(stage, len(numbers))

        def looked(number: int, report: Progress) -> Tensor:
            found = second(number) if closely else first(number)
            tally.add(1, report, asr=float((found[0] if closely else found).amax()))
            return found

        return together([partial(looked, number) for number in numbers], progress, clip.device)

    shares = look("common edits", range(len(every)), False)
    worth = [number for number, share in enumerate(shares) if float(share.amax()) >= _FAIR]
    closer = look("leading edits", worth, True) if worth else []
    found = torch.stack(closer) if closer else torch.zeros(0, 2, len(head.rows))
    return Tried(torch.tensor(worth, dtype=torch.long), found[:, 0], found[:, 1], subject.usual_lead(SURELY))
