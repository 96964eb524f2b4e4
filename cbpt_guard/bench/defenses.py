"""The defences by name, each a function of a Task; `settings_of` states what each was run with."""

from __future__ import annotations

from cbpt_guard.bench.cleanclip import cleanclip
from cbpt_guard.bench.coop import coop
from cbpt_guard.bench.finetune import ft
from cbpt_guard.bench.oracle import oracle
from cbpt_guard.bench.par import par
from cbpt_guard.bench.probe import probe
from cbpt_guard.bench.prompted import clean_prompts
from cbpt_guard.bench.purified import cbpt, cbpt_prompts
from cbpt_guard.bench.rival import unflagged
from cbpt_guard.bench.settings import SETTINGS, settings_of
from cbpt_guard.bench.task import Defended, Defense, Task

__all__ = ["DEFENSES", "SETTINGS", "none", "settings_of"]


def none(task: Task) -> Defended:
    """The suspect as it is."""
    return Defended(task.clip, unflagged(task.original.logits, task.original.logits))


DEFENSES: dict[str, Defense] = {
    "none": none,
    "ft": ft,
    "cleanclip": cleanclip,
    "par": par,
    "coop": coop,
    "clean-prompts": clean_prompts,
    "probe": probe,
    "cbpt-prompts": cbpt_prompts,
    "cbpt": cbpt,
    "oracle": oracle,
}
"""Every defence by the name that a plan gives it."""
