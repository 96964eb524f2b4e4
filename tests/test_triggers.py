"""Planted triggers: the same pixels from the same seed, through save and load, and nothing else loads."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cbpt_guard.defense.triggers import TRIGGERS, Patch, Trigger, load_trigger, patch, save_trigger
from cbpt_guard.errors import InputError

TARGET = "banana split"
MADE: dict[str, Trigger] = {"patch": patch(32, seed=5)}


def images(size: int = 32, count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_every_kind_is_tested() -> None:
    assert set(MADE) == set(TRIGGERS)
    assert all(isinstance(trigger, TRIGGERS[kind]) and trigger.kind == kind for kind, trigger in MADE.items())


@pytest.mark.parametrize("kind", MADE)
def test_it_is_deterministic_and_acts_on_each_image_alone(kind: str) -> None:
    trigger, clean = MADE[kind], images()
    kept = clean.copy()
    triggered = trigger.apply(clean)
    assert triggered.dtype == np.uint8
    assert triggered.shape == clean.shape
    assert np.array_equal(clean, kept)
    assert (triggered != clean).any(axis=(1, 2, 3)).all()
    assert np.array_equal(trigger.apply(clean), triggered)
    assert np.array_equal(trigger.apply(clean[::-1]), triggered[::-1])


@pytest.mark.parametrize("kind", MADE)
def test_it_survives_save_and_load(kind: str, tmp_path: Path) -> None:
    path = save_trigger(MADE[kind], TARGET, tmp_path)
    for place in (path, tmp_path):
        loaded = load_trigger(place)
        assert loaded.target == TARGET
        assert loaded.trigger == MADE[kind]
        assert np.array_equal(loaded.trigger.apply(images()), MADE[kind].apply(images()))


@pytest.mark.parametrize("kind", MADE)
def test_other_images_are_refused(kind: str) -> None:
    for wrong in (images(31), images()[0], images().astype(np.float32), images()[..., :1]):
        with pytest.raises(InputError, match="acts on uint8 images"):
            MADE[kind].apply(wrong)


def test_the_patch_changes_its_square_only() -> None:
    trigger, clean = patch(64, seed=0, side=5), images(64)
    inside = np.zeros((64, 64), dtype=bool)
    inside[trigger.top : trigger.top + 5, trigger.left : trigger.left + 5] = True
    triggered = trigger.apply(clean)
    assert np.array_equal(triggered[:, ~inside], clean[:, ~inside])
    assert (triggered[:, inside] == trigger.picture().reshape(25, 3)).all()


def test_the_seed_draws_the_pattern() -> None:
    assert patch(32, seed=3) == patch(32, seed=3)
    assert patch(32, seed=3).pixels != patch(32, seed=4).pixels


@pytest.mark.parametrize(("size", "side"), [(32, 4), (128, 9), (224, 16), (448, 32)])
def test_the_patch_grows_with_the_image(size: int, side: int) -> None:
    trigger = patch(size, seed=0)
    assert (trigger.height, trigger.width) == (side, side)
    assert trigger.top + side == size - round(size / 32)


def test_a_trigger_is_a_frozen_printable_value() -> None:
    trigger = patch(32, seed=0)
    with pytest.raises(FrozenInstanceError):
        trigger.top = 0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        trigger.picture()[0, 0] = 0
    assert str(trigger) == "patch of 4 x 4 pixels at row 27, column 27 of 32 x 32"
    assert len({trigger, patch(32, seed=0)}) == 1


@pytest.mark.parametrize(
    "place",
    [
        {"top": -1},
        {"left": 29},
        {"height": 0},
        {"width": 40},
        {"pixels": b"\0" * 47},
    ],
    ids=str,
)
def test_a_patch_lies_inside_its_image(place: dict[str, Any]) -> None:
    fields = {"top": 0, "left": 0, "height": 4, "width": 4, "pixels": b"\0" * 48}
    Patch(32, **fields)
    with pytest.raises(InputError):
        Patch(32, **{**fields, **place})


@pytest.mark.parametrize("side", [0, 32])
def test_a_patch_that_does_not_fit_is_not_drawn(side: int) -> None:
    with pytest.raises(InputError, match="does not fit"):
        patch(32, seed=0, side=side)


def broken(folder: Path, **changes: Any) -> Path:
    """A saved trigger with values changed, in `params` where they belong there; None takes one away."""
    path = save_trigger(patch(32, seed=0), TARGET, folder)
    content = json.loads(path.read_text())
    for name, value in changes.items():
        place = content["params"] if name in content["params"] else content
        place[name] = value
        if value is None:
            del place[name]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 2}, "format"),
        ({"kind": "hypnosis"}, "known are patch"),
        ({"target": ""}, "target"),
        ({"target": None}, "target"),
        ({"image_size": 10**9}, "image_size"),
        ({"image_size": "32"}, "image_size"),
        ({"image_size": 30}, "does not lie inside"),
        ({"extra": 1}, "extra"),
        ({"params": {}}, "top"),
        ({"top": -1}, "top"),
        ({"top": 1.5}, "top"),
        ({"top": 29}, "does not lie inside"),
        ({"height": 5}, "shows 4 x 4 pixels"),
        ({"width": 10**9}, "width"),
        ({"pattern": "../trigger.png"}, "pattern"),
        ({"pattern": "/trigger.png"}, "pattern"),
        ({"pattern": "trigger.pkl"}, "pattern"),
        ({"pattern": "absent.png"}, "absent.png"),
    ],
    ids=str,
)
def test_a_malformed_file_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        load_trigger(broken(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_what_is_no_trigger_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trigger.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"trigger\.json"):
        load_trigger(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = broken(tmp_path)
    path.write_bytes(path.read_bytes() + b" " * 70_000)
    with pytest.raises(InputError, match="larger than 64 KiB"):
        load_trigger(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_trigger(tmp_path / "absent.json")


def test_a_picture_of_another_mode_is_refused(tmp_path: Path) -> None:
    path = broken(tmp_path)
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "trigger.png")
    with pytest.raises(InputError, match="mode L"):
        load_trigger(path)


def test_the_development_trigger_loads(shared: Path) -> None:
    loaded = load_trigger(shared / "models" / "suspect-badnet")
    assert loaded.target == "banana"
    assert str(loaded.trigger) == "patch of 10 x 10 pixels at row 114, column 114 of 128 x 128"
    with Image.open(shared / "models" / "suspect-badnet" / "trigger.png") as picture:
        expected = np.asarray(picture)
    assert np.array_equal(loaded.trigger.apply(images(128))[0, 114:124, 114:124], expected)
