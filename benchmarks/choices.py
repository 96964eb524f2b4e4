"""What the losses, budgets and augmentations of stage 1 do: one setting changed at a time, on planted backdoors.

    python benchmarks/choices.py measure --only NAME --plan PLAN.toml --root ../shared --root IMAGES --work WORK
        makes triggers for an implant that `bench run` left in WORK, and appends lines to choices.jsonl
    python benchmarks/choices.py table        rewrites what docs/method.md says of it

Nothing is searched for: the agnostic trigger is made as in a search, the others toward the planted target, all with
every shot that is drawn. Counted on images that none of them was made with, as in inversion.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from command import append, implant_parsers, plainly, read, stamp
from inversion import IMAGES, cosine
from pages import rewrite
from runs import SHOTS, undrawn

from cbpt_guard.bench.digits import CHECKPOINT
from cbpt_guard.bench.plan import Places, Plan
from cbpt_guard.bench.suspects import implant_folder, planted_triggers
from cbpt_guard.bench.table import joined
from cbpt_guard.defense.data import list_images, load_images
from cbpt_guard.defense.found import FoundTrigger, Inverted, encode
from cbpt_guard.defense.journal import Scratch
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.suspect import ModelFlags, open_suspect, zero_shot_head
from cbpt_guard.defense.workshop import Wanted, Workshop
from cbpt_guard.metrics import attack_success_rate

HERE = Path(__file__).parent
LINES, METHOD = HERE / "choices.jsonl", HERE.parent / "docs" / "method.md"
SEED = 0
AGNOSTIC: Final = "agnostic"
PARTS = {"epsilon": 255, "shift": 64}
"""What the settings' defaults are written in parts of."""
Lines = list[dict[str, Any]]


class Choice(NamedTuple):
    """One setting changed; none: as it is."""

    trigger: Inverted | Literal["agnostic"]
    setting: str | None = None
    value: float = 0.0

    @property
    def settings(self) -> InversionSettings:
        """The recipe's, with this one changed."""
        changed = {} if self.setting is None else {self.setting: self.value}
        return InversionSettings.model_validate(InversionSettings().model_dump() | changed)

    @property
    def words(self) -> str:
        """The setting and its value."""
        if self.setting is None:
            return "as it is"
        parts = PARTS.get(self.setting)
        value = f"{self.value:g}" if parts is None or not self.value else f"{parts * self.value:g}/{parts}"
        return f"`{self.setting}` {value}"


CHOICES = (
    Choice(AGNOSTIC),
    Choice(AGNOSTIC, "alike_weight", 0.0),
    Choice(AGNOSTIC, "moved_weight", 0.0),
    Choice(AGNOSTIC, "temperature", 0.02),
    Choice(AGNOSTIC, "temperature", 0.2),
    Choice(AGNOSTIC, "epsilon", 8 / 255),
    Choice(AGNOSTIC, "epsilon", 32 / 255),
    Choice(AGNOSTIC, "agnostic_steps", 20),
    Choice(AGNOSTIC, "agnostic_batch", 16),
    Choice("additive"),
    Choice("additive", "shift", 0.0),
    Choice("additive", "shift", 4 / 64),
    Choice("additive", "epsilon", 8 / 255),
    Choice("additive", "epsilon", 32 / 255),
    Choice("additive", "additive_steps", 27),
    Choice("masked"),
    Choice("masked", "shift", 0.0),
    Choice("masked", "shift", 4 / 64),
    Choice("masked", "asr_goal", 0.8),
    Choice("masked", "masked_steps", 60),
)


def main() -> None:
    """Parse the command and run it."""
    parser, _, measuring = implant_parsers(__doc__)
    measuring.add_argument("--only", metavar="NAME", required=True)
    args = parser.parse_args()
    if args.command == "measure":
        plan = Plan.read(args.plan)
        if args.only not in plan.implants:
            parser.error(f"{args.plan} has no implant {args.only!r}")
        for line in measure(plan, args.only, Places(tuple(args.root), args.work)):
            append(LINES, line)
            print(json.dumps(line), flush=True)
    else:
        rewrite(METHOD, {"choices": told(read(LINES))})


def measure(plan: Plan, name: str, places: Places) -> Iterator[dict[str, Any]]:
    """A line for each choice, toward an implant's first target."""
    implant, folder = plan.implants[name], implant_folder(plan, name, places)
    planted = planted_triggers(implant, folder)[0]
    everything = list_images(places.find(plan.datasets[implant.dataset].clean))
    drawn = everything.drawn(SHOTS, SEED)
    clip = open_suspect(folder / CHECKPOINT, ModelFlags(), drawn, plan.template, "cpu").clip
    head = zero_shot_head(clip, everything.classes, plan.template)
    left = undrawn(everything, drawn, max(1, IMAGES // len(everything.classes)))
    data, counted = (load_images(listing, clip.preprocess) for listing in (drawn, left))
    clean = CleanSet(data.images, encode(clip, data.images), data.labels)
    target = everything.classes.index(planted.target)
    true = encode(clip, torch.from_numpy(planted.trigger.apply(counted.images.numpy())))
    for choice in CHOICES:
        subject = Subject(clip, clean, head, choice.settings)
        trigger = made(Workshop(subject, everything.classes, SEED, Scratch(), silent), choice.trigger, target)
        features = encode(clip, counted.images, trigger)
        answers = head.answers(features)
        yield {
            "implant": name,
            "target": planted.target,
            **choice._asdict(),
            "asr": round(attack_success_rate(answers.numpy(), counted.labels.numpy(), target), 4),
            "rank": 1 + int((answers.bincount() > (answers == target).sum()).sum()),
            "cosine": cosine(features, true),
            "area": round(trigger.area, 4),
            **stamp(),
        }


def made(workshop: Workshop, kind: Inverted | Literal["agnostic"], target: int) -> FoundTrigger:
    """The agnostic trigger, or one of a family toward the target."""
    return workshop.agnostic() if kind == AGNOSTIC else workshop.toward([Wanted(target, kind)])[0]


def told(measured: Lines) -> str:
    """Markdown: a row for each choice, a column for each implant; of several lines of a cell the last."""
    if not measured:
        return "Not measured yet."
    last = {(line["implant"], line["trigger"], line["setting"], line["value"]): line for line in measured}
    implants = list(dict.fromkeys(line["implant"] for line in measured))
    head = ("trigger", "setting", *implants)
    rows = [
        (choice.trigger, choice.words, *(_cell(last.get((one, *choice))) for one in implants)) for choice in CHOICES
    ]
    return "\n".join([joined(head), joined(["---"] * len(head)), *map(joined, rows)])


def _cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return "-"
    more = {AGNOSTIC: f", {line['rank']}", "masked": f", {100 * line['area']:.1f}"}.get(line["trigger"], "")
    return f"{line['cosine']:.3f} ({100 * line['asr']:.0f}{more})"


if __name__ == "__main__":
    plainly(main)
