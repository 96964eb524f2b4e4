"""What is counted, against cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import beta

from cbpt_guard.errors import InputError
from cbpt_guard.metrics import (
    Counts,
    attack_success_rate,
    bootstrap_interval,
    class_recall,
    clean_accuracy,
    count,
    exceeds,
    falls_beyond,
    largest_share,
    poisoned_accuracy,
    standard_error,
)

TARGET = 2
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2])
PREDICTED = np.array([0, 2, 1, 2, 0, 2, 2, 1])
NONE = np.array([], dtype=np.int64)
ONLY_TARGET = np.array([TARGET, TARGET])


def test_clean_accuracy_counts_every_image() -> None:
    assert clean_accuracy(PREDICTED, LABELS) == 4 / 8


def test_attack_success_leaves_images_of_the_target_out() -> None:
    assert attack_success_rate(PREDICTED, LABELS, TARGET) == 2 / 5
    flipped = np.where(LABELS == TARGET, 0, PREDICTED)
    assert attack_success_rate(flipped, LABELS, TARGET) == 2 / 5


def test_poisoned_accuracy_counts_the_images_that_attack_success_counts() -> None:
    assert poisoned_accuracy(PREDICTED, LABELS, TARGET) == 2 / 5
    flipped = np.where(LABELS == TARGET, 0, PREDICTED)
    assert poisoned_accuracy(flipped, LABELS, TARGET) == 2 / 5


def test_attack_success_and_poisoned_accuracy_share_one_denominator() -> None:
    elsewhere = np.mean(PREDICTED[LABELS != TARGET] == 0) - 1 / 5  # one image moved to class 0, which is neither
    total = attack_success_rate(PREDICTED, LABELS, TARGET) + poisoned_accuracy(PREDICTED, LABELS, TARGET) + elsewhere
    assert total == pytest.approx(1)


def test_largest_share_finds_an_attack_that_moved() -> None:
    assert largest_share(PREDICTED) == 4 / 8
    assert largest_share(np.array([5, 5, 5, 0])) == 3 / 4
    assert largest_share(np.array([0, 1, 0, 1])) == 1 / 2  # a tie is the share of either


def test_recall_of_one_class_counts_its_images_only() -> None:
    assert class_recall(PREDICTED, LABELS, 0) == 1 / 2
    assert class_recall(PREDICTED, LABELS, 1) == 1 / 3
    assert class_recall(PREDICTED, LABELS, TARGET) == 2 / 3


def test_standard_error_of_a_share() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(0.1, 9) == pytest.approx(math.sqrt(0.09 / 9))
    assert standard_error(1.0, 5) == 0


def test_a_difference_of_just_the_bound_does_not_exceed_it() -> None:
    assert 0.54 - 0.52 > 0.02, "in floating point"
    assert not exceeds(0.54 - 0.52, 0.02)
    assert exceeds(0.0201, 0.02)


def test_one_image_alone_is_no_rate() -> None:
    assert not falls_beyond(30 / 30 - 29 / 30, 0.02, 30)
    assert falls_beyond(30 / 30 - 28 / 30, 0.02, 30)
    assert not falls_beyond(2 / 200, 0.02, 200), "two images, and within the bound"


def test_all_five_at_once() -> None:
    """Three of the five images of other classes go to the target, one stays right, one moves elsewhere."""
    triggered = np.array([TARGET, TARGET, 1, TARGET, 0, 0, 1, 0])
    assert count(PREDICTED, triggered, LABELS, TARGET) == Counts(
        ca=4 / 8, asr=3 / 5, pa=1 / 5, max_share=3 / 8, target_recall=2 / 3
    )


def test_of_equal_logits_the_first_class_is_the_answer() -> None:
    """As argmax has it, here and in GuardedClassifier: a tie with the target counts for the lower index."""
    logits = np.array([[0.0, 1.0, 1.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert attack_success_rate(logits.argmax(1), np.array([1, 0, 1]), TARGET) == 0
    assert poisoned_accuracy(logits.argmax(1), np.array([1, 0, 1]), TARGET) == 2 / 3


def test_the_bootstrap_interval_is_that_of_drawn_images() -> None:
    hits = np.arange(200) < 60
    drawn = np.random.default_rng(1).choice(hits, (4000, 200)).mean(axis=1)
    low, high = bootstrap_interval(0.3, 200)
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.006)
    assert bootstrap_interval(0.3, 200) == (low, high)
    assert bootstrap_interval(0.3, 2000)[0] > low


@pytest.mark.parametrize("count", [1, 5, 5000])
def test_none_of_few_images_is_no_proof_of_none(count: int) -> None:
    low, high = bootstrap_interval(0.0, count)
    assert low == 0
    assert high == pytest.approx(beta.ppf(0.975, 0.5, count + 0.5), rel=0.05)
    assert bootstrap_interval(1.0, count) == (pytest.approx(1 - high, rel=0.1, abs=0.01), 1)


def test_more_hits_have_a_higher_interval() -> None:
    ends = [bootstrap_interval(hits / 5000, 5000) for hits in range(12)]
    assert ends == sorted(ends)
    assert all(low <= hits / 5000 < high for hits, (low, high) in enumerate(ends))


@pytest.mark.parametrize(
    "refused",
    [
        lambda: clean_accuracy(NONE, NONE),
        lambda: attack_success_rate(ONLY_TARGET, ONLY_TARGET, TARGET),
        lambda: poisoned_accuracy(ONLY_TARGET, ONLY_TARGET, TARGET),
        lambda: largest_share(NONE),
        lambda: class_recall(PREDICTED, LABELS, 9),
        lambda: standard_error(0.5, 0),
        lambda: bootstrap_interval(0.5, 0),
        lambda: count(ONLY_TARGET, ONLY_TARGET, ONLY_TARGET, TARGET),
        lambda: count(PREDICTED, PREDICTED, LABELS, 9),
    ],
    ids=["CA", "ASR", "PA", "largest share", "recall", "standard error", "interval", "no other", "no target"],
)
def test_an_empty_set_is_refused(refused: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=r"^no (image|prediction) to count"):
        refused()


@pytest.mark.parametrize(
    "refused",
    [
        lambda: clean_accuracy(PREDICTED[1:], LABELS),
        lambda: attack_success_rate(PREDICTED[1:], LABELS, TARGET),
        lambda: poisoned_accuracy(PREDICTED[:, None], LABELS, TARGET),
        lambda: class_recall(PREDICTED[:, None], LABELS[:, None], 0),
    ],
    ids=["CA", "ASR", "PA", "recall"],
)
def test_shapes_that_do_not_match_are_refused(refused: Callable[[], float]) -> None:
    with pytest.raises(InputError, match="predictions do not match"):
        refused()
