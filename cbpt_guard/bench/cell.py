"""One defence of one suspect, from the draw of its shots to its lines; a process of its own runs it."""

from __future__ import annotations

import csv
import io
import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import cast

import torch

from cbpt_guard import __version__
from cbpt_guard.bench import counting
from cbpt_guard.bench.clock import Clock, Cost
from cbpt_guard.bench.counting import Classify, FeatureStore, ImageSet
from cbpt_guard.bench.defenses import DEFENSES
from cbpt_guard.bench.lines import OFF, ClassRecall, Key, Line, PairShares, Shares
from cbpt_guard.bench.plan import Group, Places, Plan, Split
from cbpt_guard.bench.rival import unflagged
from cbpt_guard.bench.table import UNTOUCHED
from cbpt_guard.bench.task import Defended, Defense, Task
from cbpt_guard.classifier import GuardedClassifier
from cbpt_guard.defense.data import Listing, list_images, load_images
from cbpt_guard.defense.job import tool_versions
from cbpt_guard.defense.suspect import ModelFlags, open_suspect, zero_shot_head
from cbpt_guard.defense.suspect import Suspect as OpenedSuspect
from cbpt_guard.defense.triggers import PlantedTrigger, Trigger
from cbpt_guard.errors import InputError
from cbpt_guard.export import export
from cbpt_guard.files import in_turn, write_text
from cbpt_guard.images import Pixels

_SHORT = 12


@dataclass(frozen=True)
class Suspect:
    """What is defended: a checkpoint, the name of its folder of runs, and whether its attack took."""

    checkpoint: Path
    name: str
    took: bool | None


@dataclass(frozen=True)
class Job:
    """A group of the plan with all that its lines depend on; `planted` holds each implant's triggers."""

    plan: Plan
    group: Group
    places: Places
    suspect: Suspect
    planted: dict[str, tuple[PlantedTrigger, ...]]
    split: Split
    device: str


@dataclass(frozen=True)
class Off:
    """A trigger that is switched off."""

    image_size: int
    kind: str = OFF

    def apply(self, images: Pixels) -> Pixels:
        """Copies of uint8 images (N, S, S, 3), unchanged."""
        return images.copy()


def defense_named(name: str) -> Defense:
    """A defence of `DEFENSES`, or the one that `module:name` imports.

    Raises:
        InputError: there is none.
    """
    if ":" not in name and name not in DEFENSES:
        raise InputError(f"{name!r} is no defence; known are {', '.join(DEFENSES)}, and your own as module:name")
    try:
        own: Defense = DEFENSES[name] if name in DEFENSES else resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"the defence {name!r} cannot be imported: {error}") from error
    return own


def measure(job: Job) -> list[Line]:
    """Defend once, count every line of the group.

    Raises:
        InputError: images or names do not fit together.
        CheckError: a classifier answers with numbers that are not finite.
    """
    plan, group = job.plan, job.group
    dataset = plan.datasets[group.dataset]
    everything = list_images(job.places.find(dataset.clean))
    shots = everything.drawn(group.shots, group.seed)
    opened = open_suspect(job.suspect.checkpoint, ModelFlags(), shots, plan.template, job.device)
    sha256 = opened.record.source_sha256
    task = _task(job, shots, opened)
    cost, defended = _defend(task, group.defense)
    images = ImageSet(_counted(job, everything), shots, task.clip.preprocess)
    if not len(images.labels):
        raise InputError(f"no image is left to count: {group.shots} shots a class are all that {dataset.clean} has")
    store = FeatureStore(job.places.work / "features", sha256)
    undefended = unflagged(task.original.logits, task.original.logits)
    before = counting.remembered(
        counting.by_head(undefended, lambda trigger: store.features(task.clip, images, trigger))
    )
    after = counting.remembered(_classifier(group.defense, defended, task, images, store))
    suspects = counting.recalls(before, after, defended.suspects, images)
    lines = []
    for key in plan.keys(group, job.split):
        planted = job.planted[key.implant]
        shown = tuple(PlantedTrigger(_off(p.trigger), p.target) for p in planted) if key.attack == OFF else planted
        pairs = counting.shares(after, shown, images)
        without = counting.mean(counting.shares(before, shown, images))
        lines.append(_line(job, key, pairs, without, len(images.labels), defended, suspects, cost, sha256))
    return lines


