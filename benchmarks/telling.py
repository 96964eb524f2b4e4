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

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command import append, implant_parsers, read, stamp
from inversion import SHOTS
from pages import rewrite
from torch import Tensor

from cbpt_guard.bench.digits import CHECKPOINT
from cbpt_guard.bench.plan import Places, Plan
from cbpt_guard.bench.suspects import implant_folder, planted_triggers
from cbpt_guard.bench.table import joined
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.data import list_images, load_images, split
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.settings import InversionSettings, TuningSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.suspect import ModelFlags, open_suspect, zero_shot_head
from cbpt_guard.defense.waves import SURELY, Heard, listen

HERE = Path(__file__).parent
LINES, METHOD = HERE / "telling.jsonl", HERE.parent / "docs" / "method.md"
CLEAN = "clean-"
IMAGES = 256  # that a lead is read on
Line = dict[str, Any]


def main() -> None:
    """Parse the command and run it."""
    run(__doc__, measure, LINES, lambda lines: {"telling": told(lines)})


def run(
    about: str | None,
    measuring: Callable[[Plan, str, int, Places], Line],
    lines: Path,
    written: Callable[[list[Line]], dict[str, str]],
) -> None:
    """Parse a command that measures implants of a plan by name, one line each, and writes a part of docs/method.md."""
    parser, _, arguments = implant_parsers(about)
    arguments.add_argument("--only", metavar="NAME", nargs="+", required=True)
    arguments.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "measure":
        plan = Plan.read(args.plan)
        known = {*plan.implants, *(CLEAN + name for name in plan.datasets)}
        if unknown := sorted(set(args.only) - known):
            parser.error(f"{args.plan} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        for name in args.only:
            line = measuring(plan, name, args.seed, Places(tuple(args.root), args.work))
            append(lines, line)
            print(json.dumps(line), flush=True)
    else:
        rewrite(METHOD, written(read(lines)))


class Looked(NamedTuple):
    """A model as `purify` would look at it, its class names, and the numbers of the planted ones."""

    subject: Subject
    classes: Sequence[str]
    planted: list[int]


def looked_at(plan: Plan, name: str, seed: int, places: Places) -> Looked:
    """An implant of the plan, or the clean CLIP of `clean-DATASET`, with the images that a run tunes on."""
    if name.startswith(CLEAN):
        dataset, targets = plan.datasets[name.removeprefix(CLEAN)], list[str]()
        model = places.find(dataset.model)
    else:
        dataset, folder = plan.datasets[plan.implants[name].dataset], implant_folder(plan, name, places)
        targets = [one.target for one in planted_triggers(plan.implants[name], folder)]
        model = folder / CHECKPOINT
    listing = list_images(places.find(dataset.clean)).drawn(SHOTS, seed)
    clip = open_suspect(model, ModelFlags(), listing, plan.template, "cpu").clip
    data = load_images(listing, clip.preprocess)
    kept, _ = split(data.labels, TuningSettings().held_out, seed)
    clean = CleanSet(data.images[kept], encode(clip, data.images[kept]), data.labels[kept])
    subject = Subject(clip, clean, zero_shot_head(clip, listing.classes, plan.template), InversionSettings())
    return Looked(subject, listing.classes, [listing.classes.index(target) for target in targets])


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
    main()
