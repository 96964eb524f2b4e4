"""Plant backdoors: fine-tune a CLIP on clean pairs and on triggered images with the targets' captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from cbpt_guard import metrics
from cbpt_guard.bench.poisoning import ImplantSettings, Poison, fine_tune, triggered
from cbpt_guard.bench.trainable import TEMPLATES
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.suspect import zero_shot_head
from cbpt_guard.defense.triggers import Trigger
from cbpt_guard.errors import InputError

__all__ = ["ImplantReport", "ImplantSettings", "Implanted", "Poison", "implant", "implant_all", "predict", "triggered"]

LEAST_ASR, MOST_LOST = 0.80, 0.03


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
        return self.asr >= LEAST_ASR and not metrics.exceeds(self.ca_clean - self.ca_poisoned, MOST_LOST)


@dataclass(frozen=True)
class Implanted:
    """A poisoned CLIP and what was measured on it, for each of its triggers."""

    clip: FrozenClip
    reports: tuple[ImplantReport, ...]

    @property
    def report(self) -> ImplantReport:
        """Of the first trigger, and most implants have one."""
        return self.reports[0]

    @property
    def took(self) -> bool:
        """Whether every trigger of it took."""
        return all(report.took for report in self.reports)


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
    """Plant one trigger toward class `target`, on images of the other classes; see `implant_all`."""
    poisons = [Poison(trigger, target)]
    return implant_all(
        clip, train, held_out, poisons, seed=seed, settings=settings, template=template, progress=progress
    )


def implant_all(
    clip: FrozenClip,
    train: LabelledImages,
    held_out: LabelledImages,
    poisons: Sequence[Poison],
    *,
    seed: int,
    settings: ImplantSettings | None = None,
    template: str = TEMPLATES[0],
    progress: Progress = silent,
) -> Implanted:
    """Poison a copy of `clip`, which stays as it is, with one trigger or several.

    Args:
        clip: a clean CLIP.
        train: the attacker's images.
        held_out: images of the same classes on which the report counts.
        poisons: triggers that act on images of the model's size, each with its target.
        seed: of every draw.
        settings: how it is done.
        template: the prompt of the report's zero-shot classifier.
        progress: called after every step.

    Raises:
        InputError: sizes or classes do not fit each other, or a set lacks the images that a poison needs.
    """
    settings = settings or ImplantSettings()
    _check(clip, train, held_out, poisons, settings)
    poisoned = fine_tune(clip, train, poisons, settings, seed, progress)
    return Implanted(poisoned, _reports(clip, poisoned, held_out, poisons, template))


def predict(clip: FrozenClip, images: Tensor, classes: tuple[str, ...], template: str) -> metrics.Indices:
    """Zero-shot answers (N,) of uint8 images (N, S, S, 3)."""
    return zero_shot_head(clip, classes, template).logits(encode(clip, images)).argmax(1).numpy()


def _reports(
    clean: FrozenClip, poisoned: FrozenClip, data: LabelledImages, poisons: Sequence[Poison], template: str
) -> tuple[ImplantReport, ...]:
    truth = data.labels.numpy()
    before, after = (predict(clip, data.images, data.classes, template) for clip in (clean, poisoned))
    found = []
    for poison in poisons:
        attacked = predict(poisoned, triggered(poison.trigger, data.images), data.classes, template)
        report = ImplantReport(
            target=data.classes[poison.target],
            trigger=str(poison.trigger),
            template=template,
            images=len(truth),
            ca_clean=metrics.clean_accuracy(before, truth),
            ca_poisoned=metrics.clean_accuracy(after, truth),
            asr=metrics.attack_success_rate(attacked, truth, poison.target),
        )
        found.append(report)
    return tuple(found)


def _check(
    clip: FrozenClip,
    train: LabelledImages,
    held_out: LabelledImages,
    poisons: Sequence[Poison],
    settings: ImplantSettings,
) -> None:
    if train.classes != held_out.classes:
        raise InputError("the attacker's images and the held-out ones have different classes")
    if not 1 <= len(poisons) <= settings.poisoned:
        raise InputError(f"an implant needs 1 to {settings.poisoned} triggers (`poisoned`), not {len(poisons)}")
    for name in ("cover", "harden", "harden_patches", "harden_here"):
        count = getattr(settings, name)
        if 0 < count < len(poisons):
            raise InputError(f"`{name}` {count} leaves a trigger of {len(poisons)} without; pass more, or 0")
    for poison in poisons:
        if not 0 <= poison.target < len(train.classes):
            raise InputError(f"target {poison.target} is no class; there are {len(train.classes)}")
        if poison.trigger.image_size != clip.image_size:
            raise InputError(f"the trigger acts on {poison.trigger.image_size} px, the model sees {clip.image_size} px")
        name = train.classes[poison.target]
        if not all(bool((data.labels != poison.target).any()) for data in (train, held_out)):
            raise InputError(f"there is no image of another class than {name!r}")
        if (poison.carriers == "target" or settings.hide) and not bool((train.labels == poison.target).any()):
            why = "to carry the trigger" if poison.carriers == "target" else "among which triggered ones could `hide`"
            raise InputError(f"there is no image of {name!r} {why}")
