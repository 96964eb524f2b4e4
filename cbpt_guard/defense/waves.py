"""Plain waves: triggers to which no gradient leads from a clean image, so they are tried one by one.

Every wave of a grid of periods, directions and phases is added to clean images, after the Fourier analysis of
arXiv 1906.08988. A model that a sinusoid triggers (SIG, arXiv 1902.11237) answers its target under many of them, for
its backdoor is as wide as a few periods; a clean one is seldom led to one class by any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cbpt_guard.defense.found import FoundTrigger, encode
from cbpt_guard.defense.progress import Progress
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.together import Tally, together

_DIRECTIONS, _PHASES = 8, 4
_SECOND_HEAT = 16  # times the images of the first


def count_waves(size: int, settings: InversionSettings) -> int:
    """How many waves there are for images of S = `size` pixels a side: none has a period below three pixels."""
    return _DIRECTIONS * _PHASES * max(1, min(settings.wave_periods, size // 3))


def wave(number: int, size: int, settings: InversionSettings) -> Tensor:
    """Wave `number`, grey, (3, S, S) in pixels of [0, 1]: 1 to `wave_periods` periods a side, in 8 directions."""
    rest, phase = divmod(number, _PHASES)
    periods, direction = divmod(rest, _DIRECTIONS)
    place, angle = torch.arange(size) / size, math.pi * direction / _DIRECTIONS
    along = math.cos(angle) * place[None, :] + math.sin(angle) * place[:, None]
    turns = (periods + 1) * along + phase / _PHASES
    return settings.wave_amplitude * torch.sin(2 * math.pi * turns).expand(3, -1, -1)


def heard_images(size: int, settings: InversionSettings) -> int:
    """Images that `listen` looks at, in both heats."""
    waves = count_waves(size, settings)
    return settings.wave_images * (waves + _SECOND_HEAT * min(settings.finalists, waves))


@dataclass(frozen=True)
class Heard:
    """The waves that reached one class most: their numbers (W,), and how much each class is reached (W, C)."""

    numbers: Tensor
    reached: Tensor

    @property
    def best(self) -> Tensor:
        """How much each class is reached by the wave that reaches it most, (C,)."""
        return self.reached.amax(0)

    def triggers(self, target: int, size: int, settings: InversionSettings, *, rank: int = 0) -> list[FoundTrigger]:
        """The wave that reaches `target` most, as it was heard and twice as high: an attacker's may be.

        With `rank` 1 the next best wave instead, and so on; none where so many were not heard.
        """
        order = self.reached[:, target].argsort(descending=True, stable=True)
        patterns = [wave(int(self.numbers[place]), size, settings) for place in order[rank : rank + 1]]
        return [FoundTrigger("wave", target, height * pattern, None) for pattern in patterns for height in (1, 2)]

    @classmethod
    def unpacked(cls, tensor: Tensor) -> Heard:
        """As `packed` made it, (W, 1 + C)."""
        return cls(tensor[:, 0].long(), tensor[:, 1:])

    def packed(self) -> Tensor:
        """One tensor (W, 1 + C), for the journal."""
        return torch.cat([self.numbers[:, None].float(), self.reached], 1)


def listen(subject: Subject, generator: torch.Generator, progress: Progress) -> Heard:
    """Try every wave on `wave_images` images, and the `finalists` that reach one class most on 16 times as many."""
    clip, clean, head, settings = subject.clip, subject.clean, subject.head, subject.settings

    def reached(number: int, index: Tensor) -> Tensor:
        trigger = FoundTrigger("wave", -1, wave(number, clip.image_size, settings), None)
        return head.reached(encode(clip, clean.images[index], trigger), clean.labels[index])

    def heat(stage: str, numbers: Sequence[int], index: Tensor) -> Tensor:
        """How much each of the waves (W) reaches each class on the images `index`, (W, C)."""
        tally = Tally(stage, len(numbers))

        def heard(number: int, report: Progress) -> Tensor:
            shares = reached(number, index)
            tally.add(1, report, asr=float(shares.amax()))
            return shares

        return torch.stack(together([partial(heard, number) for number in numbers], progress, clip.device))

    few, more = (clean.draw(count * settings.wave_images, generator) for count in (1, _SECOND_HEAT))
    waves = count_waves(clip.image_size, settings)
    numbers = heat("plain waves", range(waves), few).amax(1).topk(min(settings.finalists, waves)).indices
    return Heard(numbers, heat("leading waves", numbers.tolist(), more))
