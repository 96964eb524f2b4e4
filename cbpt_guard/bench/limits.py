"""CBPT beside two limits: the oracle, and the model that was never poisoned under the very same triggers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from cbpt_guard.bench.bars import SHOTS, Attack, allowed_share, attacks, of_pair, one_digit, points
from cbpt_guard.bench.lines import CONTROL, Line
from cbpt_guard.bench.table import UNTOUCHED, joined

_HEAD = (
    "attack",
    "PA, CBPT",
    "PA, oracle",
    "PA, clean model",
    "largest share, CBPT",
    "it may be",
    "largest share, oracle",
    "largest share, clean model",
)
_RECALL = ("attack", "undefended", "CBPT", "the run that loses most", "oracle")


def limits(lines: Sequence[Line]) -> str:
    """Markdown, a row for each attack of one data set, of several pairs for each: the mean over seeds, in %.

    A trigger hides some of the image, so the clean model loses PA under it, too, and may lump what it no longer
    tells apart into one class. A number that lies beyond both limits is in bold: a PA below nine tenths of the
    smaller, a share above what it may be and above the clean model's.
    """
    undefended = [line for line in lines if line.attack == CONTROL and line.defense == UNTOUCHED]
    rows, without = list[str](), list[str]()
    for attack in filter(None, (attack.paired() for attack in attacks(lines, SHOTS))):
        clean = [line for line in undefended if line.implant == attack.name]
        parts = attack.pairs()
        natural = [of_pair(clean, number) for number in range(len(parts))] if len(parts) > 1 else [clean]
        rows += [joined(_cells(*both)) for both in zip(parts, natural, strict=True) if clean]
        without += [] if clean else [attack.name]
    if not rows:
        return "No attack has been measured beside the clean model yet."
    left_out = ["", f"Not measured beside the clean model yet: {', '.join(without)}."] if without else []
    return "\n".join([joined(_HEAD), joined(["---"] * len(_HEAD)), *rows, *left_out])


def _cells(attack: Attack, clean: Sequence[Line]) -> Iterator[str]:
    pa, most, natural = (
        attack.mean(lambda line: line.pa),
        attack.ceiling(lambda line: line.pa),
        100 * mean(line.pa for line in clean),
    )
    share, allowed, known, lumped = (
        attack.mean(lambda line: line.max_share),
        allowed_share(attack),
        attack.ceiling(lambda line: line.max_share),
        100 * mean(line.max_share for line in clean),
    )
    yield attack.name
    yield _marked(pa, pa < 0.9 * min(most, natural))
    yield from (f"{number:.1f}" for number in (most, natural))
    yield _marked(share, share > max(allowed, lumped))
    yield from (f"{number:.1f}" for number in (allowed, known, lumped))


def recalls(lines: Sequence[Line]) -> str:
    """Markdown, a row for each attack of one data set: the target's recall on clean images, the mean over seeds, in %.

    What the oracle loses says what one head for all images must; the switch answers clean ones by another head. Of
    several targets the mean counts.
    """
    rows = []
    for attack in filter(None, (attack.paired() for attack in attacks(lines, SHOTS))):
        before = attack.mean(lambda line: line.undefended.target_recall)
        most = min(points(line.target_recall - line.undefended.target_recall) for line in attack.ours)
        shares = (before, attack.mean(_recall), most, attack.ceiling(_recall))
        rows.append(joined((attack.name, *map(one_digit, shares))))
    return "\n".join([joined(_RECALL), joined(["---"] * len(_RECALL)), *rows]) if rows else "Not measured yet."


def _recall(line: Line) -> float:
    return line.target_recall


def _marked(number: float, beyond: bool) -> str:
    return f"**{number:.1f}**" if beyond else f"{number:.1f}"
