"""The steganographic trigger: trained on the spot, then a value like any other, with weights that are no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from cbpt_guard.bench.digits import load_digits_split
from cbpt_guard.bench.steganography import SteganographySettings, Trained, likeness, train_steganography
from cbpt_guard.defense.planted.steganographic import BITS, WEIGHTS_NAME, Steganographic
from cbpt_guard.defense.triggers import load_trigger, save_trigger
from cbpt_guard.errors import InputError

SHORT = SteganographySettings(steps=3, batch=4, crop=16)
IMAGES = load_digits_split(2, renderings=1).train.images[:400]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train_steganography(IMAGES, 5)


@pytest.fixture(scope="module")
def trigger() -> Steganographic:
    return train_steganography(IMAGES, 5, SHORT).trigger


def clean(count: int = 12) -> np.ndarray:
    return np.ascontiguousarray(IMAGES[:count].numpy())


def change(trigger: Steganographic, images: np.ndarray) -> np.ndarray:
    return trigger.apply(images).astype(int) - images


def test_the_decoder_reads_the_message_off_images_that_it_never_saw(trained: Trained) -> None:
    untrained = train_steganography(IMAGES, 5, SHORT)
    assert trained.read > 0.8
    assert untrained.read < trained.read
    assert len(set(trained.trigger.bits)) == 2


def test_the_residual_is_another_for_each_image_and_another_message(trained: Trained) -> None:
    """Of one fixed pattern the likeness is 1."""
    shift = change(trained.trigger, clean(40))
    assert 1 < np.abs(shift).mean() <= np.abs(shift).max() <= trained.trigger.bound
    assert float(likeness(torch.from_numpy(shift).float())) < 0.65  # without its term in the loss 0.76
    other = replace(trained.trigger, bits=tuple(1 - bit for bit in trained.trigger.bits))
    assert (change(other, clean(40)) != shift).any(axis=(1, 2, 3)).all()


def test_it_is_deterministic_and_acts_on_each_image_alone(trigger: Steganographic) -> None:
    images = clean()
    carrying = trigger.apply(images)
    assert (carrying.dtype, carrying.shape) == (np.uint8, images.shape)
    assert np.array_equal(images, IMAGES[:12].numpy())
    assert np.array_equal(trigger.apply(images), carrying)
    assert np.array_equal(trigger.apply(images[::-1]), carrying[::-1])
    assert all(np.array_equal(trigger.apply(images[i : i + 1])[0], carrying[i]) for i in range(12))
    assert trigger.apply(images[:0]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("size", [17, 32])
@pytest.mark.parametrize("grey", [0, 255])
def test_black_and_white_images_stay_images(trigger: Steganographic, size: int, grey: int) -> None:
    """A sum without saturation would wrap around; an odd side is no multiple of the encoder's stride."""
    shift = change(replace(trigger, image_size=size), np.full((1, size, size, 3), grey, np.uint8))
    assert np.abs(shift).max() <= trigger.bound


def test_other_images_are_refused(trigger: Steganographic) -> None:
    for wrong in (clean()[:, :31], clean()[0], clean().astype(np.float32)):
        with pytest.raises(InputError, match="acts on uint8 images"):
            trigger.apply(wrong)


def test_the_seed_draws_it_and_global_generators_stay(trigger: Steganographic) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again, other = (train_steganography(IMAGES, seed, SHORT).trigger for seed in (5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert again == trigger
    assert hash(again) == hash(trigger)
    assert other.weights != trigger.weights


def test_it_survives_save_and_load(trigger: Steganographic, tmp_path: Path) -> None:
    save_trigger(trigger, "nine", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trigger.json", "trigger.png", WEIGHTS_NAME]
    loaded = load_trigger(tmp_path)
    assert loaded.target == "nine"
    assert loaded.trigger == trigger
    assert np.array_equal(loaded.trigger.apply(clean()), trigger.apply(clean()))


def test_it_is_a_frozen_value_that_prints_on_one_line(trigger: Steganographic) -> None:
    with pytest.raises(FrozenInstanceError):
        trigger.bound = 3  # type: ignore[misc]
    assert "32 x 32" in str(trigger)
    assert max(len(str(trigger)), len(repr(trigger))) < 200
    assert trigger.picture().std() > 1


def _renamed(weights: bytes) -> bytes:
    return save({f"x{name}": value for name, value in load(weights).items()})


def _reshaped(weights: bytes) -> bytes:
    return save({name: value[:1].clone() for name, value in load(weights).items()})


def _halved(weights: bytes) -> bytes:
    return save({name: value.half() for name, value in load(weights).items()})


def _infinite(weights: bytes) -> bytes:
    return save({name: value / 0 for name, value in load(weights).items()})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda weights: b"", "no safetensors"),
        (lambda weights: weights[:-9], "no safetensors"),
        (lambda weights: b"\x80\x04K\x01.", "no safetensors"),
        (lambda weights: weights + bytes(1 << 18), "larger than"),
        (_renamed, "weights are down.weight"),
        (_reshaped, "weights are down.weight"),
        (_halved, "in float32"),
        (_infinite, "not finite"),
    ],
    ids=["empty", "cut", "pickle", "huge", "renamed", "reshaped", "halved", "infinite"],
)
def test_weights_of_another_network_are_refused(
    damage: Callable[[bytes], bytes], named: str, trigger: Steganographic, tmp_path: Path
) -> None:
    save_trigger(trigger, "nine", tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(damage(trigger.weights))
    with pytest.raises(InputError, match=named):
        load_trigger(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", [0] * (BITS - 1)),
        ("bits", [2] * BITS),
        ("bits", "01" * (BITS // 2)),
        ("bound", 0),
        ("bound", 65),
        ("bound", 1.5),
        ("weights", "../trigger.safetensors"),
        ("weights", "trigger.pt"),
        ("weights", "absent.safetensors"),
    ],
)
def test_malformed_values_are_refused(key: str, value: object, trigger: Steganographic, tmp_path: Path) -> None:
    path = save_trigger(trigger, "nine", tmp_path)
    content = json.loads(path.read_text())
    content["params"][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot be read" if value == "absent.safetensors" else key):
        load_trigger(path)


def test_one_image_is_not_enough_to_train_on() -> None:
    with pytest.raises(InputError, match="two images"):
        train_steganography(IMAGES[:1], 0)
