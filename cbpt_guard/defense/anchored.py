"""Anchored rows: text rows that are moved towards what triggered images show, no further than the images ask for.

Multinomial logistic regression whose prior lies at the zero-shot rows instead of at 0: what the texts know stays
where few images speak. Prompts can only reach rows that some text has; images under a trigger lie elsewhere. Sixteen
labels a class say little of which classes are alike; what the zero-shot head makes of the same image without a trigger
says it too, so that is taught along with the label (distillation, Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.head import Head
from cbpt_guard.defense.settings import AnchorSettings
from cbpt_guard.defense.tuning import PART, FeatureSet

_HISTORY = 10  # pairs of tensors as large as all rows


def anchored_rows(original: Head, data: FeatureSet, settings: AnchorSettings) -> Tensor:
    """Rows (C, E), no unit vectors any more, that minimise over all images under each trigger

        sum CE(s F_trig W', a y + (1 - a) softmax(s F T0' / tau)) + |s W - s T0|^2 / (2 C)

    with a = `label_weight`, tau = `temperature` and C = `strength`, as scikit-learn names it. Clean images only teach:
    under the switch they see these rows where the test is wrong alone. Classes without images keep their rows, and
    without triggers all do.
    """  # fmt: skip
    triggers, count = len(data.triggered), len(data.triggered) * len(data.labels)
    if not count:
        return original.rows.clone()
    parts = torch.arange(len(data.labels)).split(PART)
    moving = data.labels.unique()
    start = original.scale * original.rows
    moved = torch.zeros(len(moving), start.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [moved], max_iter=settings.iterations, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        """The mean of what is minimised, (), with its gradient left in `moved`: part by part, so that few are held."""
        optimiser.zero_grad()
        value = (moved**2).sum() / (2 * settings.strength * count)
        value.backward()
        for index in parts:
            # computed anew each time: kept, it would be as large as all logits of the clean images
            wanted = taught(original, data.clean[index], data.labels[index], settings).repeat(triggers, 1)
            rows = start.index_add(0, moving, moved)
            logits = data.triggered[:, index].flatten(0, 1) @ rows.T
            fit = F.cross_entropy(logits, wanted, reduction="sum") / count
            fit.backward()
            value = value + fit
        return value.detach()

    optimiser.step(loss)
    return original.rows.index_add(0, moving, moved.detach() / original.scale)


def taught(original: Head, clean: Tensor, labels: Tensor, settings: AnchorSettings) -> Tensor:
    """What a triggered copy of each image is to be answered with, (N, C): its label (N,) and the zero-shot head's
    softened probabilities for the image without a trigger, features (N, E)."""  # fmt: skip
    known = (original.logits(clean) / settings.temperature).softmax(dim=1)
    truth = F.one_hot(labels, known.shape[1])
    return settings.label_weight * truth + (1 - settings.label_weight) * known
