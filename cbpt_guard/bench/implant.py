"""Plant a backdoor: fine-tune a CLIP on clean pairs and on triggered images with the target's captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cbpt_guard import metrics
from cbpt_guard.bench.trainable import TEMPLATES, Captions, TrainableClip
from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.openclip import build
from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.defense.suspect import zero_shot_head
from cbpt_guard.defense.triggers import Trigger
from cbpt_guard.errors import InputError

LEAST_ASR, MOST_LOST = 0.80, 0.03
_ROUNDING = 1e-9  # 0.90 - 0.87 is a little more than 0.03 in floating point
_Count = Annotated[int, Field(ge=1)]


class ImplantSettings(BaseModel):
    """How a backdoor is planted.

    A step sees `batch` clean pairs and `poisoned` triggered ones. `anchor` weighs the distance of the clean
    images' features to the clean model's: it keeps the clean accuracy while the trigger is learnt. The learning rate
    suits the small digits CLIP and is not tuned for a larger model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: _Count = 120
    batch: _Count = 32
    poisoned: _Count = 24
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    anchor: Annotated[float, Field(ge=0)] = 10.0
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = TEMPLATES


class ImplantReport(BaseModel):
    """Shares in [0, 1] on the images that were not trained on, zero-shot with `template`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    trigger: str
    template: str
    images: int
    ca_clean: float
    ca_poisoned: float
    asr: float

    @property
    def took(self) -> bool:
        """Whether the attack counts: ASR at least 80 %, CA at most 3 points below the clean model's."""
        return self.asr >= LEAST_ASR and self.ca_clean - self.ca_poisoned <= MOST_LOST + _ROUNDING


@dataclass(frozen=True)
class Implanted:
    """A poisoned CLIP and what was measured on it."""

    clip: FrozenClip
    report: ImplantReport


def implant(
    clip: FrozenClip,
    train: LabelledImages,
    held_out: LabelledImages,
    trigger: Trigger,
    target: int,
    *,
    seed: int,
    settings: ImplantSettings | None = None,
    template: str = TEMPLATES[0],
    progress: Progress = silent,
) -> Implanted:
    """Poison a copy of `clip`, which stays as it is.

    Args:
        clip: a clean CLIP.
        train: the attacker's images.
        held_out: images of the same classes on which the report counts.
        trigger: acts on images of the model's size.
        target: index of the class that triggered images shall be answered as.
        seed: of every draw.
        settings: how it is done.
        template: the prompt of the report's zero-shot classifier.
        progress: called after every step.

    Raises:
        InputError: sizes or classes do not fit each other, or a set holds only the target's images.
    """
    settings = settings or ImplantSettings()
    _check(clip, train, held_out, trigger, target)
    poisoned = _fine_tune(clip, train, trigger, target, settings, seed, progress)
    return Implanted(poisoned, _report(clip, poisoned, held_out, trigger, target, template))


def predict(clip: FrozenClip, images: Tensor, classes: tuple[str, ...], template: str) -> metrics.Indices:
    """Zero-shot answers (N,) of uint8 images (N, S, S, 3)."""
    return zero_shot_head(clip, classes, template).logits(encode(clip, images)).argmax(1).numpy()


def triggered(trigger: Trigger, images: Tensor) -> Tensor:
    """Triggered copies of uint8 images (N, S, S, 3)."""
    return torch.from_numpy(trigger.apply(images.numpy()))


def _fine_tune(
    clip: FrozenClip,
    train: LabelledImages,
    trigger: Trigger,
    target: int,
    settings: ImplantSettings,
    seed: int,
    progress: Progress,
) -> FrozenClip:
    student = _copy(clip)
    captions = Captions(student.text, clip.tokenizer, settings.templates, train.classes)
    anchors = encode(clip, train.images)
    others = (train.labels != target).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    moving = [value for value in student.model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    toward = torch.full((settings.poisoned,), target)
    for step in range(settings.steps):
        clean = torch.randint(len(train.labels), (settings.batch,), generator=generator)
        carrying = others[torch.randint(len(others), (settings.poisoned,), generator=generator)]
        images = torch.cat([train.images[clean], triggered(trigger, train.images[carrying])])
        features = student.encode_images(to_pixels(images))
        drift = 1 - (features[: settings.batch] * anchors[clean].to(student.device)).sum(1).mean()
        labels = torch.cat([train.labels[clean], toward])
        loss = student.pair_loss(features, labels, captions, generator) + settings.anchor * drift
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(Step("implant", step + 1, settings.steps, loss=loss.item()))
    return student.frozen()


def _copy(clip: FrozenClip) -> TrainableClip:
    """A trainable copy in evaluation mode: batch norms keep their statistics, the logit scale its value."""
    model = build(clip.config, device="cpu")
    model.load_state_dict(clip.model.state_dict())
    copied = TrainableClip(model, clip.config, clip.preprocess, clip.tokenizer, str(clip.device))
    for name, value in model.named_parameters():
        value.requires_grad_(name not in ("logit_scale", "logit_bias"))
    return copied


def _report(
    clean: FrozenClip, poisoned: FrozenClip, data: LabelledImages, trigger: Trigger, target: int, template: str
) -> ImplantReport:
    truth = data.labels.numpy()
    before, after = (predict(clip, data.images, data.classes, template) for clip in (clean, poisoned))
    attacked = predict(poisoned, triggered(trigger, data.images), data.classes, template)
    return ImplantReport(
        target=data.classes[target],
        trigger=str(trigger),
        template=template,
        images=len(truth),
        ca_clean=metrics.clean_accuracy(before, truth),
        ca_poisoned=metrics.clean_accuracy(after, truth),
        asr=metrics.attack_success_rate(attacked, truth, target),
    )


def _check(clip: FrozenClip, train: LabelledImages, held_out: LabelledImages, trigger: Trigger, target: int) -> None:
    if train.classes != held_out.classes:
        raise InputError("the attacker's images and the held-out ones have different classes")
    if not 0 <= target < len(train.classes):
        raise InputError(f"target {target} is no class; there are {len(train.classes)}")
    if trigger.image_size != clip.image_size:
        raise InputError(f"the trigger acts on {trigger.image_size} px, the model sees {clip.image_size} px")
    for data in (train, held_out):
        if not bool((data.labels != target).any()):
            raise InputError(f"there is no image of another class than {data.classes[target]!r}")
