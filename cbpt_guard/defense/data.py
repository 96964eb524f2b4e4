"""LabelledImages: a folder or a CSV of clean images, prepared as the model wants them."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.errors import ImageError, InputError
from cbpt_guard.images import Preprocess, load_image, prepare

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_SHOWN = 10
_FEWEST_TO_SPLIT = 4


@dataclass(frozen=True)
class Listing:
    """Which files show which class: class names in order, and for each its files in order of their paths.

    A class without files was only named (`--classes`) or its folder is empty.
    """

    classes: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]

    def drawn(self, shots: int | None, seed: int) -> Listing:
        """At most `shots` files of each class, drawn by a seed of its own: other classes do not matter.

        Raises:
            InputError: `shots` is below one.
        """
        if shots is None:
            return self
        if shots < 1:
            raise InputError(f"{shots} shots leave no image; pass 1 or more, or none to take all")
        pairs = zip(self.classes, self.files, strict=True)
        return Listing(self.classes, tuple(_draw(files, shots, seed, name) for name, files in pairs))


@dataclass(frozen=True)
class LabelledImages:
    """Prepared images uint8 (N, S, S, 3), labels (N,) into `classes`, and the files that could not be read."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))


def list_images(data: Path, classes_file: Path | None = None) -> Listing:
    """Find the images of a folder of class folders, or of a CSV with the columns path and label.

    Raises:
        InputError: nothing is there, fewer than two classes, a duplicate class or an unknown one.
    """
    found = _list_csv(data) if data.is_file() else _list_folders(data)
    renames, additions = _read_classes(classes_file) if classes_file else ({}, [])
    unknown = sorted(set(renames) - set(found))
    if unknown:
        raise InputError(f"{classes_file} renames {unknown[0]!r}, but {data} has no such class; it has {_few(found)}")
    names = [renames.get(folder, folder) for folder in found] + additions
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"the class {twice[0]!r} stands twice; class names must differ (see `--classes`)")
    if len(names) < 2:
        raise InputError(f"{data} holds one class ({names[0]!r}); a classifier needs two or more")
    files = tuple(tuple(paths) for paths in found.values()) + ((),) * len(additions)
    if not any(files):
        raise InputError(f"{data} holds class folders but no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if sum(map(bool, files)) < 2:
        shown = next(name for name, paths in zip(names, files, strict=True) if paths)
        raise InputError(f"{data} holds images of one class only ({shown!r}); a trigger is sought on others' images")
    return Listing(tuple(names), files)


def load_images(
    listing: Listing, preprocess: Preprocess, *, skip_bad: bool = False, progress: Progress = silent
) -> LabelledImages:
    """Decode, resize and crop every listed image.

    Raises:
        InputError: some images cannot be read and `skip_bad` is off; the first ten are listed.
    """
    items = [(path, label) for label, paths in enumerate(listing.files) for path in paths]
    images, labels, bad = [], [], []
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda item: _prepared(item[0], preprocess), items)
        for number, ((path, label), result) in enumerate(zip(items, results, strict=True)):
            if isinstance(result, str):
                bad.append(f"{path}: {result}")
            else:
                images.append(torch.from_numpy(result))
                labels.append(label)
            progress(Step("images", number + 1, len(items)))
    if bad and not skip_bad:
        raise InputError(_describe_bad(bad))
    if not images:
        raise InputError(f"none of the {len(items)} images can be read; the first: {bad[0]}")
    if bad and len(set(labels)) < min(2, len(listing.classes)):
        raise InputError(f"only images of {listing.classes[labels[0]]!r} can be read; the first bad one: {bad[0]}")
    return LabelledImages(torch.stack(images), torch.tensor(labels), listing.classes, tuple(bad))


def load_unlabelled(folder: Path, preprocess: Preprocess) -> Tensor:
    """Prepared images uint8 (N, S, S, 3) of a folder, its sub-folders included; `InputError` if one is bad."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    files = _images_below(folder)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return load_images(Listing(("triggered",), (tuple(files),)), preprocess).images


def split(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to tune on and indices held out: `held_out` of each class's images, none of a class below four.

    Where only one class has four, none are held out: success towards that class would have no image to show on.
    """
    large = labels.bincount() >= _FEWEST_TO_SPLIT
    some = held_out > 0 and int(large.sum()) > 1
    keep, hold = [], []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(held_out * len(index))), len(index) - 1) if some and large[label] else 0
        order = index[torch.from_numpy(np.random.default_rng([seed, label]).permutation(len(index)))]
        hold.append(order[:count])
        keep.append(order[count:])
    return torch.cat(keep).sort().values, torch.cat(hold).sort().values


def _prepared(path: Path, preprocess: Preprocess) -> np.ndarray | str:
    try:
        return prepare(load_image(path), preprocess)
    except ImageError as error:
        return str(error)


def _describe_bad(bad: Sequence[str]) -> str:
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    shown = "\n  ".join(bad[:_SHOWN])
    return f"{len(bad)} images cannot be read; remove them or pass `--skip-bad`:\n  {shown}{more}"


def _list_folders(data: Path) -> dict[str, list[Path]]:
    if not data.is_dir():
        raise InputError(f"{data} does not exist; `--data` takes a folder of class folders or a CSV (path,label)")
    folders = sorted(item for item in data.iterdir() if item.is_dir() and not item.name.startswith("."))
    if not folders:
        raise InputError(f"{data} holds no class folders; expected {data.name}/<class name>/<image>")
    return {folder.name: _images_below(folder) for folder in folders}


def _images_below(folder: Path) -> list[Path]:
    """Image files in a folder and its sub-folders, hidden ones left out."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _list_csv(data: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    try:
        with data.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                raise InputError(f"{data} needs the columns path and label; it has {_few(reader.fieldnames or ())}")
            for row in reader:
                if not row["path"] or not (row["label"] or "").strip():
                    raise InputError(f"{data} line {reader.line_num} lacks a path or a label")
                found.setdefault(row["label"].strip(), []).append(data.parent / row["path"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{data} cannot be read as a UTF-8 CSV: {error}") from error
    if not found:
        raise InputError(f"{data} lists no image")
    return {label: sorted(found[label]) for label in sorted(found)}


def _read_classes(path: Path) -> tuple[dict[str, str], list[str]]:
    """`folder<TAB>name` renames, a line without TAB adds."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    renames: dict[str, str] = {}
    additions: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        before, tab, after = line.partition("\t")
        folder, name = before.strip(), after.strip()
        if tab and not (folder and name):
            raise InputError(f"{path} line {number} needs a folder and a name around the TAB")
        if tab and folder in renames:
            raise InputError(f"{path} line {number} renames {folder!r} a second time")
        if tab:
            renames[folder] = name
        else:
            additions.append(folder)
    return renames, additions


def _draw(files: tuple[Path, ...], shots: int, seed: int, name: str) -> tuple[Path, ...]:
    chosen = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(files))[:shots]
    return tuple(files[index] for index in sorted(chosen))


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(repr(name) for name in listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
