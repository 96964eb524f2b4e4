"""What a scan's score means: clean and poisoned models of known origin, made and scanned.

    python benchmarks/calibration.py measure --work WORK                                      small CLIPs of digits
    python benchmarks/calibration.py measure --work WORK --shared ../shared --images IMAGES   tuned shared ones
    python benchmarks/calibration.py page                                         from the lines; `--check` compares

A line for each model in scan.jsonl, appended as it is made, so an interrupted measurement goes on. IMAGES is what
images.py makes. Half of the models, in turn, are the calibration that cbpt_guard/defense/calibration.json ships; the
other half tests it, in docs/scan.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
from command import append, plainly, read
from pages import filled
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from cbpt_guard.bench.attacks import ATTACKS, Attacker, poison, recipe
from cbpt_guard.bench.digits import (
    DigitsSplit,
    load_digits_split,
    train_digits_clip,
    write_class_folders,
    write_suspect,
)
from cbpt_guard.bench.implant import implant_all
from cbpt_guard.bench.poisoning import fine_tune
from cbpt_guard.cli.machine import prepare_torch
from cbpt_guard.defense.calibration import FILE, SEARCH, Calibration, Family, scoring
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import LabelledImages, list_images, load_images
from cbpt_guard.defense.job import Job
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.scan import scan
from cbpt_guard.defense.settings import TEMPLATE, InversionSettings
from cbpt_guard.defense.suspect import ModelFlags, open_suspect

HERE = Path(__file__).parent
LINES, PAGE = HERE / "scan.jsonl", HERE.parent / "docs" / "scan.md"
DIGITS, TUNED = "small CLIPs of digits", "MobileNetV2 of 2.6 million, tuned"
PARTS = ("calibration", "test")
SHOTS, RESAMPLES = 16, 2000
_LATER = ("random-place", "bpp", "rotation", "refool", "blur", "opposite-colours", "jpeg", "large-pixels")
_LEFT_OUT = ("label-consistent", "fine-wave", *_LATER)
PLANTED = [name for name in ATTACKS if name not in _LEFT_OUT]
"""The first left out did not take on any model so far; the second is sig's, made finer by an attacker who knows the
guard; the rest came after the models had been made."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model to be made: `attack` is None where it stays clean."""

    family: str
    number: int
    attack: str | None

    @property
    def name(self) -> str:
        """Of its line."""
        return f"{self.attack or 'clean'}-{self.number}"

    @property
    def seed(self) -> int:
        """Of its data's order, its weights and its trigger; a poisoned model shares it with no clean one."""
        return self.number + (1000 if self.attack else 0)

    @property
    def part(self) -> str:
        """Which half it belongs to; of the digits each attack is in either, since the attacks are an odd number."""
        return PARTS[self.number % 2]


def models() -> list[Model]:
    """39 poisoned and 33 clean small CLIPs, 4 and 4 tuned ones."""
    few = ("badnet", "blended", "issba", "badclip")
    return [
        *(Model(DIGITS, number, None) for number in range(33)),
        *(Model(DIGITS, number, PLANTED[number % len(PLANTED)]) for number in range(3 * len(PLANTED))),
        *(Model(TUNED, number, None) for number in range(4)),
        *(Model(TUNED, number, name) for number, name in enumerate(few)),
    ]


# Making and scanning


class Source(NamedTuple):
    """What a model is made from: a clean CLIP, the attacker's images, images to count on, and a folder to scan with."""

    clip: FrozenClip
    train: LabelledImages
    held_out: LabelledImages
    clean: Path


def digits_source(model: Model, work: Path) -> Source:
    """A small CLIP of its own."""
    split: DigitsSplit = load_digits_split(model.seed)
    clip = train_digits_clip(split.train, model.seed)
    clean = write_class_folders(split.clean, work / "clean", per_class=SHOTS)
    return Source(clip, split.train, split.test, clean)


def tuned_source(model: Model, work: Path, shared: Path, images: Path) -> Source:
    """The shared CLIP; its data order is the tuning's seed."""
    folder = images / "tiny-imagenet-64"
    train, clean = (list_images(folder / part) for part in ("train", "clean"))
    opened = open_suspect(shared / "models" / "mobilenet-clip", ModelFlags(), clean, TEMPLATE, "cpu")
    few = recipe(opened.clip, (model.attack or "badnet",), {}).images
    loaded = [load_images(part.drawn(n, model.seed), opened.clip.preprocess) for part, n in ((train, few), (clean, 5))]
    return Source(opened.clip, loaded[0], loaded[1], folder / "clean")


