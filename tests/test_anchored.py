"""Anchored rows: the penalty, what stays, and what they reach that the zero-shot rows do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.anchored import anchored_rows
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.observed import moved_to
from cbpt_guard.defense.settings import AnchorSettings
from cbpt_guard.defense.tuning import FeatureSet

C, E, EACH, SCALE = 6, 12, 30, 20.0


def made(seed: int = 0) -> tuple[Head, FeatureSet]:
    """Clean images around their texts, and triggered ones that all moved towards class 0; the last class has none."""
    draws = generator(seed, "made")
    original = Head(F.normalize(torch.randn(C, E, generator=draws), dim=1), SCALE, -3.0)
    labels = torch.arange(C - 1).repeat_interleave(EACH)
    clean = F.normalize(original.rows[labels] + 0.3 * torch.randn(len(labels), E, generator=draws), dim=1)
    triggered = F.normalize(0.5 * clean + original.rows[0], dim=1)
    return original, FeatureSet(clean, triggered[None], labels)


def objective(rows: Tensor, original: Head, data: FeatureSet, settings: AnchorSettings) -> Tensor:
    """The docstring's sum, written out, ()."""
    softened = (SCALE * data.clean @ original.rows.T / settings.temperature).softmax(1)
    wanted = settings.label_weight * torch.eye(C)[data.labels] + (1 - settings.label_weight) * softened
    fit = -(wanted * (SCALE * data.triggered @ rows.T).log_softmax(2)).sum()
    return fit + (SCALE * (rows - original.rows)).square().sum() / (2 * settings.strength)


def slope(rows: Tensor, original: Head, data: FeatureSet, settings: AnchorSettings) -> float:
    """Norm of the objective's gradient in the rows that may move."""
    leaf = rows.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf, original, data, settings), leaf)
    return float(gradient[:-1].norm())


def accuracy(rows: Tensor, original: Head, features: Tensor, labels: Tensor) -> float:
    return float((Head(rows, original.scale).logits(features).argmax(1) == labels).float().mean())


def test_a_handful_of_observed_images_tells_where_the_true_trigger_puts_all() -> None:
    """Found triggers put images a little elsewhere; rows fitted there answer many true ones with a few classes."""
    original, data = made()
    draws = generator(0, "elsewhere")
    aside = 0.5 * F.normalize(torch.randn(E, generator=draws), dim=0)
    true = F.normalize(data.triggered[0] + aside, dim=1)
    bank = TriggerBank(tuple(FoundTrigger("additive", target, torch.zeros(3, 2, 2), None) for target in (0, 1)))
    found = data.triggered.repeat(2, 1, 1)
    moved = moved_to(found, bank, {0: true[::20]})
    assert torch.equal(moved[1], found[1]), "nothing was observed toward class 1"
    assert F.cosine_similarity(moved[0].mean(0), true.mean(0), dim=0) > 0.99
    assert moved.norm(dim=2).allclose(torch.ones(2, len(true)), atol=1e-5)
    assert moved_to(found, bank, {}) is found

    def reached(triggered: Tensor) -> float:
        rows = anchored_rows(original, replace(data, triggered=triggered), AnchorSettings())
        return accuracy(rows, original, true, data.labels)

    assert reached(moved[:1]) > reached(found[:1]) + 0.1
    assert reached(moved[:1]) > reached(true[None]) - 0.05


def test_triggered_images_fall_on_their_class() -> None:
    original, data = made()
    rows = anchored_rows(original, data, AnchorSettings())
    assert accuracy(original.rows, original, data.triggered[0], data.labels) < 0.3
    assert accuracy(rows, original, data.triggered[0], data.labels) > 0.9


@pytest.mark.parametrize(
    "given",
    [
        {"strength": 0.3},
        {"strength": 0.3, "label_weight": 0.8, "temperature": 0.7},
        {"strength": 2.0, "label_weight": 0.4, "temperature": 5.0},
    ],
    ids=["own mixture", "labels", "soft"],
)
def test_they_minimise_what_is_stated(given: dict[str, float]) -> None:
    """With two triggers, at settings of which none may be taken for another."""
    original, data = made()
    data = FeatureSet(data.clean, torch.cat([data.triggered, data.triggered.roll(1, 2)]), data.labels)
    settings = AnchorSettings(iterations=2000, **given)
    rows = anchored_rows(original, data, settings)
    assert slope(rows, original, data, settings) < 1e-3 * slope(original.rows, original, data, settings)


def test_clean_images_teach_and_are_not_fitted() -> None:
    """With labels alone they change nothing; without labels the rows answer what the zero-shot head says of them."""
    original, data = made()
    others = FeatureSet(data.clean.flip(0), data.triggered, data.labels)
    labels_alone, no_labels = AnchorSettings(label_weight=1.0), AnchorSettings(label_weight=0.0)
    assert torch.equal(anchored_rows(original, data, labels_alone), anchored_rows(original, others, labels_alone))
    answers = original.logits(data.clean).argmax(1)
    rows = anchored_rows(original, data, no_labels)
    assert accuracy(rows, original, data.triggered[0], answers) > 0.9
    assert accuracy(anchored_rows(original, others, no_labels), original, data.triggered[0], answers) < 0.5


def test_without_triggers_every_row_stays() -> None:
    original, data = made()
    rows = anchored_rows(original, FeatureSet(data.clean, data.triggered[:0], data.labels), AnchorSettings())
    assert torch.equal(rows, original.rows)


def test_the_smaller_the_strength_the_nearer_to_the_zero_shot_rows() -> None:
    original, data = made()
    distances = [
        float((anchored_rows(original, data, AnchorSettings(strength=strength)) - original.rows).norm())
        for strength in (1e-6, 0.1, 1.0, 10.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances[1] > 1e-2


def test_a_class_without_images_keeps_its_row() -> None:
    original, data = made()
    rows = anchored_rows(original, data, AnchorSettings())
    assert torch.equal(rows[-1], original.rows[-1])
    assert (rows[:-1] - original.rows[:-1]).norm(dim=1).min() > 1e-3


def test_the_same_images_give_the_same_rows_and_nothing_is_drawn() -> None:
    original, data = made()
    torch.manual_seed(1)
    once = anchored_rows(original, data, AnchorSettings())
    torch.manual_seed(2)
    assert torch.equal(once, anchored_rows(original, data, AnchorSettings()))
    assert not once.requires_grad
