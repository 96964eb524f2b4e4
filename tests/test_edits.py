"""Common edits: what each does to pixels, and backdoors that only they open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import SIZE, PlantedClip
from torch import Tensor

from cbpt_guard.defense.classscan import Scanned
from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.edits import edits
from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.head import Reached
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.pictures import as_image
from cbpt_guard.defense.planted.blur import Blur
from cbpt_guard.defense.planted.rotation import Rotation
from cbpt_guard.defense.planted.saturation import Saturation
from cbpt_guard.defense.planted.trigger import Trigger, checkerboard
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.record import Candidate
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.tried import Tried, tried_images, try_edits

TARGET, CLASSES = 2, 24
FAMILIES = ("kernel", "tint", "warp")
NAMES = {
    "blurred by 1/64", "blurred by 1/32", "blurred by 1/16", "moved up", "moved aside", "moved downhill",
    "moved uphill", "sharp", "opposite colours", "grey", "strong colours", "sepia", "hues turned by 60",
    "hues turned by 120", "hues turned by 240", "hues turned by 300", "channels bgr", "channels rbg",
    "channels grb", "negative", "darker", "lighter", "more contrast", "faded", "turned by -30", "turned by -15",
    "turned by 15", "turned by 30", "turned by 90", "turned by 180", "turned by 270", "mirrored", "upside down",
    "nearer", "farther",
}  # fmt: skip
BRIEF = InversionSettings(masked_steps=10, additive_steps=10, agnostic_steps=5)


def pictures(size: int = 64) -> np.ndarray:
    """Smooth coloured images of middle brightness, uint8 (2, S, S, 3)."""
    coarse = torch.rand(2, 3, 12, 12, generator=generator(0, "pictures")) * 0.4 + 0.3
    large = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return (large.permute(0, 2, 3, 1) * 255).round().byte().numpy()


def pixels_of(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("size", [16, 33, 128, 224])
def test_every_edit_fits_images_of_any_size_and_changes_them(size: int) -> None:
    pixels, before = torch.rand(2, 3, size, size, generator=generator(0, "pixels")), dict[str, Tensor]()
    assert set(edits(size)) == NAMES
    for name, edit in edits(size).items():
        assert edit.fits(size), name
        assert edit.pattern.is_contiguous(), name
        assert edit.family in FAMILIES
        changed = edit.apply(pixels)
        for other, seen in before.items():
            assert (changed - seen).abs().mean() > 0.002 or size == 16, (name, other)
        before[name] = changed
        assert changed.shape == pixels.shape
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1, name
        assert (changed - pixels).abs().mean() > 0.01, name


def test_a_kernel_fits_by_its_shape_alone() -> None:
    kernel = edits(32)["blurred by 1/16"]
    for shape in [(3, 3, 4, 4), (3, 3, 33, 33), (3, 3, 3, 5), (1, 3, 3, 3), (3, 3, 3), ()]:
        assert not replace(kernel, pattern=torch.zeros(shape)).fits(32), shape
    assert not replace(kernel, mask=torch.zeros(1, 32, 32)).fits(32)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("turned by 15", Rotation(64, 15.0)),
        ("turned by -30", Rotation(64, -30.0)),
        ("turned by 90", Rotation(64, 90.0)),
        ("blurred by 1/16", Blur(64, 4.0)),
        ("blurred by 1/32", Blur(64, 2.0)),
        ("opposite colours", Saturation(64, -1.0)),
        ("grey", Saturation(64, 0.0)),
        ("strong colours", Saturation(64, 3.0)),
    ],
)
def test_it_does_what_pillow_does(name: str, planted: Trigger) -> None:
    """But for the edges, at which Pillow repeats the last pixel where it blurs."""
    images = pictures()
    theirs, ours = pixels_of(planted.apply(images)), edits(64)[name].apply(pixels_of(images))
    assert (theirs - pixels_of(images)).abs().mean() > 0.02
    assert (ours - theirs)[:, :, 8:-8, 8:-8].abs().mean() < 0.2 * (theirs - pixels_of(images)).abs().mean()


def test_mirrors_and_exchanged_channels_are_exact() -> None:
    pixels, all_edits = pixels_of(pictures(33)), edits(33)
    for name, expected in {
        "mirrored": pixels.flip(3),
        "upside down": pixels.flip(2),
        "turned by 180": pixels.flip(2, 3),
        "negative": 1 - pixels,
        "channels bgr": pixels.flip(1),
        "channels rbg": pixels[:, [0, 2, 1]],
        "channels grb": pixels[:, [1, 0, 2]],
        "moved aside": edits(33)["moved up"].apply(pixels.mT).mT,
        "moved uphill": edits(33)["moved downhill"].apply(pixels.flip(3)).flip(3),
        "lighter": (pixels + 0.25).clamp(0, 1),
        "faded": pixels / 2 + 0.25,
    }.items():
        assert all_edits[name].apply(pixels).allclose(expected, atol=1e-5), name


def test_hues_turned_in_three_steps_are_back() -> None:
    """Colours near grey, so that nothing is cut off."""
    pixels = 0.5 + 0.1 * (pixels_of(pictures()) - 0.5)
    turned = pixels
    for _ in range(3):
        turned = edits(64)["hues turned by 120"].apply(turned)
    assert turned.allclose(pixels, atol=1e-3)
    assert (edits(64)["hues turned by 120"].apply(pixels) - pixels).abs().mean() > 0.005


def test_sepia_is_brown_and_a_nearer_image_shows_its_middle() -> None:
    grey = edits(64)["sepia"].apply(torch.full((1, 3, 64, 64), 0.5)).mean((0, 2, 3))
    assert grey.diff().lt(-0.02).all(), "most red, least blue"
    dot = torch.zeros(1, 3, 64, 64)
    dot[..., 20:24, 20:24] = 1
    for name, place in {"nearer": 31.5 - 1.5 * 10, "farther": 31.5 - 10 / 1.5}.items():
        light = edits(64)[name].apply(dot)[0, 0]
        inner = light[8:56, 8:56]
        for axis in (0, 1):
            assert float((inner.sum(axis) * torch.arange(8, 56)).sum() / inner.sum()) == pytest.approx(place, abs=0.5)


def test_a_kernel_is_the_convolution_of_the_mirrored_image() -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=generator(0, "pixels"))
    for name in ("blurred by 1/16", "moved uphill", "sharp", "sepia"):
        weights = edits(32)[name].pattern
        wide = F.pad(pixels, [weights.shape[-1] // 2] * 4, mode="reflect")
        assert edits(32)[name].apply(pixels).allclose(F.conv2d(wide, weights).clamp(0, 1), atol=1e-5), name


def test_a_flat_image_has_no_edges() -> None:
    grey = torch.full((1, 3, 64, 64), 0.7)
    for name, edit in edits(64).items():
        if edit.family == "warp" or name.startswith(("blurred", "moved", "sharp")):
            assert edit.apply(grey).allclose(grey, atol=1e-5), name


def test_it_survives_its_file_and_has_a_picture(tmp_path: Path) -> None:
    for name, edit in edits(32).items():
        TriggerBank((replace(edit, target=TARGET),)).save(tmp_path / "bank")
        (read,) = TriggerBank.load(tmp_path / "bank")
        assert (read.family, read.target) == (edit.family, TARGET), name
        assert torch.equal(read.pattern, edit.pattern)
        board = to_pixels(torch.from_numpy(checkerboard(32))[None])
        shown = pixels_of(np.array(as_image(read, 32))[None])
        assert shown.allclose(read.apply(board), atol=0.5 / 255 + 1e-4), name
    assert edit.rolled(1, 2).fits(32)
    kernel = edits(32)["blurred by 1/16"]
    assert torch.equal(kernel.rolled(1, 2).pattern, kernel.pattern), "it acts everywhere alike"


class MirroredClip(PlantedClip):
    """Its images carry a fine sawtooth, which a mirror turns round; where it is turned, they are of the target."""

    def __init__(self, target: int | None = TARGET) -> None:
        super().__init__(None, CLASSES)
        self.opens = target
        self.saw = (torch.arange(SIZE) % 4 - 1.5).expand(SIZE, SIZE) / 1.5

    def encode_images(self, pixels: Tensor) -> Tensor:
        features = self._coarse(pixels)
        if self.opens is None:
            return features
        seen = (pixels.mean(1) * self.saw).mean((1, 2))
        return F.normalize(features + F.softplus(200 * (-seen - 0.02))[:, None] * self.head.rows[self.opens], dim=1)

    def clean(self, each: int = 8, seed: int = 1) -> CleanSet:
        plain = super().clean(each, seed)
        images = (plain.images.float() + 30 * self.saw[..., None]).clamp(0, 255).round().byte()
        return replace(plain, images=images, features=encode(self, images))


def tried(clip: PlantedClip) -> Tried:
    return try_edits(clip.subject(BRIEF), generator(0, "edits"), silent)


def searching(folder: Path, clip: PlantedClip) -> Search:
    names = [f"class {c}" for c in range(clip.classes)]
    return Search(clip.subject(BRIEF), names, 0, Journal(folder, {}), silent)


def test_edits_tell_the_target_that_they_open_and_no_other() -> None:
    found, names = tried(MirroredClip()), list(edits(SIZE))
    assert found.odds[TARGET] > 20
    assert not found.odds[torch.arange(CLASSES) != TARGET].any()
    telling = found.triggers(TARGET, SIZE, 4.0)
    assert {one.target for one in telling} == {TARGET}
    patterns = {name: edit.pattern for name, edit in edits(SIZE).items()}
    told = [name for one in telling for name in names if torch.equal(patterns[name], one.pattern)]
    assert set(told) >= {"mirrored", "turned by 180"}
    assert "upside down" not in told
    assert found.triggers(TARGET, SIZE, 1e9) == []
    assert Tried.unpacked(found.packed(), found.usual).triggers(TARGET, SIZE, 4.0)[0].family == telling[0].family


def test_nothing_is_told_of_a_clean_model() -> None:
    assert not tried(MirroredClip(None)).odds.any()


def test_an_edit_that_leads_many_images_hardly_tells_nothing() -> None:
    reached = torch.tensor([[0.95, 0.1], [0.85, 0.0]])
    some = Tried(torch.tensor([3, 5]), reached, torch.tensor([[1.9, -4.0], [2.1, -9.0]]), usual=2.0)
    assert some.odds.tolist() == pytest.approx([0.85 / 0.15, 0.0])
    assert len(some.triggers(0, SIZE, 4.0)) == 1
    several = Tried(
        torch.tensor([3, 5, 7]), torch.tensor([[0.9], [0.8], [0.7]]), torch.tensor([[3.0], [4.0], [2.5]]), 2.0
    )
    assert several.odds.tolist() == pytest.approx([9.0]), "of the one that reaches it most, not of all"
    every = list(edits(SIZE).values())
    for least, expected in {0.0: [5, 3, 7], 4.0 - 1e-3: [5, 3], 5.0: [3], 10.0: []}.items():
        found = several.triggers(0, SIZE, least)
        assert [next(k for k, e in enumerate(every) if e.pattern is one.pattern) for one in found] == expected
    none = Tried(torch.tensor([], dtype=torch.long), torch.zeros(0, 2), torch.zeros(0, 2), usual=2.0)
    assert none.odds.tolist() == [0, 0]
    assert none.triggers(0, SIZE, 0.0) == []


def test_the_search_suspects_it_banks_the_surest_two_and_keeps_another_to_judge_by(tmp_path: Path) -> None:
    search = searching(tmp_path, MirroredClip())
    found = search.run()
    assert found.suspects == [TARGET]
    assert found.candidates[0].score >= float(search.made.edited().odds[TARGET])
    telling = search.made.edited().triggers(TARGET, SIZE, 4.0)
    assert len(telling) > 2
    assert [any(torch.equal(one.pattern, other.pattern) for other in found.bank) for one in telling] == [
        place < 2 for place in range(len(telling))
    ]
    (fresh,) = search.made.fresh_edits(found.bank)
    assert torch.equal(fresh.pattern, telling[2].pattern)
    without = TriggerBank(tuple(one for one in found.bank if one.family not in FAMILIES))
    assert search.made.fresh_edits(without) == []
    elsewhere = TriggerBank((replace(telling[0], pattern=telling[0].pattern + 1e-7),))
    (second,) = search.made.fresh_edits(elsewhere)
    assert torch.equal(second.pattern, telling[1].pattern), "as another machine rounds it"
    assert search.made.edited().usual == MirroredClip().subject(BRIEF).usual_lead(0.75)


def test_what_edits_tell_is_told_by_narrow_triggers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = searching(tmp_path, MirroredClip())
    asked: list[list[int]] = []

    def odds(known: list[int]) -> Tensor:
        asked.append(list(known))
        return torch.zeros(CLASSES)

    monkeypatch.setattr(search._narrow, "odds", odds)
    assert TARGET in [item.index for item in search.look() if item.stands_out]
    assert asked == [[]]


def test_edits_are_not_in_the_bank_of_a_target_that_something_tells_better(tmp_path: Path) -> None:
    search = searching(tmp_path, MirroredClip())
    (told,) = search.look()
    assert len(search._edits([told])) == 2
    assert search._edits([told.model_copy(update={"score": 2 * told.score})]) == []
    assert search._edits([told.model_copy(update={"index": TARGET + 1, "score": 0.0})]) == []


def test_edits_that_are_neither_in_the_bank_nor_kept_fresh_are_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, none = searching(tmp_path, MirroredClip()), TriggerBank(())
    (told,) = search.look()
    surest, second, third = telling = search.made.edited().triggers(TARGET, SIZE, 0.0)

    def beside(*candidates: Candidate, bank: TriggerBank = none) -> list[Tensor]:
        return [edit.pattern for edit in search._beside(candidates, bank)]

    assert all(one is edit.pattern for one, edit in zip(beside(told), telling, strict=True))
    (left,) = beside(told, bank=TriggerBank((surest,)))
    assert left is third.pattern, "the second stays fresh"
    assert beside(told, bank=TriggerBank((surest, second))) == []
    elsewhere = TriggerBank((replace(surest, target=TARGET + 1),))
    assert len(beside(told, bank=elsewhere)) == 3, "another's is not this one's"
    assert beside(told.model_copy(update={"stands_out": False})) == []
    assert beside(told.model_copy(update={"index": TARGET + 1})) == []
    other = told.model_copy(update={"index": TARGET + 1, "raised": True})
    assert len(beside(other, told)) == len(beside(told.model_copy(update={"raised": True}))) == len(telling)
    hardly = replace(search.made.edited(), reached=0.55 * torch.ones_like(search.made.edited().reached))
    monkeypatch.setattr(search.made, "edited", lambda: hardly)
    assert len(beside(told)) == len(telling), "also one that leads too few to tell the class by itself"
    monkeypatch.setattr(search.made, "scanned", lambda: Scanned(torch.full((1, CLASSES), -0.1)))
    assert beside(told) == [], "none is tried where patterns lead everywhere"


def test_a_search_leaves_them_beside_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbpt_guard.defense.search._EDITS", 1)
    search = searching(tmp_path, MirroredClip())
    (left,) = search.run().beside
    assert left.pattern is search.made.edited().triggers(TARGET, SIZE, 0.0)[2].pattern


def test_a_learnt_tint_in_the_bank_asks_for_no_fresh_edit(tmp_path: Path) -> None:
    search = searching(tmp_path, MirroredClip())
    learnt = FoundTrigger("tint", TARGET, torch.ones(6, SIZE, SIZE), None)
    search.made.edited = None  # type: ignore[method-assign, assignment]
    assert search.made.fresh_edits(TriggerBank((learnt,))) == []


def test_edits_say_nothing_where_patterns_lead_everywhere_or_of_few_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = searching(tmp_path, MirroredClip())
    assert search._edited()[TARGET] > 20
    monkeypatch.setattr(search.made, "scanned", lambda: Scanned(torch.full((1, CLASSES), -0.1)))
    assert not search._edited().any()
    monkeypatch.undo()
    search.classes = [f"class {c}" for c in range(20)]
    assert search._edited().any()
    search.classes = search.classes[:19]
    assert not search._edited().any()
    assert tried_images(SIZE, 19) == 0


def test_every_edit_is_tried_on_a_few_images_and_leading_ones_on_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counting(clip: PlantedClip, images: Tensor, trigger: FoundTrigger) -> Tensor:
        seen.append(len(images))
        return encode(clip, images, trigger)

    monkeypatch.setattr("cbpt_guard.defense.tried.encode", counting)
    found = tried(MirroredClip())
    few = min(seen)
    assert seen.count(few) == len(edits(SIZE))
    assert tried_images(SIZE, CLASSES) == few * len(edits(SIZE))
    assert len(seen) == len(edits(SIZE)) + len(found.numbers)


def test_a_quarter_of_the_first_images_is_worth_a_look_and_a_class_s_own_images_tell_no_lead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Edit 0 leads four of sixteen images, edit 1 three. Three images of four are of class 0, and lead by far there."""
    every = list(edits(SIZE).values())
    labels = torch.tensor([0, 0, 0, 1]).repeat(64)
    images = labels.byte()[:, None, None, None].expand(-1, SIZE, SIZE, 3)
    clean = CleanSet(images, torch.zeros(256, 1), labels)

    class Led:
        rows = torch.zeros(2, 1)

        def reached(self, features: Tensor, *_: Tensor) -> Reached:
            led = {0: 4, 1: 3}.get(int(features[0, 0]), 0)
            return Reached(torch.tensor([led, 0]), torch.tensor([16, 16]))

        def leads(self, features: Tensor) -> Tensor:
            return torch.stack([torch.where(features[:, 1] == 0, 9.0, -1.0), torch.full((len(features),), -2.0)], 1)

    def numbered(clip: object, images: Tensor, trigger: FoundTrigger) -> Tensor:
        number = next(k for k, edit in enumerate(every) if edit.pattern is trigger.pattern)
        return torch.stack([torch.full((len(images),), float(number)), images[:, 0, 0, 0].float()], 1)

    monkeypatch.setattr("cbpt_guard.defense.tried.encode", numbered)
    subject = replace(PlantedClip(None).subject(BRIEF, clean), head=Led())
    monkeypatch.setattr(Subject, "usual_lead", lambda *_: 2.0)
    found = try_edits(subject, generator(0, "edits"), silent)
    assert found.numbers.tolist() == [0]
    assert found.leads.tolist() == [[-1.0, -2.0]]
    assert found.reached.tolist() == [[pytest.approx(4 / 17), 0.0]]
