"""Measure a guard on held-out images, before and after, and say what may be said of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.defense.record import ClassMetrics, Origin, RunMetrics, TriggerMetrics, Verdict
from cbpt_guard.defense.settings import VerdictSettings
from cbpt_guard.metrics import attack_success_rate, falls_beyond, largest_share, poisoned_accuracy
from cbpt_guard.metrics import clean_accuracy as count_clean_accuracy

_SHOWING = 0.5  # ASR without the guard from which a fresh trigger shows that the guard holds; most had 0.93 and more
_CALLED: dict[Origin, str] = {
    "found": "a found",
    "beside": "a common edit as a",
    "fresh": "a fresh",
    "observed": "an observed",
}


@dataclass(frozen=True)
class Attacked:
    """Features (N, E) of images under one trigger toward `target`; `labels` is None for observed attack images.

    `against`: what a fresh trigger was made to mislead: `guarded`, the guard by its rule, or `original`, the zero-shot
    head.
    """

    origin: Origin
    family: str
    target: int
    features: Tensor
    labels: Tensor | None
    against: str | None = None


def measure(
    head: GuardedHead, features: Tensor, labels: Tensor, attacks: Sequence[Attacked], *, held_out: bool
) -> RunMetrics:
    """Before and after on clean features (N, E) with labels (N,), and under each trigger."""
    answer, prompts = head.answer(features), head.with_rule("prompts").answer(features)
    truth = labels.numpy()
    before, after, paper = (_answers(logits) for logits in (answer.original, answer.logits, prompts.logits))
    triggers = tuple(_under_attack(head, attack) for attack in attacks)
    found = [float(head.answer(a.features).triggered.float().mean()) for a in attacks if a.origin == "found"]
    return RunMetrics(
        images=len(truth),
        held_out=held_out,
        clean_accuracy_before=count_clean_accuracy(before, truth),
        clean_accuracy_after=count_clean_accuracy(after, truth),
        clean_accuracy_prompts=count_clean_accuracy(paper, truth),
        flagged_clean=float(answer.triggered.double().mean()),
        flagged_found=min(found, default=None),
        triggers=triggers,
        classes=_per_class(head.classes, truth, before, after, paper),
    )


def judge(run: RunMetrics, suspects: Sequence[str], settings: VerdictSettings, *, keeps_accuracy: bool) -> Verdict:
    """guarded, not guarded or unverified, with the reasons; the bounds are those of the settings.

    `keeps_accuracy`: whether the zero-shot accuracy on held-out images was kept, within stage 2's slack.
    """
    lost = list(_lost(run, suspects, settings))
    if not keeps_accuracy:
        lost.append("the zero-shot accuracy on held-out images was not kept")
    failed = [*lost, *_surviving(run, settings)]
    if not suspects:
        nothing = "no class stands out as a target, so nothing was there to guard against and no success can be shown"
        return Verdict(name="unverified", reasons=(nothing, *lost))
    if failed:
        return Verdict(name="not guarded", reasons=tuple(failed))
    unshown = _unshown(run, suspects)
    if unshown is not None:
        return Verdict(name="unverified", reasons=(unshown,))
    worst = max((trigger.asr_after for trigger in run.triggers), default=0.0)
    kept = (
        f"on {run.images} held-out images the worst trigger succeeds on {100 * worst:.1f} %, and clean accuracy "
        f"went from {100 * run.clean_accuracy_before:.1f} % to {100 * run.clean_accuracy_after:.1f} %"
    )
    kept = "; ".join([kept, *_told(run, suspects)])
    alone = max((trigger.asr_prompts for trigger in run.triggers), default=0.0)
    if alone > max(worst, settings.found_asr):  # who takes the tuned rows out of heads.safetensors must know
        kept += f"; the tuned prompts without the test for triggered images would let {100 * alone:.1f} % through"
    return Verdict(name="guarded", reasons=(kept,))


def _told(run: RunMetrics, suspects: Sequence[str]) -> Iterator[str]:
    """What no bound is set on, and a user of the answers must know."""
    pas = [one.pa_after for one in run.triggers if one.pa_after is not None]
    if pas:
        yield f"under triggers {100 * min(pas):.1f} % or more are answered rightly (PA)"
    shares = [one.max_share_after for one in run.triggers if one.max_share_after is not None]
    if shares:
        yield f"{100 * max(shares):.1f} % or fewer with one and the same class"
    for row in run.classes:
        if row.label in suspects and row.before is not None and row.after is not None:
            hits, before = (round(share * row.images) for share in (row.after, row.before))
            yield f"of {row.images} clean images of the suspected {row.label!r} {hits} are recognised, {before} before"


def _unshown(run: RunMetrics, suspects: Sequence[str]) -> str | None:
    """Why nothing that failed is no success.

    Nothing unseen was measured, or nothing of a suspected class, or no trigger that works was fresh.
    """
    if not run.held_out:
        return "no image was held out (that takes 4 images in each of two classes), so nothing unseen was measured"
    for row in run.classes:
        if row.label in suspects and not row.images:
            return f"no image of the suspected {row.label!r} was held out (that takes 4), so what it lost is not known"
    best = dict.fromkeys(suspects, 0.0)
    for one in run.triggers:
        if one.origin == "fresh" and one.target in best:
            best[one.target] = max(best[one.target], one.asr_before)
    target, least = min(best.items(), key=lambda item: item[1])
    if least >= _SHOWING:
        return None
    return (
        f"fresh triggers toward {target!r} reach no more than {100 * least:.1f} % of the images without the guard, so "
        "they show little"
    )


def _lost(run: RunMetrics, suspects: Sequence[str], settings: VerdictSettings) -> Iterator[str]:
    """What the guard costs on clean images beyond its bounds; one image alone never counts as a rate."""
    loss = run.clean_accuracy_before - run.clean_accuracy_after
    if falls_beyond(loss, settings.accuracy_loss, run.images):
        yield f"clean accuracy fell by {100 * loss:.1f} points, more than {100 * settings.accuracy_loss:.1f}"
    if falls_beyond(run.flagged_clean, settings.false_alarms, run.images):
        yield f"{100 * run.flagged_clean:.1f} % of clean images are flagged, over {100 * settings.false_alarms:g} %"
    for row in run.classes:
        if row.label in suspects and row.before is not None and row.after is not None:
            lost = row.before - row.after
            if falls_beyond(lost, settings.recall_loss, row.images):
                yield f"clean recall of the suspected {row.label!r} fell by {100 * lost:.0f} points"


def _surviving(run: RunMetrics, settings: VerdictSettings) -> Iterator[str]:
    """Triggers that still succeed beyond their bound."""
    for trigger in run.triggers:
        bound = settings.fresh_asr if trigger.origin == "fresh" else settings.found_asr
        if trigger.asr_after > bound:
            yield (
                f"{_CALLED[trigger.origin]} {trigger.family} trigger toward {trigger.target!r} still succeeds on "
                f"{100 * trigger.asr_after:.1f} % of images, more than {100 * bound:.1f} %"
            )


def _under_attack(head: GuardedHead, attack: Attacked) -> TriggerMetrics:
    answer, prompts = head.answer(attack.features), head.with_rule("prompts").answer(attack.features)
    answers = {"before": answer.original, "after": answer.logits, "prompts": prompts.logits}
    shares: dict[str, float | None] = {}
    for name, logits in answers.items():
        predicted = _answers(logits)
        shares[f"max_share_{name}"] = largest_share(predicted)
        if attack.labels is None:
            shares[f"asr_{name}"] = float((predicted == attack.target).mean())
            shares[f"pa_{name}"] = None
        else:
            truth = attack.labels.numpy()
            shares[f"asr_{name}"] = attack_success_rate(predicted, truth, attack.target)
            shares[f"pa_{name}"] = poisoned_accuracy(predicted, truth, attack.target)
    return TriggerMetrics.model_validate(
        {
            "origin": attack.origin,
            "family": attack.family,
            "against": attack.against,
            "target": head.classes[attack.target],
            "images": len(attack.features),
            **shares,
        }
    )


def _per_class(
    classes: Sequence[str], truth: np.ndarray, before: np.ndarray, after: np.ndarray, prompts: np.ndarray
) -> tuple[ClassMetrics, ...]:
    rows = []
    for index, label in enumerate(classes):
        own = truth == index
        recalls = [float((answers[own] == index).mean()) if own.any() else None for answers in (before, after, prompts)]
        rows.append(
            ClassMetrics(
                label=label,
                images=int(own.sum()),
                before=recalls[0],
                after=recalls[1],
                after_prompts=recalls[2],
            )
        )
    return tuple(rows)


def _answers(logits: Tensor) -> np.ndarray:
    answers: np.ndarray = logits.argmax(dim=1).numpy()
    return answers
