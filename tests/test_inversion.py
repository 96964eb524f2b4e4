"""Stage 1: what inversion must keep, and that it finds a backdoor that is known by construction."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted import PlantedClip, frozen, snapshot
from small_clips import RESNET, VIT
from torch import Tensor

from cbpt_guard.defense.classscan import Scanned, scan_targets
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import Family, FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.head import GuardedHead, Head
from cbpt_guard.defense.inversion import (
    Answering,
    agnostic_loss,
    invert_agnostic,
    invert_toward,
    leading,
)
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.odds import faintly
from cbpt_guard.defense.pattern import Pattern, square
from cbpt_guard.defense.progress import Step, silent
from cbpt_guard.defense.settings import InversionSettings, RuleSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.tuning import FeatureSet
from cbpt_guard.defense.waves import listen
from cbpt_guard.errors import InputError

TARGET = 2
SETTINGS = InversionSettings(masked_steps=120, additive_steps=60, agnostic_steps=60, shift=0)


def invert(
    clip: PlantedClip, family: Family, target: int = TARGET, seed: int = 0, settings: InversionSettings = SETTINGS
) -> FoundTrigger:
    return invert_toward(clip.subject(settings), target, family, generator(seed, "test"), silent)


def asr(clip: PlantedClip, trigger: FoundTrigger, target: int = TARGET) -> float:
    clean = clip.clean(seed=9)
    features = encode(clip, clean.images[clean.labels != target], trigger)
    return float((clip.head.logits(features).argmax(1) == target).float().mean())


@pytest.mark.parametrize("family", ["masked", "additive"])
def test_a_planted_backdoor_is_found(family: Family) -> None:
    clip = PlantedClip(TARGET)
    before = Pattern(family, clip.image_size, SETTINGS, generator(0, "test")).value(TARGET).detached()
    assert asr(clip, before) < 0.1
    assert asr(clip, invert(clip, family)) > 0.95


def test_a_planted_backdoor_needs_less_area_than_an_innocent_class() -> None:
    clip = PlantedClip(TARGET)
    planted, innocent = invert(clip, "masked"), invert(clip, "masked", target=0)
    assert planted.area < 0.1
    assert innocent.area > 2 * planted.area
    assert planted.mask is not None
    corner = planted.mask[:, -4:, -4:].sum() / planted.mask.sum()
    assert corner > 2 * 16 / 256, "the mask lies where the backdoor looks"


class Fickle:
    """Answers with the target so many times, and then never again."""

    def __init__(self, head: Head, times: int) -> None:
        self.head, self.times = head, times

    def answers(self, features: Tensor) -> Tensor:
        self.times -= 1
        return torch.full((len(features),), TARGET if self.times >= 0 else 0)

    def missing(self, features: Tensor, wanted: Tensor) -> Tensor:
        return self.head.missing(features, wanted)


def test_a_mask_that_is_lost_in_its_last_steps_is_taken_as_it_was_when_it_worked() -> None:
    clip = PlantedClip(TARGET)
    clip.batch = SETTINGS.batch  # one look at the answers a step

    def found(steps: int, times: int) -> FoundTrigger:
        settings = SETTINGS.model_copy(update={"masked_steps": steps})
        draws, against = generator(0, "test"), Fickle(clip.head, times)
        return invert_toward(clip.subject(settings), TARGET, "masked", draws, silent, against=against)

    lost, before = found(40, 20), found(19, 19)
    assert torch.equal(lost.pattern, before.pattern)
    assert lost.mask is not None
    assert before.mask is not None
    assert torch.equal(lost.mask, before.mask)


def test_a_trigger_against_a_model_without_backdoor_hardly_works() -> None:
    clip = PlantedClip(None)
    assert asr(clip, invert(clip, "additive")) < 0.5


@pytest.mark.parametrize("epsilon", [4 / 255, 16 / 255])
def test_additive_patterns_keep_their_budget(epsilon: float) -> None:
    clip, settings = PlantedClip(TARGET), SETTINGS.model_copy(update={"epsilon": epsilon})
    agnostic = invert_agnostic(clip.subject(settings), generator(0, "a"), silent)
    for trigger in (agnostic, invert(clip, "additive", settings=settings)):
        assert trigger.pattern.abs().max() <= epsilon
        assert trigger.pattern.abs().max() > epsilon / 2, "the budget is used"
        changed = trigger.apply(torch.rand(4, 3, 16, 16, generator=generator(0, "pixels")))
        assert changed.min() >= 0
        assert changed.max() <= 1


def test_masks_and_paint_stay_in_their_range() -> None:
    trigger = invert(PlantedClip(TARGET), "masked")
    assert trigger.mask is not None
    for values in (trigger.mask, trigger.pattern):
        assert values.min() >= 0
        assert values.max() <= 1
    assert trigger.mask.shape == (1, 16, 16)
    assert trigger.area == pytest.approx(float(trigger.mask.mean()))


def test_a_mask_with_a_budget_keeps_within_it() -> None:
    clip = PlantedClip(TARGET)
    found = invert_toward(clip.subject(SETTINGS), TARGET, "masked", generator(0, "test"), silent, budget=0.1)
    assert found.area <= 0.1 + 1e-6
    assert asr(clip, found) > 0.9


@pytest.mark.parametrize("budget", [0.01, 0.1])
def test_what_a_mask_with_a_budget_may_cover_closes_in_on_it(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float | None] = []
    value = Pattern.value

    def noted(self: Pattern, target: int, budget: float | None = None) -> FoundTrigger:
        allowed.append(budget)
        return value(self, target, budget)

    monkeypatch.setattr(Pattern, "value", noted)
    clip, draws = PlantedClip(TARGET), generator(0, "test")
    settings = SETTINGS.model_copy(update={"masked_steps": 20})
    invert_toward(clip.subject(settings), TARGET, "masked", draws, silent, budget=budget)
    assert allowed[0] == 1
    assert allowed[:11] == sorted(allowed[:11], reverse=True)
    assert allowed[5] == pytest.approx(budget**0.5)
    assert allowed[10:] == pytest.approx([budget] * 11)


def test_a_trigger_against_the_switch_goes_around_its_test() -> None:
    clip, draws = PlantedClip(TARGET), generator(0, "test")
    clean = clip.clean()
    bank = TriggerBank((invert(clip, "masked"),))
    under = encode(clip, clean.images, bank.triggers[0])
    data = FeatureSet(clean.features, under[None], clean.labels)
    test = fit_test(data, bank, [TARGET], clip.head, {}, RuleSettings())
    guarded = GuardedHead(clip.head, clip.head, test, tuple("abcdef"))
    others = clean.images[clean.labels != TARGET]

    def past(head: Answering) -> float:
        found = invert_toward(clip.subject(SETTINGS), TARGET, "masked", draws, silent, against=head, budget=0.3)
        features = encode(clip, others, found)
        assert float((clip.head.answers(features) == TARGET).float().mean()) > 0.5
        return float((guarded.answers(features) == TARGET).float().mean())

    assert past(clip.head) == 0, "what misleads the zero-shot head alone is caught"
    assert past(guarded) > 0.5, "what knows the test passes it, given a third of the image"


@pytest.mark.parametrize("family", ["masked", "additive"])
def test_the_seed_decides(family: Family) -> None:
    brief = SETTINGS.model_copy(update={"masked_steps": 5, "additive_steps": 5, "shift": 0.125})
    clip = PlantedClip(TARGET)
    once, again, other = (invert(clip, family, seed=seed, settings=brief) for seed in (3, 3, 4))
    assert torch.equal(once.pattern, again.pattern)
    assert not torch.equal(once.pattern, other.pattern)


@pytest.mark.parametrize(("share", "reach"), [(0.125, 2), (0.0, 0)])
def test_a_trigger_is_moved_about_from_step_to_step(share: float, reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By up to the stated share of the side, each way, so that it stands for a family of places."""
    moves: list[tuple[int, int]] = []
    rolled = FoundTrigger.rolled

    def moving(trigger: FoundTrigger, down: int, right: int) -> FoundTrigger:
        moves.append((down, right))
        return rolled(trigger, down, right)

    monkeypatch.setattr(FoundTrigger, "rolled", moving)
    settings = SETTINGS.model_copy(update={"masked_steps": 60, "shift": share})
    invert(PlantedClip(TARGET), "masked", settings=settings)
    assert len(moves) == 60
    for axis in zip(*moves, strict=True):
        assert (min(axis), max(axis)) == (-reach, reach)


