"""Golden inputs: a few pictures drawn from a seed, some under found triggers, with the answers that every runtime must
repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from cbpt_guard.bundle import Golden
from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.errors import CheckError
from cbpt_guard.export.gate import triggered
from cbpt_guard.export.parity import decision_slack, parity_bound
from cbpt_guard.images import Pixels
from cbpt_guard.session import Session

_WIDER: Final = 10
_COUNT, _FLAGGED, _POOL, _SEED = 4, 2, 64, 0
_COARSE: Final = 8  # a trigger on pixel noise leads to its target seldom, on a few large tiles nearly always


def golden_tolerance(head: GuardedHead) -> float:
    """How far, in logits, another processor may be off: 0.05 at CLIP's scale of 100.

    Other processors add in another order and other kernels round elsewhere, which grows with depth: ten times
    the bound of this machine leaves room for that. TF32 and half precision, whose numbers no gate has seen,
    were measured at twice the tolerance in the median (MobileNetV2), so a self-test over several images fails.
    """
    return _WIDER * parity_bound(head)


def make_golden(session: Session, head: GuardedHead, bank: TriggerBank, tolerance: float) -> Golden:
    """The golden inputs and the ONNX file's answers to them; first those under found triggers that the rule flags.

    Only pictures far from another decision of the rule are taken: near one, a rounding error flips a flag. Without
    flagged ones, of which there are none if no mosaic under a trigger is clear enough, a runtime on which the rule's
    test never fires would pass the self-test.

    Args:
        tolerance: how far, in logits, another processor may be off; those that lie farther come first.

    Raises:
        CheckError: the graph decides on none of the pictures by more than float32's own tolerance.
    """
    under, pool = _under(draw(session.size, most_tiles=_COARSE), bank), draw(session.size)
    flagged = _clearest(session, head, under, tolerance, flagged=True)[: max(_FLAGGED, len(head.suspects))]
    plain = _clearest(session, head, pool, tolerance, flagged=False)[: max(_COUNT - len(flagged), _COUNT - _FLAGGED)]
    images = np.concatenate([flagged, plain])
    if len(images) == 0:
        raise CheckError("every golden picture lies at a tie or a threshold of the graph; no self-test is possible")
    outputs = session.run(images)
    return Golden(images, outputs.logits, outputs.logits_original, outputs.triggered)


def _under(pool: Pixels, bank: TriggerBank) -> Pixels:
    """The pictures shared out among the found triggers."""
    parts = [pool[number :: len(bank)] for number in range(len(bank))]
    return np.concatenate([pool[:0], *(triggered(part, one) for part, one in zip(parts, bank, strict=True))])


def _clearest(session: Session, head: GuardedHead, pictures: Pixels, tolerance: float, *, flagged: bool) -> Pixels:
    """Those that the rule flags, or does not, the clearest first; of those flagged first one for each class answered.

    None within float32's tolerance of another decision; and none within a wider one if any lies beyond.
    """
    if not len(pictures):
        return pictures
    answers = session.run(pictures)
    slack = decision_slack(head, answers.embedding)
    order = np.argsort(-slack, kind="stable")
    order = order[(answers.triggered == flagged)[order] & (slack > golden_tolerance(head))[order]]
    wide = order[slack[order] > tolerance]
    order = wide if len(wide) else order
    if flagged:
        _, first = np.unique(answers.logits_original[order].argmax(axis=1), return_index=True)
        order = np.concatenate([order[np.sort(first)], np.delete(order, first)])
    return pictures[order]


def save_golden(golden: Golden, path: Path) -> None:
    """Write `golden.npz`."""
    np.savez_compressed(
        path,
        images=golden.images,
        logits=golden.logits,
        logits_original=golden.logits_original,
        triggered=golden.triggered,
    )


def draw(size: int, count: int = _POOL, *, most_tiles: int | None = None) -> Pixels:
    """Random mosaics uint8 (count, size, size, 3), from a few large tiles to pixel noise, or to `most_tiles` a side."""
    generator = np.random.default_rng(_SEED)
    images = np.empty((count, size, size, 3), np.uint8)
    for image in images:
        tiles = int(generator.integers(1, min(size, most_tiles or size), endpoint=True))
        colours = generator.integers(0, 256, (tiles, tiles, 3), dtype=np.uint8)
        place = np.arange(size) * tiles // size
        image[:] = colours[place[:, None], place]
    return images
