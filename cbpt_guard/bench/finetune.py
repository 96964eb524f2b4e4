"""Fine-tuning of the whole CLIP on the shots: one loop for FT, CleanCLIP and PAR, which differ in their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.bench.rival import Shots, unflagged
from cbpt_guard.bench.settings import FT, FineTuneSettings
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.bench.trainable import Captions, TrainableClip
from cbpt_guard.defense.accuracy import clean_accuracy
from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.progress import Step
from cbpt_guard.defense.suspect import zero_shot_head

_Any = TypeVar("_Any")


@dataclass(frozen=True)
class Batch:
    """A step's images and one caption of each class that they show.

    Args:
        index: which shots, (N,).
        features: of their images under the student, unit rows (N, E).
        rows: of the captions under the student, unit rows (K, E).
        position: which caption is each image's, (N,).
        captions: (template, class) of each caption, (K, 2).
        scale: the model's logit scale.
    """

    index: Tensor
    features: Tensor
    rows: Tensor
    position: Tensor
    captions: Tensor
    scale: float


Loss = Callable[[TrainableClip, Batch, torch.Generator], Tensor]
"""The loss of a step, (); what it draws comes from the generator."""


class Variant(NamedTuple):
    """A loss among several, and what tells it from the others, by name."""

    loss: Loss
    settings: dict[str, float]


def ft(task: Task, settings: FineTuneSettings = FT) -> Defended:
    """Plain fine-tuning with CLIP's loss."""
    return fine_tuned(task, settings, [Variant(lambda student, batch, draws: clip_loss(batch), {})])


def clip_loss(batch: Batch) -> Tensor:
    """CLIP's contrastive loss, images to captions and back.

    Images of one class share a caption, so none is another's negative; a caption's term is the mean over its images.
    """
    logits = batch.scale * batch.features @ batch.rows.T
    of_captions = logits.log_softmax(0)[torch.arange(len(logits)), batch.position]
    counts = batch.position.bincount()[batch.position]
    return (F.cross_entropy(logits, batch.position) - (of_captions / counts).sum() / len(batch.rows)) / 2


def fine_tuned(task: Task, settings: FineTuneSettings, variants: Sequence[Variant]) -> Defended:
    """Choose the loss and the learning rate by short trials, then train with them and choose the epoch.

    Args:
        variants: the strongest first.
    """
    work = FineTuning(task, settings)
    least = work.accuracy(TrainableClip.copy_of(task.clip)) - settings.accuracy_slack
    trials = [(variant, rate) for variant in variants for rate in sorted(settings.learning_rates, reverse=True)]
    chosen = trials[0]
    if len(trials) > 1:
        chosen = first_keeping(((work.trial(one.loss, rate), (one, rate)) for one, rate in trials), least)
    variant, rate = chosen
    student = TrainableClip.copy_of(task.clip)
    epochs = work.train(student, variant.loss, rate, settings.epochs)
    states = ((work.accuracy(student), (number, _state(student))) for number in epochs)
    epoch, state = last_keeping(states, least)
    student.model.load_state_dict(state)
    clip = student.frozen()
    head = zero_shot_head(clip, task.shots.classes, task.template)
    found = {"learning_rate": rate, "epoch": epoch, **variant.settings}
    return Defended(clip, unflagged(head.logits, head.logits), chosen=found)


def first_keeping(candidates: Iterable[tuple[float, _Any]], least: float) -> _Any:
    """Of (accuracy, value) the first whose accuracy is at least `least`, asking no further; else the most accurate."""
    best, found = -math.inf, cast(_Any, None)
    for accuracy, value in candidates:
        if accuracy > best:
            best, found = accuracy, value
        if accuracy >= least:
            return value
    return found


def last_keeping(candidates: Iterable[tuple[float, _Any]], least: float) -> _Any:
    """Of (accuracy, value) the last whose accuracy is at least `least`; else the most accurate, of equals the first."""
    best, found = -math.inf, cast(_Any, None)
    for accuracy, value in candidates:
        if accuracy >= least or (best < least and accuracy > best):
            best, found = accuracy, value
    return found


class FineTuning:
    """What all trainings of a task share; the suspect itself stays as it is."""

    def __init__(self, task: Task, settings: FineTuneSettings) -> None:
        self._task, self._settings = task, settings
        self._shots = Shots.of(task, settings.held_out)
        clip, classes = task.clip, task.shots.classes
        self._captions = Captions(clip.text, clip.tokenizer, settings.templates, classes)
        self._prompts = Captions(clip.text, clip.tokenizer, (task.template,), classes).ids[0]

    @torch.no_grad()
    def accuracy(self, student: TrainableClip) -> float:
        """On the held-out shots, zero-shot with the task's template."""
        images = self._task.shots.images[self._shots.unseen]
        features = torch.cat([student.encode_images(to_pixels(part)).cpu() for part in images.split(128)])
        head = Head(student.encode_ids(self._prompts).cpu(), self._task.original.scale)
        return clean_accuracy(head.logits(features), self._shots.labels[self._shots.unseen])

    def trial(self, loss: Loss, learning_rate: float) -> float:
        """The accuracy after a short training."""
        student = TrainableClip.copy_of(self._task.clip)
        for _ in self.train(student, loss, learning_rate, self._settings.trial_epochs):
            pass
        return self.accuracy(student)

    def train(self, student: TrainableClip, loss: Loss, learning_rate: float, epochs: int) -> Iterator[int]:
        """Change the student; yields after each epoch its number, from 1."""
        settings, draws = self._settings, generator(self._task.seed, "fine-tuning")
        moving = [value for value in student.model.parameters() if value.requires_grad]
        optimiser = torch.optim.AdamW(moving, learning_rate, weight_decay=settings.weight_decay, fused=True)
        steps = epochs * -(-len(self._shots.kept) // settings.batch)
        factor = partial(_factor, steps=steps, warm_up=settings.warm_up_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        done = 0
        for epoch in range(epochs):
            order = self._shots.kept[torch.randperm(len(self._shots.kept), generator=draws)]
            for index in order.split(settings.batch):
                value = loss(student, self._batch(student, index, draws), draws)
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
                schedule.step()
                done += 1
                self._task.progress(Step("fine-tuning", done, steps, value.item()))
            yield epoch + 1

    def _batch(self, student: TrainableClip, index: Tensor, draws: torch.Generator) -> Batch:
        classes, position = self._shots.labels[index].unique(return_inverse=True)
        templates = torch.randint(len(self._captions.ids), classes.shape, generator=draws)
        return Batch(
            index=index,
            features=student.encode_images(to_pixels(self._task.shots.images[index])),
            rows=student.encode_ids(self._captions.ids[templates, classes]),
            position=position.to(student.device),
            captions=torch.stack([templates, classes], 1),
            scale=self._task.original.scale,
        )


def _factor(step: int, steps: int, warm_up: int) -> float:
    """Of the learning rate: linear warm-up, then half a cosine to 0."""
    if step < min(warm_up, steps // 2):
        return (step + 1) / (warm_up + 1)
    return (1 + math.cos(math.pi * step / steps)) / 2


def _state(student: TrainableClip) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.model.state_dict().items()}
