"""Plain waves: the lattice, a backdoor that only a wave opens, SIG on a trained model, and models that have none."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from planted import SIZE, PlantedClip
from torch import Tensor

from cbpt_guard.bench.implant import implant
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.odds import odds_of
from cbpt_guard.defense.planted.wave import sig
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.record import Candidate
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.defense.suspect import zero_shot_head
from cbpt_guard.defense.waves import Heard, _finalists, count_waves, heard_images, listen, wave, wave_periods

if TYPE_CHECKING:
    from digits import DigitsModel

TARGET = 2
BRIEF = InversionSettings(masked_steps=10, additive_steps=5, agnostic_steps=5, shift=0)
TEMPLATE = "a photo of a {}."


class WaveClip(PlantedClip):
    """Opened by a wave over the image that the coarse colours do not show: so many periods, at an angle, in a phase.

    A wave of any height moves features by `most` towards the target at most, of which 1 brings them there.
    """

    def __init__(
        self,
        target: int | None,
        periods: float = 4,
        degrees: float = 0,
        phase: float = 0,
        most: float = math.inf,
        gain: float = 0.5,
    ) -> None:
        super().__init__(None)
        self.answer, self.most, self.gain = target, most, gain
        place, angle = torch.arange(SIZE) / SIZE, math.radians(degrees)
        along = math.cos(angle) * place[None, :] + math.sin(angle) * place[:, None]
        self.wave = torch.sin(2 * math.pi * (periods * along + phase))

    def encode_images(self, pixels: Tensor) -> Tensor:
        features = self._coarse(pixels)
        if self.answer is not None:
            seen = (pixels.mean(1) * (self.wave - self.wave.mean())).mean((1, 2))
            strength = (F.softplus(200 * (seen - 0.02)) * self.gain).clamp(max=self.most)
            features = features + strength[:, None] * self.head.rows[self.answer]
        return F.normalize(features, dim=1)


def heard(clip: PlantedClip, settings: InversionSettings = BRIEF) -> Heard:
    return listen(clip.subject(settings), generator(0, "waves"), silent)


def test_every_wave_is_another() -> None:
    settings = InversionSettings(wave_amplitude=0.2, wave_periods=10)
    assert count_waves(32, settings) == 10 * 8 * 4
    waves = torch.stack([wave(number, 32, settings) for number in range(320)])
    assert waves.shape == (320, 3, 32, 32)
    assert waves.abs().amax((1, 2, 3)).min() > 0.15
    assert float(waves.abs().max()) == pytest.approx(0.2)
    assert len(waves.round(decimals=4).unique(dim=0)) == len(waves)


@pytest.mark.parametrize(("size", "count"), [(16, 160), (2, 32), (128, 576), (224, 672)])
def test_no_period_is_below_three_pixels(size: int, count: int) -> None:
    assert count_waves(size, InversionSettings()) == count
    assert wave(count - 1, size, InversionSettings()).shape == (3, size, size)


def test_fine_waves_grow_by_a_fifth_until_three_pixels() -> None:
    """What answers to a wave of five pixels answers to all of about its length, so few lengths reach far."""
    periods = wave_periods(128, InversionSettings())
    assert periods == [*range(1, 11), 12, 14, 17, 20, 24, 29, 35, 42]
    assert wave_periods(16, InversionSettings(wave_periods=1)) == [1, 2, 3, 4, 5], "a fifth of one is none"
    finest = wave(len(periods) * 32 - 32, 128, InversionSettings())[0, 0]
    assert int(torch.fft.rfft(finest).abs().argmax()) == 42


def test_as_many_images_are_looked_at_as_a_dry_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, looked = PlantedClip(None), []
    real = clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda pixels: (looked.append(len(pixels)), real(pixels))[1])
    clean = clip.clean()
    looked.clear()
    listen(clip.subject(BRIEF, clean), generator(0, "waves"), silent)
    assert sum(looked) == heard_images(SIZE, BRIEF)


@pytest.mark.parametrize(
    ("periods", "degrees", "phase"), [(4, 0, 0), (4, 90, 0.4), (2.5, 0, 0.1), (3, 30, 0.3), (3, 100, 0.8)]
)
def test_a_wave_that_opens_a_backdoor_is_found_with_its_target(periods: float, degrees: float, phase: float) -> None:
    """Most of them lie between the waves that are tried: a backdoor is wider than that."""
    clip = WaveClip(TARGET, periods, degrees, phase)
    found = heard(clip)
    assert int(found.best.argmax()) == TARGET
    assert bool(found.telling[:, TARGET].any())
    assert float(found.best[TARGET]) > 0.8
    assert float(found.odds(twice=False)[TARGET]) == float(odds_of(found.best)[TARGET])
    trigger, higher = found.triggers(TARGET, SIZE, BRIEF)
    assert torch.allclose(higher.pattern, 2 * trigger.pattern)
    assert (trigger.family, trigger.target, trigger.mask, trigger.area) == ("wave", TARGET, None, 1.0)
    fresh = clip.clean(seed=5)
    assert (
        float(clip.head.reached(encode(clip, fresh.images, trigger), fresh.features, fresh.labels).share[TARGET]) > 0.8
    )
    again = Heard.unpacked(found.packed())
    assert torch.equal(again.numbers, found.numbers)
    assert torch.equal(again.reached, found.reached)
    assert torch.equal(again.twice, found.twice)
    assert torch.equal(again.telling, found.telling)


def test_a_wave_that_leads_to_a_class_no_surer_than_clean_images_is_not_telling(tmp_path: Path) -> None:
    """As with images far from the training: the wave takes over what little is seen of them."""
    clip = WaveClip(TARGET, most=1.2)
    found = heard(clip)
    assert float(found.best[TARGET]) > 0.8
    assert float(found.odds(twice=True)[TARGET]) == 0
    search = Search(clip.subject(BRIEF), [f"class {c}" for c in range(6)], 0, Journal(tmp_path, {}), silent)
    assert "wave" not in {trigger.family for trigger in search.run().bank}


def test_what_a_higher_wave_does_makes_it_telling() -> None:
    """Beside the planted wave the target leads by little, under twice the height by much."""
    clip = WaveClip(TARGET, 2.5, 0, 0.1, gain=0.42)
    found, clean = heard(clip), clip.clean()
    low, high = (
        clip.head.leads(encode(clip, clean.images, trigger))[clean.labels != TARGET, TARGET].median()
        for trigger in found.triggers(TARGET, SIZE, BRIEF)
    )
    assert low < 0.2 * clip.head.scale < high
    assert float(found.odds(twice=False)[TARGET]) > 0.7 / 0.3


def test_a_clean_model_is_led_to_no_class() -> None:
    assert float(heard(WaveClip(None)).best.max()) < 0.5


@pytest.mark.parametrize("classes", [2, 6])
def test_a_class_with_most_of_the_images_is_none_that_waves_lead_to(classes: int) -> None:
    """Its own images do not count for it."""
    clip = PlantedClip(None, classes=classes)
    whole = clip.clean(each=20)
    few = torch.cat([(whole.labels == label).nonzero()[: 20 if label == 0 else 2, 0] for label in range(classes)])
    clean = CleanSet(whole.images[few], whole.features[few], whole.labels[few])
    found = listen(clip.subject(BRIEF, clean), generator(0, "waves"), silent)
    assert float(found.best.max()) < 0.5


def test_what_most_images_are_answered_with_anyway_is_none_that_waves_lead_to() -> None:
    """A head that gives most images of the other classes to class 0, whatever lies over them."""
    clip = PlantedClip(None)
    rows = clip.head.rows.clone()
    rows[0] = 2.7 * F.normalize(rows.sum(0), dim=0)
    clip.head = Head(rows, clip.head.scale)
    clean = clip.clean()
    assert float((clip.head.answers(clean.features)[clean.labels > 0] == 0).float().mean()) == pytest.approx(0.8)
    assert float(heard(clip).best.max()) < 0.5


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_one_misread_image_makes_no_wave_perfect(seed: int) -> None:
    """The first heat may draw seven images of the larger class, and one of the other, half of which is misread."""
    clip = PlantedClip(None, classes=2)
    whole = clip.clean(each=60)
    kept = torch.arange(68)
    features = whole.features.clone()
    images = whole.images.clone()
    images[60:64] = whole.images[:4]  # of class 1 by their folder, of class 0 by what they show
    features[60:64] = whole.features[:4]
    clean = CleanSet(images[kept], features[kept], whole.labels[kept])
    found = listen(clip.subject(BRIEF, clean), generator(seed, "waves"), silent)
    assert float(found.best.max()) < 0.5


@pytest.mark.parametrize("target", [TARGET, None])
def test_the_search_suspects_it_and_puts_it_into_the_bank(tmp_path: Path, target: int | None) -> None:
    clip = WaveClip(target)
    names = [f"class {c}" for c in range(6)]
    search = Search(clip.subject(BRIEF), names, 0, Journal(tmp_path, {}), silent)
    found = search.run()
    assert found.suspects == ([] if target is None else [target])
    waves = [trigger for trigger in found.bank if trigger.family == "wave"]
    assert [trigger.target for trigger in waves] == ([] if target is None else [target, target])
    fresh = search.made.fresh_waves(found.bank)
    assert [trigger.target for trigger in fresh] == [trigger.target for trigger in waves]
    assert not any(torch.equal(new.pattern, old.pattern) for new in fresh for old in waves)
    third = search.made.fresh_waves(TriggerBank((*found.bank, *fresh)))
    assert len(third) == len(fresh)
    assert not any(torch.equal(new.pattern, old.pattern) for new in third for old in (*waves, *fresh))


def test_what_a_wave_misses_at_its_height_counts_by_what_twice_the_wave_reaches() -> None:
    """SIG's nearest wave on the grid may lead three images of four."""
    reached, twice = (
        torch.tensor([[0.75, 0.5, 0.4], [0.6, 0.9, 0.1]]),
        torch.tensor([[0.99, 0.4, 0.99], [0.5, 0.99, 0.99]]),
    )
    heard = Heard(torch.tensor([3, 7]), reached, twice, torch.tensor([[True, True, True], [True, False, True]]))
    assert heard.odds(twice=False).tolist() == pytest.approx([3.0, 1.0, 2 / 3])
    expected = [(3 * 99) ** 0.5, 1.0, 2 / 3]
    assert heard.odds(twice=True).tolist() == pytest.approx(expected), "no less than at its own height, if that is half"


