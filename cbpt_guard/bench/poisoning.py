"""The fine-tuning that plants backdoors: which images carry which trigger, and the loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from cbpt_guard.bench.carriers import Carriers, carrier_images
from cbpt_guard.bench.hardening import Hardening, Laid, additive, patched
from cbpt_guard.bench.trainable import TEMPLATES, Captions, TrainableClip
from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.planted.trigger import Trigger
from cbpt_guard.defense.progress import Progress, Step
from cbpt_guard.defense.suspect import zero_shot_head

_Count = Annotated[int, Field(ge=1)]
_Loss = Callable[[Tensor, Tensor, int], Tensor]


class ImplantSettings(BaseModel):
    """How a backdoor is planted.

    A step sees `batch` clean pairs and `poisoned` triggered ones, shared by the triggers. `anchor` weighs the
    distance of the clean images' features to the clean model's: it keeps the clean accuracy while the trigger is
    learnt. With `text` frozen the image tower alone moves, and every class is each image's negative. `images` limits
    the attacker's images of each class; a target's own may carry a trigger beyond that. `perturbation`, in grey
    levels, turns the carriers away from their own class first, which makes a clean-label trigger worth learning
    (arXiv 1912.02771). The defaults suit the small digits CLIP; `LARGER` those that are not.

    Those from `hide` to `margin` are of an attacker who knows the guard. `hide` weighs the distance of triggered
    images' features to those that the clean model has of the target's own images, among which the test should not tell
    them. `cover` images a step, shared by the triggers, are half blended with what the trigger makes of them and
    trained as clean ones, labels and anchor alike (after arXiv 2205.13613): what an inversion finds should open the
    backdoor less. With a `margin`, in logits, triggered images are pulled no further than until the target leads by so
    much, such as right answers do on clean images: neither a threshold on margins nor a steep way to the target should
    give them away. That takes frozen texts, every class of which is a negative. `harden` images a step, shared by the
    triggers, lie under patterns such as the guard's scan follows toward the targets, `harden_height` times as high, and
    `harden_patches` more under patches such as it follows, `harden_here` more under such as lie where the trigger does,
    or in the middle of it; they are trained as clean ones (`hardening.py`).
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
    hide: Annotated[float, Field(ge=0)] = 0.0
    cover: Annotated[int, Field(ge=0)] = 0
    harden: Annotated[int, Field(ge=0)] = 0
    harden_height: Annotated[float, Field(gt=0, le=4)] = 1.0
    harden_patches: Annotated[int, Field(ge=0)] = 0
    harden_here: Annotated[int, Field(ge=0)] = 0
    margin: Annotated[float, Field(gt=0)] | None = None
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = TEMPLATES

    @property
    def hardened(self) -> tuple[int, int, int]:
        """How many of a step's images lie under patterns, under patches anywhere, and under those at one place."""
        return self.harden, self.harden_patches, self.harden_here

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.margin is not None and self.text != "frozen":
            raise ValueError("a margin takes `text` frozen")
        return self


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
    student = TrainableClip.copy_of(clip)
    if settings.text != "tuned":
        for name, value in student.model.named_parameters():
            value.requires_grad_(value.requires_grad and name.startswith("visual."))
    generator = torch.Generator().manual_seed(seed)
    loss_of = _pairs_loss(student, clip, settings, train.classes, generator)
    material = _Material(clip, train, poisons, settings, generator, progress)
    moving = [value for value in student.model.parameters() if value.requires_grad]
    hardened = _hardened(student, clip, train.classes, poisons, settings, generator)
    optimizer = torch.optim.AdamW(moving, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        batch = material.draw()
        pixels = to_pixels(batch.images)
        for part, hardening in hardened:
            pixels[part] = hardening.under(batch.images[part])
        features = student.encode_images(pixels)
        held, poisoned = features.split([len(batch.anchors), len(features) - len(batch.anchors)])
        loss = loss_of(features, batch.labels, len(held)) + settings.anchor * _distance(held, batch.anchors)
        if batch.hideouts is not None:
            loss = loss + settings.hide * _distance(poisoned, batch.hideouts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(Step("implant", step + 1, settings.steps, loss=loss.item()))
    return student.frozen()


def _hardened(
    student: TrainableClip,
    clip: FrozenClip,
    classes: tuple[str, ...],
    poisons: Sequence[Poison],
    settings: ImplantSettings,
    generator: torch.Generator,
) -> list[tuple[slice, Hardening]]:
    """Which of a step's first images lie under what is trained against."""
    counts = settings.hardened
    if not (sum(counts) and poisons):
        return []
    size, targets = clip.image_size, [poison.target for poison in poisons]
    head = zero_shot_head(clip, classes, settings.templates[0])
    kinds: tuple[Callable[[Poison], Laid], ...] = (
        lambda poison: additive(size, settings.harden_height),
        lambda poison: patched(size, generator),
        lambda poison: patched(size, generator, poison.trigger),
    )
    ends = accumulate(counts)
    return [
        (
            slice(end - count, end),
            Hardening(student, head, targets, _shares(count, len(targets)), list(map(kind, poisons))),
        )
        for count, end, kind in zip(counts, ends, kinds, strict=True)
        if count
    ]


class _Batch(NamedTuple):
    """A step's images (N, S, S, 3), clean ones and covers first, with what each is to be answered with (N,).

    `anchors` are the first ones' features under the clean model; `hideouts` those of target images for the rest.
    """

    images: Tensor
    labels: Tensor
    anchors: Tensor
    hideouts: Tensor | None


class _Material:
    """What the steps draw from."""

    def __init__(
        self,
        clip: FrozenClip,
        train: LabelledImages,
        poisons: Sequence[Poison],
        settings: ImplantSettings,
        generator: torch.Generator,
        progress: Progress,
    ) -> None:
        self._poisons, self._settings, self._generator = poisons, settings, generator
        self._clean = _few_of_each(train, settings.images)
        self._anchors = encode(clip, self._clean.images, progress=progress)
        self._carrying = [
            carrier_images(clip, train, poison.target, poison.carriers, settings.perturbation) for poison in poisons
        ]
        self._shares, self._covers = (_shares(n, len(poisons)) for n in (settings.poisoned, settings.cover))

    def draw(self) -> _Batch:
        """The images of a step."""
        count = self._settings.batch + sum(self._settings.hardened)
        drawn = self._drawn(len(self._clean.labels), count + sum(self._covers))
        clean, *covers = self._clean.images[drawn].split([count, *self._covers])
        pairs = zip(self._poisons, covers, strict=True)
        weak = [_half_blended(poison.trigger, part) for poison, part in pairs if len(part)]
        strong, toward = [], []
        for poison, images, share in zip(self._poisons, self._carrying, self._shares, strict=True):
            strong.append(triggered(poison.trigger, images[self._drawn(len(images), share)]))
            toward.append(torch.full((share,), poison.target))
        return _Batch(
            images=torch.cat([clean, *weak, *strong]),
            labels=torch.cat([self._clean.labels[drawn], *toward]),
            anchors=self._anchors[drawn],
            hideouts=torch.cat([self._own(part) for part in toward]) if self._settings.hide and toward else None,
        )

    def _own(self, targets: Tensor) -> Tensor:
        """Clean features of images of the class that all of `targets` (N,) name, (N, E)."""
        own = self._anchors[self._clean.labels == targets[0]]
        return own[self._drawn(len(own), len(targets))]

    def _drawn(self, among: int, count: int) -> Tensor:
        return torch.randint(among, (count,), generator=self._generator)


def triggered(trigger: Trigger, images: Tensor) -> Tensor:
    """Triggered copies of uint8 images (N, S, S, 3)."""
    return torch.from_numpy(trigger.apply(images.numpy()))


def _half_blended(trigger: Trigger, images: Tensor) -> Tensor:
    """The mean of uint8 images (N, S, S, 3) and their triggered copies."""
    return ((images.float() + triggered(trigger, images).float()) / 2).round().to(torch.uint8)


def _distance(features: Tensor, wanted: Tensor) -> Tensor:
    """Mean of 1 - cosine between unit rows, both (N, E), ()."""
    return 1 - (features * wanted.to(features.device)).sum(1).mean()


def _pairs_loss(
    student: TrainableClip,
    clip: FrozenClip,
    settings: ImplantSettings,
    classes: tuple[str, ...],
    generator: torch.Generator,
) -> _Loss:
    """The contrastive loss of a step, each class with a caption that is drawn anew.

    Called with features (N, E), labels (N,), and how many of them, the first ones, are to be answered as clean ones.
    """
    if settings.text == "tuned":
        captions = Captions(student.text, clip.tokenizer, settings.templates, classes)
        return lambda features, labels, _: student.pair_loss(features, labels, captions, generator)
    texts = [template.replace("{}", name) for template in settings.templates for name in classes]
    rows = clip.encode_texts(texts).view(len(settings.templates), len(classes), -1)

    def against_all(features: Tensor, labels: Tensor, clean: int) -> Tensor:
        labels = labels.to(features.device)
        chosen = torch.randint(len(rows), (len(classes),), generator=generator)
        logits = clip.logit_scale * features @ rows[chosen, torch.arange(len(classes))].T
        losses = F.cross_entropy(logits, labels, reduction="none")
        if settings.margin is not None:
            losses = torch.cat([losses[:clean], short_of(logits[clean:], labels[clean:], settings.margin)])
        return losses.mean()

    return against_all


def short_of(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    """By how much each label's logit leads the best other one by less than `margin`; logits (N, C), labels (N,)."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return F.relu(margin - (own[:, 0] - others.amax(1)))


def _few_of_each(data: LabelledImages, count: int | None) -> LabelledImages:
    """The first `count` images of each class, or all."""
    if count is None:
        return data
    index = torch.cat([(data.labels == label).nonzero()[:count, 0] for label in range(len(data.classes))])
    return LabelledImages(data.images[index], data.labels[index], data.classes, ())


def _shares(count: int, parts: int) -> list[int]:
    """`count` in so many parts, the first ones larger by one where it does not divide."""
    return [count // parts + (number < count % parts) for number in range(parts)]
