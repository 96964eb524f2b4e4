"""Lines of evidence as tests need them: written by hand, every share known."""

from __future__ import annotations

from typing import Any

from cbpt_guard.bench.lines import Line, Shares

SHARES = {
    "ca": 0.5,
    "asr": 0.9,
    "pa": 0.1,
    "max_share": 0.9,
    "target_recall": 0.4,
    "false_positives": 0.01,
    "flag_clean": 0.0,
    "flag_triggered": 0.0,
}


def line(**given: Any) -> Line:
    """A line of BadNet on digits, with what a test gives in place."""
    shares = SHARES | {name: given.pop(name) for name in SHARES if name in given}
    rest: dict[str, Any] = {
        "attack": "badnet",
        "defense": "none",
        "seed": 0,
        "target": "three",
        "dataset": "digits",
        "implant": "badnet",
        "took": True,
        "split": "clean",
        "shots": 16,
        "images": 300,
        "asr_worst": shares["asr"],
        "pairs": (),
        "undefended": Shares(**SHARES),
        "verdict": None,
        "seconds": 1.5,
        "cpu_seconds": 2.5,
        "peak_mb": 700,
        "settings": "0123456789abcdef",
        "versions": {"numpy": "2"},
        "machine": "2 cores",
    }
    return Line(**(shares | rest | given))


def cbpt(name: str = "badnet", **given: Any) -> Line:
    """One of a guard that holds, but for what is given."""
    shares = {"ca": 0.5, "asr": 0.01, "pa": 0.4, "max_share": 0.03, "target_recall": 0.4} | given
    return line(implant=name, defense="cbpt", verdict=shares.pop("verdict", "guarded"), **shares)
