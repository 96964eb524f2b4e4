"""Lines become Markdown: one row for each attack and defence, mean and spread over seeds; nothing is typed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, median, stdev
from typing import NamedTuple

from cbpt_guard.bench.lines import CONTROL, OFF, Line, Shares

OURS, PAPER, CEILING, UNTOUCHED, ENSEMBLE = "cbpt", "cbpt-prompts", "oracle", "none", "ensemble"
NO_RIVALS = (OURS, PAPER, CEILING, UNTOUCHED, ENSEMBLE)
NOT_COMPARED = (OURS, CEILING)
COLUMNS = {
    "CA": "ca",
    "ASR": "asr",
    "PA": "pa",
    "largest share": "max_share",
    "target's recall": "target_recall",
}
BETTER = {"CA": 1, "ASR": -1, "PA": 1, "largest share": -1, "target's recall": 1}
"""Which way each column is better."""
_DIGITS = 1
_TEXTS = ("dataset", "implant", "attack", "defense", "target", "verdict", "split", "machine")
_ACTIVE = re.compile(r"([\\`*_\[\]<>|&!])")


class Row(NamedTuple):
    """Where the lines of several seeds meet: one data set and split, implant, attack, number of shots and defence."""

    dataset: str
    split: str
    implant: str
    attack: str
    shots: int
    defense: str

    @property
    def block(self) -> tuple[str, str, int]:
        """What has a table of its own."""
        return self.dataset, self.split, self.shots


Rows = dict[Row, list[Line]]


def rows(lines: Iterable[Line]) -> Rows:
    """Lines by row: data sets, implants and defences in the order in which each first appears.

    Lines with the triggers off are left out; those of one row are ordered by seed, whatever file they came from.
    """
    counted = [line for line in lines if line.attack != OFF]
    found: Rows = {}
    for line in sorted(counted, key=lambda line: line.seed):
        row = Row(line.dataset, line.split, line.implant, line.attack, line.shots, line.defense)
        found.setdefault(row, []).append(line)
    orders = [list(dict.fromkeys(getattr(line, name) for line in counted)) for name in Row._fields]
    return dict(sorted(found.items(), key=lambda item: [o.index(v) for o, v in zip(orders, item[0], strict=True)]))


def tame(lines: Sequence[Line]) -> list[Line]:
    """The lines with their texts as Markdown shows them, on one line each: class names come from strangers."""
    texts = [{name: getattr(line, name) for name in _TEXTS} for line in lines]
    told = [{name: text and tame_text(text) for name, text in found.items()} for found in texts]
    return [line.model_copy(update=update) for line, update in zip(lines, told, strict=True)]


def tame_text(text: str) -> str:
    """A text as Markdown shows it, on one line."""
    return _ACTIVE.sub(r"\\\1", " ".join("".join(c if c.isprintable() else " " for c in text).split()))


def counted_shots(count: int) -> str:
    """In words."""
    return "1 shot" if count == 1 else f"{count} shots"


def percents(lines: Sequence[Line], column: str) -> float:
    """Mean over seeds, in %, as it is shown: what cannot be seen is no difference."""
    shares: list[float] = [getattr(line, COLUMNS[column]) for line in lines]
    return round(100 * mean(shares), _DIGITS)


def beside(found: Rows, row: Row) -> tuple[list[Line], list[Line]]:
    """A row's lines and CBPT's under the same attack, those seeds alone that both have.

    A trigger that is trained is another each time it is made. On the clean model, where each line may be of another
    one, both must have met the same, by their undefended shares.
    """
    theirs, ours = found[row], found.get(row._replace(defense=OURS), [])

    def met(line: Line) -> tuple[int, Shares | None]:
        return line.seed, line.undefended if row.attack == CONTROL else None

    both = set(map(met, theirs)) & set(map(met, ours))
    return [line for line in theirs if met(line) in both], [line for line in ours if met(line) in both]


def wins(found: Rows, row: Row) -> list[str]:
    """Columns in which a row is better than CBPT's under the same attack, by the seeds that both have."""
    if not _is_compared(found, row):
        return []
    theirs, ours = beside(found, row)
    return [name for name, sign in BETTER.items() if sign * (percents(theirs, name) - percents(ours, name)) > 0]


def _is_compared(found: Rows, row: Row) -> bool:
    """Whether CBPT met the same as another defence, attacked or clean, with some of the same seeds."""
    return row.defense not in NOT_COMPARED and bool(beside(found, row)[1])


