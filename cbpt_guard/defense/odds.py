"""How far a class is ahead of all others, from shares and probabilities that were measured: arithmetic alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cbpt_guard.defense.settings import InversionSettings

PROBE = 512
"""Images on which shares and found-trigger ASRs are read: a standard error of 2 points at most."""

_LOUD = 0.1  # odds of the scan's middle class from which its leaders say nothing: of ten classes 0.3 to 50, of 200 ~0
_SURE = 10.0  # odds of a scan that is not loud above which there is nothing to compare


def odds_of(share: Tensor) -> Tensor:
    """How many times as likely as all else, for shares in [0, 1]; that of one is taken as all but one of `PROBE`."""
    share = share.clamp(max=1 - 1 / PROBE)
    return share / (1 - share)


def ranked(values: Tensor) -> list[int]:
    """Classes, the largest of the values (C,) first."""
    ranking: list[int] = values.argsort(descending=True, stable=True).tolist()
    return ranking


def loud(scores: Tensor) -> bool:
    """Whether the scan brings even the class of middle rank to some images, given its scores (C,) in nats.

    Patterns of that height are large to such a model, and its clean copies have leaders, too.
    """
    return float(odds_of(scores.exp()).median()) >= _LOUD


def at_once(reached: Tensor, scores: Tensor, settings: InversionSettings) -> Tensor:
    """How far additive triggers put each class ahead, (C,): as the agnostic one reaches it, and by the scan's odds.

    Not at all where the scan is loud. Natural leaders may be far ahead of a rest that is not reached at all, so the
    rest counts as reached as often as not.

    Args:
        reached: the share of images that the agnostic trigger leads to each class, (C,).
        scores: those of a scan with patterns of the settings' height, (C,) in nats.
        settings: what stands out.
    """
    if loud(scores):
        return torch.zeros_like(reached)
    odds = odds_of(scores.exp()).clamp(1, _SURE)
    scanned = ahead(odds, settings.stands_out, len(odds))
    return torch.maximum(odds_of(reached), scanned)


def faintly(by_height: Tensor, settings: InversionSettings) -> Tensor:
    """The root of how far a scan with fainter patterns, too, puts each class ahead, (C,), where it is furthest.

    The root, since a clean model's class may lead several times by the luck of a draw. Any height counts: a patch needs
    contrast and is lost at heights where warps and blends still lead. Not at all where the scan is not loud.

    Args:
        by_height: the scores at each height, the greatest first, (H, C) in nats.
        settings: what stands out.
    """
    if not loud(by_height[0]):
        return torch.zeros_like(by_height[0])
    leads = [
        ahead(odds_of(scores.exp()).clamp(min=1 / settings.stands_out), settings.stands_out**2, settings.candidates)
        for scores in by_height
    ]
    return torch.stack(leads).amax(0).sqrt()


def ahead(odds: Tensor, times: float, most: int) -> Tensor:
    """How far a few leaders are ahead of the rest, (C,): their odds (C,) over the best of the rest, else 0.

    As many are leaders as there can be, `most` and half of all at most, while the last is so many `times` ahead.
    """
    ranking, found = ranked(odds), torch.zeros_like(odds)
    for count in range(1, min(most, len(ranking) // 2) + 1):
        leaders, best = ranking[:count], odds[ranking[count]]
        if odds[leaders[-1]] >= times * best:
            found[leaders] = odds[leaders] / best
    return found


def grown(growth: Tensor, settings: InversionSettings) -> list[int]:
    """The class whose share of the answers grew most, and others whose share grew clearly; growth (C,)."""
    ranking = ranked(growth)
    clear = [c for c in ranking[1:] if growth[c] >= settings.clear_share]
    return [ranking[0], *clear][: settings.candidates]
