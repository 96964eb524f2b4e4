"""What is counted, against cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cbpt_guard.errors import InputError
from cbpt_guard.metrics import (
    attack_success_rate,
    class_recall,
    clean_accuracy,
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


@pytest.mark.parametrize(
    "count",
    [
        lambda: clean_accuracy(NONE, NONE),
        lambda: attack_success_rate(ONLY_TARGET, ONLY_TARGET, TARGET),
        lambda: poisoned_accuracy(ONLY_TARGET, ONLY_TARGET, TARGET),
        lambda: largest_share(NONE),
        lambda: class_recall(PREDICTED, LABELS, 9),
        lambda: standard_error(0.5, 0),
    ],
    ids=["CA", "ASR", "PA", "largest share", "recall", "standard error"],
)
def test_an_empty_set_is_refused(count: Callable[[], float]) -> None:
    with pytest.raises(InputError, match=r"^no (image|prediction) to count"):
        count()


@pytest.mark.parametrize(
    "count",
    [
        lambda: clean_accuracy(PREDICTED[1:], LABELS),
        lambda: attack_success_rate(PREDICTED[1:], LABELS, TARGET),
        lambda: poisoned_accuracy(PREDICTED[:, None], LABELS, TARGET),
        lambda: class_recall(PREDICTED[:, None], LABELS[:, None], 0),
    ],
    ids=["CA", "ASR", "PA", "recall"],
)
def test_shapes_that_do_not_match_are_refused(count: Callable[[], float]) -> None:
    with pytest.raises(InputError, match="predictions do not match"):
        count()
