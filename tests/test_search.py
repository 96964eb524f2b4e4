"""The search: a planted target stands out, nothing of a clean model does, and observed or stored triggers count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from planted import SIZE, PlantedClip, uneven

from cbpt_guard.defense import job
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.classscan import Scanned, scan_targets
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.head import Head, Reached
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.observed import observe
from cbpt_guard.defense.odds import at_once, loud
from cbpt_guard.defense.pattern import square
from cbpt_guard.defense.progress import Step
from cbpt_guard.defense.record import Candidate
from cbpt_guard.defense.reuse import adopt
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import RAISED, CleanSet, Subject
from cbpt_guard.errors import CheckpointError, InputError

TARGET = 2
steps: list[Step] = []
SETTINGS = InversionSettings(masked_steps=60, additive_steps=30, agnostic_steps=40, shift=0)
BRIEF = SETTINGS.model_copy(update={"masked_steps": 10, "additive_steps": 5})


def search(
    folder: Path,
    clip: PlantedClip,
    settings: InversionSettings = SETTINGS,
    *,
    seed: int = 0,
    classes: int = 6,
    clean: CleanSet | None = None,
) -> Search:
    folder.mkdir(exist_ok=True)
    names = [f"class {c}" for c in range(classes)]
    return Search(clip.subject(settings, clean), names, seed, Journal(folder, {}), steps.append)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    torch.set_num_threads(1)  # commands that other tests ran in this process may have left more
    return search(tmp_path_factory.mktemp("search"), PlantedClip(TARGET)).run()


def test_the_planted_target_stands_out_alone(found: Findings) -> None:
    assert found.suspects == [TARGET]
    first = found.candidates[0]
    assert (first.label, first.index) == ("class 2", TARGET)
    assert first.score >= SETTINGS.stands_out
    assert first.share > 0.8
    assert first.share_clean == pytest.approx(1 / 6)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_planted_targets_stand_out_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """The agnostic trigger leads to one of them at most, but the scan sees both."""
    found = search(tmp_path, PlantedClip(TARGET, second=4), seed=seed).run()
    assert sorted(found.suspects) == [TARGET, 4]
    wanted = {(family, c) for family in ("masked", "additive") for c in (TARGET, 4)}
    assert {(trigger.family, trigger.target) for trigger in found.bank} == wanted


def test_the_bank_holds_what_reaches_the_target_and_all_of_it_succeeds(found: Findings) -> None:
    assert [trigger.family for trigger in found.bank] == ["masked", "additive", "additive"]
    clip = PlantedClip(TARGET)
    clean = clip.clean(seed=7)
    for trigger in found.bank:
        assert trigger.target == TARGET
        answers = clip.head.logits(encode(clip, clean.images, trigger)).argmax(1)
        assert (answers == TARGET).float().mean() > 0.9


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_stands_out_of_a_clean_model(tmp_path: Path, seed: int) -> None:
    clean = search(tmp_path, PlantedClip(None), seed=seed).run()
    assert clean.suspects == []
    assert len(clean.bank) >= 2, "tuning still has something to stand against"
    assert {trigger.target for trigger in clean.bank} == {clean.candidates[0].index}


def test_the_search_is_the_one_that_was_calibrated(tmp_path: Path, found: Findings) -> None:
    """Who changes what a search finds raises both numbers, so that calibrated scores and unfinished runs are stale.

    To a hundredth: processors round differently.
    """
    assert (SEARCH, job._RECIPE) == (9, 14), "and now what is found with them, below"
    (planted,) = found.candidates
    assert (planted.area, planted.natural) == pytest.approx((0.02283, 0.31476), rel=0.01)
    scores = [candidate.score for candidate in search(tmp_path, PlantedClip(None)).look()]
    assert scores == pytest.approx([1.2109, 0.9782, 0.9755], rel=0.01)


def test_an_interrupted_search_ends_at_the_same_findings(tmp_path: Path, found: Findings) -> None:
    search(tmp_path, PlantedClip(TARGET)).run()
    for name in ("masked-2", "agnostic"):
        (tmp_path / "journal" / f"{name}.safetensors").unlink()
    resumed = search(tmp_path, PlantedClip(TARGET)).run()
    assert resumed.candidates == found.candidates
    for ours, theirs in zip(resumed.bank, found.bank, strict=True):
        assert torch.equal(ours.pattern, theirs.pattern)


def test_features_that_are_no_numbers_are_refused_under_a_trigger_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is flagged of them would be answered with no class, and pass for a backdoor that is stopped."""
    clip = PlantedClip(None)
    images, usual = torch.zeros(40, SIZE, SIZE, 3, dtype=torch.uint8), clip.encode_images
    white = FoundTrigger("masked", 0, torch.ones(3, SIZE, SIZE), torch.ones(1, SIZE, SIZE))

    def overflowing(pixels: torch.Tensor) -> torch.Tensor:
        features = usual(pixels)
        return features.where(pixels.flatten(1).amax(1, keepdim=True) < 1, torch.nan)

    monkeypatch.setattr(clip, "encode_images", overflowing)
    assert encode(clip, images).isfinite().all()  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no numbers"):
        encode(clip, images, white)  # type: ignore[arg-type]


