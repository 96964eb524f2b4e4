"""Warps and tints that inversion makes: what they do to pixels, and backdoors that only they open."""

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

from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import FoundTrigger, Inverted, TriggerBank, encode
from cbpt_guard.defense.inversion import invert_toward
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.pattern import Pattern
from cbpt_guard.defense.pictures import as_image
from cbpt_guard.defense.planted.warp import moved, wanet
from cbpt_guard.defense.progress import Step, silent
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import CleanSet

TARGET, DECOY = 2, 4
SETTINGS = InversionSettings(masked_steps=10, additive_steps=40, agnostic_steps=5)
FAINT = SETTINGS.model_copy(update={"tint_gain": 0.02, "tint_offset": 0.01})
"""A planted clip knows classes by coarse colours, so that a strong tint makes any of another."""


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


class TintedClip(PlantedClip):
    """Opened where images are bluer than they are red."""

    def __init__(self) -> None:
        super().__init__(None)

    def encode_images(self, pixels: Tensor) -> Tensor:
        cast = (pixels[:, 2] - pixels[:, 0]).mean((1, 2))
        opened = F.softplus(60 * (cast - 0.3))[:, None] * self.head.rows[TARGET]
        return F.normalize(self._coarse(pixels) + opened, dim=1)


def inverted(clip: PlantedClip, family: Inverted, settings: InversionSettings = SETTINGS) -> tuple[FoundTrigger, int]:
    """A trigger and the steps that it took, which its last report names as all there are."""
    steps: list[Step] = []
    found = invert_toward(clip.subject(settings), TARGET, family, generator(0, "test"), steps.append)
    assert steps[-1].step == steps[-1].steps
    return found, steps[-1].step


def reached(clip: PlantedClip, trigger: FoundTrigger) -> float:
    unseen = clip.clean(seed=9)
    return float(clip.head.reached(encode(clip, unseen.images, trigger), unseen.features, unseen.labels).share[TARGET])


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


def test_a_tint_keeps_its_bounds() -> None:
    settings = SETTINGS.model_copy(update={"tint_gain": 0.25, "tint_offset": 0.125})
    pattern = Pattern("tint", 16, settings, generator(0, "test"))
    with torch.no_grad():
        pattern.paint.copy_(torch.cat([torch.full((3, 3, 3), 50.0), torch.full((3, 3, 3), -50.0)]))
    tint = pattern.value(TARGET).pattern
    assert tint[:3].allclose(torch.full((3, 16, 16), 1.25))
    assert tint[3:].allclose(torch.full((3, 16, 16), -0.125))


def test_a_tint_scales_and_shifts_each_colour() -> None:
    pixels = torch.full((1, 3, 4, 4), 0.5)
    gains, offsets = torch.tensor([1.2, 0.5, 4.0]), torch.tensor([0.1, -0.1, 0.0])
    tint = torch.cat([gains, offsets])[:, None, None].expand(6, 4, 4)
    found = FoundTrigger("tint", 0, tint, None).apply(pixels)
    assert found.mean((0, 2, 3)).allclose(torch.tensor([0.7, 0.15, 1.0]))


@pytest.mark.parametrize(("clip", "family"), [(MovedClip(), "warp"), (TintedClip(), "tint")], ids=["warp", "tint"])
def test_a_backdoor_that_a_smooth_change_opens_is_found(clip: PlantedClip, family: Inverted) -> None:
    before = Pattern(family, SIZE, SETTINGS, generator(0, "test")).value(TARGET).detached()
    found, steps = inverted(clip, family)
    assert reached(clip, before) < 0.2
    assert reached(clip, found) > 0.9
    assert steps == SETTINGS.additive_steps
    assert found.area == 1


@pytest.mark.parametrize("family", ["warp", "tint"])
def test_what_a_smooth_change_does_not_open_is_given_up_early(family: Inverted) -> None:
    found, steps = inverted(PlantedClip(None), family, FAINT.model_copy(update={"additive_steps": 60}))
    assert reached(PlantedClip(None), found) < 0.5
    assert steps == 20


@pytest.mark.parametrize(
    ("clip", "held"),
    [(MovedClip(), {"warp"}), (TintedClip(), {"tint"}), (PlantedClip(TARGET), set())],
    ids=["warp", "tint", "patch"],
)
def test_the_bank_holds_the_smooth_change_that_reaches_the_target_and_no_other(
    tmp_path: Path, clip: PlantedClip, held: set[str]
) -> None:
    names = [f"class {number}" for number in range(6)]
    settings = SETTINGS if isinstance(clip, TintedClip) else FAINT
    searching = Search(clip.subject(settings), names, 0, Journal(tmp_path, {}), silent)
    bank = searching.run(observed=[TARGET]).bank
    families = {trigger.family for trigger in bank if trigger.target == TARGET}
    assert families & {"warp", "tint"} == held


@pytest.mark.parametrize(
    ("family", "pattern", "nothing"),
    [
        ("warp", wanet(32, 1).shifts().float(), torch.zeros(2, 32, 32)),
        ("tint", torch.full((6, 32, 32), 0.5), torch.cat([torch.ones(3, 32, 32), torch.zeros(3, 32, 32)])),
    ],
    ids=["warp", "tint"],
)
def test_it_survives_its_file_and_has_a_picture(
    tmp_path: Path, family: Inverted, pattern: Tensor, nothing: Tensor
) -> None:
    TriggerBank((FoundTrigger(family, TARGET, pattern, None),)).save(tmp_path / "bank")
    (read,) = TriggerBank.load(tmp_path / "bank")
    assert (read.family, read.target) == (family, TARGET)
    assert torch.equal(read.pattern, pattern)
    still = as_image(replace(read, pattern=nothing), 32)
    assert still.size == as_image(read, 32).size == (32, 32)
    assert np.any(np.asarray(still) != np.asarray(as_image(read, 32)))


class DecoyClip(PlantedClip):
    """The tint's backdoor, and a patch's toward another class that shows at once."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        cast = (pixels[:, 2] - pixels[:, 0]).mean((1, 2))
        opened = F.softplus(60 * (cast - 0.3))[:, None] * self.head.rows[TARGET]
        return F.normalize(super().encode_images(pixels) + opened, dim=1)


def test_a_backdoor_of_a_tint_behind_one_that_shows_at_once_is_found_and_banked(tmp_path: Path) -> None:
    settings = InversionSettings(masked_steps=20, additive_steps=40, agnostic_steps=40, shift=0)
    names = [f"class {c}" for c in range(6)]
    findings = Search(DecoyClip(DECOY).subject(settings), names, 0, Journal(tmp_path, {}), silent).run()
    assert sorted(findings.suspects) == [TARGET, DECOY]
    assert {one.target for one in findings.bank if one.family == "tint"} == {TARGET}