def made(model: Model, source: Source) -> tuple[FrozenClip, Line]:
    """The model, and what is known of its making."""
    settings = recipe(source.clip, (model.attack or "badnet",), {})
    if model.attack is None:  # tuned like the poisoned ones, or the scores might tell nothing but that
        return fine_tune(source.clip, source.train, (), settings, model.seed, silent), {}
    target = int(np.random.default_rng(model.seed).integers(len(source.train.classes)))
    planted = poison(model.attack, Attacker(source.clip, source.train, target, model.seed, TEMPLATE))
    found = implant_all(source.clip, source.train, source.held_out, [planted], seed=model.seed, settings=settings)
    counted = {"asr": found.report.asr, "ca_clean": found.report.ca_clean, "ca": found.report.ca_poisoned}
    return found.clip, {"target": source.train.classes[target], "took": found.took, **counted}


def line(model: Model, source: Source, work: Path) -> Line:
    """Make a model, scan it, and write down what is needed of both."""
    clip, known = made(model, source)
    path = write_suspect(clip, work)
    report = scan(Job(model=path, data=source.clean, shots=SHOTS, seed=model.seed))
    path.unlink()
    return {
        "family": model.family,
        "name": model.name,
        "part": model.part,
        "attack": model.attack,
        **known,
        "score": report.score,
        "suspects": report.suspects,
        "likeliest": report.likeliest[:3],
        "seconds": report.seconds,
        "classes": report.classes,
        "images_of_a_class": report.images_of_a_class,
        "template": report.template,
        "config": report.model.config,
        "search": SEARCH,
        "settings": {name: report.settings["inversion"][name] for name in InversionSettings.model_fields},
        "versions": {"cbpt_guard": report.cbpt_guard, **report.versions},
    }


def measure(work: Path, shared: Path | None, images: Path | None, parts: Sequence[str]) -> None:
    """Append what scan.jsonl lacks of those parts."""
    done = {(one["family"], one["name"]) for one in lines()}
    family, source = DIGITS, cast(Callable[[Model, Path], Source], digits_source)
    if shared is not None and images is not None:
        family, source = TUNED, partial(tuned_source, shared=shared, images=images)
    for model in models():
        if model.family == family and model.part in parts and (family, model.name) not in done:
            folder = work / family.replace(" ", "-") / model.name
            found = line(model, source(model, folder), folder)
            append(LINES, found)
            print(model.family, model.name, found.get("took", ""), found["score"], *found["likeliest"], flush=True)


def lines() -> list[Line]:
    """What was measured so far, in the order of `models`."""
    found = read(LINES)
    now = InversionSettings().model_dump(mode="json")
    for one in found:
        classes = one["classes"]
        if (scoring(one["search"], classes), one["settings"]) != (scoring(SEARCH, classes), now):
            sys.exit(f"{LINES.name}: {one['name']} was scanned otherwise than today; take its line out")
    place = {(model.family, model.name): number for number, model in enumerate(models())}
    return sorted(found, key=lambda one: place[one["family"], one["name"]])


# What is made of it


def counted(found: list[Line]) -> list[Line]:
    """Clean models, and the poisoned ones whose attack took."""
    return [one for one in found if one["attack"] is None or one["took"]]


def families(found: list[Line]) -> Iterator[Family]:
    """The calibration half."""
    for name in dict.fromkeys(one["family"] for one in found):
        own = [one for one in counted(found) if one["family"] == name and one["part"] == "calibration"]
        if not own:
            continue
        clean, poisoned = (sorted(o["score"] for o in own if (o["attack"] is None) is c) for c in (True, False))
        yield Family(
            name=name,
            search=own[0]["search"],
            config=own[0]["config"],
            settings=own[0]["settings"],
            template=own[0]["template"],
            classes=_range([one["classes"] for one in own]),
            images=_range([number for one in own for number in one["images_of_a_class"]]),
            clean=tuple(clean),
            poisoned=tuple(poisoned),
        )


def _range(values: list[int]) -> tuple[int, int]:
    return min(values), max(values)