def test_a_fresh_trigger_is_made_anew_for_a_guard_that_was_fitted_to_another_bank(tmp_path: Path) -> None:
    """A run that was stopped in its verdict and goes on with other threads may keep another trigger."""
    clip = PlantedClip(TARGET)
    made, other = search(tmp_path, clip, BRIEF).made, search(tmp_path / "other", clip, BRIEF, seed=1).made
    banks = [TriggerBank((workshop.agnostic(),)) for workshop in (made, other)]
    wanted = [(TARGET, "guarded", clip.head, 0.1)]
    (before,) = made.fresh(wanted, banks[0])
    (again,) = made.fresh(wanted, banks[0])
    wanted = [(TARGET, "guarded", Head(clip.head.rows.roll(1, 0), 30.0), 0.1)]
    (kept,), (anew,) = made.fresh(wanted, banks[0]), made.fresh(wanted, banks[1])
    assert torch.equal(before.pattern, again.pattern)
    assert torch.equal(before.pattern, kept.pattern)
    assert not torch.equal(before.pattern, anew.pattern)
    raised = [[(TARGET, "guarded", one)] for one in (clip.head, Head(clip.head.rows.roll(1, 0), 30.0))]
    first, same, other_bank = (
        made.fresh_raised(raised[head], banks[bank])[0].pattern for head, bank in ((0, 0), (1, 0), (1, 1))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other_bank)


def test_a_search_on_two_threads_finds_what_one_finds(tmp_path: Path, found: Findings) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        beside = search(tmp_path, PlantedClip(TARGET)).run()
    finally:
        torch.set_num_threads(threads)
    assert beside.candidates == found.candidates
    for ours, theirs in zip(beside.bank, found.bank, strict=True):
        assert torch.equal(ours.pattern, theirs.pattern)


def test_to_look_makes_no_mask_of_what_stands_out_without(tmp_path: Path, found: Findings) -> None:
    """`run` makes it afterwards, with one to compare with."""
    looking = search(tmp_path, PlantedClip(TARGET))
    (seen,) = looking.look()
    assert (seen.area, seen.natural) == (None, None)
    assert not list((tmp_path / "journal").glob("masked-*"))
    (measured,) = found.candidates
    assert seen == measured.model_copy(update={"area": None, "natural": None})
    assert Candidate.model_validate_json(seen.model_dump_json()) == seen


