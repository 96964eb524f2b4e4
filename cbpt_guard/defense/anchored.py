"""Anchored rows: text rows that are moved towards what triggered images show, no further than the images ask for.

Multinomial logistic regression whose prior lies at the zero-shot rows instead of at 0: what the texts know stays
where few images speak. Prompts can only reach rows that some text has; images under a trigger lie elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.head import Head
from cbpt_guard.defense.settings import AnchorSettings
from cbpt_guard.defense.tuning import FeatureSet

_PART = 512  # images whose logits are in memory at once, so that it hardly grows with the classes
_HISTORY = 10  # pairs of tensors as large as all rows


def anchored_rows(original: Head, data: FeatureSet, settings: AnchorSettings) -> Tensor:
    """Rows (C, E), no unit vectors any more, that minimise over clean and triggered images together

        sum CE(s F W', y) + |s W - s T0|^2 / (2 C)

    with C = `strength`, as scikit-learn names it. Classes without images keep their rows.
    """  # fmt: skip
    features = torch.cat([data.clean, data.triggered.flatten(0, 1)])
    labels = data.labels.repeat(1 + len(data.triggered))
    parts = list(zip(features.split(_PART), labels.split(_PART), strict=True))
    moving = data.labels.unique()
    start = original.scale * original.rows
    moved = torch.zeros(len(moving), start.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [moved], max_iter=settings.iterations, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (moved**2).sum() / (2 * settings.strength * len(labels))
        value.backward()
        for part, wanted in parts:
            rows = start.index_add(0, moving, moved)
            fit = F.cross_entropy(part @ rows.T, wanted, reduction="sum") / len(labels)
            fit.backward()
            value = value + fit
        return value.detach()

    optimiser.step(loss)
    return original.rows.index_add(0, moving, moved.detach() / original.scale)
