"""Listing: which image files show which class, of a folder of class folders or of a CSV; nothing is decoded here."""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from cbpt_guard.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


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

    def thinned(self, most: int) -> Listing:
        """At most so many files, evenly spread over the classes."""
        places = [(label, path) for label, paths in enumerate(self.files) for path in paths]
        kept = [places[number * len(places) // most] for number in range(most)] if len(places) > most else places
        return Listing(self.classes, tuple(tuple(p for at, p in kept if at == n) for n in range(len(self.classes))))


def list_images(data: Path, classes_file: Path | None = None, *, fewest_classes: int = 2) -> Listing:
    """Find the images of a folder of class folders, or of a CSV with the columns path and label.

    `fewest_classes` must have images: a trigger is sought on those of others, while answers of one can be counted.

    Raises:
        InputError: nothing is there or cannot be read, too few classes, a duplicate class or an unknown one.
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
    foreign = [name for name in names if not _is_text(name)]
    if foreign:
        raise InputError(f"the class {foreign[0]!r} of {data} is no UTF-8 text; rename its folder")
    if len(names) < fewest_classes:
        raise InputError(f"{data} holds one class ({names[0]!r}); a classifier needs two or more")
    files = tuple(tuple(paths) for paths in found.values()) + ((),) * len(additions)
    if not any(files):
        raise InputError(f"{data} holds class folders but no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if sum(map(bool, files)) < fewest_classes:
        shown = next(name for name, paths in zip(names, files, strict=True) if paths)
        raise InputError(f"{data} holds images of one class only ({shown!r}); a trigger is sought on others' images")
    return Listing(tuple(names), files)


def _is_text(name: str) -> bool:
    """Whether a name can be written down: a folder's may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_folders(data: Path) -> dict[str, list[Path]]:
    if not data.is_dir():
        raise InputError(f"{data} does not exist; `--data` takes a folder of class folders or a CSV (path,label)")
    folders = sorted(item for item in data.iterdir() if item.is_dir() and not item.name.startswith("."))
    if not folders:
        raise InputError(f"{data} holds no class folders; expected {data.name}/<class name>/<image>")
    return {folder.name: images_below(folder) for folder in folders}


def images_below(folder: Path) -> list[Path]:
    """Image files in a folder and its sub-folders, hidden ones left out."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if name[0] != "."]
        # a link that leads nowhere is an image that cannot be read, and told as one
        found += (Path(place, name) for name in names if name[0] != "." and Path(name).suffix.lower() in IMAGE_SUFFIXES)
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    """A folder that cannot be looked into must not pass for one without images."""
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _list_csv(data: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    seen: dict[str, int] = {}
    try:
        with data.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                raise InputError(f"{data} needs the columns path and label; it has {_few(reader.fieldnames or ())}")
            for row in reader:
                if not row["path"] or not (row["label"] or "").strip():
                    raise InputError(f"{data} line {reader.line_num} lacks a path or a label")
                path = data.parent / row["path"]
                first = seen.setdefault(os.path.normpath(path), reader.line_num)
                if first != reader.line_num:  # on both sides of the split it would flatter every number
                    raise InputError(f"{data} line {reader.line_num} lists {row['path']!r} again, as line {first} does")
                found.setdefault(row["label"].strip(), []).append(path)
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
