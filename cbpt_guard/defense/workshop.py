"""Where a search's scans and triggers are made, each once and with draws of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import NamedTuple

import torch

from cbpt_guard.defense.classscan import Scanned, scan_targets
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.edits import edits
from cbpt_guard.defense.found import FoundTrigger, Inverted, Place, TriggerBank
from cbpt_guard.defense.inversion import Answering, invert_agnostic, invert_toward
from cbpt_guard.defense.journal import Parts
from cbpt_guard.defense.progress import Progress
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.together import together
from cbpt_guard.defense.tried import Tried, try_edits
from cbpt_guard.defense.waves import SURELY, Heard, listen

Making = Callable[[Progress], FoundTrigger]
NARROW_STEPS = 1 / 3
"""Of the steps of an additive agnostic trigger, that one of a narrow family takes."""
_HURRY = 3.0  # times the learning rate of a warp or a tint there: few numbers are learnt, a slow tint finds no filter


class Wanted(NamedTuple):
    """A trigger to make: of a family, toward a class; an additive one may be `raised`, a patch kept `at` a place."""

    target: int
    family: Inverted
    at: Place | None = None
    raised: bool = False

    @property
    def name(self) -> str:
        """By which a journal keeps it."""
        kind = f"{self.family}-raised" if self.raised else self.family
        return "-".join(map(str, (kind, self.target, *(() if self.at is None else ("at", *self.at)))))


class Workshop:
    """The scans and triggers of one suspect: what the journal lacks is made, and every draw is by what it is for.

    Args:
        subject: the suspect and the images to look at.
        classes: C class names.
        seed: of all draws.
        journal: where what was made is kept.
        progress: called after every step.
    """

    def __init__(self, subject: Subject, classes: Sequence[str], seed: int, journal: Parts, progress: Progress) -> None:
        self._subject, self._classes, self._seed = subject, classes, seed
        self._journal, self._progress = journal, progress

    def scanned(self) -> Scanned:
        """How readily each class is reached."""
        make = partial(scan_targets, self._subject, generator(self._seed, "scan"), self._progress)
        return Scanned(self._journal.tensor("scan", lambda: make().by_height))

    def heard(self) -> Heard:
        """What plain waves lead to."""
        make = partial(listen, self._subject, generator(self._seed, "waves"), self._progress)
        return Heard.unpacked(self._journal.tensor("waves", lambda: make().packed()))

    def edited(self) -> Tried:
        """What common edits lead to."""
        make = partial(try_edits, self._subject, generator(self._seed, "edits"), self._progress)
        return Tried.unpacked(self._journal.tensor("edits", lambda: make().packed()), self._subject.usual_lead(SURELY))

    def agnostic(self) -> FoundTrigger:
        """The trigger that leads away from what images are, wherever that is easiest."""
        draws = generator(self._seed, "agnostic")
        return self._journal.trigger("agnostic", lambda: invert_agnostic(self._subject, draws, self._progress))

    def raised_agnostic(self, beside: Sequence[int]) -> FoundTrigger:
        """The agnostic trigger of higher patterns that leads to none of the classes `beside`."""
        name = f"agnostic-raised-{_named(beside)}"
        draws, stage = generator(self._seed, "agnostic-raised"), "raised agnostic trigger"
        steps = math.ceil(self._subject.settings.agnostic_steps / 2)
        few = self._subject.raised.with_settings(agnostic_steps=steps)
        make = partial(invert_agnostic, few, draws, self._progress, beside, stage=stage)
        return self._journal.trigger(name, make)

    def agnostic_narrow(self, beside: Mapping[Inverted, Sequence[int]]) -> list[FoundTrigger]:
        """Of each narrow family asked for the agnostic trigger that leads to none of the classes `beside`."""
        usual = self._subject.settings
        few = self._subject.with_settings(
            agnostic_steps=math.ceil(NARROW_STEPS * usual.agnostic_steps), learning_rate=_HURRY * usual.learning_rate
        )

        def making(family: Inverted, classes: Sequence[int]) -> Making:
            name, stage = f"agnostic-{family}-{_named(classes)}", f"agnostic {family}"
            draws = generator(self._seed, name)
            make = partial(invert_agnostic, few, draws, beside=classes, family=family, stage=stage)
            return lambda progress: self._journal.trigger(name, lambda: make(progress))

        return self._all([making(family, classes) for family, classes in beside.items()])

    @property
    def count(self) -> int:
        """How many classes there are."""
        return len(self._classes)

    def toward(self, wanted: Sequence[Wanted]) -> list[FoundTrigger]:
        """Triggers that make the zero-shot head answer the classes wanted."""
        return self._all(
            [
                self._making(
                    one.name,
                    f"raised {one.family} trigger" if one.raised else f"{one.family} trigger",
                    one.target,
                    one.family,
                    at=one.at,
                    raised=one.raised,
                )
                for one in wanted
            ]
        )

    def fresh(self, wanted: Sequence[tuple[int, str, Answering, float]], bank: TriggerBank) -> list[FoundTrigger]:
        """Masked triggers with draws of their own, for each (target, name of what is misled, itself, area budget).

        `bank`: what the guard was fitted to. One found on another number of cores may differ, and so may the guard.
        """
        return self._all(
            [
                self._making(
                    f"fresh-{name}-{c}", f"fresh trigger, {name} model,", c, "masked", head, budget, mark=bank.mark
                )
                for c, name, head, budget in wanted
            ]
        )

    def fresh_raised(self, wanted: Sequence[tuple[int, str, Answering]], bank: TriggerBank) -> list[FoundTrigger]:
        """Raised additive ones with draws of their own, for each (target, name of what is misled, itself)."""
        return self._all(
            [
                self._making(
                    f"fresh-raised-{name}-{c}",
                    f"fresh raised trigger, {name} model,",
                    c,
                    "additive",
                    head,
                    raised=True,
                    mark=bank.mark,
                )
                for c, name, head in wanted
            ]
        )

    def fresh_waves(self, bank: TriggerBank) -> list[FoundTrigger]:
        """Toward each target that the bank has waves for, the next best wave that is not among them."""
        known = [one for one in bank if one.family == "wave"]
        return [wave for c in sorted({one.target for one in known}) for wave in self._next_waves(c, known)]

    def fresh_edits(self, bank: TriggerBank) -> list[FoundTrigger]:
        """Toward each target that the bank has edits for, the surest telling one that is not among them, if any is."""
        size = self._subject.clip.image_size
        known = [one for one in bank if any(same(one, edit) for edit in edits(size).values())]
        fresh = [
            [edit for edit in self.edited().triggers(c, size, 0.0) if not any(same(edit, one) for one in known)]
            for c in sorted({one.target for one in known})
        ]
        return [edit for others in fresh for edit in others[:1]]

    def _next_waves(self, target: int, known: Sequence[FoundTrigger]) -> list[FoundTrigger]:
        heard, size = self.heard(), self._subject.clip.image_size
        for rank in range(len(heard.numbers)):
            waves = heard.triggers(target, size, self._subject.settings, rank=rank)
            if not any(torch.equal(wave.pattern, one.pattern) for wave in waves for one in known):
                return waves
        return []

    def _making(
        self,
        name: str,
        what: str,
        target: int,
        family: Inverted,
        against: Answering | None = None,
        budget: float | None = None,
        *,
        at: Place | None = None,
        raised: bool = False,
        mark: str = "",
    ) -> Making:
        """How a trigger is made, unless the journal has it by that name and mark; its draws are of the name alone."""
        subject, part = self._subject.raised if raised else self._subject, f"{name}-{mark}" if mark else name

        def make(progress: Progress) -> FoundTrigger:
            draws, stage = generator(self._seed, name), f"{what} toward {self._classes[target]}"
            return invert_toward(
                subject, target, family, draws, progress, stage=stage, against=against, budget=budget, at=at
            )

        return lambda progress: self._journal.trigger(part, lambda: make(progress))

    def _all(self, makings: Sequence[Making]) -> list[FoundTrigger]:
        return together(makings, self._progress, self._subject.clip.device)


def _named(classes: Sequence[int]) -> str:
    """Of a few classes: one that is just worth keeping may fail to be on another number of cores."""
    return sha256(repr(sorted(classes)).encode()).hexdigest()[:8]


def same(one: FoundTrigger, other: FoundTrigger) -> bool:
    """Whether two do the same, whatever they lead to; machines may round an edit otherwise."""
    alike = one.family == other.family and one.pattern.shape == other.pattern.shape
    return alike and torch.allclose(one.pattern, other.pattern, atol=1e-5)
