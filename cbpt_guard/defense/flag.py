"""Fit the rule's test: for each suspected class, the direction that separates found-triggered images from its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.head import Head, TriggerTest
from cbpt_guard.defense.settings import RuleSettings
from cbpt_guard.defense.tuning import FeatureSet

_FEWEST_OWN = 8  # images of the target, below which their own standard deviation says too little (docs/notebook.md)
_RIDGE = 1e-6
_FEWEST = 2  # images answering the target under its found triggers, below which there is no direction to fit
_MISSED = 0.02  # of the images under one trigger: where the test would miss more its threshold is lowered,
_LOWERED = 0.5  # but to no less than so much of its deviations
_ROUNDING = 1e-6  # of a cosine in float32


@dataclass(frozen=True)
class Direction:
    """A unit direction (E,), the threshold on the cosine with it, and how far apart it puts the two sides.

    `separation` is the distance of the two means over the sum of their standard deviations; `least` is how low the
    threshold may be set.
    """

    direction: Tensor
    threshold: float
    least: float
    separation: float

    def above_few(self, features: Tensor, tried: int) -> float:
        """The threshold, lowered until at most `_MISSED` of the images under one trigger lie below it, or to `least`.

        `features` (K, E): those of `tried` images that it leads to the target. One image alone is no share.
        """
        scores, allowed = (features @ self.direction).sort().values, max(1, int(_MISSED * tried))
        needed = float(scores[allowed]) - _ROUNDING if len(scores) > allowed else math.inf
        return min(self.threshold, max(self.least, needed))


def fit_direction(
    clean: Tensor, labels: Tensor, target: int, stand_in: Tensor, found: Tensor, deviations: float
) -> Direction:
    """Fisher's discriminant between images of class `target` and images under found triggers toward it.

    The classes' scatter comes from all clean images (each around its class mean) and the found ones, shrunk
    after Ledoit and Wolf, so that a dozen images of the target are enough. The threshold lies `deviations`
    standard deviations above the target's clean images, but never past the point that is equally improbable
    from both sides, and `least` lies `_LOWERED` of them above, nor past it either. Clean scores are left-one-out: an
    image does not pull the mean that it is measured by.
    Of a target with fewer than `_FEWEST_OWN` images the scatter is left out, too, for the direction turns away from
    the little that there is, and would score unseen images higher; its deviation is that of other classes.

    Args:
        clean: unit features (N, E) of clean images; labels (N,).
        stand_in: where the target's images may lie (E,), for a target with fewer than two.
        found: unit features (K, E) of images of other classes under found triggers.
    """
    clean, found, stand_in = clean.double(), found.double(), stand_in.double()
    own, few = clean[labels == target], int((labels == target).sum()) < _FEWEST_OWN
    means = {int(c): clean[labels == c].mean(0) for c in labels.unique()}
    scatter = clean - torch.stack([means[int(c)] for c in labels])
    telling = labels.bincount()[labels] > 1  # an image alone in its class says nothing of scatter
    if few:
        telling &= labels != target
    scatter, others, spread = scatter[telling], labels[telling], found - found.mean(0)
    covariance = _covariance(scatter, spread)
    centre = own.mean(0) if len(own) > 1 else stand_in
    direction = _toward(found.mean(0) - centre, covariance)
    if len(own) > 1:
        own_scores = _left_out_scores(own, found.mean(0), covariance)
    else:
        own_scores = (own if len(own) else centre[None]) @ direction
    found_scores = found @ direction
    low, high, high_sd = own_scores.mean(), found_scores.mean(), found_scores.std()
    if not few:
        low_sd = own_scores.std()
    elif len(others.unique()) > 1:
        low_sd = _unfitted_deviation(scatter, others, spread, found.mean(0) - centre)
    else:
        low_sd = (direction @ covariance @ direction).sqrt()
    separation = float((high - low) / (low_sd + high_sd))
    threshold, least = (float(low + min(times, separation) * low_sd) for times in (deviations, _LOWERED * deviations))
    return Direction(direction.float(), threshold, least, separation)


def _covariance(scatter: Tensor, spread: Tensor) -> Tensor:
    """Of images around the mean of their class (M, E) or trigger (K, E), shrunk after Ledoit and Wolf, (E, E).

    Two images around their own mean are shrunk by nothing, and what cannot be inverted tells no direction: the least
    that is added is `_RIDGE` of the mean variance. Where nothing scatters at all, every direction is as good.
    """
    from sklearn.covariance import ledoit_wolf  # here: a command that refuses its input need not wait a second for it

    images = torch.cat([scatter, spread])
    covariance, shrinkage = ledoit_wolf(images.numpy(), assume_centered=True)
    found, mean = torch.from_numpy(covariance), images.square().mean()
    if shrinkage >= _RIDGE:
        return found
    return found + (_RIDGE * mean if mean > 0 else 1.0) * torch.eye(len(found), dtype=found.dtype)


def _toward(shift: Tensor, covariance: Tensor) -> Tensor:
    direction: Tensor = torch.linalg.solve(covariance, shift)
    return F.normalize(direction, dim=0)


def _unfitted_deviation(scatter: Tensor, labels: Tensor, spread: Tensor, shift: Tensor) -> Tensor:
    """Standard deviation of a class's images along a direction toward `shift` that was not fitted to them.

    Along the fitted one they scatter too little, less than half with three images a class. So each half of the classes
    is measured along the other's direction.
    """
    _, rank, counts = labels.unique(return_inverse=True, return_counts=True)
    free = (counts / (counts - 1))[rank]  # the mean that they are measured from is their own
    variances = []
    for half in (rank % 2 == 0, rank % 2 == 1):
        along = scatter[~half] @ _toward(shift, _covariance(scatter[half], spread))
        variances.append((along.square() * free[~half]).mean())
    return torch.stack(variances).mean().sqrt()


def _left_out_scores(own: Tensor, found_mean: Tensor, covariance: Tensor) -> Tensor:
    count = len(own)
    centres = (own.sum(0) - own) / (count - 1)
    directions = torch.linalg.solve(covariance, (found_mean - centres).T).T
    scores: Tensor = (own * directions).sum(1) / directions.norm(dim=1)
    return scores


def fit_test(
    data: FeatureSet,
    bank: TriggerBank,
    suspects: Sequence[int],
    original: Head,
    observed: Mapping[int, Tensor],
    settings: RuleSettings,
    beside: Sequence[tuple[int, Tensor]] = (),
) -> TriggerTest:
    """One test for all suspected classes, out of the images tuned on.

    Args:
        data: clean features and those under each trigger of the bank, in its order.
        observed: features (K, E) of observed attack images for each target that they answer.
        beside: targets of further triggers, and features (N, E) of all images under them: no direction is fitted to
            them, but the threshold is lowered for them, too.
    """
    test = TriggerTest.none(*original.rows.shape)
    gap = (data.clean - original.rows[data.labels]).mean(0)  # images lie off their texts, all in one direction
    under = [(trigger.target, features) for trigger, features in zip(bank, data.triggered, strict=True)]
    for target in suspects:
        others = data.labels != target
        found, more = (
            [_answering(target, features[others], original) for toward, features in some if toward == target]
            for some in (under, beside)
        )
        seen = _answering(target, observed.get(target, data.clean[:0]), original)
        answering = torch.cat([*found, seen])
        if len(answering) < _FEWEST:
            continue
        stand_in = original.rows[target] + gap
        fitted = fit_direction(data.clean, data.labels, target, stand_in, answering, settings.clean_deviations)
        needed = [fitted.above_few(features, int(others.sum())) for features in (*found, *more)]
        test.directions[target] = fitted.direction
        test.thresholds[target] = min(needed, default=fitted.threshold)
    return test


def _answering(target: int, features: Tensor, original: Head) -> Tensor:
    return features[original.answers(features) == target]
