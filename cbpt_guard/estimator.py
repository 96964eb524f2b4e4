"""A guarded classifier as scikit-learn's own code expects one: metrics, scorers and cross-validation take it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cbpt_guard.errors import InputError
from cbpt_guard.images import ImageSource

if TYPE_CHECKING:
    from cbpt_guard.classifier import GuardedClassifier

Labels = npt.NDArray[np.str_]


class SklearnClassifier:
    """An adapter around a loaded classifier; nothing is ever learnt, `fit` and `clone` return the same object.

    `classes_` is sorted, and `predict_proba` has its columns in that order, as scikit-learn's metrics silently
    assume; the bundle's own order stays in `guard.classes_`. `abstain` has no part here: every image gets a
    label, and an image that cannot be used raises `ImageError`.
    """

    def __init__(self, guard: GuardedClassifier) -> None:
        self.guard = guard
        self._order = np.argsort(guard.classes_, kind="stable")
        self.classes_: Labels = guard.classes_[self._order]

    def fit(self, X: Iterable[ImageSource], y: Iterable[str] | None = None) -> SklearnClassifier:  # noqa: N803
        """Return the adapter as it is: the bundle was fitted when it was made."""
        return self

    def predict(self, X: Iterable[ImageSource]) -> Labels:  # noqa: N803
        """Labels (N,) of images: paths, bytes, Pillow images or arrays, or one uint8 array (N, H, W, 3)."""
        best: Labels = self.classes_[self.predict_proba(X).argmax(axis=1)]
        return best

    def predict_proba(self, X: Iterable[ImageSource]) -> npt.NDArray[np.float64]:  # noqa: N803
        """Softmax of the guarded logits (N, C) in the order of the sorted `classes_`."""
        scores: npt.NDArray[np.float64] = self.guard.predict_proba(list(X))[:, self._order]
        return scores

    def score(
        self,
        X: Iterable[ImageSource],  # noqa: N803
        y: Iterable[str],
        sample_weight: Sequence[float] | npt.NDArray[np.float64] | None = None,
    ) -> float:
        """The share of images whose label is that of `y`, weighted by `sample_weight`.

        Raises:
            InputError: `y` has another length than `X`, or is empty.
        """
        found, wanted = self.predict(X), np.array(list(y))
        if len(found) != len(wanted) or len(found) == 0:
            raise InputError(f"{len(found)} images and {len(wanted)} labels; a score needs as many, and one at least")
        return float(np.average(found == wanted, weights=sample_weight))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The classifier that it adapts."""
        return {"guard": self.guard}

    def __sklearn_is_fitted__(self) -> bool:
        """Say that nothing is left to be fitted."""
        return True

    def __sklearn_clone__(self) -> SklearnClassifier:
        """Return itself: a frozen estimator shared by every fold."""
        return self

    def __sklearn_tags__(self) -> Any:
        """A classifier that needs no `fit`. Only scikit-learn calls this, so it is loaded by then."""
        utils = sys.modules["sklearn.utils"]
        return utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=False),
            classifier_tags=utils.ClassifierTags(),
            input_tags=utils.InputTags(two_d_array=False, three_d_array=True, string=True),
            requires_fit=False,
        )

    def __repr__(self) -> str:
        """The adapter and what it adapts."""
        return f"SklearnClassifier({self.guard!r})"
