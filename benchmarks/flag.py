"""Two tests for triggered images side by side, on the clean images that were not drawn as shots.

    python benchmarks/flag.py --shared ../shared --work WORK      after `road.py measure` with the same WORK

For every number of clean target images that may be lost, the threshold that loses just so many, and the ASR left:
the zero-shot margin (the planned test) against Fisher's discriminant (the one built in). The thresholds are chosen on
the counted images themselves, so this compares the two tests and not what a user would get. Rewrites the table in
docs/method.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from pages import rewrite
from road import HERE, counted, unpacked

from cbpt_guard import GuardedClassifier
from cbpt_guard.defense.data import load_images
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.triggers import load_trigger

PAGE = HERE.parent / "docs" / "method.md"
MODEL = "suspect-badnet"


def main() -> None:
    """Count and rewrite the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    guard = GuardedClassifier.load(args.work / MODEL / "bundle")
    planted = load_trigger(args.shared / "models" / MODEL)
    data = load_images(counted(unpacked(args.shared, "clean", args.work), "clean"), guard.manifest.preprocess)
    target, labels = list(guard.classes_).index(planted.target), data.labels.numpy()
    direction = PurifyRun.open(args.work / MODEL / "purified").head().test.directions[target].numpy()
    clean = _scores(guard, data.images.numpy(), target, direction)
    triggered = _scores(guard, planted.trigger.apply(data.images.numpy()), target, direction)
    rows = ["| clean target images lost | ASR left, margin % | ASR left, Fisher % |", "|---|---|---|"]
    own = int((labels == target).sum())
    for lost in (0, 1, 2, 3, 5):
        left = [_left(c, t, labels, target, lost) for c, t in zip(clean, triggered, strict=True)]
        rows.append(f"| {lost} of {own} | {100 * left[0]:.1f} | {100 * left[1]:.1f} |")
    print("\n".join(rows))
    rewrite(PAGE, {"flag": "\n".join(rows)})


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
    main()
