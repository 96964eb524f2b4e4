"""Write docs/evidence.md's generated parts and its picture from the committed lines.

    python benchmarks/evidence.py            rewrites them
    python benchmarks/evidence.py --check    exits 1 where a committed byte differs

The prose is the document's own; what stands between a pair of `<!-- name -->` marks comes from here.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command import plainly, read
from pages import filled

from cbpt_guard.bench.bars import apart, bars
from cbpt_guard.bench.limits import limits, recalls
from cbpt_guard.bench.lines import CONTROL, OFF, Key, Line
from cbpt_guard.bench.plan import Plan
from cbpt_guard.bench.plot import plot
from cbpt_guard.bench.settings import SETTINGS, settings_of
from cbpt_guard.bench.suite import PLANTINGS, READS, lines_in, of_this_search
from cbpt_guard.bench.summary import summary
from cbpt_guard.bench.table import OURS, UNTOUCHED, joined, table, tame_text
from cbpt_guard.bench.verdicts import verdicts
from cbpt_guard.defense.calibration import SEARCH

HERE = Path(__file__).parent
LINES, PLAN, SEEDS_PLAN = HERE / "evidence", HERE / "plan.toml", HERE / "seeds.toml"
PUBLISHED = HERE / "published.toml"
ADAPTIVE, ADAPTIVE_PLAN = HERE / "adaptive", HERE / "adaptive.toml"
UNSEEN, UNSEEN_PLAN = HERE / "unseen", HERE / "unseen.toml"
ABLATIONS, ABLATIONS_PLAN = HERE / "ablations", HERE / "ablations.toml"
RECIPES = HERE / "planting"
SUPERSEDED = HERE / "superseded.jsonl"
"""Lines of CBPT that failed, or suspected a natural class, and that a later search's took the place of."""
ROAD, RECHECKS = HERE / "road.jsonl", HERE / "recheck.jsonl"
DOCUMENT = HERE.parent / "docs" / "evidence.md"
PICTURE = DOCUMENT.with_suffix(".svg")
DEVELOPED_WITH = "tiny-imagenet"
SEEN = {
    "developed on": (
        "badnet",
        "blended",
        "sig",
        "wanet",
        "issba",
        "trojvqa",
        "badclip",
        "filter",
        "two",
        "full-stripes",
        "blur",
        "opposite-colours",
        "rotation",
        "refool",
    ),
    "looked at": ("stripe-patch", "watermark"),
}
"""What docs/notebook.md says of the attacks: on whose development images a family of triggers, the test's threshold,
its rule for few images or what anchored rows are taught was chosen; and on which a bound (what stands out, the fresh
masks) or where a share comes from was looked at."""


class Compared(NamedTuple):
    """One share measured again, the mean of the committed ones, and how far apart the two may lie."""

    defense: str
    column: str
    found: float
    committed: float
    spread: float

    @property
    def inside(self) -> bool:
        """Whether the two agree."""
        return abs(self.found - self.committed) <= self.spread

    def __str__(self) -> str:
        committed = f"({100 * self.committed:.1f} ± {100 * self.spread:.1f})"
        return f"{self.defense} {self.column} {100 * self.found:.1f} {committed}"


def main() -> None:
    """Parse the command, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    lines = committed()
    document = filled(DOCUMENT.read_text(encoding="utf-8"), parts(lines))
    with tempfile.TemporaryDirectory() as folder:
        picture = plot(lines, Path(folder) / PICTURE.name).read_text(encoding="utf-8")
    for path, text in ((DOCUMENT, document), (PICTURE, picture)):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not what the lines give; run python benchmarks/evidence.py")


def committed(folder: Path = LINES, asked: Sequence[Path] = (PLAN, SEEDS_PLAN)) -> list[Line]:
    """Every committed line, in the order of the plans' suspects and defences, whatever part it was measured in."""
    keys = (key for path in asked for key in asked_by(Plan.read(path)))
    place = {key: number for number, key in enumerate(keys)}
    return sorted(lines_in(folder), key=lambda line: place[line.key])


def asked_by(plan: Plan) -> list[Key]:
    """The keys of every line on test images that a plan asks for, in its order."""
    return [key for group in plan.groups() for key in plan.keys(group, "test")]


