"""Unpack the shared packs into the class folders that benchmarks/plan.toml names.

    python benchmarks/images.py --shared ../shared --out IMAGES

A pack without a split for the defender has its `train` dealt out: the first half of each class is the attacker's, the
other half is what the defender's shots are drawn from. So no image serves both, and `test` is nobody's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from runpy import run_path

import numpy as np
from PIL import Image

PACKS = {"tiny-imagenet-64": False, "cifar10-32": True, "clothing-128": True}
"""Whether `train` must be dealt out."""
MOST = 150  # images of a class in a dealt half: more would only cost time


def main() -> None:
    """Parse the command and unpack every pack that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    unpacking = args.shared / "tools" / "packs.py"
    if not unpacking.is_file():
        parser.error(f"{unpacking} is missing: --shared is the folder that holds it, beside data/")
    load = run_path(str(unpacking))["load"]
    for pack, dealt in PACKS.items():
        for split in ("train", "test") if dealt else ("train", "clean", "test"):
            images, labels, classes, _ = load(args.shared / "data" / f"{pack}.npz", split)
            for label, name in enumerate(classes):
                own = images[labels == label]
                for part, rows in parts(split, len(own), dealt).items():
                    write(own[rows], args.out / pack / part / name)


def parts(split: str, count: int, dealt: bool) -> dict[str, slice]:
    """Which images of a class go where."""
    if not dealt or split == "test":
        return {split: slice(None)}
    half = count // 2
    return {"train": slice(0, min(half, MOST)), "clean": slice(half, min(count, half + MOST))}


def write(images: np.ndarray, folder: Path) -> None:
    """Lossless pictures, numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")


if __name__ == "__main__":
    main()
