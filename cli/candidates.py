"""The table of candidate targets, which `purify` and `scan` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cbpt_guard.cli.show import percent, table

if TYPE_CHECKING:
    from cbpt_guard.defense.record import Candidate


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
