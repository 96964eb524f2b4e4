"""Plain waves: triggers to which no gradient leads from a clean image, so they are tried one by one.

Every wave of a lattice of periods, directions and phases is added to clean images, after the Fourier analysis of
arXiv 1906.08988. A model that a sinusoid triggers (SIG, arXiv 1902.11237) answers one class under many of them, for
its backdoor is as wide as a few periods; a clean one answers no class under most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.found import FoundTrigger
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.inversion import CleanSet, Report
from cbpt_guard.defense.settings import InversionSettings

_DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))
_PHASES = 4
WAVES = len(_DIRECTIONS) * _PHASES
"""Waves of each number of periods."""
SECOND_HEAT = 8
"""How many times the images of the first heat the second one takes."""


def lattice(size: int, settings: InversionSettings) -> Tensor:
    """Grey waves (K, 1, S, S) of `wave_amplitude`: 1 to `wave_periods` periods a side, four directions and phases.

    None is shorter than three pixels.
    """
    place = torch.arange(size) / size
    down, right = place[:, None], place[None, :]
    waves = [
        torch.sin(2 * math.pi * (periods * (x * right + y * down) + phase / _PHASES))
        for periods in range(1, min(settings.wave_periods, size // 3) + 1)
        for x, y in _DIRECTIONS
        for phase in range(_PHASES)
    ]
    return settings.wave_amplitude * torch.stack(waves)[:, None]


@dataclass(frozen=True)
class Heard:
    """The waves that most images agreed on: their numbers in the lattice (W,), and the share of each class (W, C)."""

    numbers: Tensor
    shares: Tensor

    @property
    def best(self) -> Tensor:
        """Each class's largest share under any of them, (C,)."""
        return self.shares.amax(0)

    def triggers(self, target: int, size: int, settings: InversionSettings) -> tuple[FoundTrigger, FoundTrigger]:
        """The wave that leads most images to `target`, as it was heard and twice as high: an attacker's may be."""
        pattern = lattice(size, settings)[self.numbers[self.shares[:, target].argmax()]].expand(3, -1, -1)
        return FoundTrigger("wave", target, pattern.clone(), None), FoundTrigger("wave", target, 2 * pattern, None)

    @classmethod
    def unpacked(cls, tensor: Tensor) -> Heard:
        """As `packed` made it, (W, 1 + C)."""
        return cls(tensor[:, 0].long(), tensor[:, 1:])

    def packed(self) -> Tensor:
        """One tensor (W, 1 + C), for the journal."""
        return torch.cat([self.numbers[:, None].float(), self.shares], 1)


@torch.no_grad()
def listen(
    clip: FrozenClip,
    clean: CleanSet,
    head: Head,
    settings: InversionSettings,
    generator: torch.Generator,
    report: Report,
) -> Heard:
    """Try every wave on `wave_images` images, and the `finalists` that they agree on most on eight times as many."""
    waves = lattice(clip.image_size, settings)
    few, more = (clean.draw(count * settings.wave_images, generator) for count in (1, SECOND_HEAT))
    agreed = []
    for number, wave in enumerate(waves, 1):
        agreed.append(_shares(clip, clean.images[few], head, wave).amax())
        report(number, len(waves), 0.0, float(agreed[-1]))
    finalists = torch.stack(agreed).topk(min(settings.finalists, len(waves))).indices
    return Heard(finalists, torch.stack([_shares(clip, clean.images[more], head, waves[n]) for n in finalists]))


def _shares(clip: FrozenClip, images: Tensor, head: Head, wave: Tensor) -> Tensor:
    """Share of each class among the answers on images (N, S, S, 3) under a wave, (C,)."""
    parts = [
        clip.encode_images((to_pixels(part) + wave).clamp(0, 1).to(clip.device)).cpu()
        for part in images.split(clip.batch)
    ]
    answers = head.logits(torch.cat(parts)).argmax(1)
    return answers.bincount(minlength=len(head.rows)) / len(answers)
