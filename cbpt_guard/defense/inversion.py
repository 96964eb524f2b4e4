"""Contrastive trigger inversion: from a suspect and a few clean images to a bank of found triggers.

Stage 1a looks for any universal change of a family that pulls images away from their own class, and reads the target
off the answers; stage 1b makes a trigger of each family for each candidate target. After arXiv 2502.19269 (the
idea), arXiv 2406.05491 and 2506.12411 (contrastive universal perturbations) and Neural Cleanse (masks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.found import FoundTrigger, Inverted, Place, encode
from cbpt_guard.defense.pattern import Pattern, inside
from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.together import together

Result = TypeVar("Result")
SMOOTH: tuple[Inverted, ...] = ("warp", "tint")
"""Families of changes that vary slowly over the image."""
NARROW: tuple[Inverted, ...] = ("patch", *SMOOTH)
"""Families that fit the backdoors they fit at once; toward other targets they are given up early."""


class Answering(Protocol):
    """What a trigger is made to mislead: a head, or two heads and their rule."""

    def answers(self, features: Tensor) -> Tensor:
        """The answered classes (N,) of unit features (N, E)."""

    def missing(self, features: Tensor, wanted: Tensor) -> Tensor:
        """How far features (N, E) are from the answers `wanted` (N,); differentiable, (N,)."""


_HOPE = 0.5  # ASR below which a trigger of a narrow family is given up (those that fit had 0.8), or a mask is lost
PATIENCE = 20
"""Steps after which a trigger of a narrow family may be given up."""


def agnostic_loss(
    found: Tensor,
    clean: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: InversionSettings,
    beside: Sequence[int] = (),
) -> Tensor:
    """The contrastive loss of stage 1a, (); features (N, E) and rows (C, E) are unit.

    Pulls each triggered feature from its own class's text towards the texts farthest from its clean feature,
    makes triggered features alike (a universal trigger does) and moves them away from where they were. The classes
    `beside` are none to pull towards, and to be taken for one of them costs.
    """
    k = min(8, max(1, rows.shape[0] // 4))
    similarity = found @ rows.T / settings.temperature
    distant = (clean @ rows.T).index_fill(1, torch.tensor(beside, dtype=torch.long), 1.0)
    far = distant.topk(k, dim=1, largest=False).indices
    positive = similarity.gather(1, far).logsumexp(dim=1)
    negative = similarity.gather(1, labels[:, None])[:, 0]
    contrast = F.logsigmoid(negative - positive).mean()
    n = found.shape[0]
    alike = ((found.sum(0) ** 2).sum() - n) / (n * (n - 1))
    moved = ((found - clean) ** 2).sum(1).mean()
    loss = contrast - settings.alike_weight * alike - settings.moved_weight * moved
    return loss + _taken_loss(similarity, beside) if beside else loss


def _taken_loss(similarity: Tensor, classes: Sequence[int]) -> Tensor:
    """-log of the probability that an image is taken for none of the classes, in the mean, (); similarity is (N, C)."""
    these = torch.zeros(similarity.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(classes), True)
    return F.softplus(similarity[:, these].logsumexp(dim=1) - similarity[:, ~these].logsumexp(dim=1)).mean()


def invert_agnostic(
    subject: Subject,
    generator: torch.Generator,
    progress: Progress,
    beside: Sequence[int] = (),
    *,
    family: Inverted = "additive",
    stage: str = "agnostic trigger",
) -> FoundTrigger:
    """Stage 1a: a trigger toward no class in particular; its `target` is the class it ended at.

    It is led away from the classes `beside`; `stage` is what progress calls the work, and the ASR that it tells is the
    moving share of the most common answer. One of a narrow family moves about as it does in stage 1b, and a patch stays
    where it leads most images to one and the same class.
    """
    clip, clean, rows, settings = subject.clip, subject.clean, subject.head.rows, subject.settings
    pattern = Pattern(family, clip.image_size, settings, generator)
    optimiser = torch.optim.Adam(pattern.parameters(), lr=_rate(family, settings))
    answers = torch.zeros(rows.shape[0])
    for step in range(settings.agnostic_steps):
        index = clean.draw(settings.agnostic_batch, generator)
        trigger = pattern.value(-1)
        if family in NARROW:
            trigger = _varied(trigger, _shift(pattern, clip, settings), generator)
        pixels = trigger.apply(to_pixels(clean.images[index]))
        # in two passes: the loss compares all images of the batch, but their activations need not be in memory at once
        features = encode_pixels(clip, pixels.detach()).requires_grad_()
        loss = agnostic_loss(features, clean.features[index], clean.labels[index], rows, settings, beside)
        (wanted,) = torch.autograd.grad(loss, features)
        optimiser.zero_grad()
        pixels.backward(_led_back(clip, pixels.detach(), wanted))
        optimiser.step()
        counts = (features.detach() @ rows.T).argmax(1).bincount(minlength=rows.shape[0])
        answers = 0.8 * answers + 0.2 * counts / settings.agnostic_batch
        progress(Step(stage, step + 1, settings.agnostic_steps, loss.item(), float(answers.max())))
    found = pattern.value(int(answers.argmax())).detached()
    return found if family != "patch" else leading(subject, found, _shift(pattern, clip, settings), generator, beside)


def invert_toward(
    subject: Subject,
    target: int,
    family: Inverted,
    generator: torch.Generator,
    progress: Progress,
    *,
    stage: str = "trigger",
    against: Answering | None = None,
    budget: float | None = None,
    at: Place | None = None,
) -> FoundTrigger:
    """Stage 1b: a trigger of one family that makes the head answer `target` for images of other classes.

    `against` takes the place of the zero-shot head, and `stage` is what progress calls the work. What the head misses
    of the target is made small; a mask also pays for its area, with a weight that a controller raises while the
    found-trigger ASR is above its goal and lowers below it; one that is lost in the last steps is taken as it was when
    it last met the goal. Placement varies from step to step, so that the trigger stands for a family and not for one
    pixel pattern; a patch may lie anywhere, and stays where it works best, unless it is wanted `at` a place: then it
    moves as little as the others, for a backdoor may answer there alone. With a `budget`, a share of the image, the
    mask does not pay: what it may cover closes in on the budget until half of the steps, as paying does, for a mask
    that is faint from the start finds no place to concentrate on. Smooth ones are learnt on half a batch while they may
    still be given up.
    """
    clip, clean, settings, head = subject.clip, subject.clean, subject.settings, against or subject.head
    pays = family == "masked" and budget is None
    steps = settings.masked_steps if family == "masked" else settings.additive_steps
    pattern = Pattern(family, clip.image_size, settings, generator, at)
    shift = _shift(pattern, clip, settings, still=at is not None)
    optimiser = torch.optim.Adam(pattern.parameters(), lr=_rate(family, settings))
    weight, asr, met = 0.0, 0.0, None
    for step in range(steps):
        tentative = family in SMOOTH and step < PATIENCE
        index = clean.draw(settings.batch // (2 if tentative else 1), generator, without=target)
        goal = torch.full((len(index),), target)
        trigger = _varied(pattern.value(target, _allowed(budget, step / steps)), shift, generator)
        pixels = trigger.apply(to_pixels(clean.images[index]))
        pulled = pull(clip, head, pixels, goal)
        loss = pulled.losses.mean()
        asr = 0.7 * asr + 0.3 * float((pulled.answers == target).float().mean())
        optimiser.zero_grad()
        pixels.backward(pulled.gradient / len(goal), retain_graph=True)
        if pays and trigger.mask is not None:
            if asr > settings.asr_goal:
                met = pattern.value(target).detached()
                weight = min(1.3 * weight + 0.5, settings.area_weight)
            else:
                weight = 0.8 * weight
            paid = weight * trigger.mask.mean()
            paid.backward()
            loss = loss + paid
        optimiser.step()
        given_up = family in NARROW and step + 1 == min(PATIENCE, steps // 2) and asr < _HOPE
        progress(Step(stage, step + 1, step + 1 if given_up else steps, loss.item(), asr))
        if given_up:
            return pattern.value(target, budget).detached()
    found = met if met is not None and asr < _HOPE else pattern.value(target, budget).detached()
    return found if family != "patch" else settled(subject, head, found, shift, generator)


@torch.no_grad()
def settled(
    subject: Subject, head: Answering, patch: FoundTrigger, shift: int, generator: torch.Generator
) -> FoundTrigger:
    """The patch at that of `patch_places` x `patch_places` places, up to `shift` pixels off, where it works best.

    A backdoor that was trained at one place answers most surely there.
    """
    clip, clean, settings = subject.clip, subject.clean, subject.settings
    index = clean.draw(settings.batch, generator, without=patch.target)
    images, goal = clean.images[index], torch.full((len(index),), patch.target)
    places = _places(patch, shift, settings)
    return min(places, key=lambda place: float(head.missing(encode(clip, images, place), goal).mean()))


@torch.no_grad()
def leading(
    subject: Subject, patch: FoundTrigger, shift: int, generator: torch.Generator, beside: Sequence[int]
) -> FoundTrigger:
    """The patch at that of the same places where it leads most images to one class that is none of those `beside`.

    Then at that of as many places between there and the next, which is where a backdoor may answer alone.
    """
    clip, clean, settings = subject.clip, subject.clean, subject.settings
    index = clean.draw(settings.agnostic_batch, generator)

    def led(place: FoundTrigger) -> float:
        features = encode(clip, clean.images[index], place)
        shares = subject.head.reached(features, clean.features[index], clean.labels[index]).surely
        return float(shares.index_fill(0, torch.tensor(beside, dtype=torch.long), 0.0).max())

    best = max(_places(patch, shift, settings), key=led)
    return max([best, *_places(*_between(best, shift, settings), settings)], key=led)


def _places(patch: FoundTrigger, shift: int, settings: InversionSettings) -> list[FoundTrigger]:
    """The patch at `patch_places` places each way, up to `shift` pixels off."""
    steps = dict.fromkeys(torch.linspace(-shift, shift, settings.patch_places).round().int().tolist())
    return [patch.rolled(down, right) for down in steps for right in steps]


def _between(patch: FoundTrigger, shift: int, settings: InversionSettings) -> tuple[FoundTrigger, int]:
    """The patch, and how far from it the middle between such places lies: moved by as much it stays in the image."""
    size, half = patch.pattern.shape[-1], shift // (settings.patch_places - 1)
    top, left = patch.place
    down, right = inside((top, left), round(size * patch.area**0.5), size, half)
    return patch.rolled(down - top, right - left), half


def _allowed(budget: float | None, progress: float) -> float | None:
    """The area that a mask may cover, as a share, when `progress` of the steps are done."""
    return None if budget is None else budget ** min(1.0, 2 * progress)


def _in_parts(clip: FrozenClip, work: Callable[..., Result], *columns: Tensor) -> list[Result]:
    """What `work` makes of a few rows of the columns (N, ...) at a time, side by side, in order.

    What is kept for the way back through the encoder is most of what inversion holds in memory.
    """

    def of_part(part: tuple[Tensor, ...], _: Progress) -> Result:
        return work(*part)

    parts = zip(*(column.split(clip.batch) for column in columns), strict=True)
    return together([partial(of_part, part) for part in parts], silent, clip.device)


def encode_pixels(clip: FrozenClip, pixels: Tensor) -> Tensor:
    """Unit features (N, E), on the CPU, of pixels (N, 3, S, S) in [0, 1], without a way back."""

    @torch.no_grad()
    def work(part: Tensor) -> Tensor:
        return clip.encode_images(part.to(clip.device)).cpu()

    return torch.cat(_in_parts(clip, work, pixels))


def _led_back(clip: FrozenClip, pixels: Tensor, gradient: Tensor) -> Tensor:
    """The gradient (N, 3, S, S) in the pixels, given that in their features, (N, E)."""

    def work(part: Tensor, wanted: Tensor) -> Tensor:
        leaf = part.requires_grad_()
        (found,) = torch.autograd.grad(clip.encode_images(leaf.to(clip.device)).cpu(), leaf, wanted)
        return found

    return torch.cat(_in_parts(clip, work, pixels, gradient))


class Pull(NamedTuple):
    """How far pixels (N, 3, S, S) are from their targets: losses (N,), answers (N,), the gradient in them."""

    losses: Tensor
    answers: Tensor
    gradient: Tensor


def pull(clip: FrozenClip, head: Answering, pixels: Tensor, targets: Tensor) -> Pull:
    """What `head` misses of `targets` (N,), every image alone; the gradient is that of the sum of the losses."""

    def work(part: Tensor, wanted: Tensor) -> Pull:
        leaf = part.requires_grad_()
        features = clip.encode_images(leaf.to(clip.device)).cpu()
        losses = head.missing(features, wanted)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return Pull(losses.detach(), head.answers(features.detach()), gradient)

    parts = _in_parts(clip, work, pixels.detach(), targets)
    return Pull(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _rate(family: Inverted, settings: InversionSettings) -> float:
    return settings.mask_learning_rate if family in ("masked", "patch") else settings.learning_rate


def _shift(pattern: Pattern, clip: FrozenClip, settings: InversionSettings, *, still: bool = False) -> int:
    """Pixels by which a trigger moves from step to step, at most: a patch goes anywhere, unless it is to keep still."""
    if pattern.family == "patch" and not still:
        return (clip.image_size - pattern.side) // 2
    return int(settings.shift * clip.image_size)


def _varied(trigger: FoundTrigger, shift: int, generator: torch.Generator) -> FoundTrigger:
    down, right = (int(torch.randint(-shift, shift + 1, (1,), generator=generator)) for _ in range(2))
    return trigger.rolled(down, right)