def test_waves_are_heard_at_their_height_and_the_leading_ones_at_twice_that(monkeypatch: pytest.MonkeyPatch) -> None:
    heights: Counter[float] = Counter()

    def counting(clip: FrozenClip, images: Tensor, trigger: FoundTrigger) -> Tensor:
        heights[round(255 * float(trigger.pattern.abs().max()))] += 1
        return encode(clip, images, trigger)

    monkeypatch.setattr("cbpt_guard.defense.waves.encode", counting)
    settings = BRIEF.model_copy(update={"wave_periods": 4})  # of whole periods one phase of four meets the crest
    heard(WaveClip(TARGET), settings)
    assert set(heights) <= {*range(23, 33), *range(46, 65)}
    assert sum(count for height, count in heights.items() if height > 32) == settings.finalists


def test_the_bank_holds_the_wave_that_told() -> None:
    """Another may lead more images there at its own height, and be telling of nothing."""
    reached = torch.tensor([[0.7], [0.8]])
    heard = Heard(torch.tensor([3, 7]), reached, reached, torch.tensor([[True], [False]]))
    first, second = (heard.triggers(0, SIZE, BRIEF, rank=rank)[0] for rank in (0, 1))
    assert torch.equal(first.pattern, wave(3, SIZE, BRIEF))
    assert torch.equal(second.pattern, wave(7, SIZE, BRIEF))


