"""What is counted, each defined once: shares in [0, 1] of predicted class indices (N,) against labels (N,)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cbpt_guard.errors import InputError

Indices = npt.NDArray[np.integer]
_ROUNDING = 1e-9  # 0.54 - 0.52 is above 0.02 in floating point
_RESAMPLES, _OUTSIDE = 10_000, (0.025, 0.975)


class Counts(NamedTuple):
    """What is said of one classifier under one trigger toward one target; shares in [0, 1]."""

    ca: float
    asr: float
    pa: float
    max_share: float
    target_recall: float


def count(clean: Indices, triggered: Indices, labels: Indices, target: int) -> Counts:
    """All five, of the answers (N,) for clean images and for the same images triggered.

    Raises:
        InputError: there is no image of the target, or none of another class; or the three differ in length.
    """
    return Counts(
        ca=clean_accuracy(clean, labels),
        asr=attack_success_rate(triggered, labels, target),
        pa=poisoned_accuracy(triggered, labels, target),
        max_share=largest_share(triggered),
        target_recall=class_recall(clean, labels, target),
    )


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


def exceeds(share: float, bound: float) -> bool:
    """Whether a share, or a difference of two, lies above its bound: by more than floating point adds to fractions."""
    return share > bound + _ROUNDING


def falls_beyond(loss: float, bound: float, images: int) -> bool:
    """Whether a loss, a share of so many images, lies above its bound; that of one image, no rate, never does."""
    return exceeds(loss, bound) and exceeds(loss * images, 1)


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent images."""
    if count < 1:
        raise InputError("no image to count")
    return math.sqrt(share * (1 - share) / count)


def bootstrap_interval(share: float, count: int, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of what a share of `count` images may be, by the Bayesian bootstrap (Rubin 1981).

    Weighing hits and misses anew at random is drawing from a beta distribution, so no image is weighed. Half a hit and
    half a miss are added (Jeffreys' prior): drawing images anew with replacement would say of no hit among five that
    there is none among any. A share of 0 or 1 keeps that as its end (Brown, Cai and DasGupta 2001).

    Raises:
        InputError: there is no image.
    """
    if count < 1:
        raise InputError("no image to count")
    hits = round(share * count)
    drawn = np.random.default_rng(seed).beta(hits + 0.5, count - hits + 0.5, _RESAMPLES)
    low, high = np.quantile(drawn, _OUTSIDE)
    return 0.0 if hits == 0 else float(low), 1.0 if hits == count else float(high)


def _checked(predicted: Indices, labels: Indices) -> Indices:
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise InputError(f"{predicted.shape} predictions do not match {labels.shape} labels")
    return predicted


def _share(predicted: Indices, wanted: Indices) -> float:
    if not len(wanted):
        raise InputError("no image to count")
    return float((predicted == wanted).mean())
