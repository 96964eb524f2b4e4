"""The guard against its bars: what CBPT is held to, computed from lines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from cbpt_guard.bench.lines import CONTROL, OFF, Line, Shares
from cbpt_guard.bench.table import CEILING, ENSEMBLE, OURS, UNTOUCHED, joined

SHOTS = 16
"""Of the bars, but for the one of few shots."""
_FEW, _SEEDS = 4, 3
_MOST_LOST = 12  # points of the target's recall in a run: 3 of 25 images


class Bar(NamedTuple):
    """One bar: what is measured, how far it may go and should, and the measured numbers as text."""

    what: str
    must: str
    measured: str
    kept: bool
    aim: str = "-"
    reached: bool = False

    def cells(self) -> tuple[str, ...]:
        """Its row of a table."""
        kept = "**no**" if not self.kept else "the aim, too" if self.reached else "yes"
        return self.what, self.must, self.aim, self.measured, kept


class Attack(NamedTuple):
    """CBPT's lines of one attack over the seeds, and those that it is held against; `off`: undefended, triggers off."""

    name: str
    ours: list[Line]
    oracle: list[Line]
    ensemble: list[Line]
    off: list[Line]

    def mean(self, value: Callable[[Line], float]) -> float:
        """Over CBPT's seeds, in points."""
        return points(mean(map(value, self.ours)))

    def undefended_ca(self) -> float:
        """Of the suspect as it is, in points: by its single template or the ensemble, whichever has more."""
        single = mean(line.undefended.ca for line in self.ours)
        # by what it gains on its own planting: replanted implants differ by more than the bar allows
        gained = mean(line.ca - line.undefended.ca for line in self.ensemble) if self.ensemble else 0.0
        return points(single + max(0.0, gained))

    def ceiling(self, value: Callable[[Line], float]) -> float:
        """Over the oracle's seeds, in points."""
        return points(mean(map(value, self.oracle)))

    def paired(self) -> Attack | None:
        """With those seeds alone that CBPT and the oracle share; None where there are none."""
        seeds = {line.seed for line in self.ours} & {line.seed for line in self.oracle}
        ours, oracle = ([line for line in part if line.seed in seeds] for part in (self.ours, self.oracle))
        return self._replace(ours=ours, oracle=oracle) if seeds else None

    def without_oracle(self) -> Attack | None:
        """For where none shares a seed; None where the suspect was not counted with its triggers off either."""
        return self._replace(oracle=[]) if self.off else None

    def pairs(self) -> list[Attack]:
        """One for each of several (trigger, target) pairs, with the pair's own shares: a mean would hide the worst."""
        targets = [pair.target for pair in self.ours[0].pairs]
        return [
            Attack(f"{self.name} ({target})", *(of_pair(part, number) for part in self[1:]))
            for number, target in enumerate(targets)
        ] or [self]


def of_pair(lines: Sequence[Line], number: int) -> list[Line]:
    """The lines with the shares of one of their pairs in the place of the mean's."""
    return [
        line.model_copy(update={name: getattr(line.pairs[number], name) for name in Shares.model_fields})
        for line in lines
    ]


def bars(lines: Sequence[Line]) -> str:
    """Markdown, a table for each data set; every attack that took counts, each by the mean over its seeds."""
    parts = []
    for dataset in dict.fromkeys(line.dataset for line in lines):
        here = [line for line in lines if line.dataset == dataset]
        found = list(_bars(here))
        if found:
            head = ("what", "must", "aim", "measured", "kept")
            rows = [joined(bar.cells()) for bar in found]
            title = f"**{dataset}**, {_counted(attacks(here, SHOTS))}, {SHOTS} shots a class, in %"
            parts.append("\n".join([title, "", joined(head), joined(["---"] * len(head)), *rows]))
    return "\n\n".join(parts) if parts else "No attack has been measured yet."


def _counted(found: Sequence[Attack]) -> str:
    """How many attacks, and on how many of them the bars' three seeds are measured."""
    whole = sum(len({line.seed for line in attack.ours}) >= _SEEDS for attack in found)
    return f"{len(found)} attack{'s' if len(found) != 1 else ''}, {whole} with {_SEEDS} seeds and the rest with fewer"


def attacks(lines: Sequence[Line], shots: int) -> list[Attack]:
    """The attacks that CBPT was run against, in the order of the lines, but for those that did not take."""
    counted = [line for line in lines if line.attack not in (OFF, CONTROL) and line.took is not False]

    def by(defense: str, name: str, shots: int) -> list[Line]:
        return [line for line in counted if (line.defense, line.implant, line.shots) == (defense, name, shots)]

    def off(name: str) -> list[Line]:
        return [line for line in lines if (line.attack, line.defense, line.implant) == (OFF, UNTOUCHED, name)]

    names = dict.fromkeys(line.implant for line in counted if line.defense == OURS and line.shots == shots)
    return [
        Attack(name, by(OURS, name, shots), by(CEILING, name, SHOTS), by(ENSEMBLE, name, SHOTS), off(name))
        for name in names
    ]


