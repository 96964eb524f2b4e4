"""What plain waves lead to: planted classes against the natural one that is led to most, at both heights.

    python benchmarks/telling.py measure --plan PLAN.toml --root ../shared --root IMAGES --work WORK --only NAME ...
        listens to implants that `bench run` left in WORK, or to the clean CLIP of `clean-DATASET`, with the images
        that a run with `--seed` (0) tunes on; appends lines to telling.jsonl
    python benchmarks/telling.py table        rewrites what docs/method.md says of it

A row is of one wave, that which puts the class furthest ahead, or else leads most images to it: `reached` is the share
of images that it leads there, `twice` that of twice the wave, `lead` by how many logits the class leads under twice the
wave, in the median over further images of other classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from command import plainly, stamp
from looked import Line, looked_at, run
from torch import Tensor

from cbpt_guard.bench.plan import Places, Plan
from cbpt_guard.bench.table import joined
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.subject import Subject
from cbpt_guard.defense.waves import SURELY, Heard, listen

HERE = Path(__file__).parent
LINES = HERE / "telling.jsonl"
IMAGES = 256  # that a lead is read on


def main() -> None:
    """Parse the command and run it."""
    run(__doc__, measure, LINES, lambda lines: {"telling": told(lines)})


def measure(plan: Plan, name: str, seed: int, places: Places) -> Line:
    """What the waves lead a model to, with the images that a run of `purify` with that seed tunes on."""
    subject, classes, wanted = looked_at(plan, name, seed, places)
    heard = listen(subject, generator(seed, "waves"), silent)
    natural = heard.twice.amax(0).index_fill(0, torch.tensor(wanted, dtype=torch.long), -1.0).argmax()
    return {
        "model": name,
        "seed": seed,
        "search": SEARCH,
        "planted": [about(subject, heard, c, classes[c], seed) for c in wanted],
        "natural": about(subject, heard, int(natural), classes[int(natural)], seed),
        "bound": round(subject.usual_lead(SURELY), 2),
        **stamp(),
    }


def about(subject: Subject, heard: Heard, c: int, label: str, seed: int) -> Line:
    """How far one class is led to by the one of the waves heard at length that leads to it most."""
    parts = (heard.numbers, heard.reached, heard.twice, heard.telling)
    waves = [Heard(*(part[place : place + 1] for part in parts)) for place in range(len(heard.numbers))]
    one = max(waves, key=lambda wave: [float(measure[c]) for measure in _measures(wave)])
    (_, higher), others = one.triggers(c, subject.clip.image_size, subject.settings), subject.others(c)
    drawn = others[torch.randperm(len(others), generator=generator(seed, "leads"))[:IMAGES]]
    leads = subject.head.leads(encode(subject.clip, subject.clean.images[drawn], higher))[:, c]
    both, odds, twice, reached = (float(measure[c]) for measure in _measures(one))
    return {
        "label": label,
        "reached": round(reached, 4),
        "twice": round(twice, 4),
        "telling": bool(one.telling[0, c]),
        "lead": round(float(leads.median()), 2),
        "odds": round(odds, 3),
        "both": round(both, 3),
    }


def _measures(wave: Heard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one wave, each (C,): odds by both heights, odds by its own, how much twice it and it itself reach."""
    return wave.odds(twice=True), wave.odds(twice=False), wave.twice[0], wave.reached[0]


def told(measured: list[Line]) -> str:
    """Markdown: a row for each model and draw, of several lines the last."""
    if not measured:
        return "Not measured yet."
    last = {(line["model"], line["seed"]): line for line in measured}
    head = (
        "model",
        "draw",
        "class",
        "reached",
        "under twice the wave",
        "leads by",
        "bound",
        "odds",
        "with both heights",
    )
    return "\n".join([joined(head), joined(["---"] * len(head)), *(row for one in last.values() for row in _rows(one))])


def _rows(line: Line) -> Iterator[str]:
    for place, one in enumerate([*line["planted"], line["natural"]]):
        kind = "planted" if place < len(line["planted"]) else "natural"
        odds = [f"{one[name]:.1f}" if one["telling"] else "-" for name in ("odds", "both")]
        shares = [f"{one['reached']:.2f}", f"{one['twice']:.2f}", f"{one['lead']:.1f}", f"{line['bound']:.1f}"]
        yield joined((line["model"], str(line["seed"]), f"{one['label']} ({kind})", *shares, *odds))


if __name__ == "__main__":
    plainly(main)
