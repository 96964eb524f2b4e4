"""The linear probe: logistic regression on the frozen encoder's features."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cbpt_guard.bench.rival import Logits, Shots, shot_features, unflagged
from cbpt_guard.bench.settings import PROBE, ProbeSettings
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.accuracy import clean_accuracy
from cbpt_guard.defense.head import LEFT_OUT


def probe(task: Task, settings: ProbeSettings = PROBE) -> Defended:
    """A linear probe on the shots' features; its penalty is chosen on held-out shots, then all shots are fitted."""
    features, shots, classes = shot_features(task), Shots.of(task, settings.held_out), len(task.shots.classes)

    def accuracy(strength: float) -> float:
        kept = shots.kept
        logits = linear_head(features[kept], shots.labels[kept], strength, settings.iterations, classes)
        return clean_accuracy(logits(features[shots.unseen]), shots.labels[shots.unseen])

    strength = max(settings.strengths, key=accuracy)
    logits = linear_head(features, shots.labels, strength, settings.iterations, classes)
    return Defended(task.clip, unflagged(logits, task.original.logits), chosen={"strength": strength})


def linear_head(features: Tensor, labels: Tensor, strength: float, iterations: int, classes: int) -> Logits:
    """Logistic regression on features (N, E); a class without images gets a logit that never wins."""
    fitted = LogisticRegression(C=strength, max_iter=iterations).fit(features.numpy(), labels.numpy())
    weights, bias = (torch.from_numpy(part).float() for part in (fitted.coef_, fitted.intercept_))
    if len(weights) == 1:  # of two classes scikit-learn keeps the second's weights alone
        weights, bias = torch.cat([-weights, weights]), torch.cat([-bias, bias])

    def logits(unit: Tensor) -> Tensor:
        found = torch.full((len(unit), classes), LEFT_OUT)
        found[:, torch.from_numpy(fitted.classes_)] = unit @ weights.T + bias
        return found

    return logits
