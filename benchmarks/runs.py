"""The runs of `cbpt` that `bench run` left in a work folder, with what was planted and images that they never drew."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cbpt_guard.bench.cell import cells_folder
from cbpt_guard.bench.digits import CHECKPOINT
from cbpt_guard.bench.plan import Places, Plan
from cbpt_guard.bench.suspects import checkpoint_sha256, implant_folder, planted_triggers
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import Listing, list_images
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.suspect import ModelFlags, open_suspect
from cbpt_guard.defense.triggers import PlantedTrigger
from cbpt_guard.errors import InputError

SHOTS = 16


@dataclass(frozen=True)
class PlantedRun:
    """A purified run of an implant, the checkpoint, its true triggers, and all clean images of its dataset."""

    implant: str
    run: PurifyRun
    suspect: Path
    planted: tuple[PlantedTrigger, ...]
    everything: Listing

    @property
    def drawn(self) -> Listing:
        """The run's shots."""
        return self.everything.drawn(SHOTS, self.run.record.seed)

    def clip(self) -> FrozenClip:
        """The suspect, read anew."""
        return open_suspect(self.suspect, ModelFlags(), self.drawn, self.run.record.template, "cpu").clip


def planted_runs(plan_file: Path, roots: Collection[Path], work: Path, only: str | None = None) -> Iterator[PlantedRun]:
    """Those of a plan's implants, or of one, of today's search and `SHOTS` shots a class, by implant and seed.

    Raises:
        InputError: the plan is missing or malformed, or has no implant `only`.
    """
    plan, places = Plan.read(plan_file), Places(tuple(roots), work)
    if only not in (None, *plan.implants):
        raise InputError(f"{plan_file} has no implant {only!r}; it has {', '.join(plan.implants)}")
    for name, implant in plan.implants.items():
        if only not in (None, name):
            continue
        folder = implant_folder(plan, name, places)
        if not (folder / CHECKPOINT).exists():
            continue
        cells = cells_folder(work, folder.name, checkpoint_sha256(folder))
        for path in sorted(cells.glob(f"seed*-shots{SHOTS}/purified-{SEARCH}")):
            clean = list_images(places.find(plan.datasets[implant.dataset].clean))
            planted = planted_triggers(implant, folder)
            yield PlantedRun(name, PurifyRun.open(path), folder / CHECKPOINT, planted, clean)


def undrawn(everything: Listing, drawn: Listing, each: int, whole: Collection[str] = ()) -> Listing:
    """Of each class the `each` files that sort last and were not drawn; of the classes `whole` all that were not."""
    taken = {path.resolve() for files in drawn.files for path in files}
    left = [tuple(path for path in files if path.resolve() not in taken) for files in everything.files]
    kept = (files if name in whole else files[-each:] for name, files in zip(everything.classes, left, strict=True))
    return replace(everything, files=tuple(kept))
