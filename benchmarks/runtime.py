"""Measure the runtime against the bare encoder, and write docs/serving.md's table.

    python benchmarks/runtime.py measure --shared ../shared --work WORK [--rows NAME ...] [--short]
                                         [--patience N] [--quiet CORES]
    python benchmarks/runtime.py table

Ratios of interleaved runs, medians, in the default environment: no tuning variables, default arguments of `load`.
`measure` appends lines to runtime.jsonl; `--short` takes few rounds and writes nothing. A row during which other
processes took more than a tenth of a core (or `--quiet`) is measured again, whatever it gave, and left out when
patience ends; each line says what they took.
"""

from __future__ import annotations

import json
import operator
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import onnxruntime
import torch
from command import append, machine, parsers, plainly, read
from pages import rewrite
from rows import MOBILE, ROWS, TIMELESS, VIT, Line, Work, made
from timing import Watch

from cbpt_guard import __version__
from cbpt_guard.defense import openclip

HERE = Path(__file__).parent
LINES, PAGE = HERE / "runtime.jsonl", HERE.parent / "docs" / "serving.md"
QUIET, PAUSE = 0.1, 20.0  # cores that others may take; seconds until the next attempt


def main() -> None:
    """Parse the command and run it."""
    parser, _, measuring = parsers(__doc__)
    measuring.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    measuring.add_argument("--short", action="store_true")
    measuring.add_argument("--patience", type=int, default=5, help="how often a disturbed row is tried")
    measuring.add_argument("--quiet", type=float, default=QUIET, help="cores that other processes may take")
    args = parser.parse_args()
    if args.command == "table":
        write_table()
        return
    work = Work({name: made(name, args.shared, args.work) for name in (VIT, MOBILE)}, args.short)
    for name in args.rows:
        lines = undisturbed(name, work, args.patience, args.quiet)
        for line in lines:
            print(json.dumps(line), flush=True)
        if not args.short:
            append(LINES, *lines)


def undisturbed(name: str, work: Work, patience: int, quiet: float) -> list[Line]:
    """A row's lines, of the first attempt during which nobody else computed; none if there was no such."""
    for _ in range(patience):
        watch = Watch()
        lines = [{"row": name, **measured, **circumstances()} for measured in ROWS[name](work)]
        others = round(watch.others(), 3)
        if others <= quiet or name in TIMELESS:
            return [{**line, "others": others} for line in lines]
        shown = ", ".join(f"{line['ratio']}" for line in lines)
        print(f"{name}: others took {others} cores ({shown}); again", file=sys.stderr, flush=True)
        time.sleep(PAUSE)
    print(f"{name}: no quiet moment, left out", file=sys.stderr, flush=True)
    return []


def circumstances() -> Line:
    """What a ratio depends on."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return {
        "cbpt_guard": __version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "open_clip": openclip.VERSION,
        "int8_dot_products": "vnni" in flags,
        "machine": machine(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_table() -> None:
    """Rewrite the page's table."""
    lines = read(LINES)
    rewrite(PAGE, {"measured": table(last(lines))})


def last(lines: list[Line]) -> list[Line]:
    """The last line of each row, model, batch, precision and setting, in the order of `ROWS`."""
    kept = {tuple(line.get(key) for key in ("row", "model", "batch", "precision", "setting")): line for line in lines}
    return sorted(kept.values(), key=lambda line: list(ROWS).index(line["row"]))


def table(lines: list[Line]) -> str:
    """Markdown, one row per line; `kept` says whether the number is what it must be."""
    rows = ["| what | model | batch | measured | must | kept |", "|---|---|---|---|---|---|"]
    for line in lines:
        what = (ROWS[line["row"]].__doc__ or "").strip().rstrip(".")
        what += f": `{line['setting']}`" if "setting" in line else ""
        sign, bound = line["must"] or ("", "as found")
        kept = {"<=": operator.le, ">=": operator.ge}[sign](line["ratio"], bound) if sign else ""
        measured, shown = f"{line['ratio']:.3g} {line.get('unit', '')}".strip(), f"{sign} {bound}".strip()
        yes = {True: "yes", False: "no"}.get(kept, "")
        if yes == "no" and line.get("least", 0) > bound:
            yes = f"no: {line['least']:.3g} is all that these cores allow"
        rows.append(f"| {what} | {line['model']} | {line.get('batch', '')} | {measured} | {shown} | {yes} |")
    first, others = lines[0], max(line["others"] for line in lines if line["row"] not in TIMELESS)
    rows += [
        "",
        f"On {first['machine']}, onnxruntime {first['onnxruntime']}, torch {first['torch']}; medians of interleaved",
        f"runs, default arguments, other processes taking at most {others:.2g} cores. Printed by",
        "`python benchmarks/runtime.py table` from `benchmarks/runtime.jsonl`.",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    plainly(main)
