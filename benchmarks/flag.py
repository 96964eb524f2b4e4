"""Two tests for triggered images side by side, on the clean images that were not drawn as shots.

    python benchmarks/flag.py measure --shared ../shared --work WORK   after `road.py measure` with the same WORK
    python benchmarks/flag.py table        rewrites what docs/method.md says of it

For every number of clean target images that may be lost, the threshold that loses just so many, and the ASR left:
the zero-shot margin (the planned test) against Fisher's discriminant (the one built in). The thresholds are chosen on
the counted images themselves, so this compares the two tests and not what a user would get. `measure` appends a line
to flag.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from command import append, parsers, plainly, read, stamp
from pages import rewrite
from road import counted, unpacked

from cbpt_guard import GuardedClassifier
from cbpt_guard.defense.data import load_images
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.triggers import load_trigger

HERE = Path(__file__).parent
LINES, METHOD = HERE / "flag.jsonl", HERE.parent / "docs" / "method.md"
MODEL = "suspect-badnet"
LOST = (0, 1, 2, 3, 5)


def main() -> None:
    """Parse the command and run it."""
    args = parsers(__doc__).whole.parse_args()
    if args.command == "measure":
        line = measure(args.shared, args.work)
        append(LINES, line)
        print(json.dumps(line))
    else:
        rewrite(METHOD, {"flag": told(lines())})


def measure(shared: Path, work: Path) -> dict[str, Any]:
    """Both tests on the road's suspect, through its bundle."""
    guard = GuardedClassifier.load(work / MODEL / "bundle")
    planted = load_trigger(shared / "models" / MODEL)
    data = load_images(counted(unpacked(shared, "clean", work), "clean"), guard.manifest.preprocess)
    images, labels = data.images.numpy(), data.labels.numpy()
    target = list(guard.classes_).index(planted.target)
    direction = PurifyRun.open(work / MODEL / "purified").head().test.directions[target].numpy()
    clean = _scores(guard, images, target, direction)
    triggered = _scores(guard, planted.trigger.apply(images), target, direction)
    left = [[_left(c, t, labels, target, lost) for lost in LOST] for c, t in zip(clean, triggered, strict=True)]
    margin, fisher = left
    about = {"model": MODEL, "target_images": int((labels == target).sum()), "lost": LOST}
    return about | {"asr_margin": margin, "asr_fisher": fisher, **stamp()}


def lines() -> list[dict[str, Any]]:
    """What was measured so far."""
    return read(LINES)


def told(measured: list[dict[str, Any]]) -> str:
    """Markdown: the last line as a table."""
    if not measured:
        return "Not measured yet."
    line = measured[-1]
    rows = ["| clean target images lost | ASR left, margin % | ASR left, Fisher % |", "|---|---|---|"]
    for lost, margin, fisher in zip(line["lost"], line["asr_margin"], line["asr_fisher"], strict=True):
        rows.append(f"| {lost} of {line['target_images']} | {100 * margin:.1f} | {100 * fisher:.1f} |")
    about = (
        f"On {line['model']} alone, one run. The thresholds are chosen on the counted images themselves, so this "
        "compares the two tests and says nothing of what a user would get."
    )
    return "\n".join([*rows, "", about])


def _scores(
    guard: GuardedClassifier, images: np.ndarray, target: int, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both tests' scores (N,) of uint8 images, minus infinity where the zero-shot answer is not the target."""
    parts = [guard.run(part) for part in np.array_split(images, max(1, len(images) // 64))]
    logits = np.concatenate([part.logits_original for part in parts])
    fisher = np.concatenate([part.embedding for part in parts]) @ direction
    top = np.sort(logits, axis=1)
    answers_target = logits.argmax(1) == target
    margin = top[:, -1] - top[:, -2]
    return np.where(answers_target, margin, -np.inf), np.where(answers_target, fisher, -np.inf)


def _left(clean: np.ndarray, triggered: np.ndarray, labels: np.ndarray, target: int, lost: int) -> float:
    """ASR when the threshold is the highest score of a clean target image that must be kept."""
    own = np.sort(clean[labels == target])[::-1]
    threshold = own[lost] if lost < len(own) else -np.inf
    others = triggered[labels != target]
    return float(((others > -np.inf) & (others <= threshold)).mean())


if __name__ == "__main__":
    plainly(main)
