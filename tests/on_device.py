"""All that computes with torch, once and briefly: `python on_device.py DEVICE SUSPECT DATA WORK`.

Prints a line of JSON for each part: its name, what came out, and how many operations ran `elsewhere`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import elsewhere
import torch
from digits import task_of
from quick_cbpt import SETTINGS

from cbpt_guard.bench import settings as rivals
from cbpt_guard.bench.cell import measure
from cbpt_guard.bench.cleanclip import cleanclip
from cbpt_guard.bench.coop import coop
from cbpt_guard.bench.defenses import ensemble
from cbpt_guard.bench.finetune import ft
from cbpt_guard.bench.optimised import OptimisedSettings, badclip, trojvqa
from cbpt_guard.bench.oracle import oracle
from cbpt_guard.bench.par import par
from cbpt_guard.bench.plan import Cells, Dataset, Implant, Places, Plan
from cbpt_guard.bench.planting import Order, plant_folder
from cbpt_guard.bench.probe import probe
from cbpt_guard.bench.prompted import clean_prompts
from cbpt_guard.bench.suspects import provide
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.data import list_images
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.job import Job
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.scan import scan
from cbpt_guard.defense.settings import TEMPLATE
from cbpt_guard.defense.suspect import ModelFlags, open_suspect
from cbpt_guard.defense.triggers import load_trigger
from cbpt_guard.metrics import attack_success_rate

ADAPTIVE = {"steps": 2, "text": "frozen", "hide": 1.0, "cover": 4, "harden": 4, "margin": 2.0}
ONCE = {"epochs": 1, "trial_epochs": 1, "learning_rates": (1e-4,)}
TUNED = SETTINGS.tuning.model_copy(update={"epochs": 1})
DEFENSES: dict[str, Callable[[Task], Defended]] = {
    "ensemble": ensemble,
    "ft": lambda task: ft(task, rivals.FT.model_copy(update=ONCE)),
    "cleanclip": lambda task: cleanclip(task, rivals.CLEANCLIP.model_copy(update=ONCE)),
    "par": lambda task: par(task, rivals.PAR.model_copy(update=ONCE | {"thresholds": (0.25,)})),
    "coop": lambda task: coop(task, rivals.COOP.model_copy(update={"epochs": 1, "learning_rates": (0.032,)})),
    "clean-prompts": lambda task: clean_prompts(
        task, rivals.CLEAN_PROMPTS.model_copy(update={"learning_rates": (1e-2,), "tuning": TUNED})
    ),
    "probe": lambda task: probe(task, rivals.PROBE.model_copy(update={"strengths": (1.0,)})),
    "oracle": lambda task: oracle(
        task,
        rivals.ORACLE.model_copy(update={"strengths": (10.0,), "learning_rates": (1e-2,), "tuning": TUNED}),
    ),
}


def main(device: str, suspect: Path, data: Path, work: Path) -> None:
    """Every part in turn."""
    if device == elsewhere.NAME:
        elsewhere.register()
    torch.set_num_threads(1)
    listing = list_images(data).drawn(8, 0)
    say(
        "purify",
        lambda: list(purify(suspect, data, out=work / "run", settings=SETTINGS, device=device).head().suspects),
    )
    say("scan", lambda: scan(Job(suspect, data, shots=8, settings=SETTINGS, device=device)).score > 0)

    clip = open_suspect(suspect, ModelFlags(), listing, TEMPLATE, device).clip
    planted = load_trigger(suspect.parent)
    task = task_of(clip, suspect, planted, listing, work)
    target, brief = listing.classes.index(planted.target), OptimisedSettings(steps=2, images=16)
    for name, make in {"trojvqa": trojvqa, "badclip": badclip}.items():
        say(name, partial(make, clip, task.shots, target, 0, TEMPLATE, brief))
    for name in ("wanet", "label-consistent"):
        order = Order(suspect, {name: planted.target}, listing, changes=ADAPTIVE, device=device)
        say(name, partial(plant_folder, order, work / name))

    def asr(defense: Callable[[Task], Defended]) -> float:
        defended = defense(task)
        images = torch.from_numpy(planted.trigger.apply(task.shots.images.numpy()))
        answers = defended.answer(encode(defended.clip, images)).logits.argmax(1).numpy()
        return attack_success_rate(answers, task.shots.labels.numpy(), target)

    for name, defense in DEFENSES.items():
        say(name, partial(asr, defense))
    for name in ("none", "quick_cbpt:quick"):
        say(f"cell of {name}", partial(counted_asr, name, suspect, data, work, device))


def counted_asr(defense: str, suspect: Path, data: Path, work: Path, device: str) -> float:
    """As `bench run --device` counts it: a cell of a plan, from the draw of its shots to its line."""
    target = load_trigger(suspect.parent).target
    dataset = Dataset(model=str(suspect), train=str(data), clean=str(data), test=str(data))
    plan = Plan(
        datasets={"digits": dataset},
        implants={"badnet": Implant(dataset="digits", attacks={"badnet": target}, folder=str(suspect.parent))},
        cells=(Cells(implants=("badnet",), defenses=(defense,), shots=(8,)),),
    )
    (group,) = plan.groups()
    (line,) = measure(provide(plan, group, Places((Path("/"),), work / "bench"), "clean", device))
    return line.asr


def say(name: str, part: Callable[[], object]) -> None:
    """What came out of a part, and the operations that it did there."""
    before = elsewhere.Elsewhere.counted
    outcome = part()
    told = outcome if isinstance(outcome, float | list) else None
    count = elsewhere.Elsewhere.counted - before
    print(json.dumps({"part": name, "outcome": told, "operations": count}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
