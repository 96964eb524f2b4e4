"""What is counted, each defined once: shares in [0, 1] of predicted class indices (N,) against labels (N,)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cbpt_guard.errors import InputError

Indices = npt.NDArray[np.integer]


def clean_accuracy(predicted: Indices, labels: Indices) -> float:
    """CA: share of clean images predicted as their true class.

    Raises:
        InputError: nothing to count, or the two differ in length.
    """
    return _share(_checked(predicted, labels), labels)


def attack_success_rate(predicted: Indices, labels: Indices, target: int) -> float:
    """ASR: share of triggered images of other classes that are predicted as `target`; raises as CA does."""
    others = labels != target
    return _share(_checked(predicted, labels)[others], np.full(int(others.sum()), target))


def poisoned_accuracy(predicted: Indices, labels: Indices, target: int) -> float:
    """PA: share of the triggered images that ASR counts predicted as their true class; raises as CA does."""
    others = labels != target
    return _share(_checked(predicted, labels)[others], labels[others])


def largest_share(predicted: Indices) -> float:
    """Largest share of one class among the predictions: an attack that only moves elsewhere shows here."""
    if not len(predicted):
        raise InputError("no prediction to count")
    return float(np.bincount(predicted).max() / len(predicted))


def class_recall(predicted: Indices, labels: Indices, index: int) -> float:
    """Share of the clean images of one class predicted as it; raises as CA does."""
    own = labels == index
    return _share(_checked(predicted, labels)[own], labels[own])


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent images."""
    if count < 1:
        raise InputError("no image to count")
    return math.sqrt(share * (1 - share) / count)


def _checked(predicted: Indices, labels: Indices) -> Indices:
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise InputError(f"{predicted.shape} predictions do not match {labels.shape} labels")
    return predicted


def _share(predicted: Indices, wanted: Indices) -> float:
    if not len(wanted):
        raise InputError("no image to count")
    return float((predicted == wanted).mean())
