"""Measure a drawn cell of the committed evidence again, from the clean model on, and compare.

    python benchmarks/recheck.py --seed 1 --root ../shared --root IMAGES --work NEW --jobs 2 --final

A seed draws one attack that took and one rival. The implant is planted anew, CBPT and the rival defend it once more,
and CA, ASR and PA must lie within three deviations of the committed lines: of the seeds' spread, of counting so many
images, and of planting anew, taken together. The last is what the undefended CA (for PA, too: both are shares of right
answers) and ASR differ by over the committed lines of different plantings of one attack, the largest of all attacks'.
Of a share of 0 or 1 counting deviates as with one image more or less. `--work` must be new: nothing that an earlier run
made is used. The committed lines are of the test images, which `--final` must allow to be read. The comparison is
appended to recheck.jsonl, which docs/evidence.md shows.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from command import append, plainly, stamp
from evidence import LINES, PLAN, RECHECKS, Compared, committed

from cbpt_guard.bench.lines import CONTROL, OFF, Line, read_lines
from cbpt_guard.bench.plan import Cells, Places, Plan
from cbpt_guard.bench.suite import run_suite
from cbpt_guard.bench.table import NO_RIVALS, OURS
from cbpt_guard.cli.machine import prepare_torch, threads_of_each
from cbpt_guard.metrics import standard_error

SHOTS, DEVIATIONS = 16, 3
COMPARED = {"ca": "ca", "asr": "asr", "pa": "ca"}
"""What is compared, and which undefended share tells how far plantings differ in it."""


def main() -> None:
    """Parse the command, measure, compare; exits 1 where the two disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--root", type=Path, action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, help="of each job")
    parser.add_argument("--jobs", type=int, default=1, help="2: CBPT and the rival side by side")
    parser.add_argument(
        "--final",
        action="store_true",
        required=True,
        help="read the test images; each record of recheck.jsonl is such a read",
    )
    args = parser.parse_args()
    if args.work.exists():
        sys.exit(f"{args.work} exists; what an earlier run made must not be used")
    lines = committed()
    implant, rival = drawn(lines, args.seed)
    sys.stdout.write(f"seed {args.seed} draws {rival} against CBPT on {implant}\n")
    plan = small_plan(Plan.read(PLAN), implant, rival)
    out = args.work / "lines.jsonl"
    start, began = partial(prepare_torch, args.threads or threads_of_each(args.jobs)), time.monotonic()
    run_suite(plan, Places(tuple(args.root), args.work), out, split="test", jobs=args.jobs, start=start, report=print)
    again = read_lines(out)
    planted = {field: replanted(lines, field) for field in COMPARED.values()}
    told = [one for name in (OURS, rival) for one in compared(name, before(lines, implant, name), again, planted)]
    sys.stdout.writelines(f"{one}{'' if one.inside else ': DISAGREES'}\n" for one in told)
    minutes = round((time.monotonic() - began) / 60, 1)
    record = {"seed": args.seed, "implant": implant, "rival": rival, "minutes": minutes}
    append(RECHECKS, record | {"compared": [one._asdict() for one in told], **stamp()})
    sys.exit(0 if all(one.inside for one in told) else 1)


def attacked(lines: Sequence[Line]) -> list[Line]:
    """The lines of implants that took, at work: neither of the clean model nor of triggers that are off."""
    return [line for line in lines if line.took and line.shots == SHOTS and line.attack not in (CONTROL, OFF)]


def drawn(lines: Sequence[Line], seed: int) -> tuple[str, str]:
    """An implant that took, and a rival that met it."""
    rivals = sorted({(line.implant, line.defense) for line in attacked(lines) if line.defense not in NO_RIVALS})
    if not rivals:
        sys.exit(f"{LINES.name} holds no rival's line of an attack that took")
    return random.Random(seed).choice(rivals)


def before(lines: Sequence[Line], implant: str, defense: str) -> list[Line]:
    """What was committed of a defence against that implant at work."""
    return [line for line in attacked(lines) if (line.implant, line.defense) == (implant, defense)]


def small_plan(plan: Plan, implant: str, rival: str) -> Plan:
    """The plan's own implant with two defences and one seed."""
    cells = Cells(implants=(implant,), defenses=(OURS, rival), seeds=(0,), shots=(SHOTS,))
    return plan.model_copy(update={"implants": {implant: plan.implants[implant]}, "cells": (cells,)})


def replanted(lines: Sequence[Line], field: str) -> float:
    """The standard deviation of an undefended share over the plantings of one attack, the largest of all attacks'."""
    found: dict[str, set[float]] = {}
    for line in attacked(lines):
        found.setdefault(line.implant, set()).add(getattr(line.undefended, field))
    return max((stdev(shares) for shares in found.values() if len(shares) > 1), default=0.0)


def compared(
    defense: str, earlier: Sequence[Line], again: Sequence[Line], planted: Mapping[str, float]
) -> list[Compared]:
    """Each share of the defence's new line against what was committed, with the spread that is stated above."""
    (new,) = (line for line in again if line.defense == defense)
    found = []
    for name, replanting in COMPARED.items():
        shares = [getattr(line, name) for line in earlier]
        least = 1 / new.images
        counting = math.sqrt(2) * standard_error(min(max(mean(shares), least), 1 - least), new.images)
        seeds = stdev(shares) if len(shares) > 1 else 0.0
        spread = DEVIATIONS * math.hypot(seeds, counting, planted[replanting])
        found.append(Compared(defense, name, getattr(new, name), mean(shares), spread))
    return found


if __name__ == "__main__":
    plainly(main)