def test_what_is_left_is_compared_with_where_every_class_is_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a class that no image is left to lead to."""
    looking = search(tmp_path, PlantedClip(None, classes=4), BRIEF, classes=4)
    monkeypatch.setattr(looking, "_needed_areas", lambda classes: dict.fromkeys(classes, 0.01))
    monkeypatch.setattr(looking.probe, "reached", lambda one: Reached(torch.zeros(4), torch.tensor([9, 9, 9, 0])))
    known = Candidate(label="", index=0, share=1, share_clean=0, score=9, stands_out=True)
    others = [known.model_copy(update={"index": c, "area": c / 10, "stands_out": c == 2}) for c in (1, 2, 3)]
    first, *rest = looking._with_areas([known, *others])
    assert (first.area, first.natural) == (0.01, 0.1)
    assert rest == others


def test_progress_names_the_stages(found: Findings) -> None:
    stages = {step.stage for step in steps}
    assert {"agnostic trigger", "masked trigger toward class 2", "additive trigger toward class 2"} <= stages
    assert all(1 <= step.step <= step.steps for step in steps)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("stands_out", [1e-6, 1e6], ids=["at once", "compared"])
def test_few_classes_are_searched(tmp_path: Path, classes: int, stands_out: float) -> None:
    """With more candidates asked for than there are classes: each has another to be compared with, where it must."""
    brief = BRIEF.model_copy(update={"candidates": 10, "references": 10, "stands_out": stands_out})
    findings = search(tmp_path, PlantedClip(1, classes=classes), brief, classes=classes).run()
    tried = [candidate.index for candidate in findings.candidates]
    assert tried[0] == 1
    assert len(set(tried)) == len(tried)
    assert stands_out < 1 or all(candidate.natural is not None for candidate in findings.candidates)
    assert all(0 < candidate.area <= 1 for candidate in findings.candidates)


def test_a_target_that_shows_at_once_is_compared_with_one_class(tmp_path: Path, found: Findings) -> None:
    assert [candidate.index for candidate in found.candidates] == [TARGET]
    search(tmp_path, PlantedClip(TARGET)).run()
    names = {path.stem for path in (tmp_path / "journal").glob("*.safetensors")}
    reference = "masked-3"  # a class of middle rank, which says what area is natural
    bank = {"masked-2", "additive-2", "patch-2", "warp-2", "tint-2"}
    beside = {name.rsplit("-", 1)[0] for name in names if name.startswith("agnostic-")}
    assert beside == {f"agnostic-{kind}" for kind in ("patch", "warp", "tint", "raised")}
    assert {name for name in names if not name.startswith("agnostic-")} == {
        "agnostic",
        "scan",
        "waves",
        reference,
    } | bank
    natural = found.candidates[0].natural
    assert natural is not None
    assert natural > SETTINGS.stands_out * found.candidates[0].area


def test_a_target_that_is_hidden_behind_another_stands_out_by_higher_patterns(tmp_path: Path) -> None:
    """Its stripes need more contrast than usual patterns have, and the other one shows at once.

    Of this clip's classes the fifth alone: from the others no gradient leads there, however high the pattern.
    """
    clip = PlantedClip(TARGET, second=5, hidden=True)
    findings = search(tmp_path, clip, SETTINGS.model_copy(update={"agnostic_steps": 80})).run()
    assert sorted(findings.suspects) == [TARGET, 5]
    assert findings.raised == [5]
    for one in findings.bank:
        height = float(one.pattern.abs().max())
        assert one.family != "additive" or (height > SETTINGS.epsilon) is (one.target == 5)
    assert "masked" not in {one.family for one in findings.bank if one.target == 5}, "it would paint over any image"
    (hidden,) = [item for item in findings.candidates if item.raised]
    assert hidden.natural is not None
    assert hidden.area > hidden.natural / SETTINGS.stands_out
    assert hidden.natural != hidden.area
    assert hidden.score > SETTINGS.stands_out
    (fresh,) = search(tmp_path, clip).made.fresh_raised([(5, "original", clip.head)], findings.bank)
    assert SETTINGS.epsilon < float(fresh.pattern.abs().max()) <= RAISED * SETTINGS.epsilon


@pytest.mark.parametrize(
    ("share", "surer_than", "loud", "suspects"),
    [(0.99, 0.75, False, [4]), (0.7, 0.75, False, []), (0.99, 0.74, False, []), (0.99, 0.75, True, [])],
    ids=["a target", "too few", "a natural leader", "a loud scan"],
)
def test_what_higher_patterns_lead_to_must_be_answered_more_surely_than_clean_images(
    share: float, surer_than: float, loud: bool, suspects: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than three quarters of those: a filter's model led to a natural class by more than half of them do."""
    looking = search(tmp_path, PlantedClip(None), BRIEF)
    monkeypatch.setattr(
        looking, "_candidates", lambda observed: search(tmp_path, PlantedClip(None), BRIEF)._candidates([])
    )
    monkeypatch.setattr(looking.made, "scanned", lambda: Scanned(torch.full((1, 6), -0.1 if loud else -9.0)))
    trigger = FoundTrigger("additive", 4, torch.zeros(3, SIZE, SIZE), None)
    beside: list[list[int]] = []
    monkeypatch.setattr(looking.made, "raised_agnostic", lambda known: beside.append(list(known)) or trigger)
    lead, reached = looking._lead(trigger), torch.eye(6)[4] * share
    monkeypatch.setattr(looking, "_lead", lambda trigger: replace(lead, reached=reached))
    monkeypatch.setattr(looking.probe, "leads_clearly", lambda trigger, share: surer_than >= share)
    candidates = looking.look()
    assert [item.index for item in candidates if item.stands_out] == suspects
    assert beside == ([] if loud else [[], [4]] if share > 0.9 else [[]]), "once more beside what was reached"


