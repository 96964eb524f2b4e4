"""The verdict: measured through the rule, judged at stated bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cbpt_guard.defense.accuracy import check_accuracy, clean_accuracy
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.head import GuardedHead, Head, TriggerTest
from cbpt_guard.defense.record import ClassMetrics, Origin, RunMetrics, TriggerMetrics
from cbpt_guard.defense.settings import VerdictSettings
from cbpt_guard.defense.stage2 import look_at
from cbpt_guard.defense.tuning import FeatureSet
from cbpt_guard.defense.verdict import Attacked, judge, measure
from cbpt_guard.errors import InputError

BOUNDS = VerdictSettings(found_asr=0.05, fresh_asr=0.03, accuracy_loss=0.02)
ROWS = torch.eye(3)


def trigger(asr: float, origin: Origin = "found") -> TriggerMetrics:
    return TriggerMetrics(
        origin=origin, family="masked", target="b", images=100, asr_before=1.0, asr_after=asr, asr_prompts=0.5,
        pa_before=None, pa_after=None, pa_prompts=None,
    )  # fmt: skip


def run(*triggers: TriggerMetrics, before: float = 0.54, after: float = 0.54, held_out: bool = True) -> RunMetrics:
    """Without a fresh trigger nothing is shown, so where none is given there is one that was stopped."""
    fresh = any(one.origin == "fresh" for one in triggers)
    triggers = triggers if fresh else (*triggers, trigger(0.0, "fresh"))
    return RunMetrics(
        images=100, held_out=held_out, clean_accuracy_before=before, clean_accuracy_after=after,
        clean_accuracy_prompts=0.5, flagged_clean=0.0, flagged_found=1.0, triggers=triggers, classes=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "name", "reason"),
    [
        (run(trigger(0.0)), "guarded", "on 100 held-out images the worst trigger succeeds on 0.0 %"),
        (run(trigger(0.05), trigger(0.03, "fresh")), "guarded", "succeeds on 5.0 %"),
        (run(trigger(0.0501)), "not guarded", "a found masked trigger toward 'b' still succeeds on 5.0 % of images"),
        (run(trigger(0.0), trigger(0.0301, "fresh")), "not guarded", "a fresh masked trigger"),
        (run(trigger(0.05, "observed")), "guarded", "succeeds on 5.0 %"),
        (run(trigger(0.06, "observed")), "not guarded", "observed masked trigger toward 'b' still succeeds on 6.0 %"),
        (run(trigger(0.05, "beside")), "guarded", "succeeds on 5.0 %"),
        (run(trigger(0.06, "beside")), "not guarded", "a common edit as a masked trigger toward 'b' still succeeds"),
        (run(trigger(0.0), before=0.54, after=0.52), "guarded", "went from 54.0 % to 52.0 %"),
        (run(trigger(0.0), before=0.9, after=0.88), "guarded", "went from 90.0 % to 88.0 %"),
        (run(trigger(0.0), before=0.54, after=0.519), "not guarded", "clean accuracy fell by 2.1 points"),
        (run(trigger(0.0), after=0.6), "guarded", "went from 54.0 % to 60.0 %"),
        (run(trigger(0.0), held_out=False), "unverified", "no image was held out"),
        (run(trigger(0.9), held_out=False), "not guarded", "still succeeds on 90.0 %"),
    ],
)
def test_each_bound(metrics: RunMetrics, name: str, reason: str) -> None:
    verdict = judge(metrics, ["b"], BOUNDS, keeps_accuracy=True)
    assert verdict.name == name
    assert len(verdict.reasons) == 1
    assert reason in verdict.reasons[0]


def test_a_guarded_verdict_says_what_the_tuned_head_alone_is_worth() -> None:
    (reason,) = judge(run(trigger(0.0)), ["b"], BOUNDS, keeps_accuracy=True).reasons
    assert "the tuned prompts without the test for triggered images would let 50.0 % through" in reason
    good = [trigger(0.0, origin).model_copy(update={"asr_prompts": 0.05}) for origin in ("found", "fresh")]
    (reason,) = judge(run(*good), ["b"], BOUNDS, keeps_accuracy=True).reasons
    assert "tuned prompts" not in reason


def test_all_that_failed_is_named() -> None:
    metrics = run(trigger(0.5), trigger(0.4, "fresh"), before=0.9, after=0.5)
    verdict = judge(metrics, ["b"], BOUNDS, keeps_accuracy=False)
    assert verdict.name == "not guarded"
    assert len(verdict.reasons) == 4
    assert sum("was not kept" in reason for reason in verdict.reasons) == 1


@pytest.mark.parametrize(("reached", "name"), [(0.49, "unverified"), (0.5, "guarded")])
def test_fresh_triggers_that_hardly_move_the_undefended_model_show_no_success(reached: float, name: str) -> None:
    weak = trigger(0.0, "fresh").model_copy(update={"asr_before": 0.007})
    best = weak.model_copy(update={"asr_before": reached})
    verdict = judge(run(trigger(0.0), best, weak), ["b"], BOUNDS, keeps_accuracy=True)
    assert verdict.name == name
    assert ("fresh triggers toward 'b' reach no more than 49.0 % of the images" in verdict.reasons[0]) is (
        name == "unverified"
    )
    other = trigger(0.0, "fresh").model_copy(update={"target": "c"})
    assert judge(run(best, other), ["b", "c"], BOUNDS, keeps_accuracy=True).name == name
    unmet = judge(run(best), ["b", "d"], BOUNDS, keeps_accuracy=True)
    assert unmet.name == "unverified"
    if name == "guarded":
        assert "fresh triggers toward 'd' reach no more than 0.0 %" in unmet.reasons[0], "it met none at all"
    surviving = trigger(0.9, "fresh").model_copy(update={"asr_before": 0.4})
    assert judge(run(surviving), ["b"], BOUNDS, keeps_accuracy=True).name == "not guarded"


def test_a_guard_that_does_not_keep_the_zero_shot_accuracy_is_not_guarded() -> None:
    assert judge(run(trigger(0.0)), ["b"], BOUNDS, keeps_accuracy=False).name == "not guarded"


@pytest.mark.parametrize(
    ("flagged", "images", "verdict"),
    [(0.01, 200, "guarded"), (0.015, 200, "not guarded"), (1 / 30, 30, "guarded"), (2 / 30, 30, "not guarded")],
)
def test_flags_on_clean_images_are_bounded_beyond_one_image(flagged: float, images: int, verdict: str) -> None:
    metrics = run(trigger(0.0)).model_copy(update={"flagged_clean": flagged, "images": images})
    assert judge(metrics, ["b"], BOUNDS, keeps_accuracy=True).name == verdict


def test_an_accuracy_may_fall_by_one_image_of_few() -> None:
    """The one flagged image counts as just one, too: 1 / 30 is a rounding error larger in float32."""
    one = run(trigger(0.0), before=15 / 30, after=14 / 30).model_copy(update={"images": 30})
    two = one.model_copy(update={"clean_accuracy_after": 13 / 30})
    assert judge(one, ["b"], BOUNDS, keeps_accuracy=True).name == "guarded"
    assert judge(two, ["b"], BOUNDS, keeps_accuracy=True).name == "not guarded"
    flagged = torch.cat([near([1], [0], 0.99), near([0] * 29, [1] * 29, 0.9)])
    metrics = measure(guarded(), flagged, torch.zeros(30, dtype=torch.long), [], held_out=True)
    assert metrics.flagged_clean == 1 / 30


@pytest.mark.parametrize(
    ("label", "images", "after", "verdict"),
    [
        ("b", 3, 2 / 3, "guarded"),
        ("b", 3, 1 / 3, "not guarded"),
        ("b", 100, 0.95, "guarded"),
        ("b", 100, 0.94, "not guarded"),
        ("c", 3, 1 / 3, "guarded"),
    ],
)
def test_a_guard_must_not_give_the_suspected_class_up(label: str, images: int, after: float, verdict: str) -> None:
    row = ClassMetrics(label=label, images=images, before=1.0, after=after, after_prompts=after)
    metrics = run(trigger(0.0)).model_copy(update={"classes": (row,)})
    assert judge(metrics, ["b"], BOUNDS, keeps_accuracy=True).name == verdict


def test_a_suspected_class_without_a_held_out_image_leaves_the_run_unverified() -> None:
    rows = tuple(
        ClassMetrics(label=label, images=images, before=1.0 if images else None, after=1.0 if images else None,
                     after_prompts=1.0 if images else None)
        for label, images in (("a", 3), ("b", 0))
    )  # fmt: skip
    fresh = [trigger(0.0, "fresh").model_copy(update={"target": label}) for label in "ab"]
    metrics = run(*fresh).model_copy(update={"classes": rows})
    verdict = judge(metrics, ["b"], BOUNDS, keeps_accuracy=True)
    assert verdict.name == "unverified"
    assert "no image of the suspected 'b' was held out" in verdict.reasons[0]
    assert judge(metrics, ["a"], BOUNDS, keeps_accuracy=True).name == "guarded"


def test_a_guarded_verdict_says_what_no_bound_is_set_on() -> None:
    """How many answers under triggers are right, how many are one wrong class, and the target's few clean images."""
    row = ClassMetrics(label="b", images=3, before=1.0, after=2 / 3, after_prompts=0.0)
    told = [
        trigger(0.0, origin).model_copy(update={"pa_after": pa, "max_share_after": share})
        for origin, pa, share in (("found", 0.3, 0.07), ("fresh", 0.25, 0.055), ("observed", None, None))
    ]
    metrics = run(*told).model_copy(update={"classes": (row, row.model_copy(update={"label": "c"}))})
    (reason,) = judge(metrics, ["b"], BOUNDS, keeps_accuracy=True).reasons
    assert "under triggers 25.0 % or more are answered rightly (PA); 7.0 % or fewer with one and the same" in reason
    assert "of 3 clean images of the suspected 'b' 2 are recognised, 3 before" in reason
    assert "'c'" not in reason


