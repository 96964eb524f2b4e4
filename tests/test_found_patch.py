"""Patches that inversion makes: a square that may lie anywhere, and stays where the backdoor answers most surely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from planted import SIZE, PlantedClip
from torch import Tensor

from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.inversion import invert_toward
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.pattern import Pattern, square
from cbpt_guard.defense.progress import Step, silent
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import InversionSettings

TARGET, DECOY, SIDE = 2, 4, 4
SETTINGS = InversionSettings(
    masked_steps=40, additive_steps=60, agnostic_steps=5, mask_learning_rate=0.5, patch_side=SIDE / SIZE
)


class AnywhereClip(PlantedClip):
    """Reads fine stripes wherever they lie as the target, a little more surely near one corner."""

    def __init__(self, corner: bool) -> None:
        super().__init__(None)
        last = SIZE - SIDE
        near = torch.arange(last + 1.0) / last
        if not corner:
            near = near.flip(0)
        self.sure = 0.8 + 0.2 * near[:, None] * near

    def encode_images(self, pixels: Tensor) -> Tensor:
        stripes = F.conv2d(pixels.mean(1, keepdim=True), self.stripes[None, None] / SIDE**2)[:, 0]
        seen = (20 * stripes * self.sure).logsumexp((1, 2)) / 20
        strength = F.softplus(40 * (seen - 0.25)) / 4
        return F.normalize(self._coarse(pixels) + strength[:, None] * self.head.rows[TARGET], dim=1)


def inverted(clip: PlantedClip, settings: InversionSettings = SETTINGS) -> tuple[FoundTrigger, int]:
    steps: list[Step] = []
    found = invert_toward(clip.subject(settings), TARGET, "patch", generator(0, "test"), steps.append)
    return found, steps[-1].steps


def reached(clip: PlantedClip, trigger: FoundTrigger) -> float:
    unseen = clip.clean(seed=9)
    return float(clip.head.reached(encode(clip, unseen.images, trigger), unseen.features, unseen.labels).share[TARGET])


@pytest.mark.parametrize("corner", [True, False])
def test_a_patch_that_works_anywhere_is_found_and_stays_where_it_works_best(corner: bool) -> None:
    clip = AnywhereClip(corner)
    before = Pattern("patch", SIZE, SETTINGS, generator(0, "test")).value(TARGET).detached()
    found, steps = inverted(clip)
    assert reached(clip, before) < 0.2
    assert reached(clip, found) > 0.9
    assert steps == SETTINGS.additive_steps
    assert found.mask is not None
    assert found.area == (SIDE / SIZE) ** 2
    half = slice(SIZE // 2, None) if corner else slice(SIZE // 2)
    assert found.mask[:, half, half].sum() >= SIDE**2 * 3 / 4
    assert (found.pattern * (1 - found.mask)).abs().max() == 0, "nothing lies outside"


def test_it_lies_anywhere_while_it_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    rolled, places = FoundTrigger.rolled, list[tuple[int, int]]()

    def noted(self: FoundTrigger, down: int, right: int) -> FoundTrigger:
        places.append((down, right))
        return rolled(self, down, right)

    monkeypatch.setattr(FoundTrigger, "rolled", noted)
    inverted(AnywhereClip(corner=True))
    learning = places[: SETTINGS.additive_steps]
    assert {abs(number) for place in learning for number in place} == set(range((SIZE - SIDE) // 2 + 1))
    assert len(places) == SETTINGS.additive_steps + SETTINGS.patch_places**2


def test_the_place_is_one_of_those_tried() -> None:
    found, _ = inverted(AnywhereClip(corner=True), SETTINGS.model_copy(update={"patch_places": 3}))
    assert found.mask is not None
    first = [int(found.mask[0].amax(axis).nonzero()[0]) for axis in (1, 0)]
    assert set(first) <= {0, (SIZE - SIDE) // 2, SIZE - SIDE}


def test_toward_an_innocent_class_it_is_given_up_early() -> None:
    found, steps = inverted(PlantedClip(None))
    assert steps == 20
    assert reached(PlantedClip(None), found) < 0.5


@pytest.mark.parametrize(
    ("clip", "held"), [(AnywhereClip(True), True), (PlantedClip(None), False)], ids=["anywhere", "innocent"]
)
def test_the_bank_holds_a_patch_that_reaches_the_target_and_no_other(
    tmp_path: Path, clip: PlantedClip, held: bool
) -> None:
    names = [f"class {number}" for number in range(6)]
    journal = Journal(tmp_path, {})
    searching = Search(clip.subject(SETTINGS), names, 0, journal, silent)
    bank = searching.run(observed=[TARGET]).bank
    assert ("patch" in {trigger.family for trigger in bank if trigger.target == TARGET}) is held
    bank.save(tmp_path / "bank.safetensors")
    for kept, one in zip(TriggerBank.load(tmp_path / "bank.safetensors"), bank, strict=True):
        assert kept.family == one.family
        assert torch.equal(kept.pattern, one.pattern)


class BehindClip(AnywhereClip):
    """Another patch, of stripes along the rows in one corner, shows to additive patterns at once; this one does not."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        seen = (pixels[:, :, :SIDE, :SIDE] * self.stripes.T).mean((1, 2, 3))
        shown = F.softplus(200 * (seen - 0.03)) / 4
        return F.normalize(super().encode_images(pixels) + shown[:, None] * self.head.rows[DECOY], dim=1)


def test_a_patch_that_no_additive_pattern_shows_is_found_behind_one_that_shows_at_once(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"agnostic_steps": 60, "mask_learning_rate": 0.2})
    names = [f"class {number}" for number in range(6)]
    searching = Search(BehindClip(True).subject(settings), names, 0, Journal(tmp_path, {}), silent)
    findings = searching.run()
    assert sorted(findings.suspects) == [TARGET, DECOY]
    assert "patch" in {trigger.family for trigger in findings.bank if trigger.target == TARGET}
    hidden = next(item for item in findings.candidates if item.index == TARGET)
    assert not hidden.raised, "higher patterns do not show it either"
    assert hidden.share < 0.5


@pytest.mark.parametrize(("size", "side"), [(16, 4), (16, 5), (7, 2)])
def test_a_square_lies_in_the_middle(size: int, side: int) -> None:
    mask = square(size, side)
    assert mask.sum() == side**2
    rows = mask[0].amax(1).nonzero()[:, 0]
    assert abs(int(rows[0]) - (size - 1 - int(rows[-1]))) <= 1


def test_a_patch_has_a_side_of_two_pixels_at_least() -> None:
    assert Pattern("patch", 8, InversionSettings(), generator(0, "test")).side == 2