def _bars(lines: Sequence[Line]) -> Iterator[Bar]:
    found = attacks(lines, SHOTS)
    if not found:
        return
    asr = [attack.mean(lambda line: line.asr_worst) for attack in found]
    kept, reached = (mean(asr) <= most and max(asr) <= worst for most, worst in ((1.5, 3), (0.5, 2)))
    yield _bar("ASR, mean and worst", "1.5 and 3", (mean(asr), max(asr)), kept, "0.5 and 2", reached)
    ca = [round(attack.mean(lambda line: line.ca) - attack.undefended_ca(), 9) for attack in found]
    kept = mean(ca) >= -0.5 and min(ca) >= -1.5
    known = sum(bool(attack.ensemble) for attack in found)
    what = f"CA less the undefended one (the better of two for {known}), mean and worst"
    yield _bar(what, "-0.5 and -1.5", (mean(ca), min(ca)), kept, "0 in the mean", mean(ca) >= 0)
    recall = [attack.mean(lambda line: line.target_recall - line.undefended.target_recall) for attack in found]
    worst = min(points(o.target_recall - o.undefended.target_recall) for attack in found for o in attack.ours)
    kept = mean(recall) >= -5 and worst >= -_MOST_LOST
    what = "planted target's recall less the undefended one, mean and worst run"
    must = f"-5 and -{_MOST_LOST} (3 images where a class has 25)"
    yield _bar(what, must, (mean(recall), worst), kept, "0 in the mean", mean(recall) >= 0)
    yield from _wrongly_suspected([line for attack in found for line in attack.ours])
    yield from _poisoned_accuracy([paired for attack in found if (paired := attack.paired())])
    limited = [one for attack in found if (one := attack.paired() or attack.without_oracle())]
    yield from _largest_share(limited, len(found))
    control = [line for line in lines if line.attack == CONTROL and line.defense == OURS]
    if control:
        cost = points(mean(line.ca - line.undefended.ca for line in control))
        runs = _times_of(control, "run")
        yield _bar(f"CA less the undefended one, clean model ({runs})", "-0.5", (cost,), cost >= -0.5, "0", cost >= 0)
    yield from _few_shots(attacks(lines, _FEW))


def _few_shots(found: Sequence[Attack]) -> Iterator[Bar]:
    """The ASR with few shots, which is held in the mean; the worst is told, for the mean hides it."""
    if not found:
        return
    asr = {attack.name: attack.mean(lambda line: line.asr_worst) for attack in found}
    usual, worst = mean(asr.values()), max(asr, key=lambda name: asr[name])
    seeds = _times_of([line for attack in found for line in attack.ours], "seed")
    what = f"ASR with {_FEW} shots, mean and worst of {len(found)} attacks ({seeds})"
    text = f"{one_digit(usual)}, {one_digit(asr[worst])} ({worst})"
    yield Bar(what, "5 in the mean", text, usual <= 5, "2 in the mean", usual <= 2)


def _times_of(lines: Sequence[Line], what: str) -> str:
    """How many draws of shots stand behind lines, of which a control has one for each trigger."""
    count = len({line.seed for line in lines})
    return f"{count} {what}{'s' if count != 1 else ''}"


def _wrongly_suspected(runs: Sequence[Line]) -> Iterator[Bar]:
    """The recall of suspected classes that no trigger aims at; of lines from before it was kept it is not known."""
    known = [line for line in runs if line.suspects is not None]
    if not known:
        return
    lost = [
        points(one.recall - one.undefended)
        for line in known
        for one in line.suspects or ()
        if one.name not in ({pair.target for pair in line.pairs} or {line.target})
    ]
    what = f"wrongly suspected classes' recall less the undefended one, {len(known)} of {len(runs)} runs known"
    must = f"mean -5 and worst -{_MOST_LOST}"
    if lost:
        kept = mean(lost) >= -5 and min(lost) >= -_MOST_LOST
        yield _bar(what, must, (mean(lost), min(lost)), kept, "0 in the mean", mean(lost) >= 0)
    else:
        yield Bar(what, must, "none was suspected", kept=True, aim="0 in the mean", reached=True)


