"""Answers become shares: which images are counted, their features once per suspect, and the bundle's own answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cbpt_guard import metrics
from cbpt_guard.bench.lines import ClassRecall, PairShares, Shares
from cbpt_guard.classifier import GuardedClassifier
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import Listing, load_images
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.head import Answer
from cbpt_guard.defense.triggers import PlantedTrigger, Trigger
from cbpt_guard.errors import CheckError
from cbpt_guard.files import in_turn
from cbpt_guard.images import Pixels, Preprocess


class Answers(NamedTuple):
    """Class indices (N,) and the defence's flag (N,)."""

    predicted: metrics.Indices
    flagged: np.ndarray


Classify = Callable[[Trigger | None], Answers]
"""A classifier's answers for the counted images, clean (None) or triggered."""


@dataclass(frozen=True)
class ImageSet:
    """The images of a listing, class by class, of which those that were not drawn as shots are counted.

    Args:
        listing: every image of the split.
        shots: those of them that a defence was given.
        preprocess: the suspect's.
    """

    listing: Listing
    shots: Listing | None
    preprocess: Preprocess

    @property
    def counted(self) -> np.ndarray:
        """Which of all images are counted, (N,)."""
        drawn = set() if self.shots is None else {path for files in self.shots.files for path in files}
        return np.array([path not in drawn for files in self.listing.files for path in files])

    @property
    def labels(self) -> metrics.Indices:
        """Classes of the counted images."""
        sizes = [len(files) for files in self.listing.files]
        labels: metrics.Indices = np.arange(len(sizes)).repeat(sizes)[self.counted]
        return labels

    def batches(self, *, everything: bool = False) -> Iterator[Pixels]:
        """Pixels (N, S, S, 3) of the counted images, or of all, class by class: they need not fit into memory."""
        counted, start = self.counted, 0
        for name, files in zip(self.listing.classes, self.listing.files, strict=True):
            kept = [path for path, count in zip(files, counted[start:], strict=False) if count or everything]
            start += len(files)
            if kept:
                yield load_images(Listing((name,), (tuple(kept),)), self.preprocess).images.numpy()

    def digest(self) -> str:
        """Which files these are: paths, sizes and times of change."""
        found = hashlib.sha256(self.preprocess.model_dump_json().encode())
        for path in (path for files in self.listing.files for path in files):
            about = path.stat()
            found.update(f"{path.absolute()}\n{about.st_size} {about.st_mtime_ns}\n".encode())
        return found.hexdigest()


@dataclass(frozen=True)
class FeatureStore:
    """Features of whole image sets under triggers, made once and kept in `folder`; `model` is the suspect's sha256."""

    folder: Path
    model: str

    def features(self, clip: FrozenClip, images: ImageSet, trigger: Trigger | None) -> Tensor:
        """Unit features (N, E) of the counted images of a set, clean or triggered."""
        name = hashlib.sha256("\n".join((self.model, images.digest(), described(trigger))).encode()).hexdigest()
        path = self.folder / f"{name}.npy"
        if not path.exists():
            with in_turn(path):  # a process beside this one may need the same
                if not path.exists():
                    partial = path.with_suffix(".new.npy")
                    np.save(partial, encoded(clip, images, trigger, everything=True).numpy())
                    partial.replace(path)
        return torch.from_numpy(np.load(path, allow_pickle=False)[images.counted])


def described(trigger: Trigger | None) -> str:
    """What tells a trigger from any other: its kind, its numbers, and what it does to one image."""
    if trigger is None:
        return "clean"
    grey = np.random.default_rng(0).integers(0, 256, (1, trigger.image_size, trigger.image_size, 3), dtype=np.uint8)
    done = hashlib.sha256(trigger.apply(grey).tobytes()).hexdigest()
    return f"{trigger.kind} {trigger.image_size} {done}"


def encoded(clip: FrozenClip, images: ImageSet, trigger: Trigger | None, *, everything: bool = False) -> Tensor:
    """Unit features (N, E), nothing kept."""
    parts = images.batches(everything=everything)
    return torch.cat([encode(clip, torch.from_numpy(_shown(part, trigger))) for part in parts])


def by_head(answer: Callable[[Tensor], Answer], features: Callable[[Trigger | None], Tensor]) -> Classify:
    """Answers of a head over features."""

    def classify(trigger: Trigger | None) -> Answers:
        found = answer(features(trigger))
        return _answers([(found.logits.detach().cpu().numpy(), found.triggered.cpu().numpy())])

    return classify


def by_bundle(guard: GuardedClassifier, images: ImageSet) -> Classify:
    """Answers of an exported bundle, as a service gets them."""

    def classify(trigger: Trigger | None) -> Answers:
        outputs = (guard.run(_shown(part, trigger)) for part in images.batches())
        return _answers([(part.logits, part.triggered) for part in outputs])

    return classify


def remembered(classify: Classify) -> Classify:
    """The same answers, each made once."""
    kept: dict[str, Answers] = {}

    def answer(trigger: Trigger | None) -> Answers:
        name = described(trigger)
        if name not in kept:
            kept[name] = classify(trigger)
        return kept[name]

    return answer


def shares(classify: Classify, planted: Sequence[PlantedTrigger], images: ImageSet) -> list[PairShares]:
    """The shares of each (trigger, target) pair.

    Raises:
        InputError: a target's class has no image, or no other class has one.
    """
    clean, labels = classify(None), images.labels
    return [
        _pair(clean, classify(pair.trigger), pair, labels, images.listing.classes.index(pair.target))
        for pair in planted
    ]


def recalls(before: Classify, after: Classify, names: Sequence[str], images: ImageSet) -> tuple[ClassRecall, ...]:
    """The recall of some classes on clean images before and after; a class of which none is counted has none."""
    labels, classes = images.labels, images.listing.classes

    def recall(classify: Classify, name: str) -> float:
        return metrics.class_recall(classify(None).predicted, labels, classes.index(name))

    return tuple(
        ClassRecall(name=name, recall=recall(after, name), undefended=recall(before, name))
        for name in names
        if (labels == classes.index(name)).any()
    )


def mean(pairs: Sequence[Shares]) -> Shares:
    """The mean of several pairs; of one, the pair itself."""
    names = Shares.model_fields
    return Shares(**{name: sum(getattr(pair, name) for pair in pairs) / len(pairs) for name in names})


def _pair(clean: Answers, attacked: Answers, pair: PlantedTrigger, labels: metrics.Indices, target: int) -> PairShares:
    counts = metrics.count(clean.predicted, attacked.predicted, labels, target)
    return PairShares(
        **counts._asdict(),
        false_positives=metrics.attack_success_rate(clean.predicted, labels, target),
        flag_clean=float(clean.flagged.mean()),
        flag_triggered=float(attacked.flagged.mean()),
        trigger=str(pair.trigger),
        target=pair.target,
    )


def _answers(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Answers:
    """The first of equal logits is the answer, as GuardedClassifier has it."""
    logits, flagged = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not np.isfinite(logits).all():
        raise CheckError("a classifier answered with numbers that are not finite")
    return Answers(logits.argmax(1), flagged)


def _shown(pixels: Pixels, trigger: Trigger | None) -> Pixels:
    return pixels if trigger is None else trigger.apply(pixels)
