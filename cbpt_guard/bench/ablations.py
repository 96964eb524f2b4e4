"""CBPT with one thing changed: what each part of the method is worth. Every variant is a defence for a plan.

All take the found triggers of the task's own purified run, so that nothing but the named part differs; the test and
the heads are fitted and chosen as `purify` does it. `cbpt` and `cbpt-prompts` are the methods unchanged, and
`clean-prompts` is what is left without stage 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from cbpt_guard.bench.oracle import triggered_shots
from cbpt_guard.bench.purified import purified_run
from cbpt_guard.bench.rival import Shots, made_once, shot_features
from cbpt_guard.bench.settings import CBPT
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import Family, FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.head import GuardedHead, Rule
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import Settings
from cbpt_guard.defense.stage2 import guard
from cbpt_guard.defense.tuning import FeatureSet
from cbpt_guard.errors import CheckError

_CONTEXTS = {2: "photo of {}.", 8: "this is a very good photo of a {}."}
"""Templates whose words before the class name are so many tokens; they start the prompts, not the zero-shot head."""


class SharedPrompts(ClassPrompts):
    """One context for all classes, as CoOp has it: every class's copy gets the mean of their gradients."""

    def backward(self, gradient: Tensor) -> None:
        """Add to the contexts' gradients, given the loss's gradient (C, E) in `rows()`."""
        super().backward(gradient)
        (contexts,) = self.parameters()
        if contexts.grad is not None:
            contexts.grad[:] = contexts.grad.mean(0)


@dataclass(frozen=True)
class Change:
    """What is done otherwise.

    Args:
        families: of the found triggers that are kept; None keeps all.
        without: families of those that are left out.
        true_trigger: the planted triggers take the place of the found ones.
        kl_weight: of the term that holds the prompts near the zero-shot answers.
        label_weight: the label's share in what anchored rows are taught.
        strength: how far these may go.
        prompts: a context for each class, or one for all.
        template: what the prompts start from, None for the task's own.
        rule: which images are answered otherwise than by the zero-shot head.
        answers: from which rows.
    """

    families: tuple[Family, ...] | None = None
    without: tuple[Family, ...] = ()
    true_trigger: bool = False
    kl_weight: float | None = None
    label_weight: float | None = None
    strength: float | None = None
    prompts: type[ClassPrompts] = ClassPrompts
    template: str | None = None
    rule: Rule = "switch"
    answers: Literal["anchored", "prompts"] = "anchored"

    @property
    def kept(self) -> tuple[Family, ...]:
        """The families whose found triggers are kept."""
        families: tuple[Family, ...] = get_args(Family)
        wanted = families if self.families is None else self.families
        return tuple(family for family in wanted if family not in self.without)

    def applied(self, settings: Settings) -> Settings:
        """The settings with what this changes of them."""
        tuning = _given(kl_weight=self.kl_weight)
        anchor = _given(label_weight=self.label_weight, strength=self.strength)
        return settings.model_copy(
            update={
                "tuning": settings.tuning.model_copy(update=tuning),
                "anchor": settings.anchor.model_copy(update=anchor),
            }
        )


