"""The rule's test: fitted to features whose truth is known by construction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.flag import Direction, fit_direction, fit_test
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.settings import RuleSettings
from cbpt_guard.defense.tuning import FeatureSet

C, E, TARGET = 6, 24, 2
ROWS = F.normalize(torch.eye(C, E) + 0.2, dim=1)
AWAY = F.normalize(torch.ones(E), dim=0)
"""Where the trigger puts images, beyond the target's text."""


def images(each: int, spread: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(C).repeat_interleave(each)
    noise = spread * torch.randn(len(labels), E, generator=generator(seed, "clean"))
    return F.normalize(ROWS[labels] + noise, dim=1), labels


def attacked(count: int, shift: float = 0.8, spread: float = 0.05, seed: int = 0) -> Tensor:
    noise = spread * torch.randn(count, E, generator=generator(seed, "found"))
    return F.normalize(ROWS[TARGET] + shift * AWAY + noise, dim=1)


def fitted(clean: Tensor, labels: Tensor, found: Tensor, deviations: float = 3.0) -> Direction:
    return fit_direction(clean, labels, TARGET, ROWS[TARGET], found, deviations)


def fires(fit: Direction, features: Tensor) -> float:
    return float((features @ fit.direction > fit.threshold).float().mean())


def test_it_separates_unseen_images_of_both_sides() -> None:
    fit = fitted(*images(20), attacked(60))
    clean, labels = images(200, seed=1)
    assert fit.separation > 3
    assert fires(fit, clean[labels == TARGET]) <= 0.01
    assert fires(fit, attacked(500, seed=1)) >= 0.99
    assert fit.direction.norm() == pytest.approx(1, abs=1e-6)


def test_the_scatter_decides_where_it_is_large() -> None:
    """Along the trigger's own shift the classes scatter widely; the discriminant finds the narrow part of it."""
    wide = F.normalize(torch.eye(E)[8], dim=0)
    shift = wide + torch.eye(E)[9]
    draws = generator(0, "wide")
    labels = torch.arange(C).repeat_interleave(60)
    clean = ROWS[labels] + torch.randn(len(labels), 1, generator=draws) * wide
    clean = clean + 0.05 * torch.randn(clean.shape, generator=draws)
    found = ROWS[TARGET] + shift + torch.randn(60, 1, generator=draws) * wide
    found = found + 0.05 * torch.randn(found.shape, generator=draws)
    fit = fitted(clean, labels, found)
    naive = F.normalize(shift, dim=0)
    assert abs(fit.direction @ wide) < 0.2
    low, high = clean[labels == TARGET] @ naive, found @ naive
    assert fit.separation > 3 * float((high.mean() - low.mean()) / (low.std() + high.std()))


@pytest.mark.parametrize("deviations", [1.0, 2.0, 3.0])
def test_the_threshold_lies_the_stated_deviations_above_left_out_images(deviations: float) -> None:
    (clean, labels), found = images(12), attacked(60, shift=3.0)
    fit = fitted(clean, labels, found, deviations)
    assert fit.separation > deviations, "the equal point does not bind here"
    within = torch.cat([clean - torch.stack([clean[labels == c].mean(0) for c in labels]), found - found.mean(0)])
    scores = []
    own = clean[labels == TARGET]
    from sklearn.covariance import LedoitWolf

    precision = torch.linalg.inv(
        torch.from_numpy(LedoitWolf(assume_centered=True).fit(within.double().numpy()).covariance_)
    )
    for i in range(len(own)):
        rest = torch.cat([own[:i], own[i + 1 :]]).double()
        direction = F.normalize(precision @ (found.double().mean(0) - rest.mean(0)), dim=0)
        scores.append(float(own[i].double() @ direction))
    left_out = torch.tensor(scores)
    wanted = float(left_out.mean() + deviations * left_out.std())
    assert fit.threshold == pytest.approx(wanted, abs=1e-6)
    assert fires(fit, own) <= {1.0: 0.25, 2.0: 0.1, 3.0: 0.0}[deviations]


def test_the_threshold_is_never_past_the_equally_improbable_point() -> None:
    (clean, labels), found = images(12), attacked(60, shift=0.25)
    generous, modest = fitted(clean, labels, found, 50.0), fitted(clean, labels, found, 0.5)
    scores = found @ generous.direction
    equal = float(scores.mean() - generous.separation * scores.std())
    assert generous.threshold == pytest.approx(equal, abs=1e-5)
    assert modest.threshold < generous.threshold
    assert fires(generous, found) > 0.5


@pytest.mark.parametrize("own", [0, 1, 2])
def test_few_images_of_the_target_are_enough(own: int) -> None:
    clean, labels = images(15)
    keep = torch.cat([(labels != TARGET).nonzero()[:, 0], (labels == TARGET).nonzero()[:own, 0]])
    fit = fitted(clean[keep], labels[keep], attacked(60))
    assert torch.isfinite(fit.direction).all()
    unseen, unseen_labels = images(100, seed=1)
    assert fit.separation > 1
    assert fires(fit, unseen[unseen_labels == TARGET]) <= 0.05
    assert fires(fit, attacked(300, seed=1)) >= 0.95


@pytest.mark.parametrize("own", [0, 1])
def test_one_image_a_class_is_enough(own: int) -> None:
    unseen, unseen_labels = images(100, seed=99)
    alarms, found = [], []
    for seed in range(10):
        clean, labels = images(1, seed=seed)
        keep = (labels != TARGET) | (torch.tensor(own) > 0)
        fit = fitted(clean[keep], labels[keep], attacked(30))
        alarms.append(fires(fit, unseen[unseen_labels == TARGET]))
        found.append(fires(fit, attacked(300, seed=99)))
    assert sum(alarms) / 10 <= 0.1
    assert sum(found) / 10 >= 0.95


@pytest.mark.parametrize("own", [2, 3])
def test_the_deviation_of_two_images_is_not_believed(own: int) -> None:
    unseen, unseen_labels = images(100, seed=99)
    alarms = []
    for seed in range(10):
        clean, labels = images(15, seed=seed)
        keep = torch.cat([(labels != TARGET).nonzero()[:, 0], (labels == TARGET).nonzero()[:own, 0]])
        alarms.append(fires(fitted(clean[keep], labels[keep], attacked(60)), unseen[unseen_labels == TARGET]))
    assert sum(alarms) / 10 <= 0.05
    assert max(alarms) <= 0.3


def test_few_images_of_every_class_do_not_give_the_target_up() -> None:
    """In many dimensions a fitted direction turns away from what few images scatter, and flags the next ones."""
    classes, width, each = 60, 160, 3
    rows = F.normalize(torch.randn(classes, width, generator=generator(0, "rows")), dim=1)
    away = F.normalize(torch.randn(width, generator=generator(0, "away")), dim=0)

    def drawn(labels: Tensor, shift: float, seed: int, purpose: str) -> Tensor:
        noise = 0.08 * torch.randn(len(labels), width, generator=generator(seed, purpose))
        return F.normalize(rows[labels] + shift * away + noise, dim=1)

    unseen = drawn(torch.full((200,), TARGET), 0.0, 99, "unseen")
    flagged, let_through = [], []
    for seed in range(8):
        labels = torch.arange(classes).repeat_interleave(each)
        clean = drawn(labels, 0.0, seed, "clean")
        found = drawn(torch.full((150,), TARGET), 0.7, seed, "found")
        fit = fit_direction(clean, labels, TARGET, rows[TARGET], found, 2.0)
        flagged.append(fires(fit, unseen))
        let_through.append(1 - fires(fit, found))
    assert sum(flagged) / len(flagged) <= 0.045
    assert sum(let_through) / len(let_through) <= 0.01


def test_images_alone_in_their_class_say_nothing_of_scatter() -> None:
    (clean, labels), found = images(12), attacked(40)
    alone = F.normalize(torch.randn(50, E, generator=generator(0, "alone")), dim=1)
    more = fitted(torch.cat([clean, alone]), torch.cat([labels, C + torch.arange(50)]), found)
    few = fitted(clean, labels, found)
    assert torch.equal(more.direction, few.direction)
    assert more.threshold == few.threshold


def test_the_order_of_images_does_not_matter() -> None:
    (clean, labels), found = images(10), attacked(40)
    order = torch.randperm(len(labels), generator=generator(0, "order"))
    one, two = fitted(clean, labels, found), fitted(clean[order], labels[order], found.flip(0))
    assert torch.allclose(one.direction, two.direction, atol=1e-5)
    assert one.threshold == pytest.approx(two.threshold, abs=1e-5)


def bank_and_data(targets: list[int]) -> tuple[TriggerBank, FeatureSet]:
    clean, labels = images(10)
    triggers = tuple(FoundTrigger("additive", target, torch.zeros(3, 2, 2), None) for target in targets)
    noise = 0.05 * torch.randn(len(targets), len(labels), E, generator=generator(0, "bank"))
    moved = F.normalize(torch.stack([ROWS[target] + 0.8 * AWAY for target in targets])[:, None] + noise, dim=2)
    return TriggerBank(triggers), FeatureSet(clean, moved, labels)


def test_each_suspect_has_a_test_of_its_own_and_nobody_else() -> None:
    bank, data = bank_and_data([TARGET, 4, TARGET])
    original = Head(ROWS, 50.0)
    test = fit_test(data, bank, [TARGET, 4], original, {}, RuleSettings())
    assert torch.isfinite(test.thresholds).nonzero().flatten().tolist() == [TARGET, 4]
    assert test.directions[[0, 1, 3, 5]].abs().max() == 0
    answers = original.logits(data.clean).argmax(1)
    assert test.fires(data.clean, answers).float().mean() <= 0.02
    for triggered in data.triggered:
        assert test.fires(triggered, original.logits(triggered).argmax(1)).float().mean() >= 0.95


def test_a_suspect_whose_triggers_never_succeed_has_no_test() -> None:
    bank, data = bank_and_data([TARGET])
    elsewhere = FeatureSet(data.clean, F.normalize(ROWS[5] + 0 * data.triggered, dim=2), data.labels)
    test = fit_test(elsewhere, bank, [TARGET], Head(ROWS, 50.0), {}, RuleSettings())
    assert torch.isinf(test.thresholds).all()


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("deviations", [0.5, 2.0])
def test_a_target_with_few_images_is_tested_around_its_text_moved_as_images_are(own: int, deviations: float) -> None:
    """By hand: what stands in, which images count as attacked, and the setting that is used."""
    bank, data = bank_and_data([TARGET, 4])
    moved = data.triggered.clone()
    moved[0, 0] = ROWS[0]  # one image that the trigger does not move
    keep = torch.cat([(data.labels != TARGET).nonzero()[:, 0], (data.labels == TARGET).nonzero()[:own, 0]])
    few = FeatureSet(data.clean, moved, data.labels).part(keep)
    original = Head(ROWS, 50.0)
    test = fit_test(few, bank, [TARGET], original, {}, RuleSettings(clean_deviations=deviations))
    gap = sum(few.clean[i] - ROWS[few.labels[i]] for i in range(len(keep))) / len(keep)
    others = [i for i in range(len(keep)) if few.labels[i] != TARGET]
    attacked = torch.stack(
        [few.triggered[0, i] for i in others if int((few.triggered[0, i] @ ROWS.T).argmax()) == TARGET]
    )
    assert len(attacked) == len(others) - 1
    by_hand = fit_direction(few.clean, few.labels, TARGET, ROWS[TARGET] + gap, attacked, deviations)
    assert torch.allclose(test.directions[TARGET], by_hand.direction, atol=1e-5)
    assert test.thresholds[TARGET].item() == pytest.approx(by_hand.threshold, abs=1e-5)


def test_one_image_under_the_trigger_is_too_few_for_a_test() -> None:
    bank, data = bank_and_data([TARGET])
    moved = ROWS[data.labels][None].clone()
    for reached, fitted_ in ((1, False), (2, True)):
        moved[0, :reached] = data.triggered[0, :reached]
        test = fit_test(
            FeatureSet(data.clean, moved, data.labels), bank, [TARGET], Head(ROWS, 50.0), {}, RuleSettings()
        )
        assert bool(torch.isfinite(test.thresholds[TARGET])) is fitted_


@pytest.mark.parametrize("apart", [0.0, 1e-4])
def test_hardly_any_scatter_still_gives_a_direction(apart: float) -> None:
    """One image a class of two, under triggers that do nearly the same: nothing, or two images, tell the scatter."""
    clean = F.normalize(torch.stack([ROWS[0] + 0.3 * ROWS[3], ROWS[1] + 0.3 * ROWS[4]]), dim=1)
    under = F.normalize(ROWS[1] + 0.8 * AWAY + apart * torch.stack([ROWS[2], -ROWS[2]]), dim=1)
    bank = TriggerBank(tuple(FoundTrigger(name, 1, torch.zeros(3, 2, 2), None) for name in ("warp", "additive")))
    data = FeatureSet(clean, under[:, None].expand(-1, 2, -1), torch.tensor([0, 1]))
    test = fit_test(data, bank, [1], Head(ROWS[:2], 50.0), {}, RuleSettings())
    assert test.thresholds[1].isfinite()
    assert float(test.directions[1].norm()) == pytest.approx(1, abs=1e-5)
    assert test.fires(under, torch.ones(2, dtype=torch.long)).all()
    assert not test.fires(clean, torch.tensor([0, 1])).any()


def test_observed_attack_images_can_fit_alone() -> None:
    bank, data = bank_and_data([4])
    observed = {TARGET: attacked(30)}
    test = fit_test(data, bank, [TARGET], Head(ROWS, 50.0), observed, RuleSettings())
    assert torch.isfinite(test.thresholds[TARGET])
    flagged = test.fires(attacked(200, seed=1), torch.full((200,), TARGET))
    assert flagged.float().mean() >= 0.95


@pytest.mark.parametrize(
    ("tried", "lowest", "threshold"),
    [
        (100, 0.3, 0.4),
        (149, 0.3, 0.4),
        (150, 0.3, 0.5),
        (99, 0.3, 0.35),
        (9, 0.3, 0.35),
        (0, 0.3, 0.35),
        (9, 0.1, 0.35),
    ],
)
def test_a_threshold_is_lowered_until_few_images_lie_below_it(tried: int, lowest: float, threshold: float) -> None:
    """Of 100 images two may, of fewer than that one."""
    fit = Direction(torch.eye(E)[0], threshold=0.5, least=0.2, separation=9.0)
    under = torch.eye(E)[0] * torch.tensor([0.9, 0.4, lowest, 0.35, 0.8])[:, None]
    lowered = fit.above_few(under, tried)
    assert lowered == pytest.approx(threshold, abs=1e-5)
    assert int((under @ fit.direction <= torch.tensor(lowered)).sum()) <= max(int(0.02 * tried), 1)
    assert fit.above_few(under[:0], tried) == 0.5


def test_a_threshold_is_lowered_as_far_as_it_may_be_even_if_that_is_not_enough() -> None:
    fit = Direction(torch.eye(E)[0], threshold=0.5, least=0.2, separation=9.0)
    assert fit.above_few(torch.eye(E)[0] * torch.tensor([0.1, 0.15, 0.9])[:, None], 9) == 0.2


@pytest.mark.parametrize("deviations", [1.0, 3.0])
def test_the_threshold_may_be_lowered_to_half_of_its_deviations(deviations: float) -> None:
    (clean, labels), found = images(12), attacked(60, shift=3.0)
    fit, half = fitted(clean, labels, found, deviations), fitted(clean, labels, found, deviations / 2)
    assert fit.least == pytest.approx(half.threshold, abs=1e-9)
    fit = fitted(clean, labels, attacked(60, shift=0.25), 50.0)
    assert fit.least == fit.threshold, "neither goes past the equally improbable point"


EACH = 25
OTHERS = (C - 1) * EACH
"""Images of other classes: of 125 two may lie below a threshold, of all 150 three."""
ORIGINAL = Head(ROWS, 50.0)


def many(target: int, place: int = 0) -> tuple[FeatureSet, Tensor]:
    """Images with features under a trigger that all lie far past the threshold, and the numbers of other classes'."""
    clean, labels = images(EACH)
    noise = 0.05 * torch.randn(len(labels), E, generator=generator(place, "many"))
    under = F.normalize(ROWS[target] + 0.8 * AWAY + noise, dim=1)
    return FeatureSet(clean, under[None], labels), (labels != target).nonzero()[:, 0]


def low(under: Tensor, at: Tensor, near: int = TARGET) -> Tensor:
    """The same with the images `at` where class `near` has its own."""
    moved = under.clone()
    moved[at] = F.normalize(ROWS[near] + 0.1 * AWAY, dim=0)
    return moved


def lowered_by(beside: list[tuple[int, Tensor]]) -> tuple[bool, bool]:
    """Whether the thresholds of the target and of class 4 are lower with what is beside the bank."""
    data, _ = many(TARGET)
    both = FeatureSet(data.clean, torch.cat([data.triggered, many(4)[0].triggered]), data.labels)
    bank = TriggerBank(tuple(FoundTrigger("additive", target, torch.zeros(3, 2, 2), None) for target in (TARGET, 4)))
    usual = fit_test(both, bank, [TARGET, 4], ORIGINAL, {}, RuleSettings())
    test = fit_test(both, bank, [TARGET, 4], ORIGINAL, {}, RuleSettings(), beside)
    assert torch.equal(test.directions, usual.directions), "none is fitted to it"
    assert (test.thresholds <= usual.thresholds).all()
    return bool(test.thresholds[TARGET] < usual.thresholds[TARGET]), bool(test.thresholds[4] < usual.thresholds[4])


def test_what_the_test_would_miss_beside_the_bank_lowers_the_threshold_of_its_target() -> None:
    data, others = many(TARGET)
    under, own = data.triggered[0], (data.labels == TARGET).nonzero()[:, 0]
    assert lowered_by([]) == (False, False)
    assert lowered_by([(TARGET, low(under, others[:3]))]) == (True, False)
    assert lowered_by([(TARGET, under), (TARGET, low(under, others[:3]))]) == (True, False)
    assert lowered_by([(TARGET, low(under, others[:2])), (TARGET, low(under, others[2:4]))]) == (False, False)
    assert lowered_by([(TARGET, low(under, own[:3]))]) == (False, False), "the target's own images are no attack"
    assert lowered_by([(TARGET, low(under, others[:3], near=0))]) == (False, False), "these it does not lead there"
    assert lowered_by([(5, low(under, others[:3]))]) == (False, False), "who is not suspected has no test"


def lowered_in(missed: list[int], observed: int = 0) -> bool:
    """Whether a bank lowers the threshold that is fitted to it: of each of its triggers so many images lie low."""
    data, others = many(TARGET)
    under = [low(many(TARGET, place)[0].triggered[0], others[place : place + few]) for place, few in enumerate(missed)]
    bank = TriggerBank(tuple(FoundTrigger("additive", TARGET, torch.zeros(3, 2, 2), None) for _ in under))
    seen = low(attacked(50), torch.arange(observed))
    test = fit_test(
        FeatureSet(data.clean, torch.stack(under), data.labels),
        bank,
        [TARGET],
        ORIGINAL,
        {TARGET: seen},
        RuleSettings(),
    )
    answering = torch.cat([*(one[others] for one in under), seen])
    fit = fit_direction(data.clean, data.labels, TARGET, ROWS[TARGET], answering, 2.0)
    assert torch.equal(test.directions[TARGET], fit.direction)
    assert float(test.thresholds[TARGET]) >= fit.least - 1e-6
    return float(test.thresholds[TARGET]) < fit.threshold - 1e-6


def test_what_it_would_miss_of_its_own_bank_lowers_the_threshold_and_observed_images_do_not() -> None:
    assert not lowered_in([2, 2]), "each of its own"
    assert lowered_in([0, 3])
    assert lowered_in([3, 0])
    assert not lowered_in([0, 0], observed=20)


def test_with_nothing_of_a_bank_to_fit_to_there_is_no_test_whatever_lies_beside_it() -> None:
    data, _ = many(TARGET)
    beside = [(TARGET, data.triggered[0])]
    test = fit_test(
        FeatureSet(data.clean, data.clean[None], data.labels),
        bank_and_data([TARGET])[0],
        [TARGET],
        ORIGINAL,
        {},
        RuleSettings(),
        beside,
    )
    assert test.thresholds.isinf().all()
