"""The scan: a cheap look at every class, in two heats.

Each class gets an additive pattern of its own and a few signed gradient steps towards it (projected gradient descent,
Madry et al., arXiv 1706.06083); classes that share a batch are a group, and groups run side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.inversion import encode_pixels, pull
from cbpt_guard.defense.odds import loud
from cbpt_guard.defense.progress import Progress
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.together import Tally, together

_LEAST = 0.99 / 255  # below one level, and what rounding makes of it, a pattern is lost


@dataclass(frozen=True)
class Scanned:
    """How readily additive patterns make each class the answer, at one height after the other.

    `by_height` (H, C): scores under patterns of the settings' `epsilon`, then, where those reach every class, under
    fainter ones. A score is the mean log-probability of the class, in nats; larger is readier.
    """

    by_height: Tensor

    @property
    def scores(self) -> Tensor:
        """The mean over the heights, (C,): what is planted may be reached readily at some and lost at others."""
        return self.by_height.mean(0)

    @property
    def loud(self) -> bool:
        """Whether patterns of the settings' height are large to the model."""
        return loud(self.by_height[0])


def scan_targets(subject: Subject, generator: torch.Generator, progress: Progress) -> Scanned:
    """Scores of each class, under patterns of at most the settings' `epsilon`, and of less where that tells nothing.

    Each class gets its share of `scan_budget` images, at least `scan_images` a step. The first `finalists`
    are looked at once more, with twice the steps and half a batch of images each: after the first heat a target may lie
    some places behind natural leaders. Where even the class of middle rank is reached, as with few classes, all get
    twice the steps, on half a batch of images each at most, with fainter and fainter patterns until it is not: what is
    planted is reached by far less.
    """
    classes, settings, epsilon = len(subject.head.rows), subject.settings, subject.settings.epsilon
    everything, each = torch.arange(classes), scan_images(classes, settings)
    steps, few = 2 * settings.scan_steps, settings.batch // 2
    heat = partial(_heat, subject, generator, progress)
    first = heat("scan of every class", everything, epsilon, settings.scan_steps, each)
    finalists = first.topk(min(settings.finalists, classes)).indices
    first[finalists] = heat("scan of its leaders", finalists, epsilon, steps, max(each, few))
    by_height = [first]
    while loud(by_height[-1]) and epsilon >= math.sqrt(2) * _LEAST:
        epsilon /= math.sqrt(2)
        by_height.append(heat(f"scan at {255 * epsilon:.1f} levels", everything, epsilon, steps, min(each, few)))
    return Scanned(torch.stack(by_height))


def scan_images(classes: int, settings: InversionSettings) -> int:
    """Images of each class and step in the scan's first heat."""
    each = settings.scan_budget // (classes * (settings.scan_steps + 1))
    return min(max(each, settings.scan_images), settings.batch)


def _heat(
    subject: Subject,
    generator: torch.Generator,
    progress: Progress,
    stage: str,
    classes: Tensor,
    epsilon: float,
    steps: int,
    each: int,
) -> Tensor:
    """Scores (K,) of `classes` (K,), in nats, after so many steps with `each` images of each class."""
    clip, clean, head, settings = subject.clip, subject.clean, subject.head, subject.settings
    groups = classes.split(max(1, settings.batch // each))
    tally = Tally(stage, len(groups) * steps)

    def scores(group: Tensor, draws: list[Tensor], report: Progress) -> Tensor:
        """Of one group (G,), each step on the images of one draw (G * each,); the last draw tells the scores (G,)."""
        targets = group.repeat_interleave(each)
        patterns = torch.zeros(len(group), 3, clip.image_size, clip.image_size)
        for index in draws[:-1]:
            pixels = _under(patterns.requires_grad_(), clean.images[index])
            pulled = pull(clip, head, pixels, targets)
            (gradient,) = torch.autograd.grad(pixels, patterns, pulled.gradient)
            step = 2.5 * epsilon / steps
            patterns = (patterns.detach() - step * gradient.sign()).clamp(-epsilon, epsilon)
            asr = (pulled.answers == targets).float().mean()
            tally.add(1, report, float(pulled.losses.mean()), float(asr))
        features = encode_pixels(clip, _under(patterns, clean.images[draws[-1]]))
        return -head.missing(features, targets).view(-1, each).mean(1)

    def draws(group: Tensor) -> list[Tensor]:
        pools = [subject.others(c) for c in group.tolist()]
        picked = [
            [pool[torch.randint(len(pool), (each,), generator=generator)] for pool in pools] for _ in range(steps + 1)
        ]
        return [torch.cat(of_step) for of_step in picked]

    # all draws come first and in order: which group is done first must not matter
    works = [partial(scores, group, draws(group)) for group in groups]
    return torch.cat(together(works, progress, clip.device))


def _under(patterns: Tensor, images: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) of uint8 images (N, S, S, 3), every N / K in a row under one of the patterns (K, 3, S, S)."""
    each = len(images) // len(patterns)
    return (to_pixels(images) + patterns.repeat_interleave(each, dim=0)).clamp(0, 1)
