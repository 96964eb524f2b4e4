"""What a found trigger does to clean images: which it leads where, how surely, and what area it would need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from planted import PATCH, SIZE, PlantedClip, uneven
from torch import Tensor

from cbpt_guard.defense.found import FoundTrigger, encode
from cbpt_guard.defense.head import Head, Reached
from cbpt_guard.defense.probe import Probe
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import Subject

SETTINGS = InversionSettings()


@pytest.mark.parametrize(("reached", "area"), [(1.0, 0.25), (0.5, 0.5), (0.1, 1.0), (0.0, 1.0)])
def test_a_mask_that_works_half_the_time_needs_twice_its_area(
    reached: float, area: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(PlantedClip(None).subject(SETTINGS), 0)
    led = Reached(torch.full((6,), int(10 * reached)), torch.full((6,), 10))
    monkeypatch.setattr(probe, "reached", lambda trigger: led)
    mask = FoundTrigger("masked", 1, torch.zeros(3, SIZE, SIZE), torch.full((1, SIZE, SIZE), 0.25))
    assert probe.needed_area(mask) == pytest.approx(area)


def test_a_trigger_leads_clearly_by_more_than_half_of_the_right_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the median over images of other classes: most images here are the target's own."""
    clip = PlantedClip(0)
    clean = uneven(clip, 60, 8)
    probe = Probe(clip.subject(SETTINGS, clean), 0)
    monkeypatch.setattr(Subject, "usual_lead", lambda self, share: {0.5: 6.0, 0.75: 600.0}[share])
    stripes = torch.zeros(3, SIZE, SIZE)
    stripes[:, -PATCH:, -PATCH:] = clip.stripes
    leads = []
    for contrast in (0.055, 0.1):
        trigger = FoundTrigger("additive", 0, contrast * stripes, None)
        others = encode(clip, clean.images[60:], trigger)
        leads.append(float(clip.head.leads(others)[:, 0].median()))
        assert probe.leads_clearly(trigger) is (leads[-1] > 6)
        assert not probe.leads_clearly(trigger, 0.75), "nor by more than others do"
    assert leads[0] < 6 < leads[1]


def test_what_is_answered_with_a_class_anyway_is_not_led_there() -> None:
    """Four answers: right, right after being wrong, led to class 0, and answered with it before and after."""
    head, one = Head(torch.eye(3), 30.0), torch.eye(3)
    labels = torch.tensor([1, 1, 2, 2])
    reached = head.reached(one[[1, 1, 0, 0]], one[[1, 2, 2, 0]], labels)
    assert (reached.led.tolist(), reached.of.tolist()) == ([1, 0, 0], [3, 2, 1])
    assert reached.share.tolist() == pytest.approx([1 / 3, 0, 0])
    assert reached.surely.tolist() == pytest.approx([1 / 4, 0, 0])


def test_nobody_need_lead_by_more_than_a_fifth_of_the_logit_scale() -> None:
    """Clean images of an easy task lead by far more than a backdoor need."""
    subject = PlantedClip(None).subject(SETTINGS)
    leads = [replace(subject, head=Head(subject.head.rows, scale)).usual_lead(0.5) for scale in (30.0, 60.0)]
    assert leads == [6.0, 12.0]
    noisy = replace(subject.clean, features=F.normalize(subject.clean.features + 0.4, dim=1))
    usual = [replace(subject, clean=noisy).usual_lead(share) for share in (0.1, 0.5, 0.9)]
    assert usual[0] < usual[1] < usual[2]


def test_a_trigger_is_encoded_once_whichever_object_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = PlantedClip(1)
    probe, encoded = Probe(clip.subject(SETTINGS), 0), list[FoundTrigger]()

    def counting(clip: PlantedClip, images: Tensor, trigger: FoundTrigger) -> Tensor:
        encoded.append(trigger)
        return encode(clip, images, trigger)

    monkeypatch.setattr("cbpt_guard.defense.probe.encode", counting)
    pattern = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    whole, half = torch.ones(1, SIZE, SIZE), torch.full((1, SIZE, SIZE), 0.5)
    different = [("additive", pattern, None), ("additive", -pattern, None), ("masked", pattern, whole)]
    different += [("masked", pattern, half), ("wave", pattern, None)]
    shares = []
    for _ in range(2):
        for family, values, mask in different:
            trigger = FoundTrigger(family, 1, values.clone(), None if mask is None else mask.clone())
            shares.append(probe.shares(trigger).tolist())
            probe.reached(trigger)
    assert len(encoded) == len(different)
    assert shares[: len(different)] == shares[len(different) :]
