"""Targets that no additive pattern shows: agnostic patches, warps and tints hint at them, others toward those tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cbpt_guard.defense.found import FoundTrigger, Place
from cbpt_guard.defense.inversion import NARROW
from cbpt_guard.defense.odds import ahead, odds_of, ranked
from cbpt_guard.defense.probe import Probe
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.workshop import Wanted, Workshop

_HINT = 0.2  # share of the images that a narrow agnostic trigger leads to a class; of 200 natural ones 0.23 at most
_COMPARED = 3  # classes that those looked at are held against


class NarrowSearch:
    """What patches, warps and tints say of one suspect.

    An attacker may have trained against additive patterns, and against patches that lie anywhere, so that one answers
    at its own place alone. An agnostic patch that led to a class says where.

    Args:
        made: makes the triggers.
        probe: says what they do.
        settings: how far a class must be ahead, and how many may be.

    Attributes:
        hinted: the classes that were looked at, once `odds` has been asked for.
    """

    def __init__(self, made: Workshop, probe: Probe, settings: InversionSettings) -> None:
        self._made, self._probe, self._settings = made, probe, settings
        self._places = dict[int, Place]()
        self.hinted: tuple[int, ...] = ()

    def wanted(self, c: int) -> list[Wanted]:
        """One trigger of each family toward class `c`, and a patch where an agnostic one that led there lies."""
        here = [Wanted(c, "patch", at=self._places[c])] if c in self._places else []
        return [*(Wanted(c, family) for family in NARROW), *here]

    def odds(self, known: Sequence[int]) -> Tensor:
        """How far classes beside those `known` are ahead of others under a patch, a warp or a tint, (C,).

        Agnostic triggers of these families tell which classes to look at. What counts is the lead of one that fits and
        leads clearly over others under triggers of its family, at its place: over those looked at, those where other
        agnostic ones ended, and the scan's leaders. Not where the scan is loud.
        """
        scanned = self._made.scanned()
        scores = scanned.by_height[0]
        odds = torch.zeros_like(scores)
        if scanned.loud:
            return odds
        hints, ended = self._hints(known)
        self._places = {c: one.place for c, one in hints if one.family == "patch"}
        self.hinted = tuple(dict.fromkeys(c for c, _ in hints))
        others = [c for c in dict.fromkeys([*ended, *ranked(scores)]) if c not in (*known, *self.hinted)][:_COMPARED]
        wanted = [one for c in self.hinted for one in self.wanted(c)]
        made = zip(wanted, self._made.toward(wanted), strict=True)
        sure = [one for one, trigger in made if self._probe.fits(trigger) and self._probe.leads_clearly(trigger)]
        for one in sure:
            leads = self._leads_like(one, [*self.hinted, *others])
            odds[one.target] = torch.maximum(odds, leads)[one.target]
        return odds

    def _hints(self, known: Sequence[int]) -> tuple[list[tuple[int, FoundTrigger]], list[int]]:
        """Agnostic triggers with the classes to which they lead a fair share of the images, and where the last ended.

        One is made again beside the class that its family led to: a natural one may be in the way of a planted one.
        """
        beside = {family: list(known) for family in NARROW}
        hints, ended = list[tuple[int, FoundTrigger]](), dict[str, int]()
        for _ in range(self._settings.candidates):
            asked = {family: list(classes) for family, classes in beside.items() if len(classes) < self._made.count}
            beside = {}
            for (family, classes), one in zip(asked.items(), self._made.agnostic_narrow(asked), strict=True):
                led = self._led(one, classes)
                c = ended[family] = int(led.argmax())
                if led[c] >= _HINT:
                    hints.append((c, one))
                    beside[family] = [*classes, c]
        return hints, list(ended.values())

    def _led(self, trigger: FoundTrigger, beside: Sequence[int]) -> Tensor:
        """The share of the images that a trigger leads to each class, (C,), 0 for those `beside`."""
        return self._probe.reached(trigger).surely.index_fill(0, torch.tensor(beside, dtype=torch.long), 0.0)

    def _leads_like(self, one: Wanted, classes: Sequence[int]) -> Tensor:
        """How far `classes` are ahead of each other, each under a trigger toward it made like that `one`, (C,) or 0."""
        triggers = self._made.toward([one._replace(target=c) for c in classes])
        odds = odds_of(torch.stack([self._probe.reached(one).surely[one.target] for one in triggers])).clamp(min=1)
        leads = torch.zeros(self._made.count)
        leads[list(classes)] = ahead(odds, self._settings.stands_out, len(classes))
        return leads