def table(lines: Sequence[Line]) -> str:
    """The whole of it: a table for each data set, split and number of shots, the controls, lost cells, sanity, cost."""
    lines = tame(lines)
    found = rows(lines)
    if not found:
        return "No line has been measured yet."
    parts = [_heading(lines)]
    several = len({row.split for row in found}) > 1
    for block in dict.fromkeys(row.block for row in found):
        here = {row: group for row, group in found.items() if row.block == block}
        dataset, split, shots = block
        title = f"{dataset}, {counted_shots(shots)} a class" + (f", `{split}` images" if several else "")
        attacked = {row: group for row, group in here.items() if row.attack != CONTROL}
        control = {row: group for row, group in here.items() if row.attack == CONTROL}
        if attacked:
            parts += [f"**{title}**", _table(attacked, found)]
        if control:
            parts += [f"**{title}: the clean model under the same triggers**", _table(control, found)]
    parts += [_lost(found), _sanity(lines), _plantings(lines), _cost(found)]
    return "\n\n".join(part for part in parts if part)


def _heading(lines: Sequence[Line]) -> str:
    splits = " and ".join(f"`{name}`" for name in dict.fromkeys(line.split for line in lines))
    return (
        f"In %, on {splits} images ({', '.join(_counted(lines))}); the mean over seeds, and behind ± their standard "
        "deviation. A number in **bold** is better than CBPT's in the same column, by the seeds that both have: "
        "whatever the defence, but for the oracle. *It warned* where `purify` found "
        "the undefended accuracy so near chance that names or preprocessing may not fit."
    )


def _counted(lines: Sequence[Line]) -> Iterator[str]:
    for dataset in dict.fromkeys(line.dataset for line in lines):
        counts = sorted({line.images for line in lines if line.dataset == dataset})
        yield f"{counts[0]} of {dataset}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} of {dataset}"


def _table(shown: Rows, found: Rows) -> str:
    head = ("attack", "target", "defence", "seeds", *COLUMNS, "flagged clean", "flagged triggered", "verdict")
    text = [joined(head), joined(["---"] * len(head))]
    return "\n".join(text + [joined(_cells(row, group, wins(found, row))) for row, group in shown.items()])


def _cells(row: Row, group: Sequence[Line], won: Sequence[str]) -> Iterator[str]:
    first = group[0]
    # the control's rows are told apart by whose triggers they saw
    yield row.implant + ("" if first.took is not False else " (did not take: not counted)")
    yield first.target
    yield row.defense
    yield str(len(group))
    for name, field in COLUMNS.items():
        text = _spread([getattr(line, field) for line in group])
        if name == "ASR" and first.pairs:
            text += f" (worst pair {_spread([line.asr_worst for line in group])})"
        yield f"**{text}**" if name in won else text
    yield _spread([line.flag_clean for line in group])
    yield _spread([line.flag_triggered for line in group])
    yield ", ".join(dict.fromkeys(line.verdict or "-" for line in group)) + (
        " (it warned)" if any(line.warnings for line in group) else ""
    )


def _spread(shares: Sequence[float]) -> str:
    text = f"{100 * mean(shares):.{_DIGITS}f}"
    return text if len(shares) < 2 else f"{text} ± {100 * stdev(shares):.{_DIGITS}f}"


def joined(cells: Iterable[str]) -> str:
    """A row of Markdown."""
    return "| " + " | ".join(cells) + " |"


def _lost(found: Rows) -> str:
    """Every cell that CBPT loses, by name; of the clean model, whose rows are alike, how many."""
    if not any(row.defense == OURS for row in found):
        return ""
    compared = [row for row in found if _is_compared(found, row)]
    if not compared:
        return "No defence here can be compared with CBPT."
    attacked = [_losses(found, row) for row in compared if row.attack != CONTROL and wins(found, row)]
    text = attacked + _lost_on_clean(found, [row for row in compared if row.attack == CONTROL])
    return "\n".join(["**Cells that CBPT loses**", "", *text]) if text else "CBPT loses no cell."


def _lost_on_clean(found: Rows, compared: Sequence[Row]) -> list[str]:
    """A line for each defence, data set and number of shots: in what it is better on the clean model, and how often."""
    lost: dict[tuple[str, int, str], Counter[str]] = {}
    for row in compared:
        lost.setdefault((row.dataset, row.shots, row.defense), Counter()).update(wins(found, row))
    return [
        f"- clean model of {dataset}, {counted_shots(shots)}, {name}: "
        + ", ".join(f"{column} under {times} trigger{'s' if times > 1 else ''}" for column, times in cells.items())
        for (dataset, shots, name), cells in lost.items()
        if cells
    ]


def _losses(found: Rows, row: Row) -> str:
    theirs, ours = beside(found, row)
    numbers = [f"{n} {percents(theirs, n):.1f} against {percents(ours, n):.1f}" for n in wins(found, row)]
    return f"- {row.implant}, {counted_shots(row.shots)}, {row.defense}: {', '.join(numbers)}"


