"""Plain waves: triggers to which no gradient leads from a clean image, so they are tried one by one.

Every wave of a grid of periods, directions and phases is added to clean images, after the Fourier analysis of
arXiv 1906.08988. A model that a sinusoid triggers (SIG, arXiv 1902.11237) answers its target under many of them, for
its backdoor is as wide as a few periods; a clean one is seldom led to one class by any.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cbpt_guard.defense.found import FoundTrigger, encode
from cbpt_guard.defense.odds import odds_of, ranked
from cbpt_guard.defense.progress import Progress
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.together import Tally, together

_DIRECTIONS, _PHASES = 8, 4
_FINER, _LEAST_PERIOD = 1.2, 3  # each finer wave has so many times the periods of the one before it; in pixels
_SECOND_HEAT = 16  # times the images of the first
SURELY = 0.75
"""Of the right answers on clean images, that a class must lead by more than under twice a wave to be told by it."""


def count_waves(size: int, settings: InversionSettings) -> int:
    """How many waves there are for images of S = `size` pixels a side."""
    return _DIRECTIONS * _PHASES * len(wave_periods(size, settings))


def wave_periods(size: int, settings: InversionSettings) -> list[int]:
    """How many periods a side waves have: 1 to `wave_periods`, then in growing steps; none below three pixels.

    What answers to a fine wave answers to all of about its length.
    """
    most = max(1, size // _LEAST_PERIOD)
    periods = list(range(1, min(settings.wave_periods, most) + 1))
    while (finer := max(periods[-1] + 1, round(_FINER * periods[-1]))) <= most:
        periods.append(finer)
    return periods


def wave(number: int, size: int, settings: InversionSettings) -> Tensor:
    """Wave `number`, grey, (3, S, S) in pixels of [0, 1], in 8 directions and 4 phases."""
    rest, phase = divmod(number, _PHASES)
    length, direction = divmod(rest, _DIRECTIONS)
    place, angle = torch.arange(size) / size, math.pi * direction / _DIRECTIONS
    along = math.cos(angle) * place[None, :] + math.sin(angle) * place[:, None]
    turns = wave_periods(size, settings)[length] * along + phase / _PHASES
    return settings.wave_amplitude * torch.sin(2 * math.pi * turns).expand(3, -1, -1)


def heard_images(size: int, settings: InversionSettings) -> int:
    """Images that `listen` looks at, in both heats, the second with two heights."""
    waves = count_waves(size, settings)
    return settings.wave_images * (waves + 2 * _SECOND_HEAT * min(settings.finalists, waves))


@dataclass(frozen=True)
class Heard:
    """The waves that reached one class most.

    Their numbers (W,); how much each class is reached, (W, C), and how much by twice the wave, (W, C); and which
    classes each is telling of, (W, C): those answered more surely under twice the wave than clean images are.
    """

    numbers: Tensor
    reached: Tensor
    twice: Tensor
    telling: Tensor

    @property
    def best(self) -> Tensor:
        """How much each class is reached by the wave that reaches it most, (C,)."""
        return self.reached.amax(0)

    def odds(self, *, twice: bool) -> Tensor:
        """The odds of each class under that wave, of those telling of it, which puts it furthest ahead, (C,); or 0.

        With `twice`, of a wave that leads half of the images or more, the geometric mean of its odds and of those under
        twice the wave, if that is larger: one of the grid may lie a little off a planted one.
        """
        odds = odds_of(self.reached)
        if twice:
            odds = torch.where(odds >= 1, (odds * torch.maximum(odds, odds_of(self.twice))).sqrt(), odds)
        return torch.where(self.telling, odds, 0.0).amax(0)

    def triggers(self, target: int, size: int, settings: InversionSettings, *, rank: int = 0) -> list[FoundTrigger]:
        """The wave that reaches `target` most, as it was heard and twice as high: an attacker's may be.

        Those that are telling of it come first. With `rank` 1 the next best wave instead, and so on; none where so many
        were not heard.
        """
        order = (self.reached + self.telling)[:, target].argsort(descending=True, stable=True)
        patterns = [wave(int(self.numbers[place]), size, settings) for place in order[rank : rank + 1]]
        return [FoundTrigger("wave", target, height * pattern, None) for pattern in patterns for height in (1, 2)]

    @classmethod
    def unpacked(cls, tensor: Tensor) -> Heard:
        """As `packed` made it, (W, 1 + 3 C)."""
        reached, twice, telling = tensor[:, 1:].chunk(3, dim=1)
        return cls(tensor[:, 0].long(), reached, twice, telling.bool())

    def packed(self) -> Tensor:
        """One tensor (W, 1 + 3 C), for the journal."""
        return torch.cat([self.numbers[:, None].float(), self.reached, self.twice, self.telling.float()], 1)


def listen(subject: Subject, generator: torch.Generator, progress: Progress) -> Heard:
    """Try every wave on `wave_images` images, and the `finalists` that reach one class most on 16 times as many.

    Of those each is tried twice as high, too. It is telling of a class that leads then, in the median over images of
    others, by more than `Subject.usual_lead`.
    """
    clip, clean, head, settings = subject.clip, subject.clean, subject.head, subject.settings
    few, more = (clean.draw(count * settings.wave_images, generator) for count in (1, _SECOND_HEAT))
    waves, usual = count_waves(clip.image_size, settings), subject.usual_lead(SURELY)

    def under(number: int, index: Tensor, height: int = 1) -> Tensor:
        trigger = FoundTrigger("wave", -1, height * wave(number, clip.image_size, settings), None)
        return encode(clip, clean.images[index], trigger)

    def first(number: int) -> Tensor:
        return head.reached(under(number, few), clean.features[few], clean.labels[few]).surely

    def second(number: int) -> Tensor:
        labels, higher = clean.labels[more], under(number, more, 2)
        reached, twice = (
            head.reached(features, clean.features[more], labels).surely for features in (under(number, more), higher)
        )
        leads = head.leads(higher)
        leads[torch.arange(len(labels)), labels] = math.nan
        return torch.stack([reached, twice, (leads.nanmedian(0).values > usual).float()])

    def heat(stage: str, numbers: Sequence[int], hear: Callable[[int], Tensor]) -> Tensor:
        """What is heard of each of the waves."""
        tally = Tally(stage, len(numbers))

        def heard(number: int, report: Progress) -> Tensor:
            shares = hear(number)
            tally.add(1, report, asr=float(shares.amax()))
            return shares

        return torch.stack(together([partial(heard, number) for number in numbers], progress, clip.device))

    numbers = _finalists(heat("plain waves", range(waves), first), settings.finalists)
    reached, twice, telling = heat("leading waves", numbers, second).unbind(1)
    return Heard(torch.tensor(numbers), reached, twice, telling.bool())


def _finalists(reached: Tensor, most: int) -> list[int]:
    """The waves that reach one class most, given how much each reaches each, (W, C).

    No more than half of them reach the same one while others are left: many may be telling of one target, and hide
    another's.
    """
    shares, classes = reached.max(dim=1)
    places, heard = Counter[int](), list[int]()
    for number in ranked(shares):
        places[int(classes[number])] += 1
        if places[int(classes[number])] <= math.ceil(most / 2):
            heard.append(number)
    return list(dict.fromkeys([*heard, *ranked(shares)]))[:most]