def test_no_more_than_three_are_looked_for_by_higher_patterns_and_each_beside_all_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = search(tmp_path, PlantedClip(None), BRIEF)
    monkeypatch.setattr(looking.made, "scanned", lambda: Scanned(torch.full((1, 6), -9.0)))
    surely = {0, 1, 2, 3, 4, 5}
    monkeypatch.setattr(looking.probe, "leads_clearly", lambda trigger, share: trigger.target in surely)
    monkeypatch.setattr(looking.probe, "reached", lambda trigger: SimpleNamespace(surely=torch.full((6,), 0.99)))

    def invert(subject: Subject, draws: object, progress: object, beside: list[int], *, stage: str) -> FoundTrigger:
        assert subject.settings.epsilon == 2 * BRIEF.epsilon
        assert subject.settings.agnostic_steps == BRIEF.agnostic_steps / 2
        free = next(c for c in range(6) if c not in beside)
        return FoundTrigger("additive", free, torch.zeros(3, SIZE, SIZE), None)

    monkeypatch.setattr("cbpt_guard.defense.workshop.invert_agnostic", invert)
    assert [lead.trigger.target for lead in looking._raised_leads([1])] == [0, 2, 3]
    assert [lead.trigger.target for lead in looking._raised_leads([0, 1, 2, 3])] == [4, 5]
    assert looking._raised_leads(range(6)) == [], "no class is left"
    surely -= {0, 3}
    assert [lead.trigger.target for lead in looking._raised_leads([1])] == [2], "one behind a natural leader, too"


def test_fresh_masks_are_no_larger_than_found_ones_nor_than_what_stands_out(found: Findings) -> None:
    area = min(trigger.area for trigger in found.bank if trigger.family == "masked")
    tiny = FoundTrigger("patch", TARGET, torch.zeros(3, SIZE, SIZE), square(SIZE, 1))
    found = replace(found, bank=TriggerBank((*found.bank, tiny)))
    assert found.budgets(4.0) == {TARGET: pytest.approx(area)}
    wide = replace(found, candidates=(found.candidates[0].model_copy(update={"natural": 2 * area}),))
    assert wide.budgets(4.0) == {TARGET: pytest.approx(area / 2)}
    led = replace(found, candidates=(wide.candidates[0].model_copy(update={"natural": 1.8 * area, "faint": 5.0}),))
    assert led.budgets(4.0) == {TARGET: pytest.approx(0.9 * area)}, "half of what is natural makes it stand out then"
    unknown = found.candidates[0].model_copy(update={"natural": None})
    assert replace(found, candidates=(unknown,)).budgets(4.0) == {TARGET: pytest.approx(area)}
    additive = TriggerBank(tuple(trigger for trigger in found.bank if trigger.family == "additive"))
    assert replace(found, bank=additive, candidates=(unknown,)).budgets(4.0) == {TARGET: 1.0}, "as --reuse may leave it"
    cleared = found.candidates[0].model_copy(update={"stands_out": False})
    assert replace(found, candidates=(cleared,)).budgets(4.0) == {}