def apart(lines: Sequence[Line], seen: Mapping[str, Collection[str]]) -> str:
    """Markdown: the attacks apart by what the method's development saw of them, with 16 shots a class.

    `seen` names attacks by kind; the others are those that it never saw. Every number is a mean over attacks but the
    worst ASR; PA is the share of the oracle's on the same attacks.
    """
    found = attacks(lines, SHOTS)
    head = ("attacks", "which", "ASR, mean", "ASR, worst", "CA less the undefended", "target's recall less it",
            "PA, % of the oracle's")  # fmt: skip
    parts = {kind: [attack for attack in found if attack.name in names] for kind, names in seen.items()}
    known = {name for names in seen.values() for name in names}
    parts["never seen"] = [attack for attack in found if attack.name not in known]
    rows = [joined((name, *_part(part))) for name, part in parts.items() if part]
    return "\n".join([joined(head), joined(["---"] * len(head)), *rows]) if rows else "No attack has been measured yet."


def _part(part: Sequence[Attack]) -> Iterator[str]:
    asr = [attack.mean(lambda line: line.asr_worst) for attack in part]
    ca = mean(attack.mean(lambda line: line.ca) - attack.undefended_ca() for attack in part)
    recall = mean(a.mean(lambda line: line.target_recall - line.undefended.target_recall) for a in part)
    known = [paired for attack in part if (paired := attack.paired())]
    most = sum(attack.ceiling(lambda line: line.pa) for attack in known)
    reached = 100 * sum(attack.mean(lambda line: line.pa) for attack in known) / most if most else None
    yield ", ".join(attack.name for attack in part)
    for number in (mean(asr), max(asr), ca, recall):
        yield one_digit(number)
    yield "-" if reached is None else f"{reached:.0f}"


def _poisoned_accuracy(found: Sequence[Attack]) -> Iterator[Bar]:
    """PA of 90 % of the oracle's or within a point of it, by attacks that it was trained against, too."""
    if not found:
        return
    pa, most = mean(a.mean(lambda line: line.pa) for a in found), mean(a.ceiling(lambda line: line.pa) for a in found)
    reached = 100 * pa / most if most else 100.0
    what, must = "PA, mean; the oracle's; the share of it", "90 % of it or within 1"
    yield _bar(what, must, (pa, most, reached), reached >= 90 or pa >= most - 1, "97 % of it", reached >= 97)
    pairs = [pair for attack in found for pair in attack.pairs()]
    short = [pair.name for pair in pairs if not _near(pair)]
    text = ", ".join(short) or "none"
    yield Bar("attacks whose PA is short of that", "none", text, not short)


def _largest_share(found: Sequence[Attack], of: int) -> Iterator[Bar]:
    """The largest share, by those of so many attacks of which it is known what it may be."""
    if not found:
        return
    pairs = [pair for attack in found for pair in attack.pairs()]
    worst = max(pairs, key=_excess)
    must = "3 times the suspect's on clean images or 1.5 times the oracle's"
    share, excess = worst.mean(lambda line: line.max_share), _excess(worst)
    text = f"{share:.1f}, {excess:.1f} times what it may be ({worst.name})"
    aim = all(_times_the_clean(pair) <= 2 for pair in pairs)
    what = "largest share on triggered images, worst" + (f", {len(found)} of {of} known" if len(found) < of else "")
    yield Bar(what, must, text, excess <= 1, "2 times for all", aim)
    over = ", ".join(pair.name for pair in pairs if _excess(pair) > 1)
    yield Bar("attacks whose largest share is above that", "none", over or "none", not over)


def allowed_share(attack: Attack) -> float:
    """What the largest share may be, in points: 3 times the suspect's on clean images or 1.5 times the oracle's."""
    clean = [3 * 100 * mean(line.max_share for line in attack.off)] if attack.off else []
    oracle = [1.5 * attack.ceiling(lambda line: line.max_share)] if attack.oracle else []
    return max(clean + oracle)


def _times_the_clean(attack: Attack) -> float:
    """The largest share over the suspect's on clean images; endless where that was not measured."""
    clean = mean(line.max_share for line in attack.off) if attack.off else 0.0
    return round(attack.mean(lambda line: line.max_share) / (100 * clean), 9) if clean else float("inf")


def _excess(attack: Attack) -> float:
    return round(attack.mean(lambda line: line.max_share) / allowed_share(attack), 9)


def points(share: float) -> float:
    """In percentage points, without what floating point adds to a difference of decimal fractions."""
    return round(100 * share, 9)


def _near(attack: Attack) -> bool:
    pa, most = attack.mean(lambda line: line.pa), attack.ceiling(lambda line: line.pa)
    return pa >= 0.9 * most or pa >= most - 1


def _bar(what: str, must: str, numbers: Sequence[float], kept: bool, aim: str, reached: bool) -> Bar:
    return Bar(what, must, ", ".join(map(one_digit, numbers)), kept, aim, reached)


def one_digit(number: float) -> str:
    """As text with one decimal."""
    return f"{round(number, 1) + 0.0:.1f}"  # -0.04 is shown as 0.0