def test_where_nothing_stands_out_nothing_is_claimed() -> None:
    verdict = judge(run(trigger(0.0)), [], BOUNDS, keeps_accuracy=True)
    assert verdict.name == "unverified"
    assert "no class stands out" in verdict.reasons[0]


def guarded(*, suspect: bool = True) -> GuardedHead:
    test = TriggerTest.none(3, 3)
    if suspect:
        test.directions[1], test.thresholds[1] = ROWS[1], 0.95
    return GuardedHead(Head(ROWS, 10.0), Head(ROWS, 10.0), test, ("a", "b", "c"))


def near(index: list[int], second: list[int], cosine: float) -> Tensor:
    """Unit features at `cosine` to one row, the rest along another."""
    return cosine * ROWS[index] + (1 - cosine**2) ** 0.5 * ROWS[second]


LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
CLEAN = near([0, 0, 1, 1, 2, 0], [1, 1, 0, 0, 0, 2], 0.9)
"""The last image, of class 2, is answered 0."""
CAUGHT = near([1] * 6, [0, 0, 0, 0, 2, 2], 0.99)
MISSED = near([1] * 6, [0, 0, 0, 0, 2, 2], 0.9)


def test_measured_by_hand() -> None:
    attacks = [
        Attacked("found", "masked", 1, CAUGHT, LABELS),
        Attacked("fresh", "masked", 1, torch.cat([CAUGHT[:5], MISSED[5:]]), LABELS),
        Attacked("observed", "unknown", 1, torch.cat([CAUGHT[:3], MISSED[:1]]), None),
    ]
    metrics = measure(guarded(), CLEAN, LABELS, attacks, held_out=True)
    assert metrics.clean_accuracy_before == metrics.clean_accuracy_after == pytest.approx(5 / 6)
    assert (metrics.flagged_clean, metrics.flagged_found) == (0.0, 1.0)
    found, fresh, observed = metrics.triggers
    assert (found.asr_before, found.asr_after, found.pa_before, found.pa_after) == (1.0, 0.0, 0.0, 1.0)
    assert found.asr_prompts == 1.0, "the prompts alone are the original head here"
    assert found.target == "b"
    assert (found.max_share_before, found.max_share_after) == (1.0, 4 / 6), "all 'b', then four times 'a'"
    assert (fresh.asr_after, fresh.pa_after) == (0.25, 0.75), "of the four images of other classes"
    assert (observed.asr_before, observed.asr_after, observed.pa_after) == (1.0, 0.25, None)
    assert [item.before for item in metrics.classes] == [1.0, 1.0, 0.5]
    assert [item.images for item in metrics.classes] == [2, 2, 2]


