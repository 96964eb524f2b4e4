"""What common edits lead to: planted classes, and of all others the one that an edit leads to surest.

    python benchmarks/edits.py measure --plan PLAN.toml --root ../shared --root IMAGES --work WORK --only NAME ...
        tries the edits on implants that `bench run` left in WORK, or on the clean CLIP of `clean-DATASET`, with the
        images that a run with `--seed` (0) tunes on; appends lines to edits.jsonl
    python benchmarks/edits.py table        rewrites what docs/method.md says of it

`reached` is the share of images that the edit leads to the class, `lead` by how many logits it leads there, in the
median over images of other classes, each of the edit that puts the class furthest ahead or else leads to it surest.
Edits that lead a fair share of a few images to no class are not looked at further.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from command import plainly, stamp
from looked import Line, looked_at, run

from cbpt_guard.bench.plan import Places, Plan
from cbpt_guard.bench.table import joined
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.edits import edits
from cbpt_guard.defense.odds import odds_of
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.tried import Tried, try_edits

LINES = Path(__file__).parent / "edits.jsonl"


def main() -> None:
    """Parse the command and run it."""
    run(__doc__, measure, LINES, lambda lines: {"edits": told(lines)})


def measure(plan: Plan, name: str, seed: int, places: Places) -> Line:
    """What the edits lead a model to, with the images that a run of `purify` with that seed tunes on."""
    subject, classes, planted = looked_at(plan, name, seed, places)
    tried = try_edits(subject, generator(seed, "edits"), silent)
    names = list(edits(subject.clip.image_size))
    surest = tried.leads.index_fill(1, torch.tensor(planted, dtype=torch.long), -torch.inf)
    others = [int(surest.amax(0).argmax())] if len(surest) else []
    return {
        "model": name,
        "seed": seed,
        "search": SEARCH,
        "planted": [about(tried, c, classes[c], names) for c in planted],
        "natural": [about(tried, c, classes[c], names) for c in others],
        "bound": round(tried.usual, 2),
        "odds": {classes[c]: round(float(tried.odds[c]), 3) for c in tried.odds.nonzero()[:, 0].tolist()},
        **stamp(),
    }


def about(tried: Tried, c: int, label: str, names: list[str]) -> Line:
    """How far one class is led to by the edit that puts it furthest ahead, or else by that which leads to it surest."""
    if not len(tried.numbers):
        return {"label": label}
    odds = torch.where(tried.leads[:, c] > tried.usual, odds_of(tried.reached[:, c]), 0.0)
    best = int((odds if odds.any() else tried.leads[:, c]).argmax())
    return {
        "label": label,
        "edit": names[int(tried.numbers[best])],
        "reached": round(float(tried.reached[best, c]), 4),
        "lead": round(float(tried.leads[best, c]), 2),
        "odds": round(float(odds[best]), 3),
    }


def told(measured: list[Line]) -> str:
    """Markdown: a row for each class of each model and draw, of several lines the last."""
    if not measured:
        return "Not measured yet."
    last = {(line["model"], line["seed"]): line for line in measured}
    head = ("model", "draw", "class", "edit", "reached", "leads by", "bound", "odds")
    return "\n".join([joined(head), joined(["---"] * len(head)), *(row for one in last.values() for row in _rows(one))])


def _rows(line: Line) -> Iterator[str]:
    draw, bound = str(line["seed"]), f"{line['bound']:.1f}"
    if not (line["planted"] or line["natural"]):
        yield joined((line["model"], draw, "none", "none", "-", "-", bound, "-"))
    for kind in ("planted", "natural"):
        for one in line[kind]:
            if "edit" not in one:
                yield joined((line["model"], draw, f"{one['label']} ({kind})", "none", "-", "-", bound, "-"))
                continue
            shown = f"{one['reached']:.2f}", f"{one['lead']:.1f}", bound, f"{one['odds']:.1f}" if one["odds"] else "-"
            yield joined((line["model"], draw, f"{one['label']} ({kind})", one["edit"], *shown))


if __name__ == "__main__":
    plainly(main)
