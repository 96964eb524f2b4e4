"""What the commands share that look at implants as `purify` would: each a line for a model, and a part of method.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command import append, implant_parsers, read
from pages import rewrite
from runs import SHOTS

from cbpt_guard.bench.digits import CHECKPOINT
from cbpt_guard.bench.plan import Places, Plan
from cbpt_guard.bench.suspects import implant_folder, planted_triggers
from cbpt_guard.defense.data import list_images, load_images, split
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.settings import InversionSettings, TuningSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.suspect import ModelFlags, open_suspect, zero_shot_head

METHOD = Path(__file__).parent.parent / "docs" / "method.md"
CLEAN = "clean-"
Line = dict[str, Any]


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
