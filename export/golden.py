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
_COUNT, _POOL, _SEED = 4, 64, 0
_UNDER_EACH, _FLAGGED = 8, 2


def golden_tolerance(head: GuardedHead) -> float:
    """How far, in logits, another processor may be off: 0.05 at CLIP's scale of 100.

    Other processors add in another order and other kernels round elsewhere, which grows with depth: ten times
    the bound of this machine leaves room for that. TF32 and half precision, whose numbers no gate has seen,
    were measured at twice the tolerance in the median (MobileNetV2), so a self-test over several images fails.
    """
    return _WIDER * parity_bound(head)


def make_golden(session: Session, head: GuardedHead, bank: TriggerBank) -> Golden:
    """The golden inputs and the ONNX file's answers to them; first those under found triggers that the rule flags.

    Only pictures far from another decision of the rule are taken: near one, a rounding error flips a flag. Without
    flagged ones a runtime on which the rule's test never fires would pass the self-test.

    Raises:
        CheckError: the graph decides on none of the pictures by more than the tolerance.
    """
    pool = draw(session.size)
    pictures = np.concatenate([pool, *(triggered(pool[:_UNDER_EACH], trigger) for trigger in bank)])
    answers = session.run(pictures)
    slack = decision_slack(head, answers.embedding)
    order = np.argsort(-slack, kind="stable")
    clear = order[slack[order] > golden_tolerance(head)]
    flagged = clear[answers.triggered[clear]][:_FLAGGED]
    images = pictures[[*flagged, *clear[~answers.triggered[clear]][: _COUNT - len(flagged)]]]
    if len(images) == 0:
        raise CheckError("every golden picture lies at a tie or a threshold of the graph; no self-test is possible")
    outputs = session.run(images)
    return Golden(images, outputs.logits, outputs.logits_original, outputs.triggered)


def save_golden(golden: Golden, path: Path) -> None:
    """Write `golden.npz`."""
    np.savez_compressed(
        path,
        images=golden.images,
        logits=golden.logits,
        logits_original=golden.logits_original,
        triggered=golden.triggered,
    )


def draw(size: int, count: int = _POOL) -> Pixels:
    """Random mosaics uint8 (count, size, size, 3), from a few large tiles to pixel noise."""
    generator = np.random.default_rng(_SEED)
    images = np.empty((count, size, size, 3), np.uint8)
    for image in images:
        tiles = int(generator.integers(1, size, endpoint=True))
        colours = generator.integers(0, 256, (tiles, tiles, 3), dtype=np.uint8)
        place = np.arange(size) * tiles // size
        image[:] = colours[place[:, None], place]
    return images
