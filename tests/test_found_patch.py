"""Patches that inversion makes: a square that may lie anywhere, and stays where the backdoor answers most surely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from planted import SIZE, PlantedClip
from torch import Tensor

from cbpt_guard.defense.classscan import Scanned
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.inversion import invert_toward, leading
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.pattern import Pattern, inside, square
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


class CornerClip(PlantedClip):
    """Reads fine stripes as the target that begin at most two pixels from where they would lie in one corner."""

    def __init__(self) -> None:
        super().__init__(None)

    def encode_images(self, pixels: Tensor) -> Tensor:
        corner = pixels.mean(1, keepdim=True)[..., -SIDE - 2 :, -SIDE - 2 :]
        seen = F.conv2d(corner, self.stripes[None, None] / SIDE**2).amax((1, 2, 3))
        strength = F.softplus(40 * (seen - 0.1)) / 4
        return F.normalize(self._coarse(pixels) + strength[:, None] * self.head.rows[TARGET], dim=1)


def test_one_that_is_kept_at_a_place_finds_what_answers_there_alone() -> None:
    """It moves by a pixel, and never out of the image."""
    clip, settings = CornerClip(), SETTINGS.model_copy(update={"shift": 1 / SIZE})
    anywhere, steps = inverted(clip, settings)
    assert steps == 20, "given up"
    assert reached(clip, anywhere) < 0.5
    draws, corner = generator(0, "test"), (SIZE - SIDE, SIZE - SIDE)
    found = invert_toward(clip.subject(settings), TARGET, "patch", draws, silent, at=corner)
    assert reached(clip, found) > 0.9
    assert min(found.place) >= SIZE - SIDE - 2
    assert Pattern("patch", SIZE, settings, draws, corner).value(TARGET).place == (11, 11)
    assert Pattern("patch", SIZE, settings, draws, (0, 5)).value(TARGET).place == (1, 5)


class WhiteClip(PlantedClip):
    """What is white in a square of the image is the target, and more surely so the more it is."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        seen = pixels[:, :, 9:13, 9:13].gt(0.99).float().mean((1, 2, 3))
        strength = 0.8 * (seen > 0) + 0.3 * seen
        return F.normalize(self._coarse(pixels) + strength[:, None] * self.head.rows[TARGET], dim=1)


def test_an_agnostic_patch_stays_between_the_places_first_tried_where_that_leads_more_images() -> None:
    """Those are 0, 6 and 12 each way; it is white all over."""
    subject = WhiteClip(None).subject(SETTINGS.model_copy(update={"patch_places": 3}))
    mask = square(SIZE, SIDE)
    patch = FoundTrigger("patch", TARGET, mask.expand(3, -1, -1), mask)
    shift = (SIZE - SIDE) // 2
    assert leading(subject, patch, shift, generator(0, "test"), []).place == (9, 9)
    assert reached(WhiteClip(None), patch.rolled(3, 3)) > 2 * reached(WhiteClip(None), patch.rolled(6, 6)) > 0


@pytest.mark.parametrize(("margin", "place"), [(0, (12, 3)), (2, (10, 3)), (4, (8, 4)), (7, (7, 5))])
def test_the_nearest_place_from_which_a_square_may_move(margin: int, place: tuple[int, int]) -> None:
    """Where there is no such place, one between."""
    assert inside((12, 3), 4, 16, margin) == place


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


def test_a_patch_that_answers_at_its_place_alone_is_found_where_an_agnostic_one_hints_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anywhere else it is given up; the one that is found is in the bank, and no other is."""
    clip, corner = CornerClip(), (SIZE - SIDE, SIZE - SIDE)
    subject = clip.subject(SETTINGS.model_copy(update={"shift": 1 / SIZE}))
    hint = invert_toward(subject, TARGET, "patch", generator(1, "test"), silent, at=corner)
    dull = {family: FoundTrigger(family, 0, hint.pattern * 0, None) for family in ("masked", "additive")}
    searching = Search(subject, [f"class {number}" for number in range(6)], 0, Journal(tmp_path, {}), silent)
    made = searching.made
    monkeypatch.setattr(made, "agnostic", lambda: dull["additive"])
    monkeypatch.setattr(made, "raised_agnostic", lambda known: dull["additive"])
    monkeypatch.setattr(
        made, "agnostic_narrow", lambda beside: [hint if one == "patch" else dull["masked"] for one in beside]
    )
    monkeypatch.setattr(made, "scanned", lambda: Scanned(torch.full((1, 6), -9.0)))
    findings = searching.run()
    assert findings.suspects == [TARGET]
    assert findings.candidates[0].score > SETTINGS.stands_out
    (patch,) = [one for one in findings.bank if one.family == "patch"]
    assert min(patch.place) >= SIZE - SIDE - 2
    assert searching.probe.fits(patch)
    assert not torch.equal(patch.pattern, hint.pattern), "made anew"


@pytest.mark.parametrize(("size", "side"), [(16, 4), (16, 5), (7, 2)])
def test_a_square_lies_in_the_middle(size: int, side: int) -> None:
    mask = square(size, side)
    assert mask.sum() == side**2
    rows = mask[0].amax(1).nonzero()[:, 0]
    assert abs(int(rows[0]) - (size - 1 - int(rows[-1]))) <= 1


def test_a_patch_has_a_side_of_two_pixels_at_least() -> None:
    assert Pattern("patch", 8, InversionSettings(), generator(0, "test")).side == 2