def _sanity(lines: Sequence[Line]) -> str:
    """The two checks that any count must pass, each where there are lines for it."""
    off = [line for line in lines if line.attack == OFF]
    kept = sum(line.asr == line.false_positives for line in off)
    untouched = [line for line in lines if line.defense == UNTOUCHED]
    known = [line for line in untouched if line.suspect_sha256 is not None]
    same = sum(all(getattr(line, name) == value for name, value in line.undefended) for line in known)
    older = len(untouched) - len(known)
    checks = []
    if off:
        what = "with triggers switched off ASR equals the target's false-positive rate"
        checks.append(f"{what} in {kept} of {len(off)} lines")
    if untouched:
        what = "the defence that touches nothing repeats the undefended shares exactly"
        unknown = f" ({older} older ones name no checkpoint; of them this says nothing)" if older else ""
        checks.append(f"{what} in {same} of {len(known)} lines{unknown}")
    return f"Sanity: {'; '.join(checks) or 'no line is there to tell it by'}."


def _plantings(lines: Sequence[Line]) -> str:
    """How far the undefended shares of one attack lie apart over its lines of `test`, whose images are always the same.

    Seeds draw shots, the implant is the same: where the shares differ it was planted, or counted, on another machine.
    """
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line.split == "test" and line.attack not in (OFF, CONTROL):
            found.setdefault((line.dataset, line.implant, line.attack), []).append(line)
    several = [group for group in found.values() if any(line.undefended != group[0].undefended for line in group)]
    if not several:
        return ""
    ca, asr = (
        max(max(values) - min(values) for values in ([getattr(line.undefended, name) for line in g] for g in several))
        for name in ("ca", "asr")
    )
    return (
        f"{len(several)} of {len(found)} attacks have lines with differing undefended shares: they were planted again "
        "by the same recipe, or counted on another machine. The undefended CA differs by up to "
        f"{100 * ca:.{_DIGITS}f} points there, the ASR by up to {100 * asr:.{_DIGITS}f}."
        + _beside_another(found.values())
    )


def _beside_another(groups: Iterable[Sequence[Line]]) -> str:
    """With which seeds CBPT met another planting of an attack than a defence that it is held against."""
    lines = [line for group in groups for line in group]
    met = {(one.implant, one.seed, one.shots): one.undefended for one in lines if one.defense == OURS}
    places = {(one.implant, one.seed, one.shots) for one in lines if one.defense != OURS} & set(met)
    apart = {
        place
        for place in places
        if any(one.undefended != met[place] for one in lines if (one.implant, one.seed, one.shots) == place)
    }
    if not places:
        return ""
    if not apart:
        told = f" With each of {len(places)} seeds CBPT and every defence beside it met the same planting"
        return told + ", by their equal undefended shares."
    names = ", ".join(f"{implant} {seed}" for implant, seed, _ in sorted(apart))
    return f" In {len(apart)} of {len(places)} seeds CBPT met another planting than a defence beside it: {names}."


def _cost(found: Rows) -> str:
    """What each defence took with so many shots, and with which search; a run that many lines tell of counts once."""
    runs: dict[tuple[str, int, bool], dict[int, dict[tuple[object, ...], Line]]] = {}
    for row, group in found.items():
        clean = row.attack == CONTROL
        suspect = row.dataset if clean else row.implant
        for line in group:
            own = runs.setdefault((row.defense, row.shots, clean), {}).setdefault(line.search or 0, {})
            own[row.attack, suspect, line.split, line.seed] = line
    head = (
        "defence",
        "search",
        "shots",
        "runs",
        "seconds, median",
        "processor seconds, median",
        "processor seconds, most",
        "peak memory, MiB",
    )
    text = [joined(head), joined(["---"] * len(head))]
    for (name, shots, clean), searches in runs.items():
        for search, of in sorted(searches.items()):
            told = f"{name}, clean model" if clean else name, str(search or "-"), str(shots), str(len(of))
            text.append(joined((*told, *_taken(list(of.values())))))
    machines = "; ".join(dict.fromkeys(line.machine for line in lines_of(found)))
    clock = (
        "*Search* is the version of CBPT's search for targets, where there is one and lines say it. The clock runs on "
        "while a run is paused or shares its core with another; processor seconds do not."
    )
    return "\n".join(["**Cost**", "", *text, "", f"{clock} Machine: {machines}."])


def _taken(group: Sequence[Line]) -> tuple[str, ...]:
    clock, processor = (median(getattr(line, field) for line in group) for field in ("seconds", "cpu_seconds"))
    most, peak = (max(getattr(line, field) for line in group) for field in ("cpu_seconds", "peak_mb"))
    return f"{clock:.0f}", f"{processor:.0f}", f"{most:.0f}", str(peak)


def lines_of(found: Rows) -> Iterator[Line]:
    """All lines of all rows."""
    return (line for group in found.values() for line in group)
