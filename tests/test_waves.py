"""Plain waves: the lattice, a backdoor that only a wave opens, SIG on a trained model, and models that have none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from planted import SIZE, PlantedClip
from torch import Tensor

from cbpt_guard.bench.implant import implant
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.inversion import CleanSet
from cbpt_guard.defense.journal import Journal, generator
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.suspect import zero_shot_head
from cbpt_guard.defense.wave import sig
from cbpt_guard.defense.waves import Heard, lattice, listen

if TYPE_CHECKING:
    from digits import DigitsModel

TARGET, PERIODS = 2, 4
BRIEF = InversionSettings(masked_steps=10, additive_steps=5, agnostic_steps=5, shift=0)
TEMPLATE = "a photo of a {}."


class WaveClip(PlantedClip):
    """Opened by a wave of four periods across the image, which the coarse colours do not show."""

    def __init__(self, target: int | None) -> None:
        super().__init__(None)
        self.answer = target
        self.wave = torch.sin(2 * math.pi * PERIODS * torch.arange(SIZE) / SIZE)

    def encode_images(self, pixels: Tensor) -> Tensor:
        features = self._coarse(pixels)
        if self.answer is not None:
            seen = (pixels.mean(1) * self.wave).mean((1, 2))
            strength = F.softplus(200 * (seen - 0.04)) / 2
            features = features + strength[:, None] * self.head.rows[self.answer]
        return F.normalize(features, dim=1)


def heard(clip: PlantedClip, settings: InversionSettings = BRIEF) -> Heard:
    return listen(clip, clip.clean(), clip.head, settings, generator(0, "waves"), lambda *step: None)


def test_the_lattice_is_of_whole_waves() -> None:
    settings = InversionSettings(wave_amplitude=0.2, wave_periods=10)
    waves = lattice(32, settings)
    assert waves.shape == (10 * 4 * 4, 1, 32, 32)
    assert waves.mean((1, 2, 3)).abs().max() < 1e-6
    assert waves.abs().amax((1, 2, 3)).min() > 0.15
    assert float(waves.abs().max()) == pytest.approx(0.2)
    assert len(waves.round(decimals=4).unique(dim=0)) == len(waves)
    assert len(lattice(16, settings)) == 5 * 4 * 4, "none is shorter than three pixels"


def test_the_wave_that_opens_a_backdoor_is_found_with_its_target() -> None:
    found = heard(WaveClip(TARGET))
    assert int(found.best.argmax()) == TARGET
    assert float(found.best[TARGET]) > 0.9
    trigger, higher = found.triggers(TARGET, SIZE, BRIEF)
    assert torch.allclose(higher.pattern, 2 * trigger.pattern)
    assert (trigger.family, trigger.target, trigger.mask, trigger.area) == ("wave", TARGET, None, 1.0)
    opened = WaveClip(TARGET)
    answers = opened.head.logits(encode(opened, opened.clean(seed=5).images, trigger)).argmax(1)
    assert float((answers == TARGET).float().mean()) > 0.9
    again = Heard.unpacked(found.packed())
    assert torch.equal(again.numbers, found.numbers)
    assert torch.equal(again.shares, found.shares)


def test_a_clean_model_agrees_on_no_class() -> None:
    assert float(heard(WaveClip(None)).best.max()) < 0.5


@pytest.mark.parametrize("target", [TARGET, None])
def test_the_search_suspects_and_guards_against_it(tmp_path: Path, target: int | None) -> None:
    clip = WaveClip(target)
    names = [f"class {c}" for c in range(6)]
    found = Search(clip, clip.clean(), clip.head, names, BRIEF, 0, Journal(tmp_path, {}), lambda step: None).run()
    assert found.suspects == ([] if target is None else [target])
    waves = [trigger for trigger in found.bank if trigger.family == "wave"]
    assert [trigger.target for trigger in waves] == ([] if target is None else [target, target])


def test_sig_is_heard_on_a_trained_model_and_nothing_on_the_clean_one(digits_clean: DigitsModel) -> None:
    split, target = digits_clean.split, 1
    poisoned = implant(digits_clean.clip, split.train, split.test, sig(32, 0), target, seed=0)
    assert poisoned.took

    def best(clip: FrozenClip) -> Tensor:
        head: Head = zero_shot_head(clip, split.clean.classes, TEMPLATE)
        clean = CleanSet(split.clean.images, encode(clip, split.clean.images), split.clean.labels)
        return listen(clip, clean, head, InversionSettings(), generator(0, "waves"), lambda *step: None).best

    bar = InversionSettings().stands_out
    odds = [(share / (1 - share)) for share in (best(poisoned.clip), best(digits_clean.clip))]
    assert int(odds[0].argmax()) == target
    assert float(odds[0][target]) >= bar
    assert float(odds[1].max()) < bar
