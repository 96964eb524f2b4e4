"""Patches, warps and tints: which classes agnostic ones hint at, and what triggers toward those say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from planted import SIZE, PlantedClip

from cbpt_guard.defense.classscan import Scanned
from cbpt_guard.defense.found import FoundTrigger, Inverted
from cbpt_guard.defense.inversion import NARROW
from cbpt_guard.defense.journal import Scratch
from cbpt_guard.defense.narrow import NarrowSearch
from cbpt_guard.defense.pattern import square
from cbpt_guard.defense.probe import Probe
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.workshop import Wanted, Workshop

TARGET = 2
BRIEF = InversionSettings(agnostic_steps=40, masked_steps=10, additive_steps=5, shift=0)


def narrow_search() -> tuple[NarrowSearch, Workshop, Probe]:
    subject = PlantedClip(None).subject(BRIEF)
    workshop = Workshop(subject, [f"class {c}" for c in range(6)], 0, Scratch(), silent)
    probe = Probe(subject, 0)
    return NarrowSearch(workshop, probe, BRIEF), workshop, probe


Share = float
Told = dict[tuple[Inverted, int], Share]
Beside = dict[Inverted, list[int]]


@pytest.mark.parametrize(
    ("hints", "toward", "others", "clearly", "ahead"),
    [
        ([{("patch", 5): 0.3}], {("patch", 5): 0.99}, 0.2, True, {5: 99.0}),
        ([{("warp", 5): 0.3}], {("warp", 5): 0.99}, 0.2, True, {5: 99.0}),
        ([{("tint", 5): 0.3}], {("tint", 5): 0.99}, 0.2, True, {5: 99.0}),
        ([{("tint", 5): 0.3}], {("warp", 5): 0.99, ("tint", 5): 0.4}, 0.2, True, {5: 99.0}),
        ([{("patch", 5): 0.19}], {("patch", 5): 0.99}, 0.2, True, {}),
        ([{("patch", 5): 0.3}], {("patch", 5): 0.89}, 0.2, True, {}),
        ([{("patch", 5): 0.3}], {("patch", 5): 0.99}, 0.9, True, {5: 11.0}),
        ([{("patch", 5): 0.3}], {("patch", 5): 0.99}, 0.97, True, {}),
        ([{("patch", 5): 0.3}], {("patch", 5): 0.99}, 0.2, False, {}),
        ([{("warp", 5): 0.3, ("tint", 0): 0.3}], {("warp", 5): 0.99, ("warp", 0): 0.97}, 0, True, {5: 99, 0: 97 / 3}),
        ([{("tint", 0): 0.4}, {("tint", 5): 0.3}], {("tint", 0): 0.7, ("tint", 5): 0.99}, 0.2, True, {5: 99 * 3 / 7}),
        ([{("tint", c): 0.3} for c in (0, 1, 3, 5)], {("tint", 5): 0.99}, 0.2, True, {}),
    ],
    ids=[
        "a patch", "a warp", "a tint", "told by another family", "no hint", "none for the bank", "others less",
        "natural ones", "not clearly", "two of one family", "behind a natural one", "three rounds at most",
    ],
)  # fmt: skip
def test_narrow_agnostic_triggers_tell_which_classes_to_look_at(
    hints: list[Told],
    toward: Told,
    others: Share,
    clearly: bool,
    ahead: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Class 2 is known. What the agnostic triggers of each round lead to, and what is reached toward each class."""
    looking, workshop, probe = narrow_search()
    scores = torch.tensor([-9.0, -4.0, -0.1, -2.0, -3.0, -5.0])
    monkeypatch.setattr(workshop, "scanned", lambda: Scanned(scores[None]))
    agnostic, made = torch.ones(3, SIZE, SIZE), torch.zeros(3, SIZE, SIZE)
    rounds: list[Beside] = []

    def narrow(beside: Beside) -> list[FoundTrigger]:
        rounds.append(beside)
        return [FoundTrigger(family, -len(rounds), agnostic, None) for family in beside]

    def reached(one: FoundTrigger) -> SimpleNamespace:
        shares = torch.zeros(6)
        if one.pattern is agnostic:
            shares[TARGET] = 0.9  # what is known does not count, however much it is led to
            for (family, c), share in hints[len(rounds) - 1].items() if len(rounds) <= len(hints) else ():
                shares[c] = share if family == one.family else 0.0
        else:
            shares[one.target] = toward.get((cast(Inverted, one.family), one.target), others)
        return SimpleNamespace(share=shares, surely=shares)

    monkeypatch.setattr(workshop, "agnostic_narrow", narrow)
    monkeypatch.setattr(
        workshop, "toward", lambda wanted: [FoundTrigger(w.family, w.target, made, None) for w in wanted]
    )
    monkeypatch.setattr(probe, "reached", reached)
    monkeypatch.setattr(probe, "leads_clearly", lambda one: clearly)
    found = looking.odds([TARGET])
    assert {c: float(found[c]) for c in range(6) if found[c]} == pytest.approx(ahead, rel=1e-4)
    assert rounds[0] == {family: [TARGET] for family in NARROW}
    for beside, before, hinted in zip(rounds[1:], rounds, hints, strict=False):
        led = {family: c for (family, c), share in hinted.items() if share >= 0.2}
        assert beside == {family: [*before[family], c] for family, c in led.items()}, "each beside what it hinted at"
    assert len(rounds) <= 3
    rounds.clear()
    assert not looking.odds(range(6)).any(), "nobody is left"
    assert not looking.odds(range(1, 6)).any(), "or none to be held against"
    monkeypatch.setattr(workshop, "scanned", lambda: Scanned(torch.full((1, 6), -0.1)))
    rounds.clear()
    assert not looking.odds([TARGET]).any(), "where patterns lead everywhere, such changes do, too"
    assert rounds == []


