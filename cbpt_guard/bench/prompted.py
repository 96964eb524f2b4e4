"""Class-wise prompts tuned on the shots, with or without triggers, and the epoch that does best on held-out shots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cbpt_guard.bench.rival import Shots, shot_features, unflagged
from cbpt_guard.bench.settings import CLEAN_PROMPTS, CleanPromptsSettings
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.accuracy import clean_accuracy
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.progress import Step
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.settings import TuningSettings
from cbpt_guard.defense.tuning import FeatureSet, tune


class Best(NamedTuple):
    """The head that did best on held-out shots, how well (a share in [0, 1]), and what it was tuned with."""

    score: float
    head: Head
    chosen: dict[str, float]


def clean_prompts(task: Task, settings: CleanPromptsSettings = CLEAN_PROMPTS) -> Defended:
    """Our class-wise prompts tuned on clean shots alone: what the found triggers add to CBPT is the difference."""
    features, shots = shot_features(task), Shots.of(task, settings.held_out)
    data = FeatureSet(features, features.new_zeros(0, *features.shape), shots.labels)
    unseen = data.part(shots.unseen)
    best = tuned_prompts(
        task,
        data.part(shots.kept),
        settings.learning_rates,
        settings.tuning,
        lambda head: clean_accuracy(head.logits(unseen.clean), unseen.labels),
    )
    return Defended(task.clip, unflagged(best.head.logits, task.original.logits), chosen=best.chosen)


def tuned_prompts(
    task: Task,
    data: FeatureSet,
    learning_rates: Sequence[float],
    settings: TuningSettings,
    score: Callable[[Head], float],
) -> Best:
    """The best of all learning rates and epochs by `score`; of equals the first."""
    found: list[Best] = []
    steps = len(learning_rates) * settings.epochs

    for learning_rate in learning_rates:

        def judge(number: int, loss: float, rows: Tensor, rate: float = learning_rate) -> None:
            head = Head(rows, task.original.scale, task.original.bias)
            found.append(Best(score(head), head, {"learning_rate": rate, "epoch": number}))
            task.progress(Step("prompts", len(found), steps, loss))

        every = torch.arange(len(task.shots.classes))
        prompts = ClassPrompts(task.clip, list(task.shots.classes), task.template, every, settings.chunk)
        own = settings.model_copy(update={"learning_rate": learning_rate})
        tune(prompts, task.original, data, own, generator(task.seed, "prompts"), judge)
    return max(found, key=lambda best: best.score)
