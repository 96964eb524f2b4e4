"""Fit the rule's test: for each suspected class, the direction that separates found-triggered images from its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.head import Head, TriggerTest
from cbpt_guard.defense.settings import RuleSettings
from cbpt_guard.defense.tuning import FeatureSet

_FEWEST_OWN = 4  # images of the target, below which their own standard deviation says too little
_FEWEST = 2  # images answering the target under its found triggers, below which there is no direction to fit


@dataclass(frozen=True)
class Direction:
    """A unit direction (E,), the threshold on the cosine with it, and how far apart it puts the two sides.

    `separation` is the distance of the two means over the sum of their standard deviations.
    """

    direction: Tensor
    threshold: float
    separation: float


def fit_direction(
    clean: Tensor, labels: Tensor, target: int, stand_in: Tensor, found: Tensor, deviations: float
) -> Direction:
    """Fisher's discriminant between images of class `target` and images under found triggers toward it.

    The classes' scatter comes from all clean images (each around its class mean) and the found ones, shrunk
    after Ledoit and Wolf, so that a dozen images of the target are enough. The threshold lies `deviations`
    standard deviations above the target's clean images, but never past the point that is equally improbable
    from both sides. Clean scores are left-one-out: an image does not pull the mean that it is measured by.
    A target with fewer than four images takes its deviation from the scatter of all.

    Args:
        clean: unit features (N, E) of clean images; labels (N,).
        stand_in: where the target's images may lie (E,), for a target with fewer than two.
        found: unit features (K, E) of images of other classes under found triggers.
    """
    from sklearn.covariance import ledoit_wolf  # here: a command that refuses its input need not wait a second for it

    clean, found, stand_in = clean.double(), found.double(), stand_in.double()
    means = {int(c): clean[labels == c].mean(0) for c in labels.unique()}
    scatter = clean - torch.stack([means[int(c)] for c in labels])
    scatter = scatter[labels.bincount()[labels] > 1]  # an image alone in its class says nothing of scatter
    within = torch.cat([scatter, found - found.mean(0)])
    covariance = torch.from_numpy(ledoit_wolf(within.numpy(), assume_centered=True)[0])
    own = clean[labels == target]
    centre = own.mean(0) if len(own) > 1 else stand_in
    direction = torch.linalg.solve(covariance, found.mean(0) - centre)
    direction = direction / direction.norm()
    if len(own) > 1:
        own_scores = _left_out_scores(own, found.mean(0), covariance)
    else:
        own_scores = (own if len(own) else centre[None]) @ direction
    found_scores = found @ direction
    low, high, high_sd = own_scores.mean(), found_scores.mean(), found_scores.std()
    low_sd = own_scores.std() if len(own) >= _FEWEST_OWN else (direction @ covariance @ direction).sqrt()
    separation = float((high - low) / (low_sd + high_sd))
    threshold = float(low + min(deviations, separation) * low_sd)
    return Direction(direction.float(), threshold, separation)


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
) -> TriggerTest:
    """One test for all suspected classes, out of the images tuned on.

    Args:
        data: clean features and those under each trigger of the bank, in its order.
        observed: features (K, E) of observed attack images for each target that they answer.
    """
    test = TriggerTest.none(*original.rows.shape)
    gap = (data.clean - original.rows[data.labels]).mean(0)  # images lie off their texts, all in one direction
    for target in suspects:
        found = [
            features[data.labels != target]
            for trigger, features in zip(bank, data.triggered, strict=True)
            if trigger.target == target
        ]
        attacked = torch.cat([*found, observed.get(target, data.clean[:0])])
        answering = attacked[original.logits(attacked).argmax(1) == target]
        if len(answering) < _FEWEST:
            continue
        stand_in = original.rows[target] + gap
        fitted = fit_direction(data.clean, data.labels, target, stand_in, answering, settings.clean_deviations)
        test.directions[target] = fitted.direction
        test.thresholds[target] = fitted.threshold
    return test
