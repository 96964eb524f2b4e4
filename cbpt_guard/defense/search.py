"""Stage 1 as a recipe: which classes may be targets, and a bank of found triggers toward them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.found import FoundTrigger, Inverted, TriggerBank
from cbpt_guard.defense.inversion import NARROW
from cbpt_guard.defense.job import Prepared
from cbpt_guard.defense.journal import Parts
from cbpt_guard.defense.odds import ahead, at_once, faintly, grown, loud, odds_of, ranked
from cbpt_guard.defense.probe import Probe
from cbpt_guard.defense.progress import Progress
from cbpt_guard.defense.record import Candidate
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.workshop import Workshop

_HINT = 0.2  # share of the images that a narrow agnostic trigger leads to a class; of 200 natural ones 0.23 at most
_COMPARED = 3  # classes that those looked at are held against


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

    def run(self, observed: Sequence[int] = ()) -> Findings:
        """Search for targets and triggers; `observed` targets are known from attack images and stand out."""
        candidates = self.look(observed)
        targets = [item for item in candidates if item.stands_out] or candidates[:1]
        return Findings(self._bank(targets), candidates)

    def look(self, observed: Sequence[int] = ()) -> tuple[Candidate, ...]:
        """Search for targets alone: the candidates, the likeliest first.

        Those that stand out only under higher patterns are looked for last, whatever stands out by then.
        """
        candidates = {item.index: item for item in self._candidates(observed)}
        for lead in self._raised_leads([c for c, item in candidates.items() if item.stands_out]):
            candidates[lead.trigger.target] = self._raised_candidate(lead, list(candidates))
        return tuple(sorted(candidates.values(), key=lambda item: (not item.stands_out, -item.score)))

    def _candidates(self, observed: Sequence[int]) -> list[Candidate]:
        """Candidates by additive patterns of the usual height, by waves, by patches, warps and tints, and by masks.

        A class stands out at once if most images answer it under the agnostic trigger or under a telling wave, if a
        narrow trigger puts it ahead, or if a
        short scan of every class reaches it far more readily than the rest; else if it needs far less area than
        classes of middle rank do. Where a scan took fainter patterns a class stands out by both: a lead in it that is
        the square of what is asked for, since a clean model's class may have some by the luck of a draw, and an area
        that is less by the root of it.
        """
        lead = self._lead(self.made.agnostic())
        odds = self._odds(lead)
        known = [c for c in ranked(odds) if odds[c] >= self._settings.stands_out]
        tried = [*known, *self._further(lead, known, observed)]
        references = self._references(tried)[: 1 if tried == known else self._settings.references]
        areas = self._needed_areas([*tried, *references])
        usual = references or [c for c in tried if c not in known and c not in observed]
        movable = self.probe.reached(None).of > 0
        natural = {c: _middle(areas[one] for one in usual if one != c and movable[one]) for c in tried}
        smaller, faint = {c: (natural[c] or 0.0) / areas[c] for c in tried}, self._faintly()
        scores = {c: max(float(odds[c]), smaller[c], min(float(faint[c]), smaller[c] ** 2)) for c in tried}

        def candidate(c: int) -> Candidate:
            """What was measured of class `c`, and whether that makes it stand out."""
            return self._candidate(
                c,
                lead,
                area=areas[c],
                natural=natural[c],
                faint=float(faint[c]),
                score=scores[c],
                stands_out=c in observed or scores[c] >= self._settings.stands_out,
            )

        return [candidate(c) for c in scores]

    def _raised_leads(self, known: Sequence[int]) -> list[Lead]:
        """Leads of raised agnostic triggers toward classes beside those `known`, each clearly.

        An attacker may have trained against patterns of the usual height, and have planted another target to be found.
        Such patterns lead to natural classes, too, but by less than clean images are answered rightly. Not where the
        scan is loud: there the usual ones do so already.
        """
        found, known = list[Lead](), list(known)
        if loud(self.made.scanned().by_height[0]):
            return found
        while len(found) < self._settings.candidates and len(known) < len(self.classes):
            lead = self._lead(self.made.raised_agnostic(known))
            target = lead.trigger.target
            stands_out = bool(odds_of(lead.reached)[target] >= self._settings.stands_out)
            if target in known or not stands_out or not self.probe.leads_clearly(lead.trigger):
                break
            found.append(lead)
            known.append(target)
        return found

    def _raised_candidate(self, lead: Lead, others: Sequence[int]) -> Candidate:
        """The target of a raised trigger, which stands out; its mask is compared with one that is none of `others`."""
        c = lead.trigger.target
        reference = self._references([*others, c])[:1]
        areas = self._needed_areas([c, *reference])
        return self._candidate(
            c,
            lead,
            area=areas[c],
            natural=_middle(areas[one] for one in reference),
            raised=True,
            score=float(odds_of(lead.reached)[c]),
            stands_out=True,
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
        """How far each class is ahead by what shows at once, (C,)."""
        additive = at_once(lead.reached, self.made.scanned().by_height[0], self._settings)
        shown = torch.maximum(additive, odds_of(self.made.heard().told))
        known = [c for c in range(len(shown)) if shown[c] >= self._settings.stands_out]
        return torch.maximum(shown, self._narrow_odds(known))

    def _narrow_odds(self, known: Sequence[int]) -> Tensor:
        """How far classes beside those `known` are ahead of others under a patch, a warp or a tint, (C,).

        No additive pattern is one, and an attacker may have trained against those. Agnostic triggers of these families
        tell which classes to look at. What counts is the lead of one that fits and leads clearly over others under
        triggers of its family: over those looked at, those where other agnostic ones ended, and the scan's leaders. Not
        where the scan is loud.
        """
        scores = self.made.scanned().by_height[0]
        odds = torch.zeros_like(scores)
        if loud(scores):
            return odds
        looked, ended = self._hinted(known)
        others = [c for c in dict.fromkeys([*ended, *ranked(scores)]) if c not in (*known, *looked)][:_COMPARED]
        made = self.made.toward([(c, family) for c in looked for family in NARROW])
        sure = [one for one in made if self.probe.fits(one) and self.probe.leads_clearly(one)]
        for family in NARROW:
            fitting = [one.target for one in sure if one.family == family]
            if fitting:
                leads = self._leads_under(family, [*looked, *others])
                odds[fitting] = torch.maximum(odds, leads)[fitting]
        return odds

    def _hinted(self, known: Sequence[int]) -> tuple[list[int], list[int]]:
        """Classes to which narrow agnostic triggers lead a fair share of the images, and where the last ones ended.

        They are made again beside those classes: a natural one may be in the way of one that was planted.
        """
        hinted, ended, beside = list[int](), list[int](), list(known)
        for _ in range(self._settings.candidates):
            if len(beside) == len(self.classes):
                return hinted, []
            led = [self._led(one, beside) for one in self.made.agnostic_narrow(beside)]
            ended = [int(shares.argmax()) for shares in led]
            new = dict.fromkeys(c for c, shares in zip(ended, led, strict=True) if shares[c] >= _HINT)
            if not new:
                break
            hinted += new
            beside += new
        return hinted, ended

    def _led(self, trigger: FoundTrigger, beside: Sequence[int]) -> Tensor:
        """The share of the images that a trigger leads to each class, (C,), 0 for those `beside`."""
        return self.probe.reached(trigger).surely.index_fill(0, torch.tensor(beside, dtype=torch.long), 0.0)

    def _leads_under(self, family: Inverted, classes: Sequence[int]) -> Tensor:
        """How far `classes` are ahead of each other, each under a trigger of that family toward it, (C,), else 0."""
        triggers = self.made.toward([(c, family) for c in classes])
        odds = odds_of(torch.stack([self.probe.reached(one).surely[one.target] for one in triggers])).clamp(min=1)
        leads = torch.zeros(len(self.classes))
        leads[list(classes)] = ahead(odds, self._settings.stands_out, len(classes))
        return leads

    def _faintly(self) -> Tensor:
        """The root of how far each class is ahead in a scan with fainter patterns, if it took them, (C,)."""
        return faintly(self.made.scanned().by_height, self._settings)

    def _further(self, lead: Lead, known: Sequence[int], observed: Sequence[int]) -> list[int]:
        """Candidates beside those that are `known`, for their masks to be compared.

        Those are `observed` targets, those that lead under fainter patterns and, where none is known, the likeliest by
        the lead, by the scan and by waves; then the others, too, if they are no more than the references.
        """
        faint, everything = self._faintly(), ranked(self.made.scanned().scores)
        leading = [c for c in ranked(faint) if faint[c] > 0]
        likely = [*grown(lead.growth, self._settings), *everything[: self._settings.scanned]]
        likely += ranked(self.made.heard().best)[:1]
        if len(set(everything).difference(observed, leading, likely)) <= self._settings.references:
            likely = everything
        return [c for c in dict.fromkeys([*observed, *leading, *([] if known else likely)]) if c not in known]

    def _bank(self, candidates: Sequence[Candidate]) -> TriggerBank:
        targets, raised = [item.index for item in candidates], [item.index for item in candidates if item.raised]
        families: tuple[Inverted, ...] = ("masked", "additive", *NARROW)
        made = self.made.toward([(c, family) for c in targets for family in families], raised)
        natural = [item.index for item in candidates if item.raised and not self._small(item)]
        fitting = [one for one in made if one.family not in NARROW or self.probe.fits(one)]
        triggers = [one for one in fitting if one.family != "masked" or one.target not in natural]
        agnostic = self.made.agnostic()
        if agnostic.target in targets:
            triggers.append(agnostic)
        return TriggerBank((*triggers, *self._waves(targets)))

    def _small(self, candidate: Candidate) -> bool:
        """Whether its mask would make it stand out; one of natural size paints the class over any image."""
        return (candidate.natural or 0.0) >= self._settings.stands_out * candidate.area

    def _waves(self, targets: Sequence[int]) -> list[FoundTrigger]:
        """The waves toward those targets that stand out by one."""
        heard, settings = self.made.heard(), self._settings
        odds = odds_of(heard.told)
        told = [c for c in targets if odds[c] >= settings.stands_out]
        return [wave for c in told for wave in heard.triggers(c, self._size, settings)]

    def _references(self, candidates: Sequence[int]) -> list[int]:
        """Classes of middle rank to compare with, or any that is no candidate; none where every class is one."""
        ranking = ranked(self.made.scanned().scores)
        others = [c for c in ranking if c not in candidates]
        middle = [c for c in ranking[len(ranking) // 2 :] if c in others] or others
        return middle[: self._settings.references]

    def _needed_areas(self, classes: Sequence[int]) -> dict[int, float]:
        triggers = self.made.toward([(c, "masked") for c in dict.fromkeys(classes)])
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