def test_flags_are_told_of_the_trigger_that_the_test_misses_most_and_prompts_count_by_themselves() -> None:
    attacks = [Attacked("found", "masked", 1, features, LABELS) for features in (CAUGHT, MISSED, CAUGHT)]
    turned = Head(ROWS.roll(1, 0), 10.0)
    metrics = measure(replace(guarded(), prompts=turned), CLEAN, LABELS, attacks, held_out=True)
    assert metrics.flagged_found == 0.0
    edit = Attacked("beside", "warp", 1, MISSED, LABELS)
    assert measure(guarded(), CLEAN, LABELS, [attacks[0], edit], held_out=True).flagged_found == 1.0, "of the bank"
    assert metrics.clean_accuracy_prompts == 0.0, "turned rows answer every image with its neighbour"
    assert metrics.clean_accuracy_after == pytest.approx(5 / 6)


def test_a_class_without_held_out_images_has_no_recall() -> None:
    keep = LABELS != 1
    metrics = measure(guarded(), CLEAN[keep], LABELS[keep], [], held_out=True)
    assert metrics.classes[1].before is None
    assert metrics.flagged_found is None


def test_an_epoch_is_seen_by_its_worst_trigger() -> None:
    bank = TriggerBank(tuple(FoundTrigger("additive", 1, torch.zeros(3, 2, 2), None) for _ in range(2)))
    unseen = FeatureSet(CLEAN, torch.stack([CAUGHT, MISSED]), LABELS)
    epoch = look_at(guarded(), 4, ROWS, torch.zeros(1), unseen, bank)
    assert (epoch.number, epoch.found_asr, epoch.poisoned_accuracy) == (4, 1.0, 0.5)
    assert epoch.clean_accuracy == pytest.approx(clean_accuracy(10 * CLEAN @ ROWS.T, LABELS))


