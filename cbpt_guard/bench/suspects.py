"""What the suite defends: implants, planted once and kept, and the clean models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cbpt_guard.bench.cell import Job, Suspect
from cbpt_guard.bench.digits import CHECKPOINT
from cbpt_guard.bench.plan import Group, Implant, Places, Plan, Split, digest
from cbpt_guard.bench.planting import RECORD, Order, plant_folder, trigger_folder
from cbpt_guard.defense.data import list_images
from cbpt_guard.defense.triggers import JSON_NAME, PlantedTrigger, load_trigger
from cbpt_guard.errors import InputError
from cbpt_guard.files import in_turn

_SHORT = 12


def plant(plan: Plan, name: str, places: Places, device: str) -> dict[str, Any] | None:
    """Plant an implant of the plan, unless it was taken from elsewhere or lies in the work folder already.

    Returns:
        Its name, the sha256 of the poisoned checkpoint, and what `implant.json` says; None where there is no record.

    Raises:
        InputError: an attack or a target is unknown, or the images do not fit.
        SetupError: the disk refuses.
    """
    implant = plan.implants[name]
    folder = implant_folder(plan, name, places)
    if implant.folder is None:
        with in_turn(folder):  # two suites may share the work folder
            if not folder.exists():
                plant_folder(_order(plan, implant, places, device), folder)
    if not (folder / RECORD).exists():
        return None
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return {"implant": name, "suspect_sha256": checkpoint_sha256(folder), **record}


def make_triggers(plan: Plan, name: str, places: Places, device: str) -> None:
    """Make the triggers of an implant for the control, which needs no poisoned model, unless they are there already.

    Raises:
        CbptGuardError: as `plant` raises it.
    """
    if trigger_source(plan, name, places).exists():
        return
    folder = _work_folder(plan, name, places, "triggers")
    with in_turn(folder):
        if not folder.exists():
            trigger_folder(_order(plan, plan.implants[name], places, device), folder)


def _order(plan: Plan, implant: Implant, places: Places, device: str) -> Order:
    dataset = plan.datasets[implant.dataset]
    return Order(
        model=places.find(dataset.model),
        attacks=implant.attacks,
        train=list_images(places.find(dataset.train)),
        held_out=list_images(places.find(dataset.clean)),
        seed=implant.seed,
        changes=implant.recipe,
        template=plan.template,
        device=device,
    )


def checkpoint_sha256(folder: Path) -> str:
    """Of the poisoned checkpoint in an implant's folder."""
    with (folder / CHECKPOINT).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provide(plan: Plan, group: Group, places: Places, counted: Split, device: str) -> Job:
    """A group with its suspect and its triggers, read from disk.

    Raises:
        InputError: an implant's files are malformed, or its triggers aim elsewhere than the plan says.
    """
    where = trigger_source if group.control else implant_folder
    planted = {name: planted_triggers(plan.implants[name], where(plan, name, places)) for name in group.implants}
    return Job(plan, group, places, _suspect(plan, group, places), planted, counted, device)


def implant_folder(plan: Plan, name: str, places: Places) -> Path:
    """Where an implant lies: in the work folder under its recipe's digest, or where the plan says."""
    implant = plan.implants[name]
    if implant.folder is not None:
        return places.find(implant.folder)
    return _work_folder(plan, name, places, "implants")


def trigger_source(plan: Plan, name: str, places: Places) -> Path:
    """Where the control finds an implant's triggers: with the implant where there is one, else in their own folder."""
    planted = implant_folder(plan, name, places)
    return planted if planted.exists() else _work_folder(plan, name, places, "triggers")


def _work_folder(plan: Plan, name: str, places: Places, kind: str) -> Path:
    implant = plan.implants[name]
    about = (implant.model_dump(mode="json"), plan.datasets[implant.dataset].model_dump(mode="json"), plan.template)
    return places.work / kind / f"{name}-{digest(about)[:_SHORT]}"


def planted_triggers(implant: Implant, folder: Path) -> tuple[PlantedTrigger, ...]:
    """The triggers of an implant's folder: its own, and one of each sub-folder."""
    files = sorted(folder.rglob(JSON_NAME), key=lambda path: (len(path.parts), path))
    found = tuple(load_trigger(path) for path in files)
    if not found:
        hint = "" if implant.folder else "; `cbpt-guard bench run` plants it"
        raise InputError(f"{folder} holds no {JSON_NAME}{hint}")
    targets = sorted(pair.target for pair in found)
    if targets != sorted(implant.attacks.values()):
        raise InputError(f"{folder} holds triggers toward {targets}, the plan says {sorted(implant.attacks.values())}")
    return found


def _suspect(plan: Plan, group: Group, places: Places) -> Suspect:
    if group.control:
        dataset = plan.datasets[group.dataset]
        name = f"clean-{group.dataset}-{digest(dataset.model_dump(mode='json'))[:_SHORT]}"
        return Suspect(places.find(dataset.model), name, None)
    folder = implant_folder(plan, group.suspect, places)
    record = folder / RECORD
    took = json.loads(record.read_text(encoding="utf-8")).get("took") if record.exists() else None
    return Suspect(folder / CHECKPOINT, folder.name, took)
