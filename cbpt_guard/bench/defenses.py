"""The defences by name, each a function of a Task; `settings_of` states what each was run with."""

from __future__ import annotations

import torch.nn.functional as F

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
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.openclip import imagenet_prompts

__all__ = ["DEFENSES", "SETTINGS", "ensemble", "none", "settings_of"]


def none(task: Task) -> Defended:
    """The suspect as it is."""
    return Defended(task.clip, unflagged(task.original.logits, task.original.logits))


def ensemble(task: Task) -> Defended:
    """The suspect as it is, each class's row the mean over CLIP's 80 templates for ImageNet (arXiv 2103.00020)."""
    texts = [text for name in task.shots.classes for text in imagenet_prompts(name)]
    rows = task.clip.encode_texts(texts).cpu().unflatten(0, (len(task.shots.classes), -1)).mean(1)
    head = Head(F.normalize(rows, dim=1), task.original.scale, task.original.bias)
    return Defended(task.clip, unflagged(head.logits, task.original.logits))


DEFENSES: dict[str, Defense] = {
    "none": none,
    "ensemble": ensemble,
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
