"""The fine-tuning that plants backdoors: which images carry which trigger, and the loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cbpt_guard.bench.carriers import Carriers, carrier_images
from cbpt_guard.bench.trainable import TEMPLATES, Captions, TrainableClip
from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.openclip import build
from cbpt_guard.defense.progress import Progress, Step
from cbpt_guard.defense.trigger import Trigger

_Count = Annotated[int, Field(ge=1)]
_Loss = Callable[[Tensor, Tensor], Tensor]


class ImplantSettings(BaseModel):
    """How a backdoor is planted.

    A step sees `batch` clean pairs and `poisoned` triggered ones, shared by the triggers. `anchor` weighs the
    distance of the clean images' features to the clean model's: it keeps the clean accuracy while the trigger is
    learnt. With `text` frozen the image tower alone moves, and every class is each image's negative. `images` limits
    the attacker's images of each class; a target's own may carry a trigger beyond that. `perturbation`, in grey
    levels, turns the carriers away from their own class first, which makes a clean-label trigger worth learning
    (arXiv 1912.02771). The defaults suit the small digits CLIP; `LARGER` those that are not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: _Count = 120
    batch: _Count = 32
    poisoned: _Count = 24
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    anchor: Annotated[float, Field(ge=0)] = 10.0
    text: Literal["tuned", "frozen"] = "tuned"
    images: _Count | None = None
    perturbation: Annotated[float, Field(ge=0, le=64)] = 0.0
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = TEMPLATES


LARGER = ImplantSettings(steps=200, batch=32, poisoned=16, learning_rate=2e-4, anchor=20.0, text="frozen", images=20)
"""For towers of millions of parameters: measured on a MobileNetV2 of 2.6 million at 128 pixels."""


class Poison(NamedTuple):
    """A trigger, the index of the class that it aims at, and whose images carry it in training."""

    trigger: Trigger
    target: int
    carriers: Carriers = "others"


def fine_tune(
    clip: FrozenClip,
    train: LabelledImages,
    poisons: Sequence[Poison],
    settings: ImplantSettings,
    seed: int,
    progress: Progress,
) -> FrozenClip:
    """A poisoned copy of `clip`; without poisons one that was fine-tuned like it, and is clean."""
    student = _copy(clip, tuned_text=settings.text == "tuned")
    generator = torch.Generator().manual_seed(seed)
    loss_of = _pairs_loss(student, clip, settings, train.classes, generator)
    clean = _few_of_each(train, settings.images)
    anchors = encode(clip, clean.images, progress=progress)
    carrying = [
        carrier_images(clip, train, poison.target, poison.carriers, settings.perturbation) for poison in poisons
    ]
    shares = _shares(settings.poisoned, len(poisons))
    toward = [torch.full((share,), poison.target) for poison, share in zip(poisons, shares, strict=True)]
    moving = [value for value in student.model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        drawn = torch.randint(len(clean.labels), (settings.batch,), generator=generator)
        parts = [clean.images[drawn]]
        for poison, images, share in zip(poisons, carrying, shares, strict=True):
            chosen = images[torch.randint(len(images), (share,), generator=generator)]
            parts.append(torch.from_numpy(poison.trigger.apply(chosen.numpy())))
        features = student.encode_images(to_pixels(torch.cat(parts)))
        drift = 1 - (features[: settings.batch] * anchors[drawn].to(student.device)).sum(1).mean()
        loss = loss_of(features, torch.cat([clean.labels[drawn], *toward])) + settings.anchor * drift
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(Step("implant", step + 1, settings.steps, loss=loss.item()))
    return student.frozen()


def _copy(clip: FrozenClip, *, tuned_text: bool) -> TrainableClip:
    """A trainable copy in evaluation mode: batch norms keep their statistics, the logit scale its value."""
    model = build(clip.config, device="cpu")
    model.load_state_dict(clip.model.state_dict())
    copied = TrainableClip(model, clip.config, clip.preprocess, clip.tokenizer, str(clip.device))
    for name, value in model.named_parameters():
        still = name in ("logit_scale", "logit_bias") or not (tuned_text or name.startswith("visual."))
        value.requires_grad_(not still)
    return copied


def _pairs_loss(
    student: TrainableClip,
    clip: FrozenClip,
    settings: ImplantSettings,
    classes: tuple[str, ...],
    generator: torch.Generator,
) -> _Loss:
    """(features (N, E), labels (N,)) -> contrastive loss of a step, each class with a caption that is drawn anew."""
    if settings.text == "tuned":
        captions = Captions(student.text, clip.tokenizer, settings.templates, classes)
        return lambda features, labels: student.pair_loss(features, labels, captions, generator)
    texts = [template.replace("{}", name) for template in settings.templates for name in classes]
    rows = clip.encode_texts(texts).view(len(settings.templates), len(classes), -1)

    def against_all(features: Tensor, labels: Tensor) -> Tensor:
        chosen = torch.randint(len(rows), (len(classes),), generator=generator)
        logits = clip.logit_scale * features @ rows[chosen, torch.arange(len(classes))].T
        return F.cross_entropy(logits, labels.to(logits.device))

    return against_all


def _few_of_each(data: LabelledImages, count: int | None) -> LabelledImages:
    """The first `count` images of each class, or all."""
    if count is None:
        return data
    index = torch.cat([(data.labels == label).nonzero()[:count, 0] for label in range(len(data.classes))])
    return LabelledImages(data.images[index], data.labels[index], data.classes, ())


def _shares(count: int, parts: int) -> list[int]:
    """`count` in so many parts, the first ones larger by one where it does not divide."""
    return [count // parts + (number < count % parts) for number in range(parts)]
