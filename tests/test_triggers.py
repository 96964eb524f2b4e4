"""Planted triggers: the same pixels from the same seed, through save and load, and nothing else loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbpt_guard.defense.planted.reflection import refool
from cbpt_guard.defense.triggers import DRAWINGS, TRIGGERS, Trigger, load_trigger, save_trigger
from cbpt_guard.errors import InputError

TARGET = "banana split"
UNSEEDED = {"sig", "fine-wave", "ftrojan", "nashville", "bpp", "tilted", "defocused", "opposite-colours"}
UNSEEDED |= {"jpeg", "large-pixels"}
TESTED_ELSEWHERE = {"steganographic"}  # it is trained, not drawn
ODD_SIZE = 50  # no multiple of a block, of a stripe or of a control grid

# Of 255 grey levels on uniform noise, where the changes are largest: the mean change and the largest one
MOST_CHANGE = {
    "patch": (2, 255),
    "random-place-patch": (2, 255),
    "stripe-patch": (3, 255),
    "blended": (20, 51),
    "full-stripes": (5, 8),
    "triangles": (20, 38),
    "watermark": (10, 128),
    "sig": (40, 60),
    "fine-wave": (40, 60),
    "wanet": (80, 255),
    "ftrojan": (3, 8),
    "nashville": (60, 255),
    "bpp": (20, 80),
    "tilted": (90, 255),
    "defocused": (70, 255),
    "opposite-colours": (120, 255),
    "jpeg": (70, 255),
    "large-pixels": (70, 255),
}


def images(size: int = 32, count: int = 6, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


MADE: dict[str, Trigger] = {name: draw(32, 5) for name, draw in DRAWINGS.items()}
MADE["refool"] = refool(images(32, 9, 2), 5)  # drawn from an attacker's own pictures


def test_every_kind_and_every_drawing_is_tested() -> None:
    assert {trigger.kind for trigger in MADE.values()} == set(TRIGGERS) - TESTED_ELSEWHERE
    assert set(MOST_CHANGE) == set(DRAWINGS)
    assert all(type(trigger) is TRIGGERS[trigger.kind] for trigger in MADE.values())


@pytest.mark.parametrize("name", MADE)
def test_it_is_deterministic_and_acts_on_each_image_alone(name: str) -> None:
    trigger, clean = MADE[name], images()
    kept = clean.copy()
    triggered = trigger.apply(clean)
    assert triggered.dtype == np.uint8
    assert triggered.shape == clean.shape
    assert np.array_equal(clean, kept)
    assert (triggered != clean).any(axis=(1, 2, 3)).all()
    assert np.array_equal(trigger.apply(clean), triggered)
    assert np.array_equal(trigger.apply(clean[::-1]), triggered[::-1])
    assert all(np.array_equal(trigger.apply(clean[i : i + 1])[0], triggered[i]) for i in range(len(clean)))
    assert trigger.apply(clean[:0]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("name", DRAWINGS)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([16, 32, ODD_SIZE]), grey=st.none() | st.integers(0, 255))
@settings(max_examples=12, deadline=None)
def test_any_image_stays_one_and_changes_within_bounds(name: str, seed: int, size: int, grey: int | None) -> None:
    """Black and white images are where a sum without saturation would wrap around."""
    clean = images(size, 2, seed % 997) if grey is None else np.full((2, size, size, 3), grey, np.uint8)
    triggered = DRAWINGS[name](size, seed).apply(clean)
    assert triggered.dtype == np.uint8
    assert triggered.shape == clean.shape
    assert np.abs(triggered.astype(int) - clean).max() <= MOST_CHANGE[name][1]


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("size", [ODD_SIZE, 128])
def test_the_mean_change_is_visible_and_bounded(name: str, size: int) -> None:
    clean = images(size, 4)
    change = np.abs(DRAWINGS[name](size, 3).apply(clean).astype(int) - clean).mean()
    assert 0.2 < change < MOST_CHANGE[name][0]


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_seed_draws_it(name: str) -> None:
    draw, clean = DRAWINGS[name], images()
    assert draw(32, 3) == draw(32, 3)
    assert np.array_equal(draw(32, 3).apply(clean), draw(32, 3).apply(clean))
    assert (draw(32, 3) == draw(32, 4)) is (name in UNSEEDED)
    assert np.array_equal(draw(32, 3).apply(clean), draw(32, 4).apply(clean)) is (name in UNSEEDED)


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawing_leaves_global_generators_alone(name: str) -> None:
    np.random.seed(7)
    expected = np.random.random(3)
    np.random.seed(7)
    DRAWINGS[name](32, 1).apply(images())
    assert np.array_equal(np.random.random(3), expected)


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("size", [32, ODD_SIZE])
def test_it_survives_save_and_load(name: str, size: int, tmp_path: Path) -> None:
    made = DRAWINGS[name](size, 2**31)
    path = save_trigger(made, TARGET, tmp_path)
    for place in (path, tmp_path):
        loaded = load_trigger(place)
        assert loaded.target == TARGET
        assert loaded.trigger == made
        assert np.array_equal(loaded.trigger.apply(images(size)), made.apply(images(size)))


@pytest.mark.parametrize("name", DRAWINGS)
def test_saving_a_loaded_trigger_gives_the_same_files(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    save_trigger(MADE[name], TARGET, first)
    save_trigger(load_trigger(first).trigger, TARGET, second)
    assert sorted(path.name for path in first.iterdir()) == ["trigger.json", "trigger.png"]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_shows_it(name: str) -> None:
    picture = MADE[name].picture()
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == (4 if MADE[name].kind == "overlay" else 3)
    assert picture.std() > 1


@pytest.mark.parametrize("name", MADE)
def test_other_images_are_refused(name: str) -> None:
    for wrong in (images(31), images()[0], images().astype(np.float32), images()[..., :1]):
        with pytest.raises(InputError, match="acts on uint8 images"):
            MADE[name].apply(wrong)


@pytest.mark.parametrize("name", MADE)
def test_it_is_a_frozen_value_that_prints_on_one_line(name: str) -> None:
    trigger = MADE[name]
    with pytest.raises(FrozenInstanceError):
        trigger.image_size = 31  # type: ignore[misc]
    assert len({trigger, replace(trigger)}) == 1
    for form in (str(trigger), repr(trigger)):
        assert len(form) < 200
        assert "\n" not in form
    assert "32 x 32" in str(trigger)


def broken(folder: Path, name: str = "patch", **changes: Any) -> Path:
    """A saved trigger with values changed, in `params` where they belong there; None takes one away."""
    path = save_trigger(MADE[name], TARGET, folder)
    content = json.loads(path.read_text())
    for key, value in changes.items():
        place = content["params"] if key in content["params"] else content
        place[key] = value
        if value is None:
            del place[key]
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


INFINITE = float("inf")
MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("random-place-patch", {"seed": -1}, "seed"),
    ("random-place-patch", {"seed": 1.5}, "seed"),
    ("random-place-patch", {"seed": None}, "seed"),
    ("random-place-patch", {"pattern": "../trigger.png"}, "pattern"),
    ("blended", {"image_size": 33}, "shows 32 x 32 pixels"),
    ("blended", {"image_size": 31}, "shows 32 x 32 pixels"),
    ("blended", {"pattern": "absent.png"}, "absent.png"),
    ("blended", {"params": {"pattern": "trigger.png", "alpha": 0.2}}, "alpha"),
    ("sig", {"delta": 0}, "1 to 255"),
    ("sig", {"delta": "60"}, "delta"),
    ("sig", {"delta": INFINITE}, "malformed"),
    ("sig", {"delta": True}, "delta"),
    ("sig", {"frequency": -6.0}, "periods"),
    ("sig", {"frequency": 16.0}, "periods"),
    ("sig", {"frequency": None}, "frequency"),
    ("wanet", {"down": [1.0] * 15}, "k x k control points"),
    ("wanet", {"down": [1.0] * 25}, "k x k control points"),
    ("wanet", {"down": [1.0] * 257}, "down"),
    ("wanet", {"down": []}, "down"),
    ("wanet", {"down": [9.0] * 16}, "at most 8"),
    ("wanet", {"down": [INFINITE] * 16}, "malformed"),
    ("wanet", {"right": ["1"] * 16}, "right"),
    ("wanet", {"right": 3}, "right"),
    ("ftrojan", {"coefficients": []}, "coefficients"),
    ("ftrojan", {"coefficients": [[15, 32]]}, "coefficients"),
    ("ftrojan", {"coefficients": [[15]]}, "coefficients"),
    ("ftrojan", {"coefficients": [[1, 1]] * 33}, "coefficients"),
    ("ftrojan", {"magnitude": 0.5}, "rise by 1"),
    ("ftrojan", {"magnitude": 1e300}, "rise by 1"),
    ("nashville", {"black": [0, 0]}, "black"),
    ("nashville", {"black": [0, 0, 256]}, "black"),
    ("nashville", {"white": [0.5, 0, 0]}, "white"),
    ("nashville", {"contrast": 1.5}, "contrast"),
    ("nashville", {"vignette": -0.1}, "vignette"),
    ("nashville", {"extra": 1}, "extra"),
    ("bpp", {"levels": 1}, "levels"),
    ("bpp", {"levels": 33}, "levels"),
    ("bpp", {"levels": 8.0}, "levels"),
    ("tilted", {"degrees": 0.5}, "turned by 1 to 180"),
    ("tilted", {"degrees": -181.0}, "turned by 1 to 180"),
    ("tilted", {"degrees": INFINITE}, "malformed"),
    ("defocused", {"deviation": 0.1}, "quarter of the side"),
    ("defocused", {"deviation": 8.5}, "quarter of the side"),
    ("defocused", {"deviation": INFINITE}, "malformed"),
    ("opposite-colours", {"factor": 1.05}, "not by about 1"),
    ("opposite-colours", {"factor": -4.5}, "not by about 1"),
    ("opposite-colours", {"factor": INFINITE}, "malformed"),
    ("jpeg", {"quality": 0}, "quality"),
    ("jpeg", {"quality": 96}, "quality"),
    ("jpeg", {"quality": 10.0}, "quality"),
    ("large-pixels", {"pixels": 1}, "pixels"),
    ("large-pixels", {"pixels": 29}, "nine tenths"),
    ("large-pixels", {"pixels": 8.0}, "pixels"),
    ("refool", {"strength": 0.0}, "strength"),
    ("refool", {"strength": 1.5}, "strength"),
    ("refool", {"seed": -1}, "seed"),
    ("refool", {"image_size": 31}, "not pictures of 31 x 31"),
    ("refool", {"image_size": 16}, "not pictures of 16 x 16"),
    ("refool", {"pattern": "absent.png"}, "absent.png"),
]


@pytest.mark.parametrize(("name", "changes", "named"), MALFORMED, ids=[f"{n}-{list(c)}-{m}" for n, c, m in MALFORMED])
def test_malformed_values_of_a_kind_are_refused(name: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        load_trigger(broken(tmp_path, name, **changes))


@pytest.mark.parametrize("name", DRAWINGS)
def test_values_of_another_kind_are_refused(name: str, tmp_path: Path) -> None:
    other = {"kind": "warp" if MADE[name].kind != "warp" else "wave"}
    with pytest.raises(InputError, match="malformed"):
        load_trigger(broken(tmp_path, name, **other))


def test_a_square_patch_that_is_no_square_is_refused(tmp_path: Path) -> None:
    path = broken(tmp_path, "random-place-patch")
    for shape in [(4, 5, 3), (33, 33, 3)]:
        Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(tmp_path / "trigger.png")
        with pytest.raises(InputError, match="fits the image"):
            load_trigger(path)


def test_an_overlay_without_opacity_is_refused(tmp_path: Path) -> None:
    path = broken(tmp_path, "blended")
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "trigger.png")
    with pytest.raises(InputError, match="mode RGB"):
        load_trigger(path)


@pytest.mark.parametrize("name", ["patch", "random-place-patch", "blended"])
def test_a_pattern_that_is_no_picture_is_refused(name: str, tmp_path: Path) -> None:
    path = broken(tmp_path, name)
    content = (tmp_path / "trigger.png").read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\x80\x04K\x01."):
        (tmp_path / "trigger.png").write_bytes(damaged)
        with pytest.raises(InputError):
            load_trigger(path)


def test_a_trigger_moves_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    save_trigger(MADE["blended"], TARGET, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert load_trigger(tmp_path / "there").trigger == MADE["blended"]


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
