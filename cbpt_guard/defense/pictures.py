"""Pictures of found triggers, for people."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.planted.trigger import checkerboard


def as_image(trigger: FoundTrigger, size: int) -> Image.Image:
    """What the trigger does to a grey image of S = `size` pixels a side, or to a checkerboard if it adds nothing.

    What adds is stretched to the range.
    """
    if trigger.family in ("warp", "tint", "kernel"):
        board = torch.from_numpy(checkerboard(size))
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


def draw(bank: TriggerBank, size: int, folder: Path) -> None:
    """Write `folder/NUMBER-FAMILY.png` for each trigger of the bank, in its order, for images of S = `size` pixels."""
    folder.mkdir(exist_ok=True)
    for number, trigger in enumerate(bank):
        as_image(trigger, size).save(folder / f"{number}-{trigger.family}.png")
