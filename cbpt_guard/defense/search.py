"""Stage 1 as a recipe: which classes may be targets, and a bank of found triggers toward them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.inversion import NARROW
from cbpt_guard.defense.job import Prepared
from cbpt_guard.defense.journal import Parts
from cbpt_guard.defense.narrow import NarrowSearch
from cbpt_guard.defense.odds import at_once, faintly, grown, odds_of, ranked
from cbpt_guard.defense.probe import Probe
from cbpt_guard.defense.progress import Progress
from cbpt_guard.defense.record import Candidate
from cbpt_guard.defense.settings import MANY
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.workshop import Wanted, Workshop, same

_EDITS = 2  # toward one target that the guard is fitted to: the surest lie nearest to the planted one
_PLAINLY = 0.75  # of the right answers, that a raised trigger's class must lead by more than: natural ones do than half


@dataclass(frozen=True)
class Lead:
    """An agnostic trigger with the share of each class among the answers under it and on clean images, (C,).

    `reached` is the share of the images that it leads there.
    """

    trigger: FoundTrigger
    share: Tensor
    share_clean: Tensor
    reached: Tensor

    @property
    def growth(self) -> Tensor:
        """By how much each class's share grew, (C,)."""
        return self.share - self.share_clean


class Search:
    """One search through one suspect: `made` makes what is looked at, `probe` says what it does.

    Args:
        subject: the suspect and the images to tune on.
        classes: C class names.
        seed: of all draws.
        journal: where what was made is kept.
        progress: called after every step.
    """

    def __init__(self, subject: Subject, classes: Sequence[str], seed: int, journal: Parts, progress: Progress) -> None:
        self._settings, self._size = subject.settings, subject.clip.image_size
        self.classes = classes
        self.made = Workshop(subject, classes, seed, journal, progress)
        self.probe = Probe(subject, seed)
        self._narrow = NarrowSearch(self.made, self.probe, subject.settings)

    def run(self, observed: Sequence[int] = ()) -> Findings:
        """Search for targets and triggers; `observed` targets are known from attack images and stand out."""
        candidates = self._with_areas(self.look(observed))
        targets = [item for item in candidates if item.stands_out] or candidates[:1]
        bank = self._bank(targets)
        return Findings(bank, candidates, self._beside(targets, bank))

    def look(self, observed: Sequence[int] = ()) -> tuple[Candidate, ...]:
        """Search for targets alone: the candidates, the likeliest first; without masks of those that stand out anyway.

        Those that stand out only under higher patterns are looked for last, whatever stands out by then.
        """
        candidates = {item.index: item for item in self._candidates(observed)}
        for lead in self._raised_leads([c for c, item in candidates.items() if item.stands_out]):
            candidates[lead.trigger.target] = self._raised_candidate(lead)
        return tuple(sorted(candidates.values(), key=lambda item: (not item.stands_out, -item.score)))

    def _candidates(self, observed: Sequence[int]) -> list[Candidate]:
        """Candidates by additive patterns of the usual height, by waves, edits, patches, warps and tints, and by masks.

        A class stands out at once if most images answer it under the agnostic trigger or under telling waves or edits,
        if a short scan of every class reaches it far more readily than the rest, or if a narrow trigger puts it ahead.
        """
        lead = self._lead(self.made.agnostic())
        odds = self._odds(lead)
        known = [c for c in ranked(odds) if odds[c] >= self._settings.stands_out]
        faint = self._faintly()
        shown = [self._candidate(c, lead, faint=float(faint[c]), score=float(odds[c]), stands_out=True) for c in known]
        return shown + self._compared(self._further(lead, known, observed), known, observed, lead, odds)

    def _compared(
        self, further: Sequence[int], known: Sequence[int], observed: Sequence[int], lead: Lead, odds: Tensor
    ) -> list[Candidate]:
        """Candidates `further` to those `known`, by masks.

        A class stands out if it needs far less area than classes of middle rank do. Where a scan took fainter patterns
        it does by both: a lead in it that is the square of what is asked for, since a clean model's class may have some
        by the luck of a draw, and an area that is less by the root of it.
        """
        references = self._references([*known, *further]) if further else []
        areas = self._needed_areas([*further, *references])
        usual = references or [c for c in further if c not in observed]
        movable, faint = self.probe.reached(None).of > 0, self._faintly()

        def candidate(c: int) -> Candidate:
            """What was measured of class `c`, and whether that makes it stand out."""
            natural = _middle(areas[one] for one in usual if one != c and movable[one])
            smaller, led = (natural or 0.0) / areas[c], float(faint[c])
            score = max(float(odds[c]), smaller, min(led, smaller**2))
            stands_out = c in observed or score >= self._settings.stands_out
            return self._candidate(
                c, lead, area=areas[c], natural=natural, faint=led, score=score, stands_out=stands_out
            )

        return [candidate(c) for c in further]

    def _raised_leads(self, known: Sequence[int]) -> list[Lead]:
        """Leads of raised agnostic triggers toward classes beside those `known`, each plainly.

        An attacker may have trained against patterns of the usual height, and have planted another target to be found.
        Such patterns lead to natural classes, too, but by less than most clean images are answered rightly; another may
        lie behind one. Not where the scan is loud: there the usual ones do so already.
        """
        found, beside = list[Lead](), list(known)
        if self.made.scanned().loud:
            return found
        for _ in range(self._settings.candidates):
            if len(beside) == len(self.classes):
                break
            lead = self._lead(self.made.raised_agnostic(beside))
            target = lead.trigger.target
            if target in beside or odds_of(lead.reached)[target] < self._settings.stands_out:
                break
            if self.probe.leads_clearly(lead.trigger, _PLAINLY):
                found.append(lead)
            beside.append(target)
        return found

    def _raised_candidate(self, lead: Lead) -> Candidate:
        """The target of a raised trigger, which stands out."""
        c = lead.trigger.target
        return self._candidate(c, lead, raised=True, score=float(odds_of(lead.reached)[c]), stands_out=True)

    def _with_areas(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """The same with the areas that masks need toward those that stood out without, held against one class."""
        without, movable = [item.index for item in candidates if item.area is None], self.probe.reached(None).of > 0
        reference = self._references([item.index for item in candidates])[:1] if without else []
        areas = self._needed_areas([*without, *reference])
        others = {item.index: item.area for item in candidates if item.area is not None and not item.stands_out}
        usual = {c: areas[c] for c in reference} or others
        measured = {"natural": _middle(area for c, area in usual.items() if movable[c])}
        return tuple(
            item.model_copy(update={"area": areas[item.index], **measured}) if item.area is None else item
            for item in candidates
        )

    def _candidate(self, c: int, lead: Lead, **measured: Any) -> Candidate:
        """Class `c` with its shares under the trigger of `lead`, and what else was measured of it."""
        shares = {"share": float(lead.share[c]), "share_clean": float(lead.share_clean[c])}
        return Candidate(label=self.classes[c], index=c, **shares, **measured)

    def ranking(self, candidates: Sequence[Candidate]) -> list[int]:
        """Every class: the candidates as they stand, then the others as the scan reaches them."""
        return list(dict.fromkeys([*(item.index for item in candidates), *ranked(self.made.scanned().scores)]))

    def _lead(self, trigger: FoundTrigger) -> Lead:
        return Lead(trigger, self.probe.shares(trigger), self.probe.shares(None), self.probe.reached(trigger).surely)

    def _odds(self, lead: Lead) -> Tensor:
        """How far each class is ahead by what shows at once, (C,).

        Narrow triggers are made as if no edit told anything: a target that they tell has them in its bank.
        """
        additive = at_once(lead.reached, self.made.scanned().by_height[0], self._settings)
        shown = torch.maximum(additive, self._told())
        known = [c for c in range(len(shown)) if shown[c] >= self._settings.stands_out]
        return torch.stack([shown, self._narrow.odds(known), self._edited()]).amax(0)

    def _told(self) -> Tensor:
        """The odds of each class by telling waves, (C,); where the scan is loud higher ones lead to natural classes."""
        return self.made.heard().odds(twice=not self.made.scanned().loud)

    def _edited(self) -> Tensor:
        """The odds of each class by telling edits, (C,), where they are tried."""
        return self.made.edited().odds if self._tries_edits else torch.zeros(len(self.classes))

    @property
    def _tries_edits(self) -> bool:
        """Not where the scan is loud, nor of few classes: there an edit may make one class another."""
        return not self.made.scanned().loud and len(self.classes) >= MANY

    def _faintly(self) -> Tensor:
        """The root of how far each class is ahead in a scan with fainter patterns, if it took them, (C,)."""
        return faintly(self.made.scanned().by_height, self._settings)

    def _further(self, lead: Lead, known: Sequence[int], observed: Sequence[int]) -> list[int]:
        """Candidates beside those that are `known`, for their masks to be compared.

        Those are `observed` targets, those that narrow triggers hint at and do not put ahead, those that lead under
        fainter patterns and, where none is known, the likeliest by the lead, by the scan and by waves; then the others,
        too, if they are no more than the references.
        """
        faint, everything = self._faintly(), ranked(self.made.scanned().scores)
        leading = [*self._narrow.hinted, *(c for c in ranked(faint) if faint[c] > 0)]
        likely = [*grown(lead.growth, self._settings), *everything[: self._settings.scanned]]
        likely += ranked(self.made.heard().best)[:1]
        if len(set(everything).difference(observed, leading, likely)) <= self._settings.references:
            likely = everything
        return [c for c in dict.fromkeys([*observed, *leading, *([] if known else likely)]) if c not in known]

    def _bank(self, candidates: Sequence[Candidate]) -> TriggerBank:
        targets = [item.index for item in candidates]
        wanted = [one for item in candidates for one in self._kinds(item)]
        made = self.made.toward(wanted)
        natural = [item.index for item in candidates if item.raised and not self._small(item)]
        fitting = [one for one in made if one.family not in NARROW or self.probe.fits(one)]
        triggers = [one for one in fitting if one.family != "masked" or one.target not in natural]
        agnostic = self.made.agnostic()
        if agnostic.target in targets:
            triggers.append(agnostic)
        return TriggerBank((*triggers, *self._waves(candidates), *self._edits(candidates)))

    def _kinds(self, candidate: Candidate) -> list[Wanted]:
        """One trigger of each family toward a candidate."""
        c = candidate.index
        return [Wanted(c, "masked"), Wanted(c, "additive", raised=candidate.raised), *self._narrow.wanted(c)]

    def _small(self, candidate: Candidate) -> bool:
        """Whether its mask would make it stand out; one of natural size paints the class over any image."""
        if candidate.natural is None or candidate.area is None:
            return False
        return candidate.natural >= self._settings.stands_out * candidate.area

    def _waves(self, candidates: Sequence[Candidate]) -> list[FoundTrigger]:
        """The waves toward those targets that stand out by one at its own height, or by nothing more than waves.

        One that leads fewer images blurs the test of a target whose triggers are known.
        """
        heard, settings, odds = self.made.heard(), self._settings, self._told()
        own, bar = heard.odds(twice=False), settings.stands_out
        told = [c.index for c in candidates if own[c.index] >= bar or odds[c.index] >= max(bar, c.score)]
        return [wave for c in told for wave in heard.triggers(c, self._size, settings)]

    def _edits(self, candidates: Sequence[Candidate]) -> list[FoundTrigger]:
        """The surest edits toward those targets that stand out by nothing more than edits.

        Others that an edit opens by the way lie elsewhere than it puts images.
        """
        odds, bar = self._edited(), self._settings.stands_out
        told = [c.index for c in candidates if odds[c.index] >= max(bar, c.score)]
        return [edit for c in told for edit in self.made.edited().triggers(c, self._size, bar)[:_EDITS]]

    def _beside(self, candidates: Sequence[Candidate], bank: TriggerBank) -> TriggerBank:
        """Every telling edit toward a suspect, but those of the bank and those that a verdict keeps as fresh ones."""
        suspects = [item.index for item in candidates if item.stands_out] if self._tries_edits else []
        taken = [*bank, *self.made.fresh_edits(bank)] if suspects else []

        def new(edit: FoundTrigger) -> bool:
            return not any(one.target == edit.target and same(one, edit) for one in taken)

        telling = [edit for c in suspects for edit in self.made.edited().triggers(c, self._size, least=0.0)]
        return TriggerBank(tuple(filter(new, telling)))

    def _references(self, candidates: Sequence[int]) -> list[int]:
        """Classes of middle rank to compare with, or any that is no candidate; none where every class is one."""
        ranking = ranked(self.made.scanned().scores)
        others = [c for c in ranking if c not in candidates]
        middle = [c for c in ranking[len(ranking) // 2 :] if c in others] or others
        return middle[: self._settings.references]

    def _needed_areas(self, classes: Sequence[int]) -> dict[int, float]:
        triggers = self.made.toward([Wanted(c, "masked") for c in dict.fromkeys(classes)])
        return {trigger.target: self.probe.needed_area(trigger) for trigger in triggers}


def _middle(areas: Iterable[float]) -> float | None:
    """The median; None where nothing is left to compare with."""
    return median(some) if (some := list(areas)) else None


def searching(prepared: Prepared, features: Tensor, kept: Tensor, journal: Parts, progress: Progress) -> Search:
    """The search through a job's suspect with the images `kept` to tune on, given all images' features (N, E)."""
    data, job = prepared.data, prepared.job
    clean = CleanSet(data.images[kept], features[kept], data.labels[kept])
    subject = Subject(prepared.suspect.clip, clean, prepared.original, job.settings.inversion)
    return Search(subject, data.classes, job.seed, journal, progress)
