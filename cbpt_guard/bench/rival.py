"""What the rivals share: the shots' features, their held-out part, and answers that flag nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cbpt_guard.bench.task import Task
from cbpt_guard.defense.data import split
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.head import Answer

_FEATURES = "shots.npy"
Logits = Callable[[Tensor], Tensor]
"""Logits (N, C) of unit features (N, E)."""


@dataclass(frozen=True)
class Shots:
    """The shots' labels (N,), and which of them are trained on and chosen on.

    With fewer than four shots a class nothing is held out, and the choice falls on what is trained on.
    """

    labels: Tensor
    kept: Tensor
    unseen: Tensor

    @classmethod
    def of(cls, task: Task, held_out: float) -> Shots:
        """Split as CBPT splits with the same seed."""
        kept, held = split(task.shots.labels, held_out, task.seed)
        return cls(task.shots.labels, kept, held if len(held) else kept)


def shot_features(task: Task) -> Tensor:
    """Unit features (N, E) of the shots, made once for all defences of the task."""
    return made_once(
        task, _FEATURES, lambda: encode(task.clip, task.shots.images, stage="shots", progress=task.progress)
    )


def made_once(task: Task, name: str, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is kept in the task's folder under that name, and counts for each defence that asks for it."""
    path = task.folder / name

    def write() -> None:
        partial = path.with_suffix(".new.npy")
        np.save(partial, make().numpy())
        partial.replace(path)

    task.clock.once(path, write)
    return torch.from_numpy(np.load(path, allow_pickle=False))


def unflagged(logits: Logits, original: Logits) -> Callable[[Tensor], Answer]:
    """The answer of a head that flags no image."""

    def answer(features: Tensor) -> Answer:
        return Answer(logits(features), torch.zeros(len(features), dtype=torch.bool), original(features))

    return answer
