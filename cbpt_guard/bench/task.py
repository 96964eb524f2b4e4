"""What the bench gives a defence, and what it takes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cbpt_guard.bench.clock import Clock
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.head import Answer, Head
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.triggers import PlantedTrigger


@dataclass(frozen=True)
class Task:
    """A suspect and the clean images that every defence gets alike.

    Args:
        clip: the suspect, frozen.
        original: its zero-shot head over the classes of `shots`.
        shots: the clean images, S x S, with their labels.
        checkpoint: the same suspect on disk, for a defence that reads it itself.
        listing: a CSV (path, label) that lists the files of `shots`.
        template: the prompt, with one {} for the class name.
        seed: of every draw.
        folder: an existing folder of this attack and seed; defences may leave files there for each other.
        planted: the true triggers; only the oracle may look.
        progress: called after every step.
        clock: what the defence takes; what is left for other defences goes through `clock.once`.
    """

    clip: FrozenClip
    original: Head
    shots: LabelledImages
    checkpoint: Path
    listing: Path
    template: str
    seed: int
    folder: Path
    planted: tuple[PlantedTrigger, ...]
    progress: Progress = silent
    clock: Clock = field(default_factory=Clock)


@dataclass(frozen=True)
class Defended:
    """The classifier that a defence leaves.

    Args:
        clip: the suspect's own encoder, or a changed copy of it.
        answer: the answer for unit features (N, E) of `clip`.
        verdict: what the defence says of itself, if it says anything.
        run: the purified run directory, where the defence leaves one: it is counted through its exported bundle.
        warnings: what the defence warned of.
        suspects: the classes that the defence takes for an attacker's.
        search: version of the search that found them.
        chosen: what it chose on held-out shots, such as a learning rate or an epoch (from 1), by name.
    """

    clip: FrozenClip
    answer: Callable[[Tensor], Answer]
    verdict: str | None = None
    run: Path | None = None
    warnings: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    search: int | None = None
    chosen: dict[str, float] = field(default_factory=dict)


class Defense(Protocol):
    """A defence: a suspect and a few clean images in, a classifier out."""

    def __call__(self, task: Task) -> Defended:
        """Defend one suspect."""
