"""LabelledImages: the listed clean images, prepared as the model wants them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.errors import ImageError, InputError
from cbpt_guard.images import Preprocess, load_image, prepare
from cbpt_guard.listing import IMAGE_SUFFIXES, Listing, images_below, list_images

__all__ = ["LabelledImages", "Listing", "list_images", "load_images", "load_triggered", "split"]

_SHOWN = 10
_FEWEST_TO_SPLIT = 4


@dataclass(frozen=True)
class LabelledImages:
    """Prepared images uint8 (N, S, S, 3), labels (N,) into `classes`, and the files that could not be read."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))


def load_images(
    listing: Listing, preprocess: Preprocess, *, skip_bad: bool | None = None, progress: Progress = silent
) -> LabelledImages:
    """Decode, resize and crop every listed image.

    Raises:
        InputError: some images cannot be read and `skip_bad` is off, or no choice (None); the first ten are listed.
    """
    items = [(path, label) for label, paths in enumerate(listing.files) for path in paths]
    images, labels, bad = [], [], []
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda item: _prepared(item[0], preprocess), items)
        for number, ((path, label), result) in enumerate(zip(items, results, strict=True)):
            if isinstance(result, str):
                bad.append(f"{path}: {result}".encode("utf-8", "backslashreplace").decode())  # a path may be any bytes
            else:
                images.append(torch.from_numpy(result))
                labels.append(label)
            progress(Step("images", number + 1, len(items)))
    if bad and not skip_bad:
        raise InputError(_describe_bad(bad, skippable=skip_bad is not None))
    if not images:
        raise InputError(f"none of the {len(items)} images can be read; the first: {bad[0]}")
    if bad and len(set(labels)) < min(2, len(listing.classes)):
        raise InputError(f"only images of {listing.classes[labels[0]]!r} can be read; the first bad one: {bad[0]}")
    return LabelledImages(torch.stack(images), torch.tensor(labels), listing.classes, tuple(bad))


def load_triggered(folder: Path, preprocess: Preprocess, *, skip_bad: bool = False) -> LabelledImages:
    """Observed attack images of a folder, its sub-folders included; nobody knows their classes, so they have one.

    Raises:
        InputError: there is none, or one cannot be read and `skip_bad` is off.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    files = images_below(folder)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return load_images(Listing(("triggered",), (tuple(files),)), preprocess, skip_bad=skip_bad)


def split(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to tune on and indices held out: `held_out` of each class's images, none of a class below four.

    Where only one class has four, none are held out: success towards that class would have no image to show on.
    """
    large = labels.bincount() >= _FEWEST_TO_SPLIT
    some = held_out > 0 and int(large.sum()) > 1
    keep, hold = [], []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(held_out * len(index))), len(index) - 1) if some and large[label] else 0
        order = index[torch.from_numpy(np.random.default_rng([seed, label]).permutation(len(index)))]
        hold.append(order[:count])
        keep.append(order[count:])
    return torch.cat(keep).sort().values, torch.cat(hold).sort().values


def _prepared(path: Path, preprocess: Preprocess) -> np.ndarray | str:
    try:
        return prepare(load_image(path), preprocess)
    except ImageError as error:
        return str(error)


def _describe_bad(bad: Sequence[str], *, skippable: bool) -> str:
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    shown = "\n  ".join(bad[:_SHOWN])
    advice = "remove them or pass `--skip-bad`" if skippable else "remove them"
    return f"{len(bad)} {'image' if len(bad) == 1 else 'images'} cannot be read; {advice}:\n  {shown}{more}"