def parts(lines: list[Line]) -> dict[str, str]:
    """The generated parts by name."""
    adaptive, unseen = committed(ADAPTIVE, [ADAPTIVE_PLAN]), committed(UNSEEN, [UNSEEN_PLAN])
    counted = [*lines, *unseen]
    every = [*counted, *adaptive]
    own = [line for line in counted if line.dataset == DEVELOPED_WITH]
    return {
        "summary": summary(lines),
        "progress": "\n\n".join(
            progress(found, asked)
            for found, asked in (
                (lines, PLAN),
                (lines, SEEDS_PLAN),
                (unseen, UNSEEN_PLAN),
                (adaptive, ADAPTIVE_PLAN),
                (committed(ABLATIONS, [ABLATIONS_PLAN]), ABLATIONS_PLAN),
            )
        ),
        "searches": searches(every),
        "bars": bars(counted),
        "limits": limits(own),
        "recall": recalls(own),
        "apart": apart(own, SEEN),
        "verdicts": verdicts(every),
        "superseded": "\n".join(superseded([Line(**line) for line in read(SUPERSEDED)])),
        "verdicts by the paper's rule": verdicts(every, "cbpt-prompts"),
        "unseen": table(unseen),
        "adaptive": table(adaptive),
        "adaptive bars": bars(adaptive),
        "table": table(lines),
        "reads": reads(),
        "rechecks": rechecks(read(RECHECKS)),
        "plantings": "\n".join(
            plantings(
                [folder / PLANTINGS for folder in (LINES, UNSEEN, ADAPTIVE)], {line.suspect_sha256 for line in every}
            )
        ),
        "recipes": "\n".join(recipes(read(RECIPES / PLANTINGS), lines_in(RECIPES))),
        "published": "\n\n".join(published(tomllib.loads(PUBLISHED.read_text(encoding="utf-8")))),
        "chosen": "\n".join(chosen([line for line in lines if line.defense in SETTINGS])),
        "settings": "\n\n".join(stated()),
    }


def superseded(lines: Sequence[Line]) -> Iterator[str]:
    """A point for each line that was replaced: what the run said, its ASR, and whom it suspected wrongly."""
    for line in lines:
        planted = {pair.target for pair in line.pairs} or {line.target}
        draw = f", seed {line.seed}" if line.seed else ""
        told = f"- *{line.implant}*{draw}, search {line.search}: *{line.verdict}*, ASR of the worst trigger "
        told += f"{100 * line.asr_worst:.1f} %"
        for one in line.suspects or ():
            if one.name not in planted:
                lost = 100 * (one.recall - one.undefended)
                told += f"; {one.name!r} suspected wrongly, its recall {lost:+.1f} points"
        yield told


def reads() -> str:
    """How often the test images were read, by what the suite logs and by the road's lines."""
    suite = sum(len(read(folder / READS)) for folder in (LINES, UNSEEN, ADAPTIVE, ABLATIONS))
    road = sum(line["split"] == "test" for line in read(ROAD))
    return (
        f"The test images were read by {suite} runs of the suite (`{READS}` beside the lines), {road} times by "
        f"`benchmarks/road.py` (`{ROAD.name}`), and {len(read(RECHECKS))} times by `benchmarks/recheck.py` "
        f"(`{RECHECKS.name}`)."
    )


