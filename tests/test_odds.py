"""How far a class is ahead: leads of two planted targets, of natural leaders, of models that every pattern moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cbpt_guard.defense.odds import PROBE, ahead, at_once, faintly, grown, odds_of, ranked
from cbpt_guard.defense.settings import InversionSettings

SETTINGS = InversionSettings()


@pytest.mark.parametrize(
    ("odds", "wanted"),
    [
        ([0.02, 511.0, 20.0, 0.9, 0.03, 0.01], {1: 10.0, 2: 10.0}),  # two planted targets
        ([269.0, 0.3, 0.04, 0.01, 0.0, 0.0], {0: 10.0}),  # one, with a natural leader far ahead of what is left
        ([6.0, 1.25, 0.04, 0.01, 0.0, 0.0], {0: 4.8}),
        ([0.11, 0.08, 0.04, 0.04, 0.02, 0.0], {}),  # a clean model
        ([511.0, 120.0, 55.0, 14.0, 9.0, 8.0], {}),  # of ten digits: every class is reached
        ([9.0, 9.0, 9.0, 9.0, 0.01, 0.01], {}),  # more than may be candidates
    ],
)
def test_leaders_of_the_scan_are_ahead_of_the_rest(odds: list[float], wanted: dict[int, float]) -> None:
    found = ahead(torch.tensor(odds).clamp(1, 10), SETTINGS.stands_out, SETTINGS.candidates)
    assert found.tolist() == pytest.approx([wanted.get(c, 0.0) for c in range(6)])


def test_additive_triggers_say_nothing_where_they_reach_every_class() -> None:
    """A clean CLIP of ten digits gives nine answers of ten to one class under the agnostic trigger."""
    reached = torch.tensor([0.92, 0.04, 0.02, 0.01, 0.01, 0.0])
    assert at_once(reached, scores(9.0, 4.0, 3.0, 2.0, 1.0, 0.5), SETTINGS).tolist() == [0] * 6
    tuned = scores(18.6, 1.15, 0.78, 0.61, 0.47, 0.42)  # a clean one that was fine-tuned: its leader is natural
    assert at_once(reached, tuned, SETTINGS).tolist() == [0] * 6
    quiet = scores(0.1, 0.08, 0.06, 0.04, 0.02, 0.0)
    assert at_once(reached, quiet, SETTINGS)[0] > 10


def test_as_many_as_half_of_the_classes_may_lead_the_scan() -> None:
    found = at_once(torch.zeros(8), scores(30.0, 20.0, 15.0, 12.0, 0.05, 0.03, 0.02, 0.0), SETTINGS)
    assert found.tolist() == [10.0] * 4 + [0.0] * 4


LOUD = [2.0] * 6


def test_under_fainter_patterns_a_lead_counts_by_its_root() -> None:
    found = faintly(heights(LOUD, [0.1, 4.8, 0.28, 0.04, 0.02, 0.0]), SETTINGS)
    assert found.tolist() == pytest.approx([0, math.sqrt(4.8 / 0.28), 0, 0, 0, 0], rel=1e-4)
    faint = heights(LOUD, [0.1, 3.9, 0.2, 0.04, 0.02, 0.0])
    assert not faintly(faint, SETTINGS).any(), "classes that are hardly reached count as reached in one image of five"


def test_the_lead_of_a_clean_model_is_not_enough() -> None:
    """Of ten classes "airplane" leads at most heights; nearly five times at most."""
    assert not faintly(heights(LOUD, [3.41, 0.71, 0.21, 0.2, 0.1, 0.1]), SETTINGS).any()


def test_a_lead_counts_at_the_height_where_it_is_largest() -> None:
    """A patch on ten classes: at the faintest patterns it is lost."""
    lost, most, less = [0.2, 0.2, 0.3, 0.1, 0.1, 0.0], [60.0, 0.9, 3.0, 2.0, 1.0, 1.0], [5.0, 0.5, 0.7, 0.2, 0.1, 0.1]
    wanted = pytest.approx([math.sqrt(60 / 3), 0, 0, 0, 0, 0], rel=1e-3)
    assert faintly(heights(LOUD, most, less, lost), SETTINGS).tolist() == wanted
    assert faintly(heights(most, less, lost), SETTINGS).tolist() == wanted, "the settings' own height is one of them"
    quiet = [60.0, 0.05, 0.05, 0.05, 0.05, 0.05]
    assert not faintly(heights(quiet), SETTINGS).any(), "of a scan that is not loud other rules tell"


def test_most_classes_are_no_leaders() -> None:
    """One class that is hard to reach makes no suspects of the others."""
    assert not ahead(torch.tensor([90.0, 80.0, 1.0]), 4.0, 3).any()
    assert ahead(torch.tensor([90.0, 80.0, 1.0, 1.0]), 4.0, 3).tolist() == [90, 80, 0, 0]


def heights(*odds: list[float]) -> Tensor:
    """Of scans with those odds."""
    return torch.stack([scores(*each) for each in odds])


def scores(*odds: float) -> Tensor:
    """Of a scan with those odds."""
    return torch.tensor([one / (1 + one) for one in odds]).log()


def test_odds_stay_finite_where_every_image_of_the_probe_is_reached() -> None:
    assert odds_of(torch.tensor([0.0, 0.5, 0.8, 1.0])).tolist() == pytest.approx([0, 1, 4, PROBE - 1], rel=1e-4)


def test_ties_keep_the_order_of_the_classes() -> None:
    assert ranked(torch.tensor([0.1, 0.3, 0.1, 0.3])) == [1, 3, 0, 2]
    many = torch.arange(2000) % 3  # few values keep their order by chance
    assert ranked(many) == sorted(range(2000), key=lambda c: -int(many[c]))


def test_one_class_grew_most_and_others_count_where_they_grew_clearly() -> None:
    assert grown(torch.tensor([0.02, 0.05, 0.01, -0.08]), SETTINGS) == [1]
    clear = torch.tensor([0.1, 0.3, 0.09, 0.2, 0.15])
    assert grown(clear, SETTINGS) == [1, 3, 4], "no more than may be candidates"
    assert grown(clear, SETTINGS.model_copy(update={"candidates": 5})) == [1, 3, 4, 0]
