"""What stage 1 found, as the later steps take it: a bank of triggers and the candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.record import Candidate


@dataclass(frozen=True)
class Findings:
    """What stage 1 found: a bank of triggers, and the candidates, the likeliest first.

    `beside` the bank are edits that lead to a suspect by the way. What was planted may put images elsewhere, so no
    direction is fitted to them and no prompt is tuned on them, but the guard has to stop them and to answer for them.
    """

    bank: TriggerBank
    candidates: tuple[Candidate, ...]
    beside: TriggerBank = field(default_factory=lambda: TriggerBank(()))

    @property
    def suspects(self) -> list[int]:
        """Targets that stand out."""
        return [candidate.index for candidate in self.candidates if candidate.stands_out]

    @property
    def raised(self) -> list[int]:
        """Those of them that stand out only under higher patterns."""
        return [candidate.index for candidate in self.candidates if candidate.stands_out and candidate.raised]

    def budgets(self, stands_out: float) -> dict[int, float]:
        """The area that a fresh mask toward each suspect may cover, as a share of the image.

        As much as the found one, and no more than would make a class stand out: with more, any image can be painted
        over with the target, backdoor or not. That is the root of it beside a lead under fainter patterns.
        """
        masks = [one for one in self.bank if one.family == "masked"]
        found = {item.index: [one.area for one in masks if one.target == item.index] for item in self.candidates}
        factor = {item.index: math.sqrt(stands_out) if item.faint else stands_out for item in self.candidates}
        natural = {item.index: item.natural for item in self.candidates if item.natural is not None}
        striking = {index: [area / factor[index]] for index, area in natural.items()}
        # the bank of an earlier run, read for other classes, may hold no mask toward a suspect
        return {target: min([1.0, *found[target], *striking.get(target, [])]) for target in self.suspects}
