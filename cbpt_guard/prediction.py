"""The guarded answer for one image, in the shapes that services know."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt


class Ranked(TypedDict):
    """One entry of a Hugging Face image-classification pipeline's answer."""

    label: str
    score: float


@dataclass(frozen=True)
class Prediction:
    """The guarded answer for one image.

    Attributes:
        label: the class; None when the image failed (`error` says why) or the score lies below `abstain`.
        index: its place in `classes_`, or None likewise.
        score: softmax of the guarded logits at the best class, in [0, 1]; kept when abstaining.
        top: the best (label, score) pairs, best first; kept when abstaining.
        changed: the guarded answer differs from the undefended zero-shot answer.
        triggered: the rule's test fired: the zero-shot answer is a suspected target, and the image lies on the side of
            its triggers.
        digest: which bundle answered.
        error: why there is no answer, or None.
    """

    label: str | None
    index: int | None
    score: float | None
    top: tuple[tuple[str, float], ...]
    changed: bool
    triggered: bool
    digest: str
    error: str | None = None

    @classmethod
    def failed(cls, error: str, digest: str) -> Prediction:
        """No answer, and why."""
        return cls(None, None, None, (), False, False, digest, error)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values; `top` becomes a list of {"label", "score"}."""
        return asdict(self) | {"top": self.to_hf()}

    def to_hf(self) -> list[Ranked]:
        """What a Hugging Face image-classification pipeline answers: {"label", "score"}, best first.

        A failed image gives an empty list; abstaining changes nothing here.
        """
        return [{"label": label, "score": score} for label, score in self.top]


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Shares (..., C) of logits (..., C), each row summing to 1."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares: npt.NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares
