"""The demo: plant a backdoor in a small real CLIP, then walk the road that a user walks, and count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from cbpt_guard import metrics
from cbpt_guard.bench.digits import load_digits_split, train_digits_clip, write_class_folders, write_suspect
from cbpt_guard.bench.implant import implant
from cbpt_guard.bench.poster import Column, draw_poster
from cbpt_guard.classifier import GuardedClassifier
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.triggers import Trigger, patch, save_trigger
from cbpt_guard.export import export
from cbpt_guard.files import staged, write_text
from cbpt_guard.manifest import VerdictName

TARGET = 3
SHOTS = 16
REPORT, PICTURE = "report.json", "picture.png"
OURS = (REPORT, PICTURE)
"""By these files a folder is known as a demo, which another may replace."""
LEAST_POISON, MOST_LEFT, MOST_LOST = 0.90, 0.05, 0.03
_SHOWN = 4


class Counts(BaseModel):
    """CA on clean images, ASR and PA on triggered ones; shares in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: float
    asr: float
    pa: float


class DemoReport(BaseModel):
    """What the demo counted on `images` test images, through the exported bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    trigger: str
    images: int
    verdict: VerdictName
    undefended: Counts
    guarded: Counts
    flagged_clean: float
    flagged_triggered: float
    bundle: str
    picture: str

    @property
    def failures(self) -> list[str]:
        """Why the demo did not show what it is meant to show; empty when it did."""
        before, after = self.undefended, self.guarded
        checks = {
            f"the run's verdict is {self.verdict!r}": self.verdict == "guarded",
            f"the poison did not take: ASR {before.asr:.1%}, at least {LEAST_POISON:.0%} wanted": before.asr
            >= LEAST_POISON,
            f"the guard did not hold: ASR {after.asr:.1%}, at most {MOST_LEFT:.0%} wanted": after.asr <= MOST_LEFT,
            f"the guard cost {before.ca - after.ca:.1%} of CA, at most {MOST_LOST:.0%} wanted": before.ca - after.ca
            <= MOST_LOST,
        }
        return [failure for failure, passed in checks.items() if not passed]


@dataclass(frozen=True)
class _Answers:
    """Class indices (N,) before and after, and the rule's flag (N,)."""

    before: metrics.Indices
    after: metrics.Indices
    flags: np.ndarray


def run_demo(out: Path, *, seed: int = 0, force: bool = False, progress: Progress = silent) -> DemoReport:
    """Train, poison, purify, export, serve, count; `out` holds every file of it and `report.json`.

    Raises:
        InputError: `out` exists and `force` is off, or it is no demo.
        SetupError: the disk refuses.
    """
    with staged(out, force=force, ours=OURS) as folder:
        data = load_digits_split(seed)
        clean = train_digits_clip(data.train, seed, progress=progress)
        trigger = patch(clean.image_size, seed)
        poisoned = implant(clean, data.train, data.test, trigger, TARGET, seed=seed, progress=progress).clip

        suspect = write_suspect(poisoned, folder / "suspect")
        save_trigger(trigger, data.test.classes[TARGET], folder / "suspect")
        images = write_class_folders(data.clean, folder / "clean", per_class=SHOTS)
        run = purify(suspect, images, out=folder / "purified", seed=seed, progress=progress)
        # a demo that fails must still show its numbers, so the verdict is reported and not enforced
        guard = GuardedClassifier.load(export(run, folder / "bundle", allow_unguarded=True))

        report = _count(guard, data.test, trigger, out)
        _draw(guard, run, data.test, trigger, folder / PICTURE)
        write_text(folder / REPORT, report.model_dump_json(indent=1))
    return report


def _count(guard: GuardedClassifier, test: LabelledImages, trigger: Trigger, out: Path) -> DemoReport:
    labels, images = test.labels.numpy(), test.images.numpy()
    clean, attacked = _answer(guard, images), _answer(guard, trigger.apply(images))

    def counts(on_clean: metrics.Indices, on_triggered: metrics.Indices) -> Counts:
        return Counts(
            ca=metrics.clean_accuracy(on_clean, labels),
            asr=metrics.attack_success_rate(on_triggered, labels, TARGET),
            pa=metrics.poisoned_accuracy(on_triggered, labels, TARGET),
        )

    return DemoReport(
        target=test.classes[TARGET],
        trigger=str(trigger),
        verdict=guard.manifest.verdict,
        images=len(labels),
        undefended=counts(clean.before, attacked.before),
        guarded=counts(clean.after, attacked.after),
        flagged_clean=float(clean.flags.mean()),
        flagged_triggered=float(attacked.flags.mean()),
        bundle=str(out / "bundle"),
        picture=str(out / "picture.png"),
    )


def _answer(guard: GuardedClassifier, images: np.ndarray) -> _Answers:
    """Answers through the bundle, and the zero-shot head's beside them."""
    predictions = guard.predict(list(images))
    outputs = guard.run(images)
    after = np.array([prediction.index for prediction in predictions])
    return _Answers(outputs.logits_original.argmax(1), after, outputs.triggered)


def _draw(guard: GuardedClassifier, run: PurifyRun, test: LabelledImages, trigger: Trigger, path: Path) -> None:
    """One column per example: clean, triggered, and what was answered before and after."""
    others = (test.labels != TARGET).nonzero()[:_SHOWN, 0]
    images = test.images[others].numpy()
    attacked = trigger.apply(images)
    clean, hit = _answer(guard, images), _answer(guard, attacked)
    names = test.classes
    answers = (clean.before, clean.after, hit.before, hit.after)
    columns = [
        Column(names[truth], images[i], attacked[i], *(names[answer[i]] for answer in answers))
        for i, truth in enumerate(test.labels[others].tolist())
    ]
    draw_poster(columns, run.bank()).save(path)