def auroc(found: list[Line]) -> tuple[float, float, float]:
    """Area under the ROC curve of the score, with the 2.5th and 97.5th percentile of stratified bootstrap resamples.

    Where the scores do not overlap every resample says 1. Then the lower end is that of as many independent pairs of
    a clean and a poisoned model as there are, all in the right order (Clopper and Pearson 1934).
    """
    clean, poisoned = (np.array([o["score"] for o in found if (o["attack"] is None) is c]) for c in (True, False))
    labels = np.repeat([0, 1], [len(clean), len(poisoned)])
    generator, areas = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = [generator.choice(part, len(part)) for part in (clean, poisoned)]
        areas.append(roc_auc_score(labels, np.concatenate(drawn)))
    low, high = np.percentile(areas, [2.5, 97.5])
    if low == 1:
        pairs = min(len(clean), len(poisoned))
        low = binomtest(pairs, pairs).proportion_ci(0.95).low
    return float(roc_auc_score(labels, np.concatenate([clean, poisoned]))), float(low), float(high)


def by_part(found: list[Line]) -> str:
    """A row for each family and half: how well scores tell clean from poisoned, and where the true target ranks."""
    rows = [
        "| models | half | clean | poisoned | AUROC (95 %) | clean that stand out "
        "| poisoned that stand out | classes that stand out beside the target | true target first | in the first three "
        "| median seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(one["family"] for one in found):
        for part in PARTS:
            own = [one for one in counted(found) if (one["family"], one["part"]) == (name, part)]
            clean = [one for one in own if one["attack"] is None]
            poisoned = [one for one in own if one["attack"] is not None]
            if clean and poisoned:
                area, low, high = auroc(own)
                first = sum(one["likeliest"][0] == one["target"] for one in poisoned)
                three = sum(one["target"] in one["likeliest"] for one in poisoned)
                cells = (
                    name,
                    part,
                    len(clean),
                    len(poisoned),
                    f"{area:.3f} ({low:.3f} to {high:.3f})",
                    sum(bool(one["suspects"]) for one in clean),
                    sum(bool(one["suspects"]) for one in poisoned),
                    sum(len(set(one["suspects"]) - {one["target"]}) for one in poisoned),
                    first,
                    three,
                    f"{median(one['seconds'] for one in own):.0f}",
                )
                rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def by_attack(found: list[Line]) -> str:
    """A row for each family and attack: the scores, the target's ranks, and the implants that did not take."""
    rows = ["| models | attack | scores | true target in the first three | did not take |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(one["family"] for one in found):
        for attack in dict.fromkeys(one["attack"] for one in found if one["family"] == name):
            own = [one for one in found if (one["family"], one["attack"]) == (name, attack)]
            took = counted(own)
            scores = ", ".join(f"{one['score']:.1f}" for one in sorted(took, key=lambda one: one["score"]))
            ranks = "" if attack is None else f"{sum(one['target'] in one['likeliest'] for one in took)} of {len(took)}"
            rows.append(f"| {name} | {attack or 'none'} | {scores} | {ranks} | {len(own) - len(took) or ''} |")
    return "\n".join(rows)


def page(*, check: bool) -> None:
    """Write calibration.json and the tables, or exit with 1 where a byte differs."""
    found = lines()
    calibration = Calibration(families=tuple(families(found))).model_dump_json(indent=1) + "\n"
    document = filled(PAGE.read_text(encoding="utf-8"), {"parts": by_part(found), "attacks": by_attack(found)})
    for path, text in ((FILE, calibration), (PAGE, document)):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not what scan.jsonl gives; run python benchmarks/calibration.py page")


def main() -> None:
    """Parse the command, measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--work", type=Path, required=True)
    measuring.add_argument("--shared", type=Path)
    measuring.add_argument("--images", type=Path)
    measuring.add_argument("--part", choices=PARTS, action="append", help="of two processes each may take one")
    measuring.add_argument("--threads", type=int)
    commands.add_parser("page").add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.command == "page":
        page(check=args.check)
        return
    if (args.shared is None) != (args.images is None):
        parser.error("tuned models take both --shared and --images")
    prepare_torch(args.threads)
    measure(args.work, args.shared, args.images, args.part or PARTS)


if __name__ == "__main__":
    plainly(main)
