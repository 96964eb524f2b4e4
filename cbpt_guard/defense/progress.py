"""How long work reports itself: library code never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step of a stage: `step` of `steps`; loss and ASR (share in [0, 1]) where the stage has them."""

    stage: str
    step: int
    steps: int
    loss: float | None = None
    asr: float | None = None


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Report nothing."""
