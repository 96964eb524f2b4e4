"""A user's own check of a bundle: CA, ASR and PA on their images, guarded and undefended, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from cbpt_guard import metrics
from cbpt_guard.classifier import GuardedClassifier
from cbpt_guard.decoding import decoders_here, in_batches
from cbpt_guard.errors import CheckError, ImageError, InputError
from cbpt_guard.images import Pixels, Preprocess, load_image, prepare
from cbpt_guard.listing import Listing
from cbpt_guard.manifest import VerdictName

Apply = Callable[[Pixels], Pixels]
_BATCH = 64
_SHOWN = 5  # classes that a message names


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(_Frozen):
    """A share in [0, 1] of `images` images, and its interval (95 %; see `metrics.bootstrap_interval`)."""

    share: float
    low: float
    high: float
    images: int


class Shares(_Frozen):
    """One classifier: CA, and under a trigger ASR, PA, the largest class's share and the target's clean recall."""

    ca: Share
    asr: Share | None = None
    pa: Share | None = None
    max_share: float | None = None
    target_recall: Share | None = None


class Evaluation(_Frozen):
    """What was counted through a bundle; `flag_*` is the share of images that the rule flags."""

    digest: str
    verdict: VerdictName
    images: int
    target: str | None
    undefended: Shares
    guarded: Shares
    flag_clean: float
    flag_triggered: float | None


@dataclass(frozen=True)
class _Answers:
    """Class indices (N,) of both heads and the rule's flag (N,)."""

    undefended: metrics.Indices
    guarded: metrics.Indices
    flags: np.ndarray


def evaluate(
    guard: GuardedClassifier,
    listing: Listing,
    trigger: Apply | None = None,
    target: str | None = None,
    *,
    seed: int = 0,
) -> Evaluation:
    """Count a bundle's answers for listed images, and for the same images triggered.

    Args:
        guard: the bundle.
        listing: images by class; every class must be one of the bundle's.
        trigger: triggered copies of uint8 images (N, S, S, 3), after resize and crop; None counts CA alone.
        target: the class that the trigger aims at.
        seed: of the bootstrap.

    Raises:
        InputError: a class is not the bundle's, a trigger comes without a target, or there is nothing to count.
        ImageError: an image cannot be read.
        CheckError: an answer is not finite.
    """
    names = guard.classes_.tolist()
    index = None if target is None else _index(target, names)
    if (trigger is None) != (index is None):
        raise InputError("a trigger and its target belong together: pass both, or none to count CA alone")
    paths, labels = _items(listing, names)
    if index is not None:
        _check_target(labels, index, names)
    clean, *attacks = _answers(guard, paths, (None,) if trigger is None else (None, trigger))
    attacked = attacks[0] if attacks else None
    return Evaluation(
        digest=guard.digest,
        verdict=guard.manifest.verdict,
        images=len(labels),
        target=target,
        undefended=_shares(clean.undefended, attacked.undefended if attacked else None, labels, index, seed),
        guarded=_shares(clean.guarded, attacked.guarded if attacked else None, labels, index, seed),
        flag_clean=float(clean.flags.mean()),
        flag_triggered=None if attacked is None else float(attacked.flags.mean()),
    )


def _index(name: str, names: list[str]) -> int:
    if name not in names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(map(repr, names[:_SHOWN]))
        raise InputError(f"{name!r} is no class of this bundle; it answers {shown}{more}")
    return names.index(name)


def _items(listing: Listing, names: list[str]) -> tuple[list[Path], metrics.Indices]:
    """The files, and each one's class's place in the bundle."""
    pairs = zip(listing.classes, listing.files, strict=True)
    items = [(path, _index(name, names)) for name, files in pairs for path in files]
    return [path for path, _ in items], np.array([label for _, label in items])


def _check_target(labels: metrics.Indices, target: int, names: list[str]) -> None:
    """A trigger is counted on other classes, and its target's recall on its own."""
    for there, where in (((labels == target).any(), "of"), ((labels != target).any(), "of any class but")):
        if not there:
            raise InputError(f"there is no image {where} the target {names[target]!r} to count")


def _answers(guard: GuardedClassifier, paths: list[Path], views: Sequence[Apply | None]) -> list[_Answers]:
    """Answers for the images as they are (None) or triggered, a batch at a time, decoded while the graph runs."""
    prepared = partial(_prepared, preprocess=guard.manifest.preprocess)
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in views]
    with closing(in_batches(paths, prepared, batch_size=_BATCH, workers=decoders_here())) as batches:
        for batch in batches:
            images = np.stack(batch)
            for part, view in zip(parts, views, strict=True):
                part.append(_answered(guard, images if view is None else view(images)))
    return [_Answers(*(np.concatenate(column) for column in zip(*part, strict=True))) for part in parts]


def _prepared(path: Path, preprocess: Preprocess) -> Pixels:
    try:
        return prepare(load_image(path), preprocess)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def _answered(guard: GuardedClassifier, images: Pixels) -> tuple[np.ndarray, ...]:
    outputs = guard.run(images)
    if not (np.isfinite(outputs.logits).all() and np.isfinite(outputs.logits_original).all()):
        raise CheckError("the graph answered with numbers that are not finite")
    return outputs.logits_original.argmax(1), outputs.logits.argmax(1), outputs.triggered


def _shares(
    clean: metrics.Indices, attacked: metrics.Indices | None, labels: metrics.Indices, target: int | None, seed: int
) -> Shares:
    def share(value: float, images: int) -> Share:
        low, high = metrics.bootstrap_interval(value, images, seed)
        return Share(share=value, low=low, high=high, images=images)

    if attacked is None or target is None:
        return Shares(ca=share(metrics.clean_accuracy(clean, labels), len(labels)))
    counts, own = metrics.count(clean, attacked, labels, target), int((labels == target).sum())
    return Shares(
        ca=share(counts.ca, len(labels)),
        asr=share(counts.asr, len(labels) - own),
        pa=share(counts.pa, len(labels) - own),
        max_share=counts.max_share,
        target_recall=share(counts.target_recall, own),
    )