def test_narrow_agnostic_triggers_are_short_fast_and_beside_what_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A patch at its usual rate; warps and tints, of few numbers, at three times theirs."""
    _, workshop, _ = narrow_search()
    asked = []

    def invert(subject: Subject, draws: object, progress: object, *, beside: list[int], **how: str) -> FoundTrigger:
        asked.append((how["family"], beside))
        settings = subject.settings
        assert settings.agnostic_steps == 14, "a third of 40"
        assert settings.learning_rate == pytest.approx(3 * BRIEF.learning_rate)
        assert settings.mask_learning_rate == BRIEF.mask_learning_rate
        return FoundTrigger("tint", 0, torch.ones(6, SIZE, SIZE), None)

    monkeypatch.setattr("cbpt_guard.defense.workshop.invert_agnostic", invert)
    workshop.agnostic_narrow({"patch": [4, 1], "tint": []})
    assert asked == [("patch", [4, 1]), ("tint", [])]


def test_a_patch_toward_a_class_is_also_made_where_the_agnostic_one_that_led_there_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is held against others at that place. A patch toward any other class lies anywhere and no more."""
    looking, workshop, probe = narrow_search()
    monkeypatch.setattr(workshop, "scanned", lambda: Scanned(torch.tensor([[-9.0, -4.0, -0.1, -2.0, -3.0, -5.0]])))
    hint = FoundTrigger("patch", 3, torch.zeros(3, SIZE, SIZE), square(SIZE, 2, (3, 7)))
    led = {"patch": (5, 0.3), "warp": (4, 0.3), "tint": (0, 0.1)}
    asked: list[list[Wanted]] = []

    def toward(wanted: list[Wanted]) -> list[FoundTrigger]:
        asked.append(list(wanted))
        return [
            FoundTrigger(one.family, one.target, torch.full((1,), float(one.at is not None)), None) for one in wanted
        ]

    def reached(one: FoundTrigger) -> SimpleNamespace:
        shares = torch.zeros(6)
        if one.pattern is hint.pattern:
            c, share = led[one.family]
            shares[c] = share
        elif one is not nothing:
            shares[one.target] = 0.99 if one.target == 5 and one.pattern == 1 else 0.2
        return SimpleNamespace(share=shares, surely=shares)

    rounds = iter([[FoundTrigger(family, 3, hint.pattern, hint.mask) for family in NARROW]])
    nothing = FoundTrigger("tint", 0, torch.ones(1), None)
    monkeypatch.setattr(workshop, "agnostic_narrow", lambda beside: next(rounds, [nothing] * len(beside)))
    monkeypatch.setattr(workshop, "toward", toward)
    monkeypatch.setattr(probe, "reached", reached)
    monkeypatch.setattr(probe, "leads_clearly", lambda one: True)
    assert looking.odds([TARGET])[5] == pytest.approx(99, rel=1e-3)
    assert set(looking.hinted) == {4, 5}
    first, compared = asked
    assert [one.name for one in looking.wanted(5)] == ["patch-5", "warp-5", "tint-5", "patch-5-at-3-7"]
    assert [one.name for one in looking.wanted(4)] == ["patch-4", "warp-4", "tint-4"]
    assert set(first) == {*looking.wanted(4), *looking.wanted(5)}
    assert {one.target for one in compared} > {5, 4}
    assert {(one.family, one.at) for one in compared} == {("patch", (3, 7))}
