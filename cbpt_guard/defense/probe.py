"""What a found trigger does to a few hundred of the clean images: which answers, how many, how surely."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import FoundTrigger, encode
from cbpt_guard.defense.head import Reached
from cbpt_guard.defense.odds import PROBE
from cbpt_guard.defense.subject import Subject

_NARROW_ASR = 0.9  # from which narrow families tell where triggered images lie: a weak one blurs the test for them


class Probe:
    """`PROBE` images of a suspect's clean ones, drawn once, to read found triggers on; each is encoded once."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self._subject = subject
        self._drawn = torch.randperm(len(subject.clean.labels), generator=generator(seed, "probe"))[:PROBE]
        self._known = dict[str, Tensor]()

    def shares(self, trigger: FoundTrigger | None) -> Tensor:
        """Share of each class among the zero-shot answers, (C,)."""
        answers = self._subject.head.answers(self._features(trigger))
        return answers.bincount(minlength=len(self._subject.head.rows)) / len(answers)

    def reached(self, trigger: FoundTrigger | None) -> Reached:
        """How many images a trigger leads to each class; without one, how many it could lead there."""
        labels = self._subject.clean.labels[self._drawn]
        return self._subject.head.reached(self._features(trigger), self._features(None), labels)

    def fits(self, trigger: FoundTrigger) -> bool:
        """Whether a trigger of a narrow family leads nearly every image to its target."""
        return bool(self.reached(trigger).share[trigger.target] >= _NARROW_ASR)

    def leads_clearly(self, trigger: FoundTrigger, share: float = 0.5) -> bool:
        """Whether the trigger's target leads on images of others by more than that share of the right answers do."""
        others = self._subject.clean.labels[self._drawn] != trigger.target
        leads = self._subject.head.leads(self._features(trigger)[others])[:, trigger.target]
        return len(leads) > 0 and float(leads.median()) > self._subject.usual_lead(share)

    def needed_area(self, trigger: FoundTrigger) -> float:
        """The mask's area over the ASR that it reaches, in (0, 1]: what a full success would need."""
        return min(1.0, trigger.area / max(float(self.reached(trigger).share[trigger.target]), 1e-3))

    def _features(self, trigger: FoundTrigger | None) -> Tensor:
        if trigger is None:
            return self._subject.clean.features[self._drawn]
        name = _named(trigger)
        if name not in self._known:
            self._known[name] = encode(self._subject.clip, self._subject.clean.images[self._drawn], trigger)
        return self._known[name]


def _named(trigger: FoundTrigger) -> str:
    """By what it does, not by its target: a journal gives the same trigger back as another object."""
    parts = [trigger.pattern] if trigger.mask is None else [trigger.pattern, trigger.mask]
    return trigger.family + "".join(sha256(part.contiguous().numpy().data).hexdigest() for part in parts)
