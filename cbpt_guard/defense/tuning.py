"""Stage 2: tune class-wise prompts on cached features of clean and triggered images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.head import Head
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.settings import TuningSettings
from cbpt_guard.metrics import exceeds

PART = 128  # images, each with its triggered copies
Judge = Callable[[int, float, Tensor], None]
"""Called after each epoch with (epoch, loss, rows (C, E))."""


@dataclass(frozen=True)
class FeatureSet:
    """Cached unit features of the same images: clean (N, E), under each of K triggers (K, N, E); labels (N,)."""

    clean: Tensor
    triggered: Tensor
    labels: Tensor

    def part(self, index: Tensor) -> FeatureSet:
        """The images at `index`."""
        return FeatureSet(self.clean[index], self.triggered[:, index], self.labels[index])


def tuning_loss(rows: Tensor, original: Head, data: FeatureSet, settings: TuningSettings) -> Tensor:
    """CE(clean, y) + w CE(triggered, y) + v KL(p_T(clean) || p_T0(clean)), (); rows (C, E) are the tuned ones.

    arXiv 2502.19269 names three losses without giving them; this is the reconstruction of docs/method.md.
    """
    logits = Head(rows, original.scale, original.bias).logits(data.clean)
    loss = F.cross_entropy(logits, data.labels)
    before = original.logits(data.clean).log_softmax(dim=1)
    kept = F.kl_div(before, logits.log_softmax(dim=1), log_target=True, reduction="batchmean")
    loss = loss + settings.kl_weight * kept
    if len(data.triggered):
        triggered = Head(rows, original.scale, original.bias).logits(data.triggered.flatten(0, 1))
        loss = loss + settings.triggered_weight * F.cross_entropy(triggered, data.labels.repeat(len(data.triggered)))
    return loss


def loss_and_gradient(rows: Tensor, original: Head, data: FeatureSet, settings: TuningSettings) -> tuple[float, Tensor]:
    """`tuning_loss` and its gradient (C, E), a few images at a time: their logits grow with the classes."""
    loss, gradient = 0.0, torch.zeros_like(rows)
    for index in torch.arange(len(data.labels)).split(PART):
        leaf = rows.detach().requires_grad_()
        part = tuning_loss(leaf, original, data.part(index), settings) * (len(index) / len(data.labels))
        gradient += torch.autograd.grad(part, leaf)[0]
        loss += part.item()
    return loss, gradient


def tune(
    prompts: ClassPrompts,
    original: Head,
    data: FeatureSet,
    settings: TuningSettings,
    generator: torch.Generator,
    judge: Judge,
) -> None:
    """Change the prompts' contexts, epoch by epoch; `judge` sees the rows after each."""
    optimiser = torch.optim.AdamW(prompts.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * -(-len(data.labels) // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(settings.epochs):
        losses = []
        for index in torch.randperm(len(data.labels), generator=generator).split(settings.batch):
            loss, gradient = loss_and_gradient(prompts.rows(), original, data.part(index), settings)
            optimiser.zero_grad()
            prompts.backward(gradient)
            optimiser.step()
            schedule.step()
            losses.append(loss)
        judge(epoch + 1, sum(losses) / len(losses), prompts.rows())


@dataclass(frozen=True)
class Epoch:
    """One epoch as the held-out images saw it: clean accuracy, worst found-trigger ASR, PA; shares in [0, 1]."""

    number: int
    rows: Tensor
    contexts: Tensor
    clean_accuracy: float
    found_asr: float
    poisoned_accuracy: float


def choose(epochs: Sequence[Epoch], least_accuracy: float) -> Epoch:
    """The epoch to ship.

    Among those that keep `least_accuracy`: the lowest found-trigger ASR, then the highest PA, then the earliest.
    If none does: the one with the highest clean accuracy.
    """
    keeping = [epoch for epoch in epochs if not exceeds(least_accuracy, epoch.clean_accuracy)]
    if not keeping:
        return max(epochs, key=lambda epoch: epoch.clean_accuracy)
    return min(keeping, key=lambda epoch: (epoch.found_asr, -epoch.poisoned_accuracy, epoch.number))
