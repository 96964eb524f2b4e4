"""Write docs/method.md's tables of ablations and of both answer rules from the committed lines.

    python benchmarks/ablations.py            rewrites them
    python benchmarks/ablations.py --check    exits 1 where a committed byte differs

How the lines are measured stands in benchmarks/ablations.toml and benchmarks/rule.toml.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from statistics import mean

from command import plainly
from evidence import committed
from pages import filled

from cbpt_guard.bench.lines import CONTROL, OFF, Line
from cbpt_guard.bench.plan import Plan
from cbpt_guard.bench.settings import TRUE_TRIGGER
from cbpt_guard.bench.suite import lines_in
from cbpt_guard.bench.table import joined

HERE = Path(__file__).parent
LINES, PLAN = HERE / "ablations", HERE / "ablations.toml"
RULE = HERE / "rule"
PAGE = HERE.parent / "docs" / "method.md"
CLEAN = "clean-prompts"
WHOLE = {
    "cbpt": "CBPT as it is: the switch, anchored rows",
    "cbpt-prompts": "the paper's rule: the tuned prompts answer every image",
    CLEAN: "the paper's rule without stage 1: prompts tuned on clean images alone",
}
"""What the variants are held against. The first two answer from the same found triggers, so they are lines of the same
run, which those of the evidence need not be."""
UNSEARCHED = (CLEAN, TRUE_TRIGGER)
"""Those that no found trigger is in."""
BY_RULE = {"none": "the suspect", "cbpt": "the switch", "cbpt-prompts": "the paper's rule"}


def main() -> None:
    """Parse the command, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, {"ablations": table(measured()), "rule": both_rules(lines_in(RULE))})
    if not parser.parse_args().check:
        PAGE.write_text(after, encoding="utf-8")
    elif before != after:
        sys.exit(f"{PAGE.name} is not what the lines give; run python benchmarks/ablations.py")


def measured() -> list[Line]:
    """The variants and the methods unchanged, of one run each, and what needs no found trigger from the evidence."""
    own = lines_in(LINES)
    met = set(map(_cell, own))
    counted = [line for line in committed() if line.attack not in (OFF, CONTROL)]
    return [*(line for line in counted if line.defense == CLEAN and _cell(line) in met), *own]


def _cell(line: Line) -> tuple[object, ...]:
    """What lines share that meet one planting with one draw of shots."""
    return line.implant, line.suspect_sha256, line.seed, line.shots


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row for each variant, in the plan's order, a pair of columns for each attack."""
    if not lines:
        return "No variant has been measured yet."
    attacks = [name for name in Plan.read(PLAN).implants if any(line.implant == name for line in lines)]
    order = [*WHOLE, *(group.defense for group in Plan.read(PLAN).groups())]
    head = ("what", "CA", "largest share, worst", *(f"{name}: {what}" for name in attacks for what in ("ASR", "PA")))
    rows = [joined(_cells(name, lines, attacks)) for name in dict.fromkeys(order) if _of(lines, name)]
    splits = " and ".join(sorted({f"`{line.split}`" for line in lines}))
    seeds = len({line.seed for line in lines})
    of = f"on {splits} images, {seeds} seed{'s' if seeds != 1 else ''}"
    counted = f"In %, {of}; CA is the mean over the attacks, where (of n) stands over n of them."
    return "\n".join([counted, "", joined(head), joined(["---"] * len(head)), *rows, "", searches(lines)])


def both_rules(lines: Sequence[Line]) -> str:
    """Markdown: the suspect as it is and CBPT by each rule, attack by attack, on development images."""
    if not lines:
        return "Neither rule has been measured on development images yet."
    counted = [line for line in lines if line.attack != OFF]
    if {line.split for line in counted} != {"clean"}:
        raise SystemExit(f"lines under {RULE.name} were counted on test images; measure them without --final")
    head = ("attack", "answers by", "CA", "ASR", "PA", "largest share", "target's recall")
    fields = ("ca", "asr", "pa", "max_share", "target_recall")
    order = [(name, rule) for name in dict.fromkeys(line.implant for line in counted) for rule in BY_RULE]
    rows = [
        joined((name, BY_RULE[rule], *(f"{100 * mean(getattr(line, one) for line in here):.1f}" for one in fields)))
        for name, rule in order
        if (here := [line for line in counted if (line.implant, line.defense) == (name, rule)])
    ]
    fewest, most = (which(line.images for line in counted) for which in (min, max))
    images = str(most) if fewest == most else f"{fewest} to {most}"
    return "\n".join([f"In %, on {images} images.", "", joined(head), joined(["---"] * len(head)), *rows])


def searches(lines: Sequence[Line]) -> str:
    """Which version of the search the found triggers of each attack are of, as far as lines say it."""
    found: dict[str, set[str]] = {}
    for line in lines:
        if line.defense not in UNSEARCHED:
            found.setdefault(line.implant, set()).add("not recorded" if line.search is None else str(line.search))
    told = (f"{name} {', '.join(sorted(versions))}" for name, versions in found.items())
    return f"Version of the search that found the triggers: {'; '.join(told)}."


def _cells(name: str, lines: Sequence[Line], attacks: Sequence[str]) -> Iterator[str]:
    own = _of(lines, name)
    yield _what(name)
    met = len({line.implant for line in own})
    yield f"{100 * mean(line.ca for line in own):.1f}" + (f" (of {met})" if met < len(attacks) else "")
    yield f"{100 * max(line.max_share for line in own):.1f}"
    for attack in attacks:
        here = [line for line in own if line.implant == attack]
        for field in ("asr", "pa"):
            yield f"{100 * mean(getattr(line, field) for line in here):.1f}" if here else "-"


def _of(lines: Sequence[Line], name: str) -> list[Line]:
    return [line for line in lines if line.defense == name]


def _what(name: str) -> str:
    """What a defence is, in its own words."""
    if name in WHOLE:
        return WHOLE[name]
    about = inspect.getdoc(resolve_name(name)) or name
    return about.partition("\n")[0].rstrip(".").lower()


if __name__ == "__main__":
    plainly(main)
