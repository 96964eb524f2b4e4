"""The digits CLIP, clean and poisoned, as the files that a user would have and as values."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from cbpt_guard.bench.digits import (
    DigitsSplit,
    load_digits_split,
    train_digits_clip,
    write_class_folders,
    write_suspect,
)
from cbpt_guard.bench.implant import ImplantReport, implant
from cbpt_guard.bench.task import Task
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import Listing, load_images
from cbpt_guard.defense.settings import TEMPLATE
from cbpt_guard.defense.suspect import zero_shot_head
from cbpt_guard.defense.triggers import PlantedTrigger, Trigger, patch, save_trigger

SEED, TARGET, SHOTS = 0, 3, 20


@dataclass(frozen=True)
class DigitsModel:
    """`folder` holds suspect.pt and open_clip_config.json, `data` class folders with 20 clean images each."""

    clip: FrozenClip
    folder: Path
    data: Path
    split: DigitsSplit

    @property
    def checkpoint(self) -> Path:
        return self.folder / "suspect.pt"


@dataclass(frozen=True)
class DigitsSuspect(DigitsModel):
    """A poisoned one; `folder` holds trigger.json and trigger.png too, which no defence may read."""

    trigger: Trigger
    target: int
    report: ImplantReport


def make_clean(folder: Path) -> DigitsModel:
    split = load_digits_split(SEED)
    clip = train_digits_clip(split.train, SEED)
    data = write_class_folders(split.clean, folder / "clean", per_class=SHOTS)
    return DigitsModel(clip, write_suspect(clip, folder / "model").parent, data, split)


def make_suspect(clean: DigitsModel, folder: Path) -> DigitsSuspect:
    trigger = patch(clean.clip.image_size, SEED)
    poisoned = implant(clean.clip, clean.split.train, clean.split.test, trigger, TARGET, seed=SEED)
    model = write_suspect(poisoned.clip, folder / "model").parent
    save_trigger(trigger, clean.split.test.classes[TARGET], model)
    return DigitsSuspect(poisoned.clip, model, clean.data, clean.split, trigger, TARGET, poisoned.report)


def make_task(suspect: DigitsSuspect, listing: Listing, folder: Path) -> Task:
    """What the bench's suite would hand to a defence, with `listing` as the shots."""
    planted = PlantedTrigger(suspect.trigger, listing.classes[suspect.target])
    return task_of(suspect.clip, suspect.checkpoint, planted, listing, folder)


def task_of(clip: FrozenClip, checkpoint: Path, planted: PlantedTrigger, listing: Listing, folder: Path) -> Task:
    """The same of a suspect in parts."""
    with (folder / "shots.csv").open("w", newline="") as file:
        pairs = zip(listing.classes, listing.files, strict=True)
        csv.writer(file).writerows([("path", "label"), *((path, name) for name, files in pairs for path in files)])
    return Task(
        clip=clip,
        original=zero_shot_head(clip, listing.classes, TEMPLATE),
        shots=load_images(listing, clip.preprocess),
        checkpoint=checkpoint,
        listing=folder / "shots.csv",
        template=TEMPLATE,
        seed=0,
        folder=folder,
        planted=(planted,),
    )
