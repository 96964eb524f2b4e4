"""A reduced precision is a graph of its own: it passes the gate on its own ONNX file, or it is not written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from cbpt_guard.bundle import GOLDEN, MODEL, Golden
from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.errors import CheckError
from cbpt_guard.export.checks import check_graph
from cbpt_guard.export.gate import Answers, Measured, answer_all, check_clean, check_gate, measure_gate
from cbpt_guard.export.golden import golden_tolerance, make_golden
from cbpt_guard.export.parity import decision_slack
from cbpt_guard.export.parts import Parts
from cbpt_guard.export.precision import reduced
from cbpt_guard.manifest import Agreement, Graph, Parity, Variant
from cbpt_guard.session import Outputs, Session

LEAST_AGREEMENT: Final = 0.95
"""Of clean images that must be answered as in fp32: below, it is another classifier, whatever its accuracy."""

_MUCH_SMALLER: Final = 0.75
_HALF_WIDER: Final = 10  # a GPU rounds to fp16 between operators too, a CPU computes most of them in fp32


@dataclass(frozen=True)
class Built:
    """A graph's bytes, its entry in the manifest, its golden answers, what it reached, and why that is not enough."""

    data: bytes
    variant: Variant
    golden: Golden
    answers: Answers
    measured: Measured
    failure: str | None


def build_full(data: bytes, session: Session, parts: Parts, parity: Parity) -> Built:
    """The fp32 graph with its gate measured; whether a failure is one is the caller's to say."""
    answers = answer_all(session, parts.images, parts.labels, parts.bank)
    measured = measure_gate(answers, parts.labels)
    golden = make_golden(session, parts.graph.head, parts.bank, golden_tolerance(parts.graph.head))
    variant = Variant(file=MODEL, parity=parity, gate=measured.gate)
    failure = _caught(lambda: check_gate(measured.gate, parts.bounds))
    return Built(data, variant, golden, answers, measured, failure)


def build_reduced(precision: str, full: Built, parts: Parts, doors: Graph, *, strict: bool = True) -> Built:
    """The graph in another precision, by the method that keeps it best.

    Of the methods that pass, one whose file is smaller by a quarter wins, else the one that agrees more with fp32.
    Unless `strict`, a method that fails may be taken all the same: the manifest then says what it reached.

    Raises:
        CheckError: no method passes; the message holds each one's numbers.
    """
    found = [
        _measured(method, data, full, parts, doors)
        for method, data in reduced(full.data, precision, parts.images).items()
    ]
    failures = {candidate.method: _failure(candidate, full, parts) for candidate in found}
    passed = [candidate for candidate in found if failures[candidate.method] is None]
    if not passed and strict:
        raise CheckError(f"{'; '.join(filter(None, failures.values()))}. Leave out --precision {precision}")
    chosen = _better(passed or found)
    return _built(precision, chosen, parts, failures[chosen.method])


@dataclass(frozen=True)
class _Candidate:
    """A reduced graph by one method, and what it reached."""

    method: str
    data: bytes
    session: Session
    answers: Answers
    measured: Measured
    agreement: Agreement


def _measured(method: str, data: bytes, full: Built, parts: Parts, doors: Graph) -> _Candidate:
    check_graph(data, doors)
    session = Session(data, size=parts.images.shape[1], classes=len(parts.graph.head.classes))
    answers = answer_all(session, parts.images, parts.labels, parts.bank)
    measured, agreement = measure_gate(answers, parts.labels), _agreement(answers, full.answers)
    return _Candidate(method, data, session, answers, measured, agreement)


def _built(precision: str, chosen: _Candidate, parts: Parts, failure: str | None) -> Built:
    head = parts.graph.head
    allowed = _allowed(precision, head, chosen.agreement)
    golden = make_golden(chosen.session, head, parts.bank, allowed)
    slack = decision_slack(head, chosen.session.run(golden.images).embedding)
    variant = Variant(
        file=MODEL.replace(".", f".{precision}."),
        gate=chosen.measured.gate,
        agreement=chosen.agreement,
        method=chosen.method,
        golden=GOLDEN.replace(".", f".{precision}."),
        tolerance=float(max(golden_tolerance(head), min(allowed, float(slack.min())))),  # no decision may change
    )
    return Built(chosen.data, variant, golden, chosen.answers, chosen.measured, failure)


def _agreement(answers: Answers, full: Answers) -> Agreement:
    pairs = zip(answers.triggered, full.triggered, strict=True)
    difference = float(np.abs(answers.clean.logits_original - full.clean.logits_original).max())
    return Agreement(
        images=len(full.clean.logits),
        clean=_same(answers.clean, full.clean),
        triggered=min((_same(ours, theirs) for (_, ours), (_, theirs) in pairs), default=None),
        max_logit_difference=difference if np.isfinite(difference) else float(np.finfo(np.float32).max),
        least=LEAST_AGREEMENT,
    )


def _same(ours: Outputs, theirs: Outputs) -> float:
    finite = np.isfinite(ours.logits).all(axis=1)
    return float((finite & (ours.logits.argmax(axis=1) == theirs.logits.argmax(axis=1))).mean())


def _failure(found: _Candidate, full: Built, parts: Parts) -> str | None:
    """Why a variant may not be written, in words and numbers."""
    agreement, undefended = found.agreement, full.measured.gate.clean_accuracy_original
    gate = partial(check_gate, found.measured.gate, parts.bounds, undefended=undefended, name=found.method)
    clean = partial(check_clean, found.answers.clean, full.answers.clean, parts, found.method)
    failure = _caught(gate) or _caught(clean)
    if failure is not None:
        return failure
    if agreement.clean < agreement.least:
        return (
            f"{found.method} does not pass its gate: it answers {agreement.clean:.1%} of {agreement.images} of the "
            f"run's images as fp32 does, at least {agreement.least:.1%} is demanded"
        )
    return None


def _caught(check: Callable[[], None]) -> str | None:
    """What a check says, or None where it passes."""
    try:
        check()
    except CheckError as error:
        return str(error)
    return None


def _better(found: list[_Candidate]) -> _Candidate:
    smallest = min(len(candidate.data) for candidate in found)
    small = [candidate for candidate in found if len(candidate.data) * _MUCH_SMALLER <= smallest]
    return max(small, key=lambda candidate: candidate.agreement.clean)


def _allowed(precision: str, head: GuardedHead, agreement: Agreement) -> float:
    """How far another processor's answers should be allowed to be off, in logits.

    As far as this precision lies from fp32, for nothing promises that two processors round alike.
    """
    return max(agreement.max_logit_difference, golden_tolerance(head) * (_HALF_WIDER if precision == "fp16" else 1))