def accurate(right: int, count: int, classes: int = 4) -> tuple[Head, Tensor, LabelledImages]:
    labels = torch.arange(count) % classes
    answers = torch.where(torch.arange(count) < right, labels, (labels + 1) % classes)
    rows = torch.eye(classes)
    names = tuple("abcdefghij"[:classes])
    return Head(rows, 10.0), rows[answers], LabelledImages(torch.zeros(count, 1, 1, 3), labels, names, ())


@pytest.mark.parametrize(("right", "warnings"), [(400, 0), (300, 0), (299, 1), (118, 1)])
def test_an_accuracy_under_three_times_chance_warns(right: int, warnings: int) -> None:
    """Chance is 100 of 400, and two standard errors above it 117.3."""
    assert len(check_accuracy(*accurate(right, 400))) == warnings


@pytest.mark.parametrize(("right", "classes", "warnings"), [(301, 2, 0), (299, 2, 1), (267, 3, 0), (266, 3, 1)])
def test_where_three_times_chance_is_out_of_reach_halfway_to_perfect_counts(
    right: int, classes: int, warnings: int
) -> None:
    assert len(check_accuracy(*accurate(right, 400, classes))) == warnings


def test_a_model_that_answers_all_alike_is_refused_however_often_it_is_right() -> None:
    """Of images of which four fifths are of one class, answering that one alone is right that often."""
    labels = torch.tensor([0] * 80 + [1] * 20)
    data = LabelledImages(torch.zeros(100, 1, 1, 3), labels, ("a", "b"), ())
    constant, one_differs = torch.eye(2)[[0] * 100], torch.eye(2)[[0] * 99 + [1]]
    with pytest.raises(InputError, match=r"answers every clean image with 'a'\. Class names, tokenizer"):
        check_accuracy(Head(torch.eye(2), 10.0), constant, data)
    check_accuracy(Head(torch.eye(2), 10.0), one_differs, data)


@pytest.mark.parametrize("right", [117, 100, 0])
def test_an_accuracy_not_clearly_above_chance_stops(right: int) -> None:
    with pytest.raises(InputError, match=r"chance is 25\.0 %\. Class names, tokenizer or preprocessing"):
        check_accuracy(*accurate(right, 400))


def test_of_very_few_images_all_right_is_above_chance() -> None:
    """Two classes of two images: two standard errors above chance is 100 %."""
    check_accuracy(*accurate(4, 4, classes=2))
    with pytest.raises(InputError, match="chance is 50"):
        check_accuracy(*accurate(3, 4, classes=2))
