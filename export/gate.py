"""The gate: what a precision variant reaches on held-out images, measured through its own ONNX file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.settings import VerdictSettings
from cbpt_guard.errors import CheckError
from cbpt_guard.export.parts import Parts
from cbpt_guard.images import Pixels
from cbpt_guard.manifest import Gate
from cbpt_guard.metrics import attack_success_rate, class_recall, clean_accuracy, exceeds, falls_beyond
from cbpt_guard.session import Outputs, Session

_CHUNK = 128
_UNDER_EACH = 16


@dataclass(frozen=True)
class Measured:
    """The gate's numbers, and how often the flag fired on clean images and under the trigger it misses most.

    Shares in [0, 1]; None without found triggers.
    """

    gate: Gate
    flagged_clean: float
    flagged_found: float | None


@dataclass(frozen=True)
class Answers:
    """What a graph answers for the clean images, and under each trigger that any of them is not yet a target of."""

    clean: Outputs
    triggered: tuple[tuple[FoundTrigger, Outputs], ...]


def answer_all(session: Session, images: Pixels, labels: npt.NDArray[np.int64], bank: TriggerBank) -> Answers:
    """Run images uint8 (N, S, S, 3) with labels (N,) through a graph, clean and under every found trigger."""
    under = []
    for trigger in bank:
        others = images[labels != trigger.target]
        if len(others):
            under.append((trigger, session.run(triggered(others, trigger))))
    return Answers(session.run(images), tuple(under))


def measure_gate(answers: Answers, labels: npt.NDArray[np.int64]) -> Measured:
    """Clean accuracy of both heads and worst found-trigger ASR of a graph's answers; labels (N,)."""
    clean, rates, flags = answers.clean, [], []
    for trigger, outputs in answers.triggered:
        predicted, truth = outputs.logits.argmax(axis=1), labels[labels != trigger.target]
        rates.append(attack_success_rate(predicted, truth, trigger.target))
        flags.append(float(outputs.triggered.mean()))
    gate = Gate(
        images=len(labels),
        clean_accuracy=clean_accuracy(clean.logits.argmax(axis=1), labels),
        clean_accuracy_original=clean_accuracy(clean.logits_original.argmax(axis=1), labels),
        found_trigger_asr=max(rates, default=None),
    )
    return Measured(gate, float(clean.triggered.mean()), min(flags, default=None))


def check_gate(
    gate: Gate, bounds: VerdictSettings, *, undefended: float | None = None, name: str = "the ONNX file"
) -> None:
    """Hold a variant to the bounds that the run was judged by, with the verdict's allowance of one image.

    `undefended` is the clean accuracy that it is compared with; None is its own zero-shot head's, which a reduced
    precision may have lowered as well.

    Raises:
        CheckError: it lets a found trigger through, or loses clean accuracy.
    """
    if gate.found_trigger_asr is not None and exceeds(gate.found_trigger_asr, bounds.found_asr):
        raise CheckError(
            f"{name} does not pass its gate: found-trigger ASR {gate.found_trigger_asr:.1%} on "
            f"{gate.images} of the run's images, at most {bounds.found_asr:.1%} is allowed"
        )
    before = gate.clean_accuracy_original if undefended is None else undefended
    loss = before - gate.clean_accuracy
    if falls_beyond(loss, bounds.accuracy_loss, gate.images):
        raise CheckError(
            f"{name} does not pass its gate: it loses {loss:.1%} of clean accuracy on {gate.images} "
            f"of the run's images, at most {bounds.accuracy_loss:.1%} is allowed"
        )


def check_clean(clean: Outputs, full: Outputs, parts: Parts, name: str) -> None:
    """Hold a reduced precision to what the verdict allows on clean images, beyond their accuracy.

    `clean` and `full` are its answers and the fp32 graph's, whose zero-shot head is the undefended one. What that graph
    loses on these very images, a part of those that were judged, is allowed as well.

    Raises:
        CheckError: it flags too many of them, or recognises too few of a suspected class.
    """
    labels, bounds = parts.labels, parts.bounds
    flagged, allowed = float(clean.triggered.mean()), max(bounds.false_alarms, float(full.triggered.mean()))
    if falls_beyond(flagged, allowed, len(labels)):
        raise CheckError(
            f"{name} does not pass its gate: it flags {flagged:.1%} of {len(labels)} clean images of the run, at most "
            f"{allowed:.1%} is allowed"
        )
    for index in parts.graph.head.suspects:
        images = int((labels == index).sum())
        if not images:
            continue
        before, kept, now = (
            class_recall(logits.argmax(axis=1), labels, index)
            for logits in (full.logits_original, full.logits, clean.logits)
        )
        if falls_beyond(before - now, max(bounds.recall_loss, before - kept), images):
            label = parts.graph.head.classes[index]
            raise CheckError(
                f"{name} does not pass its gate: of {images} clean images of the suspected {label!r} {now:.1%} are "
                f"recognised, {before:.1%} without the guard in fp32"
            )


def with_triggered(images: Pixels, bank: TriggerBank) -> Pixels:
    """The images, and the first of them once more under each found trigger.

    On clean images alone what the rule answers for flagged ones would be compared with nothing.
    """
    return np.concatenate([images, *(triggered(images[:_UNDER_EACH], trigger) for trigger in bank)])


def triggered(images: Pixels, trigger: FoundTrigger) -> Pixels:
    """The images under the trigger, rounded to uint8: what a camera or a file could really carry."""
    parts = torch.from_numpy(images).split(_CHUNK)
    done = torch.cat([(trigger.apply(to_pixels(part)) * 255).round().to(torch.uint8) for part in parts])
    return done.permute(0, 2, 3, 1).contiguous().numpy()