def rechecks(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: what `benchmarks/recheck.py` measured again, with the committed mean and the stated spread behind."""
    if not records:
        return "None yet."
    rows = [joined(("day", "seed", "implant", "rival", "minutes", "in %, committed in brackets", "agrees"))]
    rows.append(joined(["---"] * 7))
    for record in records:
        shares = [Compared(**one) for one in record["compared"]]
        about = (record["when"][:10], str(record["seed"]), record["implant"], record["rival"], str(record["minutes"]))
        agrees = "yes" if all(one.inside for one in shares) else "**no**"
        rows.append(joined((*about, ", ".join(map(str, shares)), agrees)))
    return "\n".join(rows)


def progress(lines: Sequence[Line], asked_in: Path) -> str:
    """How much of a plan is measured, with today's settings and, suspect by suspect, with today's search."""
    plan = Plan.read(asked_in)
    asked: dict[str, list[Key]] = {}
    for group in plan.groups():
        asked.setdefault(group.unit, []).extend(plan.keys(group, "test"))
    every = {key for keys in asked.values() for key in keys}
    found = {line.key: line for line in lines if line.key in every and line.settings == plan.settings(line.key)}
    measured = {key for key, line in found.items() if of_this_search(line)}
    done = {unit: sum(key in measured for key in keys) for unit, keys in asked.items()}
    told = {
        "Whole": [unit for unit, keys in asked.items() if done[unit] == len(keys)],
        "In part": [
            f"{unit} ({done[unit]} of {len(keys)})" for unit, keys in asked.items() if 0 < done[unit] < len(keys)
        ],
        "Not yet": [unit for unit in asked if not done[unit]],
    }
    parts = [f"{what}: {', '.join(units)}." for what, units in told.items() if units]
    told_of = f"Of the {len(every)} lines that `{asked_in.name}` asks for {len(found)} are measured"
    told_of += f", {len(measured)} of them with today's search or without any." if len(found) > len(measured) else "."
    return " ".join([told_of, *parts])


def searches(lines: Sequence[Line]) -> str:
    """Which version of the search each of CBPT's lines is of: what was measured before a change is not after it."""
    runs: dict[str, list[str]] = {}
    for line in lines:
        if line.defense == OURS:
            version = "earlier ones, or lines that do not say it" if line.search is None else f"version {line.search}"
            runs.setdefault(version, []).append(f"clean {line.dataset}" if line.attack == CONTROL else line.implant)
    told = (f"of {version}: {len(names)} ({', '.join(dict.fromkeys(names))})" for version, names in runs.items())
    return f"Lines of `{OURS}` by the version of its search, which is {SEARCH} now: {'; '.join(told)}."


def plantings(logs: Sequence[Path], named: Collection[str | None]) -> Iterator[str]:
    """What each implant did when it was planted, by its own record; those alone whose checkpoint a line names."""
    records = {
        (record["implant"], record["suspect_sha256"]): record
        for log in logs
        for record in read(log)
        if record["suspect_sha256"] in named
    }
    if not records:
        yield "No line names a planting yet."
        return
    yield joined(("implant", "sha256", "trigger", "target", "CA, clean model", "CA, poisoned", "ASR", "images", "took"))
    yield joined(["---"] * 9)
    for record in records.values():
        for report in record["reports"]:
            shares = [f"{100 * report[share]:.1f}" for share in ("ca_clean", "ca_poisoned", "asr")]
            name, trigger, target = (
                tame_text(text) for text in (record["implant"], report["trigger"], report["target"])
            )
            took = "yes" if record["took"] else "no"
            yield joined((name, record["suspect_sha256"][:8], trigger, target, *shares, str(report["images"]), took))


def recipes(records: Sequence[dict[str, Any]], lines: Sequence[Line]) -> Iterator[str]:
    """What each implant of one attack did, and what differs in their recipes.

    By its last planting, which counts on few images, and by the undefended suspect's line, which counts on many.
    """
    last = {record["implant"]: record for record in records}
    if not last:
        yield "None has been measured yet."
        return
    names = dict.fromkeys(name for record in last.values() for name in record["recipe"])
    values = {name: [str(record["recipe"].get(name, "-")) for record in last.values()] for name in names}
    differ = [name for name, found in values.items() if len(set(found)) > 1]
    untouched = (line for line in lines if line.defense == UNTOUCHED and line.attack not in (OFF, CONTROL))
    many = {line.suspect_sha256: line for line in untouched}
    planted = ("CA, clean model", "CA, poisoned", "ASR", "images", "took")
    counted = ("CA, counted", "target's recall, counted", "images counted")
    head = ("implant", *(name.replace("_", " ") for name in differ), *planted, *counted)
    yield joined(head)
    yield joined(["---"] * len(head))
    for number, (implant, record) in enumerate(last.items()):
        took = "yes" if record["took"] else "no"
        for report in record["reports"]:
            shares = [f"{100 * report[share]:.1f}" for share in ("ca_clean", "ca_poisoned", "asr")]
            cells = [*(values[name][number] for name in differ), *shares, str(report["images"]), took]
            line = many.get(record["suspect_sha256"])
            if line is None:
                cells += ["-"] * len(counted)
            else:
                cells += [f"{100 * line.ca:.1f}", f"{100 * line.target_recall:.1f}", str(line.images)]
            yield joined((implant, *cells))


def chosen(lines: Sequence[Line]) -> Iterator[str]:
    """What each defence chose on held-out shots, how often, and what it could choose from."""
    runs = {(line.suspect_sha256, line.defense, line.seed, line.shots): line for line in lines if line.chosen}
    if not runs:
        yield "No line says it yet."
        return
    yield joined(("defence", "runs", "what", "chosen (times)", "of"))
    yield joined(["---"] * 5)
    for defense in dict.fromkeys(line.defense for line in runs.values()):
        own = [line.chosen or {} for line in runs.values() if line.defense == defense]
        settings = settings_of(defense)
        tuning = settings | settings.get("tuning", {})
        for name in sorted({name for values in own for name in values}):
            times = Counter(values[name] for values in own if name in values)
            told = ", ".join(f"{value:g} ({count})" for value, count in sorted(times.items()))
            tried = f"1 to {tuning['epochs']}" if name == "epoch" else _listed(settings[f"{name}s"])
            yield joined((defense, str(len(own)), name.replace("_", " "), told, tried))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))


def stated() -> Iterator[str]:
    """The settings of every defence, after what its model's docstring says of them."""
    for name, settings in SETTINGS.items():
        if settings is not None:
            about = inspect.getdoc(type(settings)) or ""
            yield f"**{name}.** {about}\n\n```json\n{json.dumps(settings_of(name), indent=1)}\n```"


def published(read: dict[str, Any]) -> Iterator[str]:
    """A table for each paper, its setting above."""
    for paper in read["papers"]:
        head = ("", *paper["columns"])
        rows = [(name, *map(str, numbers)) for name, numbers in paper["rows"].items()]
        text = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
        yield "\n".join([f"**{paper['title']}.** {paper['setting']}.", "", *text])


if __name__ == "__main__":
    plainly(main)
