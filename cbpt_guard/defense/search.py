"""Stage 1 as a recipe: which classes may be targets, and a bank of found triggers toward them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.found import FoundTrigger, Inverted, TriggerBank, encode
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.inversion import (
    NARROW,
    Answering,
    CleanSet,
    Report,
    invert_agnostic,
    invert_toward,
    scan_targets,
)
from cbpt_guard.defense.job import Prepared
from cbpt_guard.defense.journal import Parts, generator
from cbpt_guard.defense.progress import Progress, Step
from cbpt_guard.defense.record import Candidate
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.together import together
from cbpt_guard.defense.waves import Heard, listen
from cbpt_guard.errors import InputError

Making = Callable[[Progress], FoundTrigger]
_PROBE = 512  # images on which shares and found-trigger ASRs are read: a standard error of 2 points at most
_SMALL = 0.1  # odds of the scan's middle class from which its leaders say nothing: 0.3 to 0.5 of ten digits, else ~0
_NARROW_ASR = 0.9  # from which narrow families tell where triggered images lie: a weak one blurs the test for them
_SURE = 10.0  # odds of the scan above which there is nothing to compare


@dataclass(frozen=True)
class Findings:
    """What stage 1 found: a bank of triggers, and the candidates, the likeliest first."""

    bank: TriggerBank
    candidates: tuple[Candidate, ...]

    @property
    def suspects(self) -> list[int]:
        """Targets that stand out."""
        return [candidate.index for candidate in self.candidates if candidate.stands_out]

    def budgets(self, stands_out: float) -> dict[int, float]:
        """The area that a fresh mask toward each suspect may cover, as a share of the image.

        As much as the found one, and no more than would make a class stand out: with more, any image can be painted
        over with the target, backdoor or not.
        """
        masks = [one for one in self.bank if one.family == "masked"]
        found = {item.index: [one.area for one in masks if one.target == item.index] for item in self.candidates}
        striking = {item.index: [item.natural / stands_out] for item in self.candidates if item.natural is not None}
        # the bank of an earlier run, read for other classes, may hold no mask toward a suspect
        return {target: min([1.0, *found[target], *striking.get(target, [])]) for target in self.suspects}


@dataclass(frozen=True)
class Lead:
    """An agnostic trigger with the share of each class among the answers under it and on clean images, (C,).

    `reached` is the share among the images of other classes, under it.
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
    """One search through one suspect; every found trigger goes through the journal.

    Args:
        clip: the suspect.
        clean: images to tune on, with their features.
        head: its zero-shot head.
        classes: C class names.
    """

    def __init__(
        self,
        clip: FrozenClip,
        clean: CleanSet,
        head: Head,
        classes: Sequence[str],
        settings: InversionSettings,
        seed: int,
        journal: Parts,
        progress: Progress,
    ) -> None:
        self._clip, self._clean, self._head = clip, clean, head
        self.classes, self._settings, self._seed = classes, settings, seed
        self._journal, self._progress = journal, progress
        order = torch.randperm(len(clean.labels), generator=generator(seed, "probe"))
        self._probe = order[:_PROBE]

    def run(self, observed: Sequence[int] = ()) -> Findings:
        """Search for targets and triggers; `observed` targets are known from attack images and stand out."""
        candidates = self.look(observed)
        targets = [item.index for item in candidates if item.stands_out] or [candidates[0].index]
        return Findings(self._bank(targets), candidates)

    def look(self, observed: Sequence[int] = ()) -> tuple[Candidate, ...]:
        """Search for targets alone: the candidates, the likeliest first.

        A class stands out at once if most images answer it under the agnostic trigger or under a plain wave, or if a
        short scan of every class reaches it far more readily than the rest; else if it needs far less area than
        classes of middle rank do.
        """
        trigger = self._agnostic()
        lead = Lead(trigger, self.shares(trigger), self.shares(None), self._reached(trigger))
        scanned = self._scanned()
        odds = torch.maximum(self._at_once(lead.reached, _odds(scanned.exp())), _odds(self._heard().best))
        known = [c for c in _ranked(odds) if odds[c] >= self._settings.stands_out]
        tried = [*known, *self._further(lead, scanned, known, observed)]
        references = self._references(_ranked(scanned), tried)[: 1 if tried == known else self._settings.references]
        areas = self._needed_areas([*tried, *references])
        typical = median(areas[c] for c in references or tried)
        scores = {c: max(float(odds[c]), typical / areas[c]) for c in tried}

        def candidate(c: int) -> Candidate:
            return Candidate(
                label=self.classes[c],
                index=c,
                share=float(lead.share[c]),
                share_clean=float(lead.share_clean[c]),
                area=areas[c],
                natural=typical if references else None,
                score=scores[c],
                stands_out=c in observed or scores[c] >= self._settings.stands_out,
            )

        return tuple(sorted(map(candidate, scores), key=lambda item: (not item.stands_out, -item.score)))

    def ranking(self, candidates: Sequence[Candidate]) -> list[int]:
        """Every class: the candidates as they stand, then the others as the scan reaches them."""
        return list(dict.fromkeys([*(item.index for item in candidates), *_ranked(self._scanned())]))

    def _at_once(self, lead: Tensor, scanned: Tensor) -> Tensor:
        """How far additive triggers put each class ahead, (C,): as the agnostic one reaches it, and by the scan's odds.

        Not at all, where the scan brings even the class of middle rank to some images: to so small a model the budget
        of additive triggers is large, and its clean copies have such leaders, too.
        """
        if scanned.median() >= _SMALL:
            return torch.zeros_like(lead)
        return torch.maximum(_odds(lead), self._ahead(scanned))

    def _ahead(self, odds: Tensor) -> Tensor:
        """How far a few leaders of the scan are ahead of the rest, (C,): their odds over the best of the rest, else 0.

        As many are leaders as there can be while the last of them is `stands_out` times ahead, and `stands_out` times
        as likely as all else: natural leaders may be far ahead of a rest that is not reached at all.
        """
        ranking, ahead, odds = _ranked(odds), torch.zeros_like(odds), odds.clamp(1.0, _SURE)
        for count in range(1, min(self._settings.candidates, len(ranking) - 1) + 1):
            leaders, best = ranking[:count], odds[ranking[count]]
            if odds[leaders[-1]] >= self._settings.stands_out * best:
                ahead[leaders] = odds[leaders] / best
        return ahead

    def _further(self, lead: Lead, scanned: Tensor, known: Sequence[int], observed: Sequence[int]) -> list[int]:
        """Candidates beside those that are `known`, for their masks to be compared.

        Those are `observed` targets and, where none is known, the likeliest by the lead, by the scan and by waves. One
        class is left to compare with, if there is one.
        """
        scanning, hearing = _ranked(scanned)[: self._settings.scanned], _ranked(self._heard().best)[:1]
        likely = [] if known else [*self._grown(lead.growth), *scanning, *hearing]
        further = [c for c in dict.fromkeys([*observed, *likely]) if c not in known]
        return further[: max(len(self.classes) - len(known) - 1, len(observed))]

    def toward(self, wanted: Sequence[tuple[int, Inverted]]) -> list[FoundTrigger]:
        """For each class and family a trigger that makes the zero-shot head answer the class."""
        return self._all([self._making(f"{family}-{c}", f"{family} trigger", c, family) for c, family in wanted])

    def fresh(self, wanted: Sequence[tuple[int, str, Answering, float]]) -> list[FoundTrigger]:
        """Masked triggers with draws of their own, for each (target, name of what is misled, itself, area budget)."""
        return self._all(
            [
                self._making(f"fresh-{name}-{c}", f"fresh trigger, {name} model,", c, "masked", head, budget)
                for c, name, head, budget in wanted
            ]
        )

    def fresh_waves(self, bank: TriggerBank) -> list[FoundTrigger]:
        """Toward each target that the bank has waves for, the next best wave that is not among them."""
        known = [one for one in bank if one.family == "wave"]
        if not known:
            return []
        heard, size = self._heard(), self._clip.image_size
        fresh = [
            wave for c in sorted({w.target for w in known}) for wave in heard.triggers(c, size, self._settings, rank=1)
        ]
        return [wave for wave in fresh if not any(torch.equal(wave.pattern, one.pattern) for one in known)]

    def _making(
        self,
        name: str,
        what: str,
        target: int,
        family: Inverted,
        head: Answering | None = None,
        budget: float | None = None,
    ) -> Making:
        """How a trigger is made, unless the journal has it by that name."""

        def make(progress: Progress) -> FoundTrigger:
            report = _report(f"{what} toward {self.classes[target]}", progress)
            against, draws = head or self._head, generator(self._seed, name)
            return invert_toward(
                self._clip, self._clean, against, target, family, self._settings, draws, report, budget
            )

        return lambda progress: self._journal.trigger(name, lambda: make(progress))

    def _all(self, makings: Sequence[Making]) -> list[FoundTrigger]:
        return together(makings, self._progress, self._clip.device)

    def _bank(self, targets: Sequence[int]) -> TriggerBank:
        agnostic = self._agnostic()
        families: tuple[Inverted, ...] = ("masked", "additive", *NARROW)
        made = self.toward([(c, family) for c in targets for family in families])
        triggers = [one for one in made if one.family not in NARROW or self._reached(one)[one.target] >= _NARROW_ASR]
        if agnostic.target in targets:
            triggers.append(agnostic)
        return TriggerBank((*triggers, *self._waves(targets)))

    def _waves(self, targets: Sequence[int]) -> list[FoundTrigger]:
        """The waves toward those targets that stand out by one."""
        heard, settings = self._heard(), self._settings
        odds = _odds(heard.best)
        told = [c for c in targets if odds[c] >= settings.stands_out]
        return [wave for c in told for wave in heard.triggers(c, self._clip.image_size, settings)]

    def _heard(self) -> Heard:
        draws, report = generator(self._seed, "waves"), _report("plain waves", self._progress)
        make = partial(listen, self._clip, self._clean, self._head, self._settings, draws, report)
        return Heard.unpacked(self._journal.tensor("waves", lambda: make().packed()))

    def _agnostic(self) -> FoundTrigger:
        draws, report = generator(self._seed, "agnostic"), _report("agnostic trigger", self._progress)
        return self._journal.trigger(
            "agnostic",
            lambda: invert_agnostic(self._clip, self._clean, self._head.rows, self._settings, draws, report),
        )

    def _grown(self, growth: Tensor) -> list[int]:
        """The class whose share of the answers grew most, and others whose share grew clearly."""
        ranking = _ranked(growth)
        clear = [c for c in ranking[1:] if growth[c] >= self._settings.clear_share]
        return [ranking[0], *clear][: self._settings.candidates]

    def _references(self, ranking: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """Classes of middle rank to compare with; with very few classes, any that is no candidate."""
        others = [c for c in ranking if c not in candidates]
        middle = [c for c in ranking[len(ranking) // 2 :] if c in others] or others
        return middle[: self._settings.references]

    def _scanned(self) -> Tensor:
        """Mean log-probability of each class under a trigger of its own after a short inversion, (C,)."""
        draws, report = generator(self._seed, "scan"), _report("scan of every class", self._progress)
        return self._journal.tensor(
            "scan", lambda: scan_targets(self._clip, self._clean, self._head, self._settings, draws, report)
        )

    def shares(self, trigger: FoundTrigger | None) -> Tensor:
        """Share of each class among the zero-shot answers on the probe images, (C,)."""
        features = self._features(trigger)
        answers = self._head.logits(features).argmax(1)
        return answers.bincount(minlength=len(self.classes)) / len(answers)

    def _reached(self, trigger: FoundTrigger) -> Tensor:
        """How much a trigger reaches each class on the probe images, (C,)."""
        return self._head.reached(self._features(trigger), self._clean.labels[self._probe])

    def _needed_areas(self, classes: Sequence[int]) -> dict[int, float]:
        triggers = self.toward([(c, "masked") for c in dict.fromkeys(classes)])
        return {trigger.target: self._needed_area(trigger) for trigger in triggers}

    def _needed_area(self, trigger: FoundTrigger) -> float:
        """The mask's area over the ASR that it reaches: what a full success would need."""
        return min(1.0, trigger.area / max(float(self._reached(trigger)[trigger.target]), 1e-3))

    def _features(self, trigger: FoundTrigger | None) -> Tensor:
        if trigger is None:
            return self._clean.features[self._probe]
        return encode(self._clip, self._clean.images[self._probe], trigger)


def searching(prepared: Prepared, features: Tensor, kept: Tensor, journal: Parts, progress: Progress) -> Search:
    """The search through a job's suspect with the images `kept` to tune on, given all images' features (N, E)."""
    data, job = prepared.data, prepared.job
    clean = CleanSet(data.images[kept], features[kept], data.labels[kept])
    clip, head, settings = prepared.suspect.clip, prepared.original, job.settings.inversion
    return Search(clip, clean, head, data.classes, settings, job.seed, journal, progress)


def _ranked(values: Tensor) -> list[int]:
    """Classes, the largest value first."""
    ranking: list[int] = values.argsort(descending=True, stable=True).tolist()
    return ranking


def _odds(share: Tensor) -> Tensor:
    """How many times as likely as all else; no more than a probe of some hundred images can tell."""
    share = share.clamp(max=1 - 1 / _PROBE)
    return share / (1 - share)


def _report(stage: str, progress: Progress) -> Report:
    return lambda step, steps, loss, asr: progress(Step(stage, step, steps, loss, asr))


def adopt(run: PurifyRun, search: Search, observed: Sequence[int]) -> Findings:
    """The findings of an earlier run of the same suspect, read for another class list.

    A stored trigger's target is the class that most images answer under it now; a suspect of the earlier run
    stays one, whatever its class is called here.
    """
    suspected = {candidate.index for candidate in run.record.candidates if candidate.stands_out}
    triggers, candidates = [], {}
    for trigger in run.bank():
        share = search.shares(trigger)
        target = int(share.argmax())
        triggers.append(replace(trigger, target=target))
        if trigger.target in suspected:
            earlier = next(item for item in run.record.candidates if item.index == trigger.target)
            candidates[target] = earlier.model_copy(
                update={
                    "label": search.classes[target],
                    "index": target,
                    "share": float(share[target]),
                    "share_clean": float(search.shares(None)[target]),
                }
            )
    known = Findings(TriggerBank(tuple(triggers)), tuple(candidates.values()))
    missing = [target for target in observed if target not in known.suspects]
    if not missing:
        return known
    raise InputError(
        f"the observed attack images answer {search.classes[missing[0]]!r}, toward which the earlier run found no "
        "trigger; run without `--reuse`"
    )
