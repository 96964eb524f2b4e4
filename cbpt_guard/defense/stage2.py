"""Stage 2 as a recipe: prompts tuned, an epoch chosen, rows anchored, and the head that the rule asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cbpt_guard.defense.accuracy import clean_accuracy
from cbpt_guard.defense.anchored import anchored_rows
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.head import GuardedHead, Head
from cbpt_guard.defense.observed import moved_to
from cbpt_guard.defense.progress import Progress, Step
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.settings import Settings
from cbpt_guard.defense.tuning import Epoch, FeatureSet, choose, tune
from cbpt_guard.metrics import attack_success_rate, poisoned_accuracy


def guard(
    prompts: ClassPrompts,
    untuned: GuardedHead,
    data: FeatureSet,
    unseen: FeatureSet | None,
    bank: TriggerBank,
    settings: Settings,
    seed: int,
    progress: Progress,
    *,
    beside: Sequence[Tensor] = (),
    observed: Mapping[int, Tensor] | None = None,
) -> tuple[GuardedHead, Epoch]:
    """The guarded head, and the epoch of prompt tuning that it holds.

    The epoch is chosen as if the prompts answered every image: under the switch they answer none.

    Args:
        prompts: at their start; they are changed.
        untuned: the zero-shot head twice, with the test for triggered images and the rule.
        data: what is tuned on.
        unseen: what the epoch is chosen on; None takes the last.
        bank: the triggers of both, in their order.
        beside: features (N, E) of what is tuned on under each of further triggers: rows are fitted to these, too,
            prompts are not.
        observed: features (M, E) of observed attack images for each target that they answer; they move the bank's
            features, and none of those beside it.
    """
    best = list[Epoch]()  # the others are let go: each holds all prompts
    least = 0.0 if unseen is None else least_accuracy(untuned.original, unseen, settings)

    def look(number: int, loss: float, rows: Tensor) -> None:
        head = replace(untuned, guarded=_head(untuned, rows), rule="prompts")
        epoch = look_at(head, number, rows, prompts.state(), data if unseen is None else unseen, bank)
        best[:] = [epoch if unseen is None else choose([*best, epoch], least)]
        progress(Step("prompts", number, settings.tuning.epochs, loss, epoch.found_asr))

    tune(prompts, untuned.original, data, settings.tuning, generator(seed, "tuning"), look)
    found = moved_to(data.triggered, bank, observed or {})
    if beside:  # only then: a copy is as large as all of stage 2
        found = torch.cat([found, *(features[None] for features in beside)])
    rows = anchored_rows(untuned.original, replace(data, triggered=found), settings.anchor)
    both = replace(untuned, guarded=_head(untuned, rows), prompts=_head(untuned, best[0].rows))
    return both.with_rule(settings.rule.name), best[0]


def look_at(
    head: GuardedHead, number: int, rows: Tensor, contexts: Tensor, unseen: FeatureSet, bank: TriggerBank
) -> Epoch:
    """One epoch through the rule on unseen images: clean accuracy, worst found-trigger ASR and mean PA."""
    truth = unseen.labels.numpy()
    asrs, pas = [0.0], []
    for trigger, features in zip(bank, unseen.triggered, strict=True):
        predicted = head.answers(features).numpy()
        asrs.append(attack_success_rate(predicted, truth, trigger.target))
        pas.append(poisoned_accuracy(predicted, truth, trigger.target))
    accuracy = clean_accuracy(head.answer(unseen.clean).logits, unseen.labels)
    return Epoch(number, rows, contexts, accuracy, max(asrs), sum(pas) / len(pas))


def least_accuracy(original: Head, unseen: FeatureSet, settings: Settings) -> float:
    """The clean accuracy to keep on unseen images, given the zero-shot head."""
    return still_kept(clean_accuracy(original.logits(unseen.clean), unseen.labels), len(unseen.labels), settings)


def still_kept(accuracy: float, images: int, settings: Settings) -> float:
    """The least accuracy that keeps another one on so many images: by the slack less, or by one image."""
    return accuracy - max(settings.tuning.accuracy_slack, 1 / images)


def _head(untuned: GuardedHead, rows: Tensor) -> Head:
    return Head(rows, untuned.original.scale, untuned.original.bias)