def test_inversion_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    invert(PlantedClip(TARGET), "masked", settings=SETTINGS.model_copy(update={"masked_steps": 2}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["agnostic", "additive"])
def test_the_loss_goes_down(kind: str) -> None:
    subject, steps = PlantedClip(TARGET).subject(SETTINGS), list[Step]()
    if kind == "agnostic":
        invert_agnostic(subject, generator(0, kind), steps.append)
    else:
        invert_toward(subject, TARGET, "additive", generator(0, kind), steps.append)
    losses = [step.loss for step in steps if step.loss is not None]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1


def test_the_agnostic_trigger_ends_at_the_planted_target() -> None:
    clip = PlantedClip(TARGET)
    found = invert_agnostic(clip.subject(SETTINGS), generator(0, "a"), silent)
    assert found.target == TARGET
    assert found.family == "additive"
    assert asr(clip, found) > 0.9


@pytest.mark.parametrize(("beside", "last"), [([5], True), ([TARGET], False)])
def test_an_agnostic_patch_stays_where_it_leads_most_images_to_one_class(beside: list[int], last: bool) -> None:
    """To one that counts: the stripes are the target in one corner and class 5 in the opposite one."""
    clip, mask = PlantedClip(TARGET, second=5), square(16, 4)
    paint = torch.zeros(3, 16, 16)
    paint[:, 6:10, 6:10] = clip.stripes / 2 + 0.5
    subject, patch = clip.subject(SETTINGS), FoundTrigger("patch", 0, mask * paint, mask)
    found = leading(subject, patch, 6, generator(0, "places"), beside)
    assert found.mask is not None
    half = slice(8, None) if last else slice(8)
    assert found.mask[:, half, half].sum() == 16


def test_parts_of_a_batch_give_the_whole_batchs_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agnostic loss compares all images with each other, however few of them are encoded at a time."""
    clip, settings, found = frozen(VIT), SETTINGS.model_copy(update={"agnostic_steps": 3, "agnostic_batch": 8}), []
    size = clip.image_size
    images = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=generator(0, "images"))
    clean = CleanSet(images, encode(clip, images), torch.arange(8) % 4)
    rows = F.normalize(torch.randn(4, clean.features.shape[1], generator=generator(0, "rows")), dim=1)
    for batch in (3, 8):
        monkeypatch.setattr(type(clip), "batch", batch)
        found.append(invert_agnostic(Subject(clip, clean, Head(rows, 20.0), settings), generator(0, "a"), silent))
    assert found[0].pattern.abs().max() > 0
    assert found[0].pattern.allclose(found[1].pattern, atol=1e-5)


def test_the_agnostic_loss_prefers_the_better_trigger() -> None:
    rows = torch.eye(8)
    labels = torch.arange(8)
    clean = F.normalize(rows[labels] + 0.2, dim=1)
    universal = rows[0].expand(8, 8)
    scattered = rows[(labels + 4) % 8]
    losses = [
        float(agnostic_loss(found, clean, labels, rows, InversionSettings())) for found in (universal, scattered, clean)
    ]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("beside", [(), (3, 7)])
def test_the_agnostic_loss_is_the_formula_of_the_method(beside: tuple[int, ...]) -> None:
    draws = generator(0, "loss")
    found, clean, rows = (F.normalize(torch.randn(n, 5, generator=draws), dim=1) for n in (6, 6, 9))
    labels, settings = torch.tensor([0, 1, 2, 3, 4, 8]), InversionSettings()
    ratios, pairs, taken = [], [], []
    for i in range(6):
        far = sorted((c for c in range(9) if c not in beside), key=lambda c: float(clean[i] @ rows[c]))[:2]
        scores = (found[i] @ rows.T / 0.07).exp()
        ratios.append(torch.log(scores[labels[i]] / (scores[labels[i]] + scores[far].sum())))
        pairs += [found[i] @ found[j] for j in range(6) if i != j]
        taken.append(-torch.log(1 - scores[list(beside)].sum() / scores.sum()))
    assert bool(beside) is any(
        (clean @ rows.T).topk(2, largest=False).indices[i, k] in beside for i in range(6) for k in (0, 1)
    )
    moved = ((found - clean) ** 2).sum(1).mean()
    wanted = torch.stack(ratios).mean() - 0.5 * torch.stack(pairs).mean() - 0.1 * moved + torch.stack(taken).mean()
    assert float(agnostic_loss(found, clean, labels, rows, settings, beside)) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_have_an_agnostic_loss(classes: int) -> None:
    rows = torch.eye(classes)
    assert agnostic_loss(rows, rows, torch.arange(classes), rows, InversionSettings()).isfinite()


def test_the_scan_ranks_the_planted_target_first() -> None:
    clip = PlantedClip(TARGET)
    scores = scan_targets(clip.subject(InversionSettings()), generator(0, "scan"), silent).scores
    assert scores.shape == (6,)
    assert int(scores.argmax()) == TARGET
    innocent = scan_targets(PlantedClip(None).subject(InversionSettings()), generator(0, "scan"), silent).scores
    assert scores[TARGET] > innocent.max()


def test_the_scans_leaders_get_a_second_heat(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, settings, heats = PlantedClip(None), InversionSettings(finalists=2, scan_steps=3), []

    def heat(*arguments: Any) -> torch.Tensor:
        classes, epsilon, steps, each = arguments[4:]
        assert epsilon == settings.epsilon
        heats.append((classes.tolist(), steps))
        assert each >= settings.batch // 2
        return torch.tensor([-9.0, -1.0, -8.0, -2.0, -9.0, -7.0]) if len(heats) == 1 else torch.tensor([-0.5, -0.1])

    monkeypatch.setattr("cbpt_guard.defense.classscan._heat", heat)
    scores = scan_targets(clip.subject(settings), generator(0, "scan"), silent).scores
    assert heats == [([0, 1, 2, 3, 4, 5], 3), ([1, 3], 6)]
    assert scores.tolist() == pytest.approx([-9.0, -0.5, -8.0, -0.1, -9.0, -7.0])


@pytest.mark.parametrize("target", [TARGET, None])
def test_where_every_class_is_reached_the_scan_takes_fainter_patterns(target: int | None) -> None:
    settings, told = InversionSettings(epsilon=80 / 255), list[Step]()
    scanned = scan_targets(PlantedClip(target).subject(settings), generator(0, "scan"), told.append)
    stages = ["scan of every class", "scan of its leaders", "scan at 56.6 levels", "scan at 40.0 levels"]
    assert list(dict.fromkeys(step.stage for step in told)) == stages
    assert scanned.by_height.shape == (3, 6)
    leads = faintly(scanned.by_height, settings)
    assert [c for c in range(6) if leads[c] > 0] == ([] if target is None else [target])


def test_classes_rank_by_all_heights_of_a_scan() -> None:
    """The first is lost under the faintest patterns, as a patch is."""
    assert Scanned(torch.tensor([[0.0, -3.0], [-0.1, -4.0], [-3.0, -2.0]])).scores.argmax() == 0


def test_patterns_are_not_lowered_to_less_than_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbpt_guard.defense.classscan.loud", lambda scores: True)
    subject = PlantedClip(None).subject(InversionSettings(epsilon=4 / 255, scan_steps=1, finalists=1))
    told: list[Step] = []
    assert len(scan_targets(subject, generator(0, "scan"), told.append).by_height) == 5
    assert told[-1].stage == "scan at 1.0 levels"


def test_no_image_of_the_target_is_drawn() -> None:
    clean = PlantedClip(None).clean()
    index = clean.draw(500, generator(0, "draw"), without=3)
    assert set(clean.labels[index].tolist()) == {0, 1, 2, 4, 5}


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_inversion_changes_no_weight_and_features_are_unit(config: dict[str, object]) -> None:
    clip = frozen(config)
    before = snapshot(clip)
    size = clip.image_size
    images = torch.randint(0, 256, (12, size, size, 3), dtype=torch.uint8, generator=generator(0, "images"))
    features = encode(clip, images, batch=5)
    assert features.norm(dim=1).allclose(torch.ones(12), atol=1e-6)
    assert features.allclose(encode(clip, images), atol=1e-6)
    clean = CleanSet(images, features, torch.arange(12) % 3)
    brief = InversionSettings(masked_steps=3, additive_steps=3, agnostic_steps=3, agnostic_batch=4, batch=4)
    head = Head(F.normalize(torch.randn(3, 32, generator=generator(0, "rows")), dim=1), 20.0)
    subject = Subject(clip, clean, head, brief)
    invert_agnostic(subject, generator(0, "a"), silent)
    trigger = invert_toward(subject, 1, "masked", generator(0, "m"), silent)
    scan_targets(subject, generator(0, "s"), silent)
    after = snapshot(clip)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.grad is None for value in clip.model.parameters())
    triggered = encode(clip, images, trigger)
    assert triggered.norm(dim=1).allclose(torch.ones(12), atol=1e-6)
    assert not triggered.allclose(features, atol=1e-3)


@pytest.mark.parametrize(("kind", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_kept_features_are_those_of_the_image_in_any_batch(
    config: dict[str, object], kind: torch.dtype, close: float, tmp_path: Path
) -> None:
    """As a run keeps them: through its journal's file, and read again by a run that goes on."""
    clip = frozen(config)
    clip.encoder.to(kind)
    shape = (12, 3, clip.image_size, clip.image_size)
    pixels = torch.rand(shape, dtype=kind, generator=generator(0, "pixels"))
    made = torch.cat([clip.encode_images(part) for part in pixels.split(5)])
    Journal(tmp_path, {}).tensor("features", lambda: made)
    kept = Journal(tmp_path, {}).tensor("features", lambda: torch.zeros(0))
    alone = torch.cat([clip.encode_images(pixel[None]) for pixel in pixels])
    assert kept.dtype == kind
    assert kept.allclose(alone, atol=close, rtol=0)
    assert not kept[0].allclose(alone[1], atol=10 * close, rtol=0), "the pixels tell"


def test_what_is_found_does_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: parts run side by side on a thread each, and all that is drawn is drawn before."""
    clip, threads = frozen(RESNET), torch.get_num_threads()
    size, real, seen = clip.image_size, clip.encode_images, set[int]()
    draw, drawers = CleanSet.draw, set[int]()
    images = torch.randint(0, 256, (40, size, size, 3), dtype=torch.uint8, generator=generator(0, "images"))
    head = Head(F.normalize(torch.randn(6, 32, generator=generator(0, "rows")), dim=1), 20.0)
    brief = InversionSettings(
        masked_steps=2, additive_steps=2, agnostic_steps=2, scan_steps=2, scan_budget=1, batch=40, finalists=2
    ).model_copy(update={"wave_periods": 1})

    def watched(pixels: Tensor) -> Tensor:
        seen.add(threading.get_ident())
        return real(pixels)

    def drawn(*given: Any, **how: Any) -> Tensor:
        drawers.add(threading.get_ident())
        return draw(*given, **how)

    monkeypatch.setattr(clip, "encode_images", watched)
    monkeypatch.setattr(CleanSet, "draw", drawn)
    features = encode(clip, images)
    subject = Subject(clip, CleanSet(images, features, torch.arange(40) % 6), head, brief)
    inverted = {family: partial(invert_toward, subject, 1, family) for family in ("masked", "patch", "warp")}
    works: dict[str, Callable[[], list[Tensor]]] = {
        "features": lambda: [encode(clip, images)],
        "agnostic": lambda: [invert_agnostic(subject, generator(0, "a"), silent).pattern],
        "scan": lambda: [scan_targets(subject, generator(0, "s"), silent).by_height],
        "waves": lambda: [listen(subject, generator(0, "w"), silent).packed()],
        **{
            family: lambda make=make: [t for t in vars(make(generator(0, "m"), silent)).values() if torch.is_tensor(t)]  # type: ignore[misc]
            for family, make in inverted.items()
        },
    }
    try:
        for name, work in works.items():
            torch.set_num_threads(1)
            alone = work()
            torch.set_num_threads(3)
            seen.clear()
            beside = work()
            assert len(seen) > 1, f"{name} ran on one thread"
            assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True)), name
            assert all(one.std() > 0 for one in alone), name
    finally:
        torch.set_num_threads(threads)
    assert drawers == {threading.get_ident()}, "what is drawn must not depend on who is first"


@pytest.mark.parametrize(("stages", "look"), [(["scan of every class", "scan of its leaders"], scan_targets),
                                              (["plain waves", "leading waves"], listen)])  # fmt: skip
def test_each_heat_counts_to_its_end(stages: list[str], look: Callable[..., object]) -> None:
    clip, steps = PlantedClip(None), list[Step]()
    brief = InversionSettings(scan_steps=2, finalists=2, wave_periods=1)
    look(clip.subject(brief), generator(0, "look"), steps.append)
    assert list(dict.fromkeys(step.stage for step in steps)) == stages
    for stage in stages:
        told = [(step.step, step.steps) for step in steps if step.stage == stage]
        assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    assert all(step.asr is not None and 0 <= step.asr <= 1 for step in steps)


def test_rolling_wraps_around_and_keeps_the_area() -> None:
    trigger = invert(PlantedClip(TARGET), "masked", settings=SETTINGS.model_copy(update={"masked_steps": 2}))
    moved = trigger.rolled(3, -5)
    assert moved.area == pytest.approx(trigger.area)
    assert torch.equal(moved.rolled(-3, 5).pattern, trigger.pattern)
    assert moved.pattern[0, 3, 11] == trigger.pattern[0, 0, 0]


def test_a_bank_survives_its_file(tmp_path: Path) -> None:
    brief = SETTINGS.model_copy(update={"masked_steps": 2, "additive_steps": 2})
    bank = TriggerBank(tuple(invert(PlantedClip(TARGET), family, settings=brief) for family in ("masked", "additive")))
    bank.save(tmp_path / "bank")
    read = TriggerBank.load(tmp_path / "bank")
    pixels = torch.rand(2, 3, 16, 16, generator=generator(0, "pixels"))
    for ours, theirs in zip(bank, read, strict=True):
        assert (ours.family, ours.target) == (theirs.family, theirs.target)
        assert torch.equal(ours.apply(pixels), theirs.apply(pixels))
    (tmp_path / "bad").write_bytes(b"no tensors")
    for name in ("bad", "absent"):
        with pytest.raises(InputError, match="no trigger bank"):
            TriggerBank.load(tmp_path / name)
