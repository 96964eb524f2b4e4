"""Wall time of `purify` against fine-tuning the whole CLIP for ten epochs on the same shots, in one run.

    python benchmarks/ft_time.py measure --shared ../shared --work WORK   appends a line to ft_time.jsonl
    python benchmarks/ft_time.py table        rewrites what docs/method.md says of it

`purify` is the command from its start to its end; of fine-tuning the training alone counts, with one learning rate,
although a rival would also have to choose it. Half of the epochs run before `purify` and half after it, so that a
machine that slows down slows both; each in a process of its own, with the threads that each takes by itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from command import append, parsers, plainly, read, stamp, timed
from pages import rewrite
from road import LINES as ROAD
from road import MODELS, SEED, SHOTS, unpacked
from timing import Watch

from cbpt_guard.defense.calibration import SEARCH

HERE = Path(__file__).parent
LINES, METHOD = HERE / "ft_time.jsonl", HERE.parent / "docs" / "method.md"
STAGE1 = "stage 1: inversion"


def main() -> None:
    """Parse the command and run it."""
    parser, commands, measuring = parsers(__doc__)
    measuring.add_argument("--model", choices=tuple(MODELS), default="suspect-badnet")
    training = commands.add_parser("train", help="what `measure` runs beside purify: prints seconds")
    training.add_argument("--model", type=Path, required=True)
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--work", type=Path, required=True)
    training.add_argument("--epochs", type=int, required=True)
    args = parser.parse_args()
    if args.command == "train":
        print(trained_seconds(args.model, args.data, args.work, args.epochs))
    elif args.command == "measure":
        line = measure(args.model, args.shared, args.work)
        append(LINES, line)
        print(json.dumps(line))
    else:
        rewrite(METHOD, {"ft": told(lines(), read(ROAD))})


def measure(model: str, shared: Path, work: Path) -> dict[str, Any]:
    """Train, purify, train; all on the same shots of one model."""
    from cbpt_guard.bench.settings import FT

    work.mkdir(parents=True, exist_ok=True)
    data, suspect, watch = unpacked(shared, "clean", work), shared / "models" / model / MODELS[model], Watch()
    epochs = (FT.epochs // 2, FT.epochs - FT.epochs // 2)
    first = _train(suspect, data, work, epochs[0])
    shots = ("--shots", str(SHOTS), "--seed", str(SEED))
    seconds = timed("purify", "--model", suspect, "--data", data, "--out", work / "purified", *shots, "--force")
    trained = first + _train(suspect, data, work, epochs[1])
    return {
        "model": model,
        "ratio": round(seconds / trained, 3),
        "purify_seconds": round(seconds, 1),
        "ft_seconds": round(trained, 1),
        "epochs": FT.epochs,
        "search": SEARCH,
        "others_cores": round(watch.others(), 2),
        **stamp(),
    }


def _train(suspect: Path, data: Path, work: Path, epochs: int) -> float:
    command = [sys.executable, __file__, "train", "--model", suspect, "--data", data, "--work", work]
    done = subprocess.run([*command, "--epochs", str(epochs)], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def trained_seconds(model: Path, data: Path, work: Path, epochs: int) -> float:
    """Seconds that `epochs` of fine-tuning on all shots take, reading model and images apart."""
    from cbpt_guard.bench.finetune import FineTuning, clip_loss
    from cbpt_guard.bench.settings import FT
    from cbpt_guard.bench.task import Task
    from cbpt_guard.bench.trainable import TrainableClip
    from cbpt_guard.cli.machine import prepare_torch
    from cbpt_guard.defense.data import list_images, load_images
    from cbpt_guard.defense.settings import TEMPLATE
    from cbpt_guard.defense.suspect import ModelFlags, open_suspect, zero_shot_head

    prepare_torch(None)
    listing = list_images(data).drawn(SHOTS, SEED)
    clip = open_suspect(model, ModelFlags(), listing, TEMPLATE, "cpu").clip
    original = zero_shot_head(clip, listing.classes, TEMPLATE)
    shots = load_images(listing, clip.preprocess)
    task = Task(clip, original, shots, model, data, TEMPLATE, SEED, work, ())
    training = FineTuning(task, FT.model_copy(update={"held_out": 0.0}))  # on all shots, as purify sees all
    student = TrainableClip.copy_of(clip)
    started = time.monotonic()
    for _ in training.train(student, lambda _, batch, draws: clip_loss(batch), FT.learning_rates[0], epochs):
        pass
    return time.monotonic() - started


def lines() -> list[dict[str, Any]]:
    """What was measured so far."""
    return read(LINES)


def told(measured: list[dict[str, Any]], road: list[dict[str, Any]]) -> str:
    """Markdown: what the last line of each model says, and what the stages of its last run on the `road` leave."""
    last = {line["model"]: line for line in measured}
    staged = {line["model"]: line["stages"] for line in road if line["split"] == "test"}
    rows = [
        f"{name}: {line['purify_seconds']:.0f} s of purify, {line['ft_seconds']:.0f} s for {line['epochs']} epochs of "
        f"FT, {line['ratio']:.2f} times (search {line.get('search', 'not said')}; {line['machine']}; other processes "
        f"took {line['others_cores']:.1f} cores){_against_half(line['ft_seconds'] / 2, staged.get(name, {}))}"
        for name, line in last.items()
    ]
    return "\n".join(f"- {row}" for row in rows) or "Not measured yet."


def _against_half(half: float, stages: dict[str, float]) -> str:
    """Where half of fine-tuning's seconds would have to come from; empty where no stages were measured."""
    first = stages.get(STAGE1)
    if first is None:
        return ""
    rest = sum(stages.values()) - first
    return (
        f". Half would be {half:.0f} s; by the stages above stage 1 takes {first:.0f} s, the other stages {rest:.0f} s"
    )


if __name__ == "__main__":
    plainly(main)