def _counted(job: Job, clean: Listing) -> Listing:
    """The images of the job's split, whose labels must be those of the shots.

    Raises:
        InputError: the test images are of other classes.
    """
    if job.split == "clean":
        return clean
    test = list_images(job.places.find(job.plan.datasets[job.group.dataset].test))
    if test.classes != clean.classes:
        odd = sorted(set(test.classes) ^ set(clean.classes))
        raise InputError(f"the test images of {job.group.dataset} are of other classes than the clean ones: {odd[:3]}")
    return test


def cells_folder(work: Path, suspect: str, sha256: str) -> Path:
    """Where the runs of a suspect lie, by the sha256 of its checkpoint: one that was planted anew is another."""
    return work / "cells" / f"{suspect}-{sha256[:_SHORT]}"


def _task(job: Job, shots: Listing, opened: OpenedSuspect) -> Task:
    group = job.group
    folder = cells_folder(job.places.work, job.suspect.name, opened.record.source_sha256)
    folder /= f"seed{group.seed}-shots{group.shots}"
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "shots.csv"
    with in_turn(listing):  # a process beside this one writes the same
        write_text(listing, _listed(shots))
    return Task(
        clip=opened.clip,
        original=zero_shot_head(opened.clip, shots.classes, job.plan.template),
        shots=load_images(shots, opened.clip.preprocess),
        checkpoint=job.suspect.checkpoint,
        listing=listing,
        template=job.plan.template,
        seed=group.seed,
        folder=folder,
        planted=tuple(pair for name in group.implants for pair in job.planted[name]),
    )


def _listed(shots: Listing) -> str:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("path", "label"))
    pairs = zip(shots.classes, shots.files, strict=True)
    rows.writerows((path.absolute(), name) for name, files in pairs for path in files)
    return text.getvalue()


def _defend(task: Task, name: str) -> tuple[Cost, Defended]:
    """Run the defence; peak memory is this process's, which has done nothing else so far."""
    defense = defense_named(name)
    timed = replace(task, clock=Clock())
    defended = defense(timed)
    return timed.clock.read(), defended


def _classifier(name: str, defended: Defended, task: Task, images: ImageSet, store: FeatureStore) -> Classify:
    """What ships is counted: a bundle where the defence leaves a run, else its head over its own encoder.

    The classifier without a defence meets the images themselves, so that its row tells whether kept features are right.
    """
    if defended.run is not None:
        bundle = export(defended.run, task.folder / f"{defended.run.name}-bundle", allow_unguarded=True, force=True)
        return counting.by_bundle(GuardedClassifier.load(bundle, threads=torch.get_num_threads()), images)
    if defended.clip is task.clip and name != UNTOUCHED:
        return counting.by_head(defended.answer, lambda trigger: store.features(task.clip, images, trigger))
    return counting.by_head(defended.answer, lambda trigger: counting.encoded(defended.clip, images, trigger))


def _off(trigger: Trigger) -> Trigger:
    return cast(Trigger, Off(trigger.image_size))


def _line(
    job: Job,
    key: Key,
    pairs: list[PairShares],
    undefended: Shares,
    images: int,
    defended: Defended,
    suspects: tuple[ClassRecall, ...],
    cost: Cost,
    sha256: str,
) -> Line:
    return Line(
        **key._asdict(),
        **counting.mean(pairs).model_dump(),
        target="+".join(pair.target for pair in pairs),
        dataset=job.group.dataset,
        took=job.suspect.took,
        images=images,
        asr_worst=max(pair.asr for pair in pairs),
        pairs=tuple(pairs) if len(pairs) > 1 else (),
        undefended=undefended,
        verdict=defended.verdict,
        seconds=cost.seconds,
        cpu_seconds=cost.cpu_seconds,
        peak_mb=cost.peak_mb,
        settings=job.plan.settings(key),
        versions={"cbpt_guard": __version__, **tool_versions(), **_counted_with()},
        machine=_machine(job.device),
        suspect_sha256=sha256,
        suspects=suspects,
        search=defended.search,
        chosen=defended.chosen,
        warnings=defended.warnings,
    )


def _counted_with() -> dict[str, str]:
    """What a line may depend on besides: bundles answer by the one, CleanCLIP augments by the other."""
    import onnxruntime  # of which there are two packages

    return {"onnxruntime": onnxruntime.__version__, "torchvision": version("torchvision")}


def _machine(device: str) -> str:
    """The class of the machine, and where torch computed."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, {name}"
