"""From a clean CLIP on disk to a folder that holds a poisoned one, its triggers and how it was made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from cbpt_guard import __version__
from cbpt_guard.bench.attacks import Attacker, attack_named, poison, recipe
from cbpt_guard.bench.digits import CHECKPOINT, write_suspect
from cbpt_guard.bench.implant import ImplantReport, ImplantSettings, Poison, implant_all
from cbpt_guard.defense.data import LabelledImages, Listing, load_images
from cbpt_guard.defense.job import tool_versions
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.settings import TEMPLATE
from cbpt_guard.defense.suspect import ModelFlags, Suspect, open_suspect
from cbpt_guard.defense.triggers import save_trigger
from cbpt_guard.errors import InputError
from cbpt_guard.files import staged, write_text

RECORD = "implant.json"
_HELD_OUT = 0.1
_SHOWN = 10  # classes that a message names
_MOST_COUNTED = 1000  # images on which a report counts


@dataclass(frozen=True)
class Order:
    """What is planted: attacks by name with the class that each aims at, in the CLIP `model`.

    Without `held_out` a tenth of each class's images is kept from training, and the report counts on it. `changes`
    are settings that differ from the attacks' own.
    """

    model: Path
    attacks: Mapping[str, str]
    train: Listing
    held_out: Listing | None = None
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    device: str = "cpu"
    flags: ModelFlags = field(default_factory=ModelFlags)


class ImplantRecord(BaseModel):
    """`implant.json`: how a folder was made and what was measured when it was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    took: bool
    attacks: dict[str, str]
    seed: int
    source_sha256: str
    recipe: ImplantSettings
    reports: tuple[ImplantReport, ...]
    versions: dict[str, str]


def plant_folder(order: Order, out: Path, *, force: bool = False, progress: Progress = silent) -> ImplantRecord:
    """Plant what is ordered and write `suspect.pt`, its config, the triggers and `implant.json` into `out`.

    One trigger lies in `out` itself; of several each has a sub-folder with its attack's name.

    Raises:
        InputError: `out` exists and `force` is off, or it is no implant; an attack or a target is unknown, or the
            images do not fit.
        SetupError: the disk refuses, or another process plants the same.
        CheckpointError: the model is malformed.
    """
    with staged(out, force=force, ours=(RECORD, CHECKPOINT)) as folder:
        plot = _plotted(order, progress)
        made = implant_all(
            plot.opened.clip,
            plot.images,
            load_images(plot.held_out, plot.opened.clip.preprocess, progress=progress),
            tuple(plot.poisons.values()),
            seed=order.seed,
            settings=plot.settings,
            template=order.template,
            progress=progress,
        )
        write_suspect(made.clip, folder)
        _write_triggers(plot, folder)
        record = ImplantRecord(
            took=made.took,
            attacks=dict(order.attacks),
            seed=order.seed,
            source_sha256=plot.opened.record.source_sha256,
            recipe=plot.settings,
            reports=made.reports,
            versions={"cbpt_guard": __version__, **tool_versions()},
        )
        write_text(folder / RECORD, record.model_dump_json(indent=1))
    return record


def trigger_folder(order: Order, out: Path, *, progress: Progress = silent) -> None:
    """Write into `out` the triggers alone, the same that `plant_folder` would write.

    Raises:
        CbptGuardError: as `plant_folder` raises it.
    """
    with staged(out, force=False, ours=()) as folder:
        _write_triggers(_plotted(order, progress), folder)


class _Plot(NamedTuple):
    """All that is there before a model is poisoned."""

    opened: Suspect
    images: LabelledImages
    held_out: Listing
    settings: ImplantSettings
    poisons: dict[str, Poison]


def _plotted(order: Order, progress: Progress) -> _Plot:
    targets = {name: _index(order.train.classes, target) for name, target in order.attacks.items()}
    for name in targets:
        attack_named(name)
    train, held_out = order.train, order.held_out
    opened = open_suspect(order.model, order.flags, train, order.template, order.device)
    if held_out is None:
        train, held_out = _parted(train, order.seed)
    held_out = held_out.drawn(max(1, _MOST_COUNTED // len(held_out.classes)), order.seed)
    settings = recipe(opened.clip, tuple(order.attacks), order.changes)
    train = _fewer(train, settings.images, set(order.attacks.values()), order.seed)
    images = load_images(train, opened.clip.preprocess, progress=progress)
    poisons = {
        name: poison(name, Attacker(opened.clip, images, target, order.seed, order.template, progress))
        for name, target in targets.items()
    }
    return _Plot(opened, images, held_out, settings, poisons)


def _write_triggers(plot: _Plot, folder: Path) -> None:
    for name, one in plot.poisons.items():
        place = folder if len(plot.poisons) == 1 else folder / name.replace(":", "-")
        place.mkdir(exist_ok=True)
        save_trigger(one.trigger, plot.images.classes[one.target], place)


def _index(classes: tuple[str, ...], target: str) -> int:
    if target not in classes:
        more = " ..." if len(classes) > _SHOWN else ""
        raise InputError(f"the images show no class {target!r}; they have {', '.join(classes[:_SHOWN])}{more}")
    return classes.index(target)


def _fewer(listing: Listing, count: int | None, targets: Collection[str], seed: int) -> Listing:
    """At most `count` files of each class, all of the targets': clean-label carriers are few enough."""
    pairs = zip(listing.classes, listing.files, listing.drawn(count, seed).files, strict=True)
    return Listing(listing.classes, tuple(files if name in targets else few for name, files, few in pairs))


def _parted(listing: Listing, seed: int) -> tuple[Listing, Listing]:
    """What is trained on, and as many images of each class as a tenth of the smallest class."""
    fewest = min(len(files) for files in listing.files if files)
    held = listing.drawn(max(1, round(_HELD_OUT * fewest)), seed)
    pairs = zip(listing.files, held.files, strict=True)
    kept = tuple(tuple(path for path in files if path not in set(part)) for files, part in pairs)
    return Listing(listing.classes, kept), held
