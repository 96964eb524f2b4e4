"""What `purify` and `scan` both show: how the model was read, and the candidate targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cbpt_guard.cli.show import note, one_line, percent, table

if TYPE_CHECKING:
    from cbpt_guard.defense.record import Candidate, ModelRecord


def show_model(model: ModelRecord, warnings: Sequence[str]) -> None:
    """On stderr: what the model is, how each thing that its file cannot tell was resolved, and what to beware of."""
    note(one_line(f"model: {model.architecture} from {model.source} ({model.form})"))
    for what, how in model.resolved.items():
        note(one_line(f"  {what}: {how}"))
    for text in (*model.notes, *warnings):
        note(one_line(f"  note: {text}"))


def show_candidates(candidates: Sequence[Candidate], settings: Mapping[str, Any]) -> None:
    """Candidates on stderr, given the inversion's settings."""
    rows = [
        (
            c.label,
            percent(c.share_clean),
            percent(c.share),
            percent(c.area),
            f"{c.score:.2f}",
            "yes" if c.stands_out else "no",
        )
        for c in candidates
    ]
    table(
        f"candidate targets (one stands out at a score of {settings['stands_out']:g})",
        (
            "class",
            "share of answers, clean %",
            "agnostic trigger %",
            "mask area needed %",
            "score",
            "stands out",
        ),
        rows,
    )
