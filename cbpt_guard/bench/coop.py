"""CoOp (arXiv 2109.01134): one learnt context for all classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.bench.rival import Shots, shot_features, unflagged
from cbpt_guard.bench.settings import COOP, CoopSettings
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.accuracy import clean_accuracy
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.progress import Step
from cbpt_guard.defense.prompts import ClassPrompts

_CHUNK = 64


class SharedContext:
    """One context (M, D) before every class name, from the template's words.

    Every class gets a copy; by the chain rule the context's gradient is the sum of the copies'.
    """

    def __init__(self, task: Task) -> None:
        classes = list(task.shots.classes)
        self._prompts = ClassPrompts(task.clip, classes, task.template, torch.arange(len(classes)), _CHUNK)
        (self._copies,) = self._prompts.parameters()
        self.context = self._copies[0].detach().clone().requires_grad_()

    def rows(self) -> Tensor:
        """Unit text rows (C, E), without a graph."""
        with torch.no_grad():
            self._copies.copy_(self.context.expand_as(self._copies))
        return self._prompts.rows()

    def backward(self, gradient: Tensor) -> None:
        """Set the context's gradient, given the loss's (C, E) in the last `rows()`."""
        self._copies.grad = None
        self._prompts.backward(gradient)
        if self._copies.grad is None:
            raise RuntimeError("the prompts gave no gradient to their contexts")
        self.context.grad = self._copies.grad.sum(0)


class _Epoch(NamedTuple):
    accuracy: float
    head: Head
    chosen: dict[str, float]


def coop(task: Task, settings: CoopSettings = COOP) -> Defended:
    """CoOp on the shots; learning rate and epoch are those that do best on held-out shots."""
    features, shots = shot_features(task), Shots.of(task, settings.held_out)
    found: list[_Epoch] = []

    def judge(rows: Tensor, loss: float, chosen: dict[str, float]) -> None:
        head = Head(rows, task.original.scale, task.original.bias)
        accuracy = clean_accuracy(head.logits(features[shots.unseen]), shots.labels[shots.unseen])
        found.append(_Epoch(accuracy, head, chosen))
        task.progress(Step("coop", len(found), settings.epochs * len(settings.learning_rates), loss))

    for learning_rate in settings.learning_rates:
        _tune(task, features[shots.kept], shots.labels[shots.kept], learning_rate, settings, judge)
    best = max(found, key=lambda epoch: epoch.accuracy)
    return Defended(task.clip, unflagged(best.head.logits, task.original.logits), chosen=best.chosen)


def _tune(
    task: Task,
    features: Tensor,
    labels: Tensor,
    learning_rate: float,
    settings: CoopSettings,
    judge: Callable[[Tensor, float, dict[str, float]], None],
) -> None:
    shared, draws = SharedContext(task), generator(task.seed, "coop")
    optimiser = torch.optim.SGD(
        [shared.context], learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    steps = -(-len(labels) // settings.batch)

    def factor(step: int) -> float:
        if step < steps and settings.epochs > 1:
            return settings.warm_up / learning_rate
        return (1 + math.cos(math.pi * step / (steps * settings.epochs))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    for epoch in range(1, settings.epochs + 1):
        for index in torch.randperm(len(labels), generator=draws).split(settings.batch):
            rows = shared.rows().requires_grad_()
            logits = Head(rows, task.original.scale, task.original.bias).logits(features[index])
            loss = F.cross_entropy(logits, labels[index])
            (gradient,) = torch.autograd.grad(loss, rows)
            shared.backward(gradient)
            optimiser.step()
            schedule.step()
        judge(shared.rows(), loss.item(), {"learning_rate": learning_rate, "epoch": epoch})
