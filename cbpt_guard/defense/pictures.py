"""Pictures of found triggers, for people."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.edits import FAMILIES
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.planted.trigger import checkerboard

_SIDE = 128  # of the checkerboard that a kernel, which has no side of its own, is shown on


def as_image(trigger: FoundTrigger) -> Image.Image:
    """What the trigger does to a grey image, or to a checkerboard if it adds nothing; what adds is stretched."""
    if trigger.family in FAMILIES:
        board = torch.from_numpy(checkerboard(_SIDE if trigger.family == "kernel" else trigger.pattern.shape[-1]))
        return to_image(trigger.apply(to_pixels(board[None]))[0])
    grey = torch.full((1, *trigger.pattern.shape), 0.5)
    if trigger.mask is None:
        pixels = grey + 0.5 * trigger.pattern / trigger.pattern.abs().max().clamp_min(1e-6)
    else:
        pixels = trigger.apply(grey)
    return to_image(pixels[0])


def to_image(pixels: Tensor) -> Image.Image:
    """A Pillow image of pixels (3, H, W) in [0, 1]."""
    return Image.fromarray((pixels.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())


def draw(bank: TriggerBank, folder: Path) -> None:
    """Write `folder/NUMBER-FAMILY.png` for each trigger of the bank, in its order."""
    folder.mkdir(exist_ok=True)
    for number, trigger in enumerate(bank):
        as_image(trigger).save(folder / f"{number}-{trigger.family}.png")