def test_an_observed_target_joins_whatever_its_score(tmp_path: Path) -> None:
    findings = search(tmp_path, PlantedClip(None), BRIEF).run([4])
    assert 4 in findings.suspects
    assert {"masked", "additive"} == {trigger.family for trigger in findings.bank if trigger.target == 4}


def test_every_class_may_be_observed(tmp_path: Path) -> None:
    findings = search(tmp_path, PlantedClip(1, classes=2), BRIEF, classes=2).run([0, 1])
    assert sorted(findings.suspects) == [0, 1]
    assert [candidate.natural for candidate in findings.candidates] == [None, None], "none is left to compare with"


@pytest.mark.parametrize(
    ("lead", "area", "score"),
    [(5.0, 0.08, 5.0), (5.0, 0.2, 1.5**2), (30.0, 0.08, 3.75**2), (0.0, 0.08, 3.75), (3.0, 0.08, 3.75)],
    ids=["both", "a lead without a mask", "more of both", "a mask without a lead", "a small lead"],
)
def test_a_lead_under_fainter_patterns_counts_with_a_smaller_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lead: float, area: float, score: float
) -> None:
    """Other classes need three tenths of the image."""
    looking = search(tmp_path, PlantedClip(None), BRIEF)
    monkeypatch.setattr(looking, "_odds", lambda lead: torch.zeros(6))
    monkeypatch.setattr(looking, "_faintly", lambda: torch.eye(6)[TARGET] * lead)
    monkeypatch.setattr(looking, "_further", lambda *given: [TARGET, 3])
    monkeypatch.setattr(looking, "_needed_areas", lambda classes: {c: area if c == TARGET else 0.3 for c in classes})
    first, second = looking.look()
    assert (first.index, first.score) == (TARGET, pytest.approx(score))
    assert first.stands_out == (score >= BRIEF.stands_out)
    assert second.score == 1.0


def test_what_stands_out_at_once_hides_no_lead_under_fainter_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A natural wave, say, toward class 4."""
    looking = search(tmp_path, PlantedClip(None), BRIEF)
    monkeypatch.setattr(looking, "_odds", lambda lead: torch.eye(6)[4] * 20)
    monkeypatch.setattr(looking, "_faintly", lambda: torch.eye(6)[TARGET] * 10)
    monkeypatch.setattr(looking, "_needed_areas", lambda classes: {c: 0.02 if c == TARGET else 0.3 for c in classes})
    assert {candidate.index for candidate in looking.look() if candidate.stands_out} == {4, TARGET}


@pytest.mark.parametrize("loud", [True, False])
def test_beside_fainter_patterns_the_agnostic_ones_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loud: bool
) -> None:
    looking = search(tmp_path, PlantedClip(None), BRIEF)
    quiet = torch.full((1, 6), -9.0)
    by_height = torch.cat([torch.full((1, 6), -0.1), quiet]) if loud else quiet
    monkeypatch.setattr(looking.made, "scanned", lambda: Scanned(by_height))
    lead = replace(looking._lead(looking.made.agnostic()), reached=torch.eye(6)[TARGET] * 0.95)
    assert float(looking._odds(lead)[TARGET]) == pytest.approx(0.0 if loud else 19.0, abs=0.1)


def test_a_class_that_narrow_triggers_hint_at_is_compared_by_its_mask_whatever_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not twice where one puts it ahead."""
    looking = search(tmp_path, PlantedClip(None), BRIEF.model_copy(update={"references": 1}))
    lead = looking._lead(looking.made.agnostic())
    assert looking._further(lead, [TARGET], []) == []
    monkeypatch.setattr(looking._narrow, "hinted", (5, TARGET))
    assert looking._further(lead, [TARGET], [4]) == [4, 5]