@pytest.mark.parametrize(("loud", "suspects"), [(False, [TARGET]), (True, [])])
def test_it_does_where_the_scan_is_not_loud(
    loud: bool, suspects: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few classes higher waves lead to natural ones."""
    clip = WaveClip(TARGET, 2.5, 0, 0.1, gain=0.42)
    own, both = (heard(clip).odds(twice=twice)[TARGET] for twice in (False, True))
    assert float(own) < BRIEF.stands_out < float(both)
    monkeypatch.setattr("cbpt_guard.defense.classscan.Scanned.loud", loud)
    looking = Search(clip.subject(BRIEF), [f"class {c}" for c in range(6)], 0, Journal(tmp_path, {}), silent)
    found = looking.run()
    assert found.suspects == suspects
    assert ("wave" in {trigger.family for trigger in found.bank}) == (not loud)


@pytest.mark.parametrize(("score", "waves"), [(6.0, 2), (500.0, 0)])
def test_a_wave_that_tells_by_both_heights_alone_is_in_the_bank_of_no_target_that_more_tells(
    score: float, waves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leads too few images there, and the test would be wider for it."""
    clip = WaveClip(TARGET)
    looking = Search(clip.subject(BRIEF), [f"class {c}" for c in range(6)], 0, Journal(tmp_path, {}), silent)
    share = torch.zeros(1, 6).index_fill(1, torch.tensor([TARGET]), 0.7)
    one = Heard(torch.tensor([3]), share, share + 0.27 * (share > 0), share > 0)
    monkeypatch.setattr(looking.made, "heard", lambda: one)
    monkeypatch.setattr(looking, "_told", lambda: torch.full((6,), 6.0))
    told = Candidate(label="class 2", index=TARGET, share=0.9, share_clean=0.1, score=score, stands_out=True)
    assert len(looking._waves([told])) == waves


def test_where_one_wave_was_heard_there_is_no_next_best() -> None:
    one = Heard(
        torch.tensor([3]), torch.tensor([[0.1, 0.9]]), torch.tensor([[0.1, 0.9]]), torch.tensor([[False, True]])
    )
    assert len(one.triggers(1, SIZE, BRIEF)) == 2
    assert one.triggers(1, SIZE, BRIEF, rank=1) == []


def test_sig_is_heard_on_a_trained_model_and_nothing_on_the_clean_one(digits_clean: DigitsModel) -> None:
    split, target = digits_clean.split, 1
    poisoned = implant(digits_clean.clip, split.train, split.test, sig(32, 0), target, seed=0)
    assert poisoned.took

    def odds(clip: FrozenClip, *, twice: bool) -> Tensor:
        head: Head = zero_shot_head(clip, split.clean.classes, TEMPLATE)
        clean = CleanSet(split.clean.images, encode(clip, split.clean.images), split.clean.labels)
        return listen(Subject(clip, clean, head, InversionSettings()), generator(0, "waves"), silent).odds(twice=twice)

    bar = InversionSettings().stands_out
    planted, natural = odds(poisoned.clip, twice=False), odds(digits_clean.clip, twice=True)
    assert int(planted.argmax()) == target
    assert float(planted[target]) >= bar
    assert float(natural.max()) < bar


def test_many_waves_toward_one_class_leave_places_for_anothers() -> None:
    reached = torch.zeros(20, 3)
    reached[:12, 0] = torch.linspace(1.0, 0.9, 12)
    reached[15:18, 2] = 0.5
    assert _finalists(reached, 8) == [0, 1, 2, 3, 15, 16, 17, 4], "then those that are left"
    assert _finalists(reached[:3], 8) == [0, 1, 2]
