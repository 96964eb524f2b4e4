"""A user's own check of a bundle: CA, ASR and PA on their images, guarded and undefended, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from cbpt_guard import metrics
from cbpt_guard.classifier import GuardedClassifier
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
    labels = np.array([label for _, label in _items(listing, names)])
    clean = _answers(guard, listing, names, None)
    attacked = None if trigger is None else _answers(guard, listing, names, trigger)
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


def _items(listing: Listing, names: list[str]) -> list[tuple[Path, int]]:
    """Each file with its class's place in the bundle."""
    pairs = zip(listing.classes, listing.files, strict=True)
    return [(path, _index(name, names)) for name, files in pairs for path in files]


def _batches(guard: GuardedClassifier, listing: Listing, names: list[str]) -> Iterator[Pixels]:
    items = _items(listing, names)
    preprocess = guard.manifest.preprocess
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), _BATCH):
            paths = [path for path, _ in items[start : start + _BATCH]]
            yield np.stack(list(pool.map(lambda path: _prepared(path, preprocess), paths)))


def _prepared(path: Path, preprocess: Preprocess) -> Pixels:
    try:
        return prepare(load_image(path), preprocess)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def _answers(guard: GuardedClassifier, listing: Listing, names: list[str], trigger: Apply | None) -> _Answers:
    parts = []
    for images in _batches(guard, listing, names):
        outputs = guard.run(images if trigger is None else trigger(images))
        if not (np.isfinite(outputs.logits).all() and np.isfinite(outputs.logits_original).all()):
            raise CheckError("the graph answered with numbers that are not finite")
        parts.append((outputs.logits_original.argmax(1), outputs.logits.argmax(1), outputs.triggered))
    return _Answers(*(np.concatenate(column) for column in zip(*parts, strict=True)))


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
