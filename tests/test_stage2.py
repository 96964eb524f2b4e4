"""Stage 2 as a whole on the poisoned digits CLIP: which epoch the guarded head holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from digits import make_task
from quick_cbpt import SETTINGS
from torch import Tensor

from cbpt_guard.bench.oracle import triggered_shots
from cbpt_guard.bench.rival import Shots, shot_features
from cbpt_guard.defense import stage2
from cbpt_guard.defense.accuracy import clean_accuracy
from cbpt_guard.defense.anchored import anchored_rows
from cbpt_guard.defense.data import list_images
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import FoundTrigger, TriggerBank
from cbpt_guard.defense.head import GuardedHead, Head, TriggerTest
from cbpt_guard.defense.observed import moved_to
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.settings import Settings
from cbpt_guard.defense.stage2 import guard, least_accuracy, still_kept
from cbpt_guard.defense.tuning import Epoch, FeatureSet, choose

if TYPE_CHECKING:
    from digits import DigitsSuspect


def test_the_accuracy_to_keep_is_the_zero_shot_one_less_half_a_point() -> None:
    labels = torch.zeros(200, dtype=torch.long)
    answers = torch.eye(2)[[0] * 150 + [1] * 50]
    unseen = FeatureSet(answers, answers[None], labels)
    assert least_accuracy(Head(torch.eye(2), 10.0), unseen, Settings()) == pytest.approx(0.745)


def test_one_image_of_few_may_be_lost() -> None:
    assert still_kept(0.5, 30, Settings()) == pytest.approx(14 / 30)
    assert still_kept(0.5, 2000, Settings()) == pytest.approx(0.495)


@pytest.mark.parametrize("chosen", [True, False], ids=["held out", "nothing held out"])
def test_the_epoch_is_the_best_on_unseen_images_and_the_last_without_any(
    digits_suspect: DigitsSuspect,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    chosen: bool,
) -> None:
    task = make_task(digits_suspect, list_images(digits_suspect.data).drawn(16, 0), tmp_path_factory.mktemp("cell"))
    tuning = SETTINGS.tuning.model_copy(update={"learning_rate": 0.3, "epochs": 6})  # so high that epochs differ
    settings = SETTINGS.model_copy(update={"tuning": tuning})
    shots, target = Shots.of(task, 0.25), digits_suspect.target
    everything = FeatureSet(shot_features(task), triggered_shots(task), shots.labels)
    data, unseen = everything.part(shots.kept), everything.part(shots.unseen)
    bank = TriggerBank((FoundTrigger("additive", target, torch.zeros(3, 1, 1), None),))
    test = fit_test(data, bank, [target], task.original, {}, settings.rule)
    untuned = GuardedHead(task.original, task.original, test, task.shots.classes, "switch")
    prompts = ClassPrompts(task.clip, list(task.shots.classes), task.template, data.labels.unique(), 64)
    seen: list[Epoch] = []
    look_at = stage2.look_at

    def looked(*args: Any) -> Epoch:
        seen.append(look_at(*args))
        return seen[-1]

    monkeypatch.setattr(stage2, "look_at", looked)
    head, epoch = guard(prompts, untuned, data, unseen if chosen else None, bank, settings, 0, silent)
    best = choose(seen, least_accuracy(task.original, unseen, settings))
    assert len(seen) == 6
    on = unseen if chosen else data
    for one in seen:
        assert one.clean_accuracy == clean_accuracy(replace(task.original, rows=one.rows).logits(on.clean), on.labels)
    assert best.number != 6, "every epoch but the last would do: the choice shows nothing"
    wanted = best if chosen else seen[-1]
    assert epoch.number == wanted.number
    assert head.prompts is not None
    assert torch.equal(head.prompts.rows, wanted.rows)
    assert torch.equal(epoch.contexts, wanted.contexts)


def test_rows_are_fitted_to_what_is_beside_the_bank_which_observed_images_do_not_move(
    digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory
) -> None:
    task = make_task(digits_suspect, list_images(digits_suspect.data).drawn(8, 0), tmp_path_factory.mktemp("cell"))
    target, settings = digits_suspect.target, SETTINGS
    data = FeatureSet(shot_features(task), triggered_shots(task), Shots.of(task, 0.25).labels)
    bank = TriggerBank((FoundTrigger("additive", target, torch.zeros(3, 1, 1), None),))
    under = F.normalize(data.clean + data.triggered[0], dim=1)
    untuned = GuardedHead(
        task.original, task.original, TriggerTest.none(*task.original.rows.shape), task.shots.classes, "switch"
    )

    def made(*beside: Tensor, observed: dict[int, Tensor] | None = None) -> GuardedHead:
        prompts = ClassPrompts(task.clip, list(task.shots.classes), task.template, data.labels.unique(), 64)
        head, _ = guard(
            prompts, untuned, data, None, bank, settings, 0, silent, beside=beside, observed=observed
        )  # fmt: skip
        return head

    def rows(*beside: Tensor, observed: dict[int, Tensor] | None = None) -> Tensor:
        return made(*beside, observed=observed).guarded.rows

    def fitted(*triggered: Tensor) -> Tensor:
        return anchored_rows(task.original, replace(data, triggered=torch.stack(triggered)), settings.anchor)

    assert torch.equal(rows(), fitted(data.triggered[0]))
    assert torch.equal(rows(under), fitted(data.triggered[0], under))
    observed = {target: data.clean[:4]}
    (moved,) = moved_to(data.triggered, bank, observed)
    assert torch.equal(rows(under, observed=observed), fitted(moved, under))
    prompts, tuned = made().prompts, made(under).prompts
    assert prompts is not None
    assert tuned is not None
    assert torch.equal(prompts.rows, tuned.rows), "no prompt is tuned on it"
