"""The oracle: heads trained with the true triggers, which no defence knows; what they reach is what PA is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from cbpt_guard.bench.probe import linear_head
from cbpt_guard.bench.prompted import tuned_prompts
from cbpt_guard.bench.rival import Logits, Shots, shot_features, unflagged
from cbpt_guard.bench.settings import ORACLE, OracleSettings
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.tuning import FeatureSet
from cbpt_guard.errors import InputError
from cbpt_guard.metrics import poisoned_accuracy


def oracle(task: Task, settings: OracleSettings = ORACLE) -> Defended:
    """A linear head or class-wise prompts, trained on clean and truly triggered shots: what has more PA held out.

    Raises:
        InputError: the task has no planted trigger.
    """
    if not task.planted:
        raise InputError("the oracle trains with the planted trigger, and this task has none")
    shots = Shots.of(task, settings.held_out)
    everything = FeatureSet(shot_features(task), triggered_shots(task), shots.labels)
    kept, unseen = everything.part(shots.kept), everything.part(shots.unseen)
    targets = [task.shots.classes.index(pair.target) for pair in task.planted]

    def linear(data: FeatureSet, strength: float) -> Logits:
        features = torch.cat([data.clean, data.triggered.flatten(0, 1)])
        labels = data.labels.repeat(1 + len(targets))
        return linear_head(features, labels, strength, settings.iterations, len(task.shots.classes))

    strengths = {strength: mean_pa(linear(kept, strength), unseen, targets) for strength in settings.strengths}
    strength = max(strengths, key=lambda value: strengths[value])
    prompts = tuned_prompts(
        task, kept, settings.learning_rates, settings.tuning, lambda head: mean_pa(head.logits, unseen, targets)
    )
    if prompts.score >= strengths[strength]:
        return Defended(task.clip, unflagged(prompts.head.logits, task.original.logits), chosen=prompts.chosen)
    logits = linear(everything, strength)
    return Defended(task.clip, unflagged(logits, task.original.logits), chosen={"strength": strength})


def mean_pa(logits: Logits, data: FeatureSet, targets: list[int]) -> float:
    """Mean over triggers of the share of triggered images of other classes that are answered rightly."""
    truth = data.labels.numpy()
    pairs = zip(data.triggered, targets, strict=True)
    found = [poisoned_accuracy(logits(features).argmax(1).numpy(), truth, target) for features, target in pairs]
    return sum(found) / len(found)


def triggered_shots(task: Task) -> Tensor:
    """Features of the shots under each planted trigger, (K, N, E)."""
    parts = []
    for pair in task.planted:
        images = torch.from_numpy(pair.trigger.apply(task.shots.images.numpy()))
        parts.append(encode(task.clip, images, stage="triggered shots", progress=task.progress))
    return torch.stack(parts)
