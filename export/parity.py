"""Does the ONNX file answer as torch does? Measured on the run's held-out images, against a stated bound."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.errors import CheckError
from cbpt_guard.export.graph import GuardedGraph
from cbpt_guard.images import Pixels
from cbpt_guard.manifest import Parity
from cbpt_guard.session import Outputs, Session

RELATIVE_BOUND: Final = 5e-5
"""Of the logit scale: 5e-3 logits at CLIP's 100. float32 itself costs 2e-6 on a MobileNetV2, TF32 1e-3."""

_BATCH = 32
_OTHER_BATCHES = (1, 2, 5)
_FEW = 10


def parity_bound(head: GuardedHead) -> float:
    """The largest logit difference that is still float32's own."""
    return RELATIVE_BOUND * max(1.0, head.original.scale)


def measure_parity(graph: GuardedGraph, session: Session, images: Pixels) -> Parity:
    """Compare the ONNX file with torch on images uint8 (N, S, S, 3), a few from all over in other batch sizes too.

    Zero-shot logits and embeddings must agree on every image. The rule decides, so an image closer to another
    decision than the bound may rightly fall to either side: guarded logits and flags are compared on the
    others. Agreement within the bound includes the first answer wherever it leads by twice the bound.

    Raises:
        CheckError: the two differ by more than the bound.
    """
    bound = parity_bound(graph.head)
    wanted = torch_outputs(graph, images)
    decided = decision_slack(graph.head, wanted.embedding) > bound
    few = np.linspace(0, len(images) - 1, min(_FEW, len(images))).round().astype(np.int64)
    runs: list[tuple[npt.NDArray[np.int64] | slice, int]] = [(slice(None), _BATCH)]
    worst = 0.0
    for chosen, batch in (*runs, *((few, batch) for batch in _OTHER_BATCHES)):
        found, expected, sure = session.run(images[chosen], batch), _taken(wanted, chosen), decided[chosen]
        difference = _logit_difference(found, expected, sure)
        moved = _embedding_logits(graph.head) * _embedding_difference(found, expected)
        if not max(difference, moved) <= bound or np.isnan([difference, moved]).any():
            raise CheckError(
                f"the ONNX file differs from torch by {difference:.3g} logits, and by {moved:.3g} through its "
                f"embedding, in batches of {batch}; at most {bound:.3g} is allowed"
            )
        if not np.array_equal(found.triggered[sure], expected.triggered[sure]):
            raise CheckError(f"the ONNX file's flags differ from torch's in batches of {batch}")
        worst = max(worst, difference)
    return Parity(images=len(images), max_logit_difference=worst, bound=bound)


@torch.no_grad()
def torch_outputs(graph: GuardedGraph, images: Pixels) -> Outputs:
    """What the module itself answers for images uint8 (N, S, S, 3)."""
    parts = [graph(part) for part in torch.from_numpy(images).split(_BATCH)]
    return Outputs(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def decision_slack(head: GuardedHead, embedding: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How far, in logits, the unit rows (N, E) lie from another decision of the rule, (N,).

    Either the zero-shot answer may change, when two logits meet halfway, or the test's side. An error of d in
    the embedding moves a logit by up to `scale` d, the test by up to |direction| d: so both share one unit.
    """
    features = torch.from_numpy(embedding)
    logits = head.original.logits(features)
    best: Tensor = logits.topk(2, dim=1).values
    answer = logits.argmax(dim=1)
    direction, threshold = head.test.directions[answer], head.test.thresholds[answer]
    distance = ((features * direction).sum(dim=1) - threshold).abs() / direction.norm(dim=1)
    slack = torch.minimum((best[:, 0] - best[:, 1]) / 2, head.original.scale * distance)
    return slack.numpy().astype(np.float32, copy=False)


def _embedding_logits(head: GuardedHead) -> float:
    """What a difference of 1 in the embedding can cost in logits: the longest row of both heads, times the scale."""
    longest = torch.cat([head.original.rows, head.guarded.rows]).norm(dim=1).max()
    return head.original.scale * float(longest)


def _taken(outputs: Outputs, chosen: npt.NDArray[np.int64] | slice) -> Outputs:
    logits, triggered, original, embedding = outputs
    return Outputs(logits[chosen], triggered[chosen], original[chosen], embedding[chosen])


def _logit_difference(found: Outputs, wanted: Outputs, decided: npt.NDArray[np.bool_]) -> float:
    original = np.abs(found.logits_original - wanted.logits_original)
    guarded = np.abs(found.logits[decided] - wanted.logits[decided])
    return float(np.max([original.max(), guarded.max(initial=0)]))


def _embedding_difference(found: Outputs, wanted: Outputs) -> float:
    """By how much an embedding differs at most."""
    return float(np.linalg.norm(found.embedding - wanted.embedding, axis=1).max())
