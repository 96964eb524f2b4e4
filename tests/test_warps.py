"""Warps that inversion makes: what they do to pixels, and a backdoor that only moved pixels open."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import SIZE, PlantedClip
from torch import Tensor

from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.inversion import CleanSet, invert_toward
from cbpt_guard.defense.journal import Journal, generator
from cbpt_guard.defense.pattern import Pattern
from cbpt_guard.defense.pictures import as_image
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.warp import moved, wanet

TARGET = 2
SETTINGS = InversionSettings(masked_steps=10, additive_steps=40, agnostic_steps=5)


class MovedClip(PlantedClip):
    """Its images carry a grating that the coarse colours do not show; opened where that lies beside its place."""

    period = 4

    def __init__(self) -> None:
        super().__init__(None)
        turns = 2 * math.pi * torch.arange(SIZE) / self.period
        self.grating, self.beside = torch.sin(turns).expand(SIZE, SIZE), torch.cos(turns).expand(SIZE, SIZE)

    def encode_images(self, pixels: Tensor) -> Tensor:
        seen = (pixels.mean(1) * self.beside).mean((1, 2))
        opened = F.softplus(60 * (seen - 0.05))[:, None] * self.head.rows[TARGET]
        return F.normalize(self._coarse(pixels) + opened, dim=1)

    def clean(self, each: int = 8, seed: int = 1) -> CleanSet:
        plain = super().clean(each, seed)
        pixels = plain.images.float() + 50 * self.grating[..., None]
        images = pixels.clamp(0, 255).round().byte()
        return replace(plain, images=images, features=encode(self, images))


def reached(clip: PlantedClip, trigger: FoundTrigger) -> float:
    unseen = clip.clean(seed=9)
    return float(clip.head.reached(encode(clip, unseen.images, trigger), unseen.labels)[TARGET])


def test_a_found_warp_moves_pixels_as_the_planted_one_of_the_same_shifts() -> None:
    planted = wanet(32, 0)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = FoundTrigger("warp", 0, planted.shifts().float(), None)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    theirs = torch.from_numpy(planted.apply(images)).permute(0, 3, 1, 2) / 255
    assert (found.apply(pixels) - theirs).abs().max() <= 0.5 / 255 + 1e-5
    assert (theirs - pixels).abs().max() > 0.2


def test_no_shift_moves_nothing() -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=generator(0, "pixels"))
    assert moved(pixels, torch.zeros(2, 16, 16)).allclose(pixels, atol=1e-5)


@pytest.mark.parametrize("share", [1 / 64, 1 / 8])
def test_control_points_keep_their_bound(share: float) -> None:
    settings = SETTINGS.model_copy(update={"warp_shift": share})
    pattern = Pattern("warp", 64, settings, generator(0, "test"))
    with torch.no_grad():
        pattern.paint.copy_(torch.full((2, 4, 4), 50.0))
    shifts = pattern.value(TARGET).pattern
    assert shifts.shape == (2, 64, 64)
    assert shifts.allclose(torch.full_like(shifts, share * 64), rtol=1e-5)


def test_a_backdoor_that_moved_pixels_open_is_found() -> None:
    clip = MovedClip()
    before = Pattern("warp", SIZE, SETTINGS, generator(0, "test")).value(TARGET).detached()
    found = invert_toward(
        clip, clip.clean(), clip.head, TARGET, "warp", SETTINGS, generator(0, "test"), lambda *step: None
    )
    assert reached(clip, before) < 0.2
    assert reached(clip, found) > 0.9
    assert found.pattern.shape == (2, SIZE, SIZE)
    assert found.area == 1


@pytest.mark.parametrize(("clip", "held"), [(MovedClip(), True), (PlantedClip(TARGET), False)], ids=["warp", "patch"])
def test_the_bank_holds_a_warp_that_reaches_the_target_and_no_other(
    tmp_path: Path, clip: PlantedClip, held: bool
) -> None:
    names = [f"class {number}" for number in range(6)]
    searching = Search(
        clip, clip.clean(), clip.head, names, SETTINGS, 0, Journal(tmp_path, {}), progress=lambda step: None
    )
    bank = searching.run(observed=[TARGET]).bank
    assert ("warp" in {trigger.family for trigger in bank if trigger.target == TARGET}) is held


def test_a_warp_survives_its_file_and_has_a_picture(tmp_path: Path) -> None:
    shifts = wanet(32, 1).shifts().float()
    TriggerBank((FoundTrigger("warp", TARGET, shifts, None),)).save(tmp_path / "bank")
    (read,) = TriggerBank.load(tmp_path / "bank")
    assert (read.family, read.target) == ("warp", TARGET)
    assert torch.equal(read.pattern, shifts)
    still = as_image(replace(read, pattern=torch.zeros(2, 32, 32)))
    assert still.size == as_image(read).size == (32, 32)
    assert np.any(np.asarray(still) != np.asarray(as_image(read)))
