"""Stage 2: the loss of the method, weights that stay, and the choice of an epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from planted import NAMES, TEMPLATE, frozen, snapshot
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.settings import TuningSettings
from cbpt_guard.defense.tuning import Epoch, FeatureSet, choose, loss_and_gradient, tune, tuning_loss

C, N = len(NAMES), 40
ALL = torch.arange(C)


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return frozen()


@pytest.fixture(scope="module")
def original(clip: FrozenClip) -> Head:
    return Head(clip.encode_texts([TEMPLATE.replace("{}", name) for name in NAMES]), 20.0)


@pytest.fixture(scope="module")
def data(original: Head) -> FeatureSet:
    """Images near their class's text, which a trigger sends to class 2."""
    labels = torch.arange(N) % C
    noise = 0.05 * torch.randn(N, 32, generator=generator(0, "noise"))
    clean = F.normalize(original.rows[labels] + noise, dim=1)
    own = 0.2 * torch.randn(C, 32, generator=generator(0, "own"))[labels]
    triggered = F.normalize(original.rows[2] + own + noise, dim=1)
    return FeatureSet(clean, torch.stack([triggered, F.normalize(triggered + 0.1, dim=1)]), labels)


def run(
    clip: FrozenClip, original: Head, data: FeatureSet, seed: int = 0, tuned: Tensor = ALL, epochs: int = 4
) -> list[Tensor]:
    """The rows after each epoch."""
    seen: list[Tensor] = []
    settings = TuningSettings(epochs=epochs, batch=16, learning_rate=2e-2, chunk=2)
    prompts = ClassPrompts(clip, NAMES, TEMPLATE, tuned, settings.chunk)
    tune(prompts, original, data, settings, generator(seed, "t"), lambda epoch, loss, rows: seen.append(rows))
    return seen


@pytest.mark.parametrize(("kind", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_few_images_at_a_time_give_the_loss_and_the_gradient_of_all(
    original: Head, data: FeatureSet, kind: torch.dtype, close: float
) -> None:
    """300 images are two whole parts and a rest."""
    many = torch.arange(300) % N
    head = Head(original.rows.to(kind), original.scale)
    whole = FeatureSet(data.clean[many].to(kind), data.triggered[:, many].to(kind), data.labels[many])
    whole = whole.part(torch.arange(299, -1, -1))
    rows = (head.rows + 0.1).requires_grad_()
    wanted = tuning_loss(rows, head, whole, TuningSettings())
    loss, gradient = loss_and_gradient(rows.detach(), head, whole, TuningSettings())
    assert loss == pytest.approx(wanted.item(), rel=close)
    assert gradient.allclose(torch.autograd.grad(wanted, rows)[0], atol=close, rtol=close)


def test_the_loss_is_the_formula_of_the_method(original: Head, data: FeatureSet) -> None:
    rows = F.normalize(original.rows + 0.1 * torch.randn(C, 32, generator=generator(1, "rows")), dim=1)
    settings = TuningSettings(kl_weight=0.7, triggered_weight=1.3)

    def surprise(features: Tensor) -> Tensor:
        probabilities = (20 * features @ rows.T).softmax(1)
        return -probabilities[torch.arange(N), data.labels].log().mean()

    before, after = (20 * data.clean @ original.rows.T).softmax(1), (20 * data.clean @ rows.T).softmax(1)
    kept = (after * (after / before).log()).sum(1).mean()
    wanted = surprise(data.clean) + 1.3 * torch.stack([surprise(part) for part in data.triggered]).mean() + 0.7 * kept
    assert float(tuning_loss(rows, original, data, settings)) == pytest.approx(float(wanted), abs=1e-4)


def test_the_loss_bears_a_set_without_triggers(original: Head, data: FeatureSet) -> None:
    bare = replace(data, triggered=data.triggered[:0])
    loss = tuning_loss(original.rows, original, bare, TuningSettings())
    wanted = F.cross_entropy(original.logits(data.clean), data.labels)
    assert float(loss) == pytest.approx(float(wanted), abs=1e-5), "the original head is at no distance from itself"


def test_a_part_keeps_images_labels_and_triggers_together(data: FeatureSet) -> None:
    part = data.part(torch.tensor([7, 3]))
    assert torch.equal(part.labels, data.labels[[7, 3]])
    assert torch.equal(part.clean[1], data.clean[3])
    assert torch.equal(part.triggered[1, 0], data.triggered[1, 7])


def test_tuning_answers_triggered_images_rightly(clip: FrozenClip, original: Head, data: FeatureSet) -> None:
    def wrong(rows: Tensor) -> float:
        answers = replace(original, rows=rows).logits(data.triggered[0]).argmax(1)
        return float((answers != data.labels).float().mean())

    rows = run(clip, original, data, epochs=30)
    assert wrong(original.rows) > 0.5
    assert wrong(rows[-1]) < 0.2
    settings = TuningSettings()
    assert tuning_loss(rows[-1], original, data, settings) < tuning_loss(original.rows, original, data, settings)


def test_tuning_changes_no_weight_and_rows_are_unit(clip: FrozenClip, original: Head, data: FeatureSet) -> None:
    before = snapshot(clip)
    for rows in run(clip, original, data):
        assert rows.norm(dim=1).allclose(torch.ones(C), atol=1e-6)
    after = snapshot(clip)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_seed_decides(clip: FrozenClip, original: Head, data: FeatureSet) -> None:
    once, again, other = (run(clip, original, data, seed=seed)[-1] for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_class_without_images_keeps_its_row(clip: FrozenClip, original: Head, data: FeatureSet) -> None:
    rest = data.part((data.labels != 4).nonzero()[:, 0])
    rows = run(clip, original, rest, tuned=rest.labels.unique())
    assert torch.equal(rows[-1][4], ClassPrompts(clip, NAMES, TEMPLATE, ALL, chunk=2).rows()[4])
    assert not torch.equal(rows[-1][3], rows[0][3])


def epoch(number: int, accuracy: float, asr: float, pa: float = 0.5) -> Epoch:
    return Epoch(number, torch.zeros(1), torch.zeros(1), accuracy, asr, pa)


@pytest.mark.parametrize(
    ("epochs", "number"),
    [
        ([epoch(1, 0.5, 0.0), epoch(2, 0.6, 0.3), epoch(3, 0.7, 0.2)], 3),
        ([epoch(1, 0.6, 0.1), epoch(2, 0.9, 0.1)], 1),
        ([epoch(1, 0.6, 0.1, 0.4), epoch(2, 0.6, 0.1, 0.5), epoch(3, 0.6, 0.1, 0.5)], 2),
        ([epoch(1, 0.3, 0.0), epoch(2, 0.5, 0.9), epoch(3, 0.4, 0.0)], 2),
    ],
    ids=["lowest ASR that keeps CA", "the bound itself keeps", "then PA, then the earliest", "none keeps: best CA"],
)
def test_the_chosen_epoch(epochs: list[Epoch], number: int) -> None:
    assert choose(epochs, 0.6).number == number


def test_an_epoch_that_loses_just_the_slack_keeps_the_accuracy() -> None:
    """Three of 600 images are half a point; of 598 such pairs 12 differ by more in floating point."""
    for right in range(3, 601):
        epochs = [epoch(1, (right - 3) / 600, 0.0), epoch(2, right / 600, 0.5), epoch(3, (right - 4) / 600, 0.0)]
        assert choose(epochs, right / 600 - 0.005).number == 1
        assert choose(epochs[1:], right / 600 - 0.005).number == 2