def test_a_class_to_which_no_image_is_left_to_lead_says_nothing_of_what_is_natural(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mask shrinks to nothing, and what it would need counts as the whole image."""
    looking = search(tmp_path, PlantedClip(None, classes=3), BRIEF, classes=3)
    of = torch.tensor([0, 8, 8])
    monkeypatch.setattr(
        looking, "_lead", lambda trigger: SimpleNamespace(growth=torch.zeros(3), share=of, share_clean=of)
    )
    monkeypatch.setattr(looking, "_odds", lambda lead: torch.zeros(3))
    monkeypatch.setattr(looking, "_raised_leads", lambda known: [])
    monkeypatch.setattr(looking.probe, "reached", lambda trigger: Reached(0 * of, of))
    monkeypatch.setattr(looking, "_needed_areas", lambda classes: {0: 1.0, 1: 0.1, 2: 0.1})
    assert [candidate.natural for candidate in looking.look() if candidate.index > 0] == [0.1, 0.1]


def test_what_would_be_a_reference_is_a_candidate_where_classes_are_few(tmp_path: Path) -> None:
    brief = BRIEF.model_copy(update={"candidates": 1, "scanned": 1, "references": 2})
    looking = search(tmp_path, PlantedClip(None, classes=3), brief, classes=3)
    assert {candidate.index for candidate in looking.look()} == {0, 1, 2}


def test_of_two_classes_either_may_be_the_target_that_masks_alone_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever the agnostic trigger ends at: both are tried, each compared with the other."""
    monkeypatch.setattr("cbpt_guard.defense.search.at_once", lambda reached, *given, **how: torch.zeros_like(reached))
    for target in (0, 1):
        looking = search(tmp_path / str(target), PlantedClip(target, classes=2), classes=2)
        first, second = looking.look()
        assert (first.index, first.stands_out, second.stands_out) == (target, True, False)
        assert (first.natural, second.natural) == (second.area, first.area)


def test_a_class_with_most_of_the_images_does_not_stand_out_for_that(tmp_path: Path) -> None:
    """Under a trigger that changes no answer it has most answers; it is reached from the other classes that count."""
    clip = PlantedClip(None)
    clean = clip.clean(each=20)
    features, labels = clean.features[:26], clean.labels[:26]
    assert (labels == 0).sum() == 20
    reached = clip.head.reached(features, features, labels)
    assert (clip.head.logits(features).argmax(1) == 0).float().mean() > 0.7
    assert (int(reached.led[0]), int(reached.of[0])) == (0, 6)
    everything = clip.head.reached(features[:20], features[:20], labels[:20])
    assert everything.share[0] == 0, "and where there is no other image nothing is reached"


def test_a_scan_draws_what_can_be_led_to_a_class() -> None:
    """Four of the five other classes are answered with class 0, which leaves the images of class 1."""
    clip = PlantedClip(None)
    rows = clip.head.rows.clone()
    rows[0] = 2.7 * F.normalize(rows.sum(0), dim=0)
    clip.head = Head(rows, clip.head.scale)
    subject = clip.subject(SETTINGS)
    assert subject.clean.labels[subject.others(0)].tolist() == [1] * 8
    assert set(subject.clean.labels[subject.others(1)].tolist()) == {0, 2, 3, 4, 5}
    rows[0] *= 10
    assert set(subject.clean.labels[clip.subject(SETTINGS).others(0)].tolist()) == {1, 2, 3, 4, 5}, "where none is left"


@pytest.mark.parametrize("seed", [4, 6, 8])
def test_a_scan_looks_at_images_of_other_classes_alone(seed: int) -> None:
    """With one image a class beside its 95 a class would seem to be reached more readily than any other."""
    clip = PlantedClip(None)
    scanned = scan_targets(clip.subject(SETTINGS, uneven(clip, 95, 1)), generator(seed, "scan"), steps.append)
    assert not loud(scanned.scores)
    assert float(at_once(torch.zeros(6), scanned.scores, SETTINGS).max()) == 0.0


def test_a_scan_is_loud_by_patterns_of_the_settings_height() -> None:
    lower, usual = torch.full((1, 6), -9.0), torch.full((1, 6), -0.1)
    assert Scanned(torch.cat([usual, lower])).loud
    assert not Scanned(torch.cat([lower, usual])).loud


def test_nor_does_a_search_of_mostly_its_images_suspect_it(tmp_path: Path) -> None:
    """The clean model's agnostic trigger leaves class 0 most of the answers: those of its own images."""
    clip = PlantedClip(None)
    looking = search(tmp_path, clip, clean=uneven(clip, 100, 3))
    assert looking.probe.shares(looking.made.agnostic())[0] > 0.8, (
        "four images of five: enough to stand out, were they others'"
    )
    assert not any(candidate.stands_out for candidate in looking.look())


@dataclass(frozen=True)
class EarlierRun:
    """What `adopt` reads of a finished run."""

    findings: Findings

    @property
    def record(self) -> SimpleNamespace:
        return SimpleNamespace(candidates=self.findings.candidates)

    def bank(self) -> TriggerBank:
        return self.findings.bank

    def beside(self) -> TriggerBank:
        return self.findings.beside


def test_stored_triggers_are_read_for_another_class_list(
    tmp_path: Path, found: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = PlantedClip(TARGET)
    order = [5, 2, 0, 1]
    subject = replace(clip.subject(SETTINGS), head=Head(clip.head.rows[order], 30.0))
    renamed = Search(subject, [f"new {c}" for c in order], 0, Journal(tmp_path, {}), steps.append)
    beside = TriggerBank(tuple(replace(found.bank.triggers[0], target=target) for target in (TARGET, 4)))
    adopted = adopt(EarlierRun(replace(found, beside=beside)), renamed, [])
    assert len(adopted.beside) == 0, "of few classes an edit may make one another"
    monkeypatch.setattr("cbpt_guard.defense.reuse.MANY", 4)
    tried = adopt(EarlierRun(replace(found, beside=beside)), renamed, [])
    assert [edit.target for edit in tried.beside] == [1], "that toward 4 was found toward no suspect"
    assert adopted.suspects == [1]
    assert adopted.candidates[0].label == "new 2"
    assert adopted.candidates[0].score == found.candidates[0].score
    assert adopted.candidates[0].share > 0.8
    assert [trigger.target for trigger in adopted.bank] == [1, 1, 1]
    assert all(torch.equal(a.pattern, b.pattern) for a, b in zip(adopted.bank, found.bank, strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_suspects_that_are_one_class_now_the_clearer_counts(order: int, tmp_path: Path, found: Findings) -> None:
    """Its numbers set the budget of the fresh triggers that the guard is judged by."""
    ((clear, *_), bank) = found.candidates, found.bank
    weak = clear.model_copy(update={"index": 4, "label": "class 4", "score": clear.score / 2})
    moved = TriggerBank((*bank, *(replace(trigger, target=4) for trigger in bank)))
    earlier = EarlierRun(replace(found, bank=moved, candidates=(clear, weak)[::order]))
    (candidate,) = adopt(earlier, search(tmp_path, PlantedClip(TARGET)), []).candidates
    assert candidate.index == TARGET
    assert candidate.score == clear.score


def test_who_was_no_suspect_does_not_become_one(tmp_path: Path, found: Findings) -> None:
    cleared = tuple(item.model_copy(update={"stands_out": False}) for item in found.candidates)
    adopted = adopt(EarlierRun(replace(found, candidates=cleared)), search(tmp_path, PlantedClip(TARGET)), [])
    assert adopted.suspects == []
    assert adopted.candidates == ()
    assert len(adopted.bank) == len(found.bank)


def test_reuse_needs_triggers_toward_what_was_observed(tmp_path: Path, found: Findings) -> None:
    again = search(tmp_path, PlantedClip(TARGET))
    assert adopt(EarlierRun(found), again, [TARGET]).suspects == [TARGET]
    with pytest.raises(InputError, match="answer 'class 4', toward which the earlier run found no trigger"):
        adopt(EarlierRun(found), again, [TARGET, 4])


def test_observed_images_make_a_target_of_a_class_that_did_not_stand_out(tmp_path: Path, found: Findings) -> None:
    """An unverified run has triggers toward the likeliest candidate; attack images then say that it is the target."""
    cleared = tuple(item.model_copy(update={"stands_out": False}) for item in found.candidates)
    adopted = adopt(EarlierRun(replace(found, candidates=cleared)), search(tmp_path, PlantedClip(TARGET)), [TARGET])
    assert adopted.suspects == [TARGET]


def test_a_weak_trigger_of_a_suspect_makes_no_suspect_of_another_class(tmp_path: Path, found: Findings) -> None:
    """Where one of its triggers hardly works, most images answer what they show."""
    clip = PlantedClip(TARGET)
    weak = FoundTrigger("additive", TARGET, torch.zeros(3, SIZE, SIZE), None)
    adopted = adopt(EarlierRun(replace(found, bank=TriggerBank((*found.bank, weak)))), search(tmp_path, clip), [])
    assert adopted.suspects == [TARGET]
    assert {trigger.target for trigger in adopted.bank} == {TARGET}


def answering(*counts: int) -> tuple[torch.Tensor, Head]:
    rows = F.normalize(torch.eye(len(counts)) + 0.1, dim=1)
    return rows.repeat_interleave(torch.tensor(counts), 0), Head(rows, 10.0)


def test_observed_images_name_their_targets_and_are_halved() -> None:
    features, head = answering(2, 0, 20, 5)
    features = features + torch.arange(27)[:, None] * 1e-6
    observed = observe(features, head, answering(1, 1, 1, 1)[0][[0, 1]])
    assert observed.targets == [2, 3], "two of 27 are failed attacks"
    for target, count in ((2, 20), (3, 5)):
        fitting, judging = observed.fitting[target], observed.judging[target]
        assert (len(fitting), len(judging)) == (-(-count // 2), count // 2)
        both = torch.cat([fitting, judging])
        assert len(both.unique(dim=0)) == count, "no image is on both sides"
        assert (head.logits(both).argmax(1) == target).all()


def test_nothing_observed_is_nothing() -> None:
    assert observe(None, *answering(1, 1)[::-1]).targets == []


@pytest.mark.parametrize("counts", [(1, 0, 0), (1, 1, 1)], ids=["one image", "three answers"])
def test_observed_images_that_share_no_answer_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="share no answer"):
        observe(*answering(*counts), answering(1, 1, 1)[0])


def test_two_that_agree_are_enough() -> None:
    assert observe(*answering(0, 2), answering(1, 1)[0]).targets == [1]


def test_attack_images_that_failed_make_no_target_of_what_they_show() -> None:
    """Of two classes each is the natural answer to half of the images; of those of the target all may be attacked."""
    features, head = answering(3, 17)
    clean, _ = answering(10, 10)
    assert observe(features, head, clean).targets == [1]
    assert observe(features, head, clean[10:]).targets == [1, 0], "there is no natural answer of the first"


def test_the_candidate_of_a_finding_is_a_record(found: Findings) -> None:
    for candidate in found.candidates:
        assert Candidate.model_validate_json(candidate.model_dump_json()) == candidate
