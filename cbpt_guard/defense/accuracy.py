"""The zero-shot accuracy on clean images: counted, and refused where it shows that something does not fit."""

from __future__ import annotations

from torch import Tensor

from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.head import Head
from cbpt_guard.errors import InputError
from cbpt_guard.metrics import clean_accuracy as count_clean_accuracy
from cbpt_guard.metrics import standard_error

_CHANCE_ERRORS = 2.0
_WARN_BELOW = 3.0


def clean_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers in [0, 1]; logits (N, C), labels (N,)."""
    return count_clean_accuracy(logits.argmax(dim=1).numpy(), labels.numpy())


def check_accuracy(original: Head, features: Tensor, data: LabelledImages) -> tuple[str, ...]:
    """Warnings about the undefended accuracy on all clean features (N, E); chance is 1 / C.

    Raises:
        InputError: it is not above chance by two standard errors, or all images, which are of two classes or more, are
            answered alike: names, tokenizer or preprocessing do not fit.
    """
    answers = original.answers(features)
    accuracy = count_clean_accuracy(answers.numpy(), data.labels.numpy())
    chance = 1 / len(data.classes)
    error = standard_error(chance, len(data.labels))
    found = f"the undefended model gets {100 * accuracy:.1f} % of clean images right; chance is {100 * chance:.1f} %"
    alike = len(answers.unique()) == 1
    if alike:
        found = f"the undefended model answers every clean image with {data.classes[int(answers[0])]!r}"
    # of very few images two errors may be more than there is: all of them right is above chance
    if alike or accuracy <= min(chance + _CHANCE_ERRORS * error, 1 - 1 / len(data.labels)):
        raise InputError(
            f"{found}. Class names, tokenizer or preprocessing do not fit this model; check `--classes`, "
            "`--template`, `--preprocess`, `--quickgelu` and `--tokenizer`"
        )
    # with two or three classes three times chance is out of reach: there, halfway from chance to perfect
    if accuracy < (_WARN_BELOW * chance if _WARN_BELOW * chance < 1 else (1 + chance) / 2):
        return (f"{found}: so little above it that class names or preprocessing may not fit",)
    return ()