def _given(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def ablated(task: Task, change: Change, settings: Settings = CBPT) -> Defended:
    """CBPT's heads from the task's purified run, with one change."""
    run = purified_run(task, settings)
    bank, triggered, suspects = _triggers(task, change, run)
    settings = change.applied(settings)
    shots = Shots.of(task, settings.tuning.held_out)
    everything = FeatureSet(shot_features(task), triggered, shots.labels)
    data, unseen = everything.part(shots.kept), everything.part(shots.unseen)
    beside = [(target, under[shots.kept]) for target, under in _beside(task, change, run)]
    test = fit_test(data, bank, suspects, task.original, {}, settings.rule, beside)
    untuned = GuardedHead(task.original, task.original, test, task.shots.classes, settings.rule.name)
    template = change.template or task.template
    names = list(task.shots.classes)
    prompts = change.prompts(task.clip, names, template, data.labels.unique(), settings.tuning.chunk)
    edited = [under for _, under in beside]
    head, epoch = guard(prompts, untuned, data, unseen, bank, settings, task.seed, task.progress, beside=edited)
    rows = head.prompts if change.answers == "prompts" and head.prompts is not None else head.guarded
    answer = replace(head, guarded=rows, prompts=None, rule=change.rule).answer
    search = None if change.true_trigger else run.record.search
    return Defended(
        task.clip, answer, suspects=tuple(names[c] for c in suspects), search=search, chosen={"epoch": epoch.number}
    )


def _triggers(task: Task, change: Change, run: PurifyRun) -> tuple[TriggerBank, Tensor, list[int]]:
    """The triggers to tune with, the shots' features (K, N, E) under each, and the suspected classes."""
    if change.true_trigger:
        targets = [task.shots.classes.index(pair.target) for pair in task.planted]
        planted = tuple(FoundTrigger("additive", target, torch.zeros(3, 1, 1), None) for target in targets)
        return TriggerBank(planted), triggered_shots(task), targets
    bank = run.bank()
    kept = [number for number, trigger in enumerate(bank) if trigger.family in change.kept]
    if not kept:
        raise CheckError(f"{run.path} found no trigger of the families {', '.join(change.kept)}")
    suspects = [suspect.index for suspect in run.record.suspects]
    return TriggerBank(tuple(bank.triggers[number] for number in kept)), _under_found(task, run)[kept], suspects


def _under_found(task: Task, run: PurifyRun) -> Tensor:
    """Features (K, N, E) of the shots under every found trigger of the run, made once for all variants."""
    return _under(task, run, "found", run.bank())


def _beside(task: Task, change: Change, run: PurifyRun) -> list[tuple[int, Tensor]]:
    """The targets of the kept edits beside the run's bank, with the shots' features (N, E) under each."""
    beside = run.beside()
    if change.true_trigger or not len(beside):
        return []
    under = zip(beside, _under(task, run, "beside", beside), strict=True)
    return [(edit.target, features) for edit, features in under if edit.family in change.kept]


def _under(task: Task, run: PurifyRun, name: str, bank: TriggerBank) -> Tensor:
    file = f"{name}-{run.record.created.replace(':', '')}.npy"
    return made_once(
        task, file, lambda: torch.stack([encode(task.clip, task.shots.images, trigger) for trigger in bank])
    )


def additive_only(task: Task) -> Defended:
    """Of the found triggers only what adds within the budget."""
    return ablated(task, Change(families=("additive",)))


def masked_only(task: Task) -> Defended:
    """Of the found triggers only the masked one."""
    return ablated(task, Change(families=("masked",)))


def no_patch(task: Task) -> Defended:
    """Without patches; the masked trigger stays."""
    return ablated(task, Change(without=("patch",)))


def no_smooth(task: Task) -> Defended:
    """Without warps and tints."""
    return ablated(task, Change(without=("warp", "tint")))


def no_wave(task: Task) -> Defended:
    """Without plain waves in the bank; they may still have told the target."""
    return ablated(task, Change(without=("wave",)))


def true_trigger(task: Task) -> Defended:
    """With the planted triggers in place of the found ones."""
    return ablated(task, Change(true_trigger=True))


def switch_prompts(task: Task) -> Defended:
    """The switch, but triggered images are answered from the tuned prompts instead of anchored rows."""
    return ablated(task, Change(answers="prompts"))


def labels_alone(task: Task) -> Defended:
    """Anchored rows taught by the labels alone, with the strength that suits these (docs/notebook.md)."""
    return ablated(task, Change(label_weight=1.0, strength=10.0))


def anchored_alone(task: Task) -> Defended:
    """Anchored rows answer every image, although no clean one was fitted: without the switch."""
    return ablated(task, Change(rule="prompts"))


def prompts_no_kl(task: Task) -> Defended:
    """The paper's rule without the KL term."""
    return ablated(task, Change(kl_weight=0.0, rule="prompts", answers="prompts"))


def prompts_shared(task: Task) -> Defended:
    """The paper's rule with one context for all classes."""
    return ablated(task, Change(prompts=SharedPrompts, rule="prompts", answers="prompts"))


def prompts_2_tokens(task: Task) -> Defended:
    """The paper's rule with contexts of 2 tokens instead of 4."""
    return ablated(task, Change(template=_CONTEXTS[2], rule="prompts", answers="prompts"))


def prompts_8_tokens(task: Task) -> Defended:
    """The paper's rule with contexts of 8 tokens instead of 4."""
    return ablated(task, Change(template=_CONTEXTS[8], rule="prompts", answers="prompts"))
