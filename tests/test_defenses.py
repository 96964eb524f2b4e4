"""Every defence of the bench on the poisoned digits CLIP, with few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import planted
import pytest
import torch
from commands import QUICK, python
from digits import make_task
from torch import Tensor

from cbpt_guard import GuardedClassifier, metrics
from cbpt_guard.bench import oracle as oracle_module
from cbpt_guard.bench import purified
from cbpt_guard.bench.cleanclip import augmented_text, auto_augment, cleanclip, cleanclip_loss, in_modal
from cbpt_guard.bench.clock import Clock, Cost
from cbpt_guard.bench.coop import SharedContext, coop
from cbpt_guard.bench.defenses import DEFENSES, SETTINGS, ensemble, none, settings_of
from cbpt_guard.bench.finetune import Batch, FineTuning, Loss, clip_loss, first_keeping, ft, last_keeping
from cbpt_guard.bench.oracle import mean_pa, oracle
from cbpt_guard.bench.par import distance, par, par_variants
from cbpt_guard.bench.probe import linear_head, probe
from cbpt_guard.bench.prompted import clean_prompts, tuned_prompts
from cbpt_guard.bench.purified import cbpt, cbpt_prompts
from cbpt_guard.bench.rival import Shots, shot_features
from cbpt_guard.bench.settings import (
    CleanClipSettings,
    CleanPromptsSettings,
    CoopSettings,
    FineTuneSettings,
    OracleSettings,
    ParSettings,
    ProbeSettings,
)
from cbpt_guard.bench.task import Defended, Defense, Task
from cbpt_guard.bench.trainable import TrainableClip
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.data import LabelledImages, Listing, list_images
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.head import LEFT_OUT
from cbpt_guard.defense.openclip import imagenet_prompts
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import Settings, TuningSettings
from cbpt_guard.defense.tuning import FeatureSet
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export import export

if TYPE_CHECKING:
    from digits import DigitsSuspect

SHOTS, TEMPLATE = 8, "a photo of a {}."
TUNING = TuningSettings(epochs=3, batch=64)
FEW: dict[str, Any] = {"epochs": 1, "trial_epochs": 1, "learning_rates": (1e-4,), "batch": 16}
QUICKLY: dict[str, Defense] = {
    "none": none,
    "ensemble": ensemble,
    "coop": lambda task: coop(task, CoopSettings(epochs=2, batch=32, learning_rates=(0.01,))),
    "clean-prompts": lambda task: clean_prompts(task, CleanPromptsSettings(tuning=TUNING, learning_rates=(0.01,))),
    "probe": lambda task: probe(task, ProbeSettings(strengths=(1, 100))),
    "ft": lambda task: ft(task, FineTuneSettings(**FEW)),
    "cleanclip": lambda task: cleanclip(task, CleanClipSettings(**FEW)),
    "par": lambda task: par(task, ParSettings(**FEW, thresholds=(1.0,))),
    "oracle": lambda task: oracle(task, OracleSettings(strengths=(10,), learning_rates=(0.01,), tuning=TUNING)),
}

CHOSEN: dict[str, dict[str, float]] = {
    "coop": {"learning_rate": 0.01},
    "clean-prompts": {"learning_rate": 0.01},
    "ft": {"learning_rate": 1e-4},
    "cleanclip": {"learning_rate": 1e-4},
    "par": {"learning_rate": 1e-4, "threshold": 1.0},
}
"""What there is to choose from but the epoch."""


@pytest.fixture(scope="module")
def listing(digits_suspect: DigitsSuspect) -> Listing:
    return list_images(digits_suspect.data).drawn(SHOTS, 0)


@pytest.fixture(scope="module")
def task(digits_suspect: DigitsSuspect, listing: Listing, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """What the suite would hand over."""
    return make_task(digits_suspect, listing, tmp_path_factory.mktemp("cell"))


def logits(defended: Defended, images: Tensor) -> Tensor:
    return defended.answer(encode(defended.clip, images)).logits


def accuracy(defended: Defended, data: LabelledImages) -> float:
    return metrics.clean_accuracy(logits(defended, data.images).argmax(1).numpy(), data.labels.numpy())


def attacked(defended: Defended, suspect: DigitsSuspect) -> tuple[float, float]:
    """ASR and PA on the test digits."""
    test = suspect.split.test
    images = torch.from_numpy(suspect.trigger.apply(test.images.numpy()))
    answers, truth = logits(defended, images).argmax(1).numpy(), test.labels.numpy()
    asr = metrics.attack_success_rate(answers, truth, suspect.target)
    return asr, metrics.poisoned_accuracy(answers, truth, suspect.target)


# all of them


def test_every_defence_states_its_settings_without_torch(tmp_path: Path) -> None:
    assert list(SETTINGS) == list(DEFENSES)
    assert settings_of("none") == settings_of("own:defence") == {}
    assert settings_of("cbpt") == Settings().model_dump(mode="json")
    assert {name for name in DEFENSES if not settings_of(name)} == {"none", "ensemble"}
    code = "import sys; import cbpt_guard.bench.settings as s; print(len(s.SETTINGS), 'torch' in sys.modules)"
    assert python(code, cwd=tmp_path).stdout.split() == [str(len(DEFENSES)), "False"]


def test_the_ensemble_is_the_mean_over_clips_own_templates(task: Task, digits_suspect: DigitsSuspect) -> None:
    """A class's row points where its 80 texts do together."""
    prompts = imagenet_prompts("three")
    assert len(set(prompts)) == 80
    assert "a bad photo of a three." in prompts
    rows = task.clip.encode_texts(prompts)
    features = encode(task.clip, digits_suspect.split.test.images[:8])
    expected = task.original.scale * features @ torch.nn.functional.normalize(rows.mean(0), dim=0)
    found = ensemble(task).answer(features).logits[:, task.shots.classes.index("three")]
    assert found.allclose(expected + task.original.bias, atol=1e-4)


@pytest.mark.parametrize("name", QUICKLY)
def test_a_defence_answers_keeps_clean_accuracy_and_leaves_the_suspect_alone(
    name: str, task: Task, digits_suspect: DigitsSuspect
) -> None:
    """Twice the same, whatever torch's global generator; and without the trigger, where only the oracle may look."""
    before, test = planted.snapshot(task.clip), digits_suspect.split.test
    first = logits(QUICKLY[name](task), test.images)
    torch.rand(7)
    defended = QUICKLY[name](task if name == "oracle" else replace(task, planted=()))
    second = logits(defended, test.images)
    after = planted.snapshot(task.clip)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert second.shape == (300, 10)
    if name in CHOSEN:
        assert defended.chosen == CHOSEN[name] | {"epoch": defended.chosen["epoch"]}
        assert 1 <= defended.chosen["epoch"] <= 3
    assert bool(second.isfinite().all())
    assert torch.equal(first, second)
    undefended = accuracy(none(task), test)
    assert accuracy(defended, test) >= undefended - (0.15 if name == "probe" else 0.05)


def test_no_defence_repeats_the_undefended_row(task: Task, digits_suspect: DigitsSuspect) -> None:
    images, defended = digits_suspect.split.test.images, none(task)
    assert defended.clip is task.clip
    answer = defended.answer(encode(task.clip, images))
    assert torch.equal(answer.logits, task.original.logits(encode(task.clip, images)))
    assert torch.equal(answer.original, answer.logits)
    assert not bool(answer.triggered.any())
    asr, _ = attacked(defended, digits_suspect)
    assert asr == digits_suspect.report.asr > 0.9


def test_the_shots_are_encoded_once_and_split_as_cbpt_splits(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    features = shot_features(task)
    monkeypatch.setattr("cbpt_guard.bench.rival.encode", None)
    assert torch.equal(shot_features(task), features)
    assert torch.equal(features, encode(task.clip, task.shots.images))
    shots = Shots.of(task, 0.2)
    assert len(shots.unseen) == 10 * round(0.2 * SHOTS)
    assert sorted([*shots.kept.tolist(), *shots.unseen.tolist()]) == list(range(10 * SHOTS))
    few = (task.shots.labels[:, None] == torch.arange(10)).cumsum(0)[range(10 * SHOTS), task.shots.labels] <= 2
    scarce = LabelledImages(task.shots.images[few], task.shots.labels[few], task.shots.classes, ())
    nothing_held = Shots.of(replace(task, shots=scarce), 0.2)
    assert torch.equal(nothing_held.kept, nothing_held.unseen)


# the probe


def test_a_class_without_shots_is_never_answered(task: Task, digits_suspect: DigitsSuspect, tmp_path: Path) -> None:
    kept = task.shots.labels != 4
    part = LabelledImages(task.shots.images[kept], task.shots.labels[kept], task.shots.classes, ())
    without = probe(replace(task, shots=part, folder=tmp_path), ProbeSettings(strengths=(10,)))
    found = logits(without, digits_suspect.split.test.images)
    assert bool((found[:, 4] == LEFT_OUT).all())
    assert set(found.argmax(1).tolist()) == set(range(10)) - {4}


def test_a_probe_of_two_classes_answers_both() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 3]).repeat(20)
    features = torch.randn(40, 8, generator=draws) + 3 * (labels[:, None] - 2) * torch.eye(8)[0]
    answers = linear_head(features, labels, 100, 100, 5)(features).argmax(1)
    assert set(answers.tolist()) == {1, 3}
    assert float((answers == labels).float().mean()) > 0.9


def test_the_penalty_is_chosen_on_held_out_shots(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leaves the head useless is passed over wherever it stands in the grid; then all shots are fitted."""
    fitted: list[tuple[float, int]] = []

    def fit(features: Tensor, labels: Tensor, strength: float, *rest: int) -> Callable[[Tensor], Tensor]:
        fitted.append((strength, len(labels)))
        return linear_head(features, labels if strength != 5 else labels.flip(0), strength, *rest)

    monkeypatch.setattr("cbpt_guard.bench.probe.linear_head", fit)
    for grid in ((5, 10), (10, 5)):
        assert probe(task, ProbeSettings(strengths=grid)).chosen == {"strength": 10}
    kept = 10 * (SHOTS - round(0.2 * SHOTS))
    assert fitted == [(5, kept), (10, kept), (10, 80), (10, kept), (5, kept), (10, 80)]


# prompts


def test_coop_shares_one_context_over_all_classes(task: Task) -> None:
    """Its gradient is the sum of the class-wise ones; a class of its own would move alone."""
    classes = list(task.shots.classes)
    shared, own = SharedContext(task), ClassPrompts(task.clip, classes, TEMPLATE, torch.arange(10))
    rows = shared.rows()
    assert torch.allclose(rows, own.rows(), atol=1e-6)
    gradient = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    shared.backward(gradient)
    own.backward(gradient)
    (learnt,) = own.parameters()
    assert learnt.grad is not None
    assert shared.context.grad is not None
    assert torch.allclose(shared.context.grad, learnt.grad.sum(0), atol=1e-6)
    assert not torch.allclose(shared.context.grad, learnt.grad[0], atol=1e-3)
    with torch.no_grad():
        shared.context[:, 0] += 1  # one number for all would be normalised away
    moved = (shared.rows() - rows).norm(dim=1)
    assert bool((moved > 1e-4).all())


class ContextOfEachClass(SharedContext):
    """CoOp's context without the sharing."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.context = self._copies

    def backward(self, gradient: Tensor) -> None:
        self.context.grad = None
        self._prompts.backward(gradient)


def test_what_coop_shares_is_what_it_learns_otherwise(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sharing classes' contexts part, and the loss from the second epoch on is another, and lower."""
    made: list[SharedContext] = []
    losses: dict[type[SharedContext], list[float]] = {SharedContext: [], ContextOfEachClass: []}
    for kind, told in losses.items():

        def recorded(task: Task, kind: type[SharedContext] = kind) -> SharedContext:
            made.append(kind(task))
            return made[-1]

        monkeypatch.setattr("cbpt_guard.bench.coop.SharedContext", recorded)
        watched = replace(task, progress=lambda step, told=told: told.append(step.loss))  # type: ignore[misc]
        coop(watched, CoopSettings(epochs=4, batch=80, learning_rates=(0.1,), held_out=0))
    (shared, own), started = made, SharedContext(task).context
    assert torch.equal(shared._copies, shared.context.expand_as(shared._copies))
    assert not torch.allclose(shared.context, started, atol=1e-4), "it has learnt"
    assert not torch.allclose(own.context[0], own.context[1], atol=1e-4)
    together, apart = losses.values()
    assert together[0] == pytest.approx(apart[0]), "both begin with the same words"
    assert apart[-1] < 0.999 * together[-1]


def test_the_epoch_is_chosen_on_held_out_shots(task: Task) -> None:
    data = FeatureSet(shot_features(task), torch.zeros(0, 80, 64), task.shots.labels)
    scores = iter([0.1, 0.7, 0.7, 0.2, 0.3, 0.6])
    seen: list[Tensor] = []

    def score(head: object) -> float:
        seen.append(getattr(head, "rows"))  # noqa: B009
        return next(scores)

    best = tuned_prompts(task, data, [0.01, 0.03], TUNING, score)
    assert len(seen) == 6
    assert best.score == 0.7
    assert torch.equal(best.head.rows, seen[1])
    assert best.chosen == {"learning_rate": 0.01, "epoch": 2}


# fine-tuning


@pytest.fixture
def student(task: Task) -> TrainableClip:
    return TrainableClip.copy_of(task.clip)


def batch_of(task: Task, student: TrainableClip, count: int = 24) -> Batch:
    """The same draw each time, in which classes occur several times."""
    work = FineTuning(task, FineTuneSettings())
    return work._batch(student, torch.arange(0, 80, 80 // count)[:count], torch.Generator().manual_seed(0))


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def gradients(student: TrainableClip, loss: Tensor) -> dict[str, Tensor]:
    student.model.zero_grad()
    loss.backward()
    named = student.model.named_parameters()
    return {name: value.grad.clone() for name, value in named if value.grad is not None}


def test_clips_loss_counts_images_of_one_class_as_each_others_friends() -> None:
    """By hand: two images of one class, one of another, scale 1."""
    features, rows = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]]), torch.eye(2)
    empty = torch.zeros(0)
    batch = Batch(empty, features, rows, torch.tensor([0, 0, 1]), empty, 1.0)
    right, e = torch.log(torch.tensor(1 + torch.e) / torch.e), torch.e
    first, second = torch.log(torch.tensor((2 * e + 1) / e)), torch.log(torch.tensor((e + 2) / e))
    assert clip_loss(batch).item() == pytest.approx(((right + (first + second) / 2) / 2).item(), abs=1e-6)


def test_a_copy_starts_as_the_suspect_and_keeps_statistics_and_scale(task: Task, student: TrainableClip) -> None:
    images = task.shots.images[:10]
    with torch.no_grad():
        assert torch.allclose(student.encode_images(to_pixels(images)), encode(task.clip, images), atol=1e-5)
    assert not student.model.training
    still = {name for name, value in student.model.named_parameters() if not value.requires_grad}
    assert still == {"logit_scale"}
    buffers = {name: value.clone() for name, value in student.model.named_buffers()}
    work = FineTuning(task, FineTuneSettings(batch=32))
    before = gradients(student, clip_loss(batch_of(task, student)))
    assert all(bool(value.any()) for name, value in before.items() if name.endswith("proj.weight"))
    list(work.train(student, lambda _, batch, __: clip_loss(batch), 1e-3, 1))
    assert all(torch.equal(value, buffers[name]) for name, value in student.model.named_buffers())
    assert not torch.allclose(student.encode_images(to_pixels(images)), encode(task.clip, images), atol=1e-2)


def test_cleanclips_own_term_pulls_copies_together_within_each_modality(
    task: Task, student: TrainableClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(task, student)
    with torch.no_grad():
        plain = cleanclip_loss(task, CleanClipSettings(intra=0))(student, batch, draws())
        whole = cleanclip_loss(task, CleanClipSettings())(student, batch, draws())
        alone = cleanclip_loss(task, CleanClipSettings(inter=0))(student, batch, draws())
    assert plain.item() == pytest.approx(clip_loss(batch).item())
    assert whole.item() == pytest.approx((plain + alone).item(), rel=1e-5)
    assert alone.item() > 0.01
    with_it = gradients(
        student, cleanclip_loss(task, CleanClipSettings(inter=0))(student, batch_of(task, student), draws())
    )
    for tower in ("visual.", "transformer."):  # it alone moves both towers
        assert any(bool(value.any()) for name, value in with_it.items() if name.startswith(tower))
    found = []
    for same in (("auto_augment", "augmented_text"), ("auto_augment",), ("augmented_text",)):
        with monkeypatch.context() as patch, torch.no_grad():
            for name in same:
                patch.setattr(f"cbpt_guard.bench.cleanclip.{name}", lambda given, draws: given)
            found.append(cleanclip_loss(task, CleanClipSettings(inter=0))(student, batch, draws()).item())
    assert found[0] < min(found[1:]) - 1e-5  # copies that are the same are the closest, of images as of texts
    rows = torch.eye(4)
    assert in_modal(rows, rows, 20.0) < 1e-3
    assert in_modal(rows, rows.roll(1, 0), 20.0) > 1


def test_augmented_copies_differ_and_repeat(task: Task) -> None:
    images, text = task.shots.images[:16], "a close-up photo of a six."
    before = images.clone()
    once, again = auto_augment(images, draws()), auto_augment(images, draws())
    assert torch.equal(once, again)
    assert torch.equal(images, before)
    assert once.dtype == torch.uint8
    assert once.shape == images.shape
    assert sum(not torch.equal(one, other) for one, other in zip(once, images, strict=True)) > 8
    generator = draws()
    drawn = {augmented_text(text, generator) for _ in range(60)}
    assert len(drawn) > 15
    assert {len(one.split()) for one in drawn} == {5, 6, 7}
    assert all(set(one.split()) <= set(text.split()) for one in drawn)
    assert augmented_text("six", generator) in ("six", "six six")


def test_pars_own_term_drives_away_from_the_suspect_up_to_the_threshold(task: Task, student: TrainableClip) -> None:
    """Nothing at the start; with it training moves further, and never gains beyond the threshold."""
    ((loss, _),) = par_variants(task, ParSettings(thresholds=(0.5,)))
    batch = batch_of(task, student)
    assert loss(student, batch, draws()).item() == pytest.approx(clip_loss(batch).item(), abs=1e-4)
    work, images = FineTuning(task, FineTuneSettings(batch=32)), to_pixels(task.shots.images)
    moved: list[float] = []
    plain: Loss = lambda _, part, __: clip_loss(part)  # noqa: E731
    for one in (plain, loss):
        copy = TrainableClip.copy_of(task.clip)
        list(work.train(copy, one, 1e-3, 2))
        with torch.no_grad():
            moved.append(distance(copy.encode_images(images), shot_features(task), 4).item())
    assert moved[1] > 1.2 * moved[0]
    far, near = torch.eye(3), torch.eye(3) + torch.tensor([0.1, 0, 0])
    assert distance(far, -far, 0.5).item() == 0.5
    assert distance(near, far, 0.5).item() == pytest.approx(0.01)
    away = (-far).requires_grad_()
    distance(away, far, 0.5).backward()
    assert away.grad is not None
    assert not bool(away.grad.any())


def test_the_strongest_that_keeps_the_accuracy_is_taken() -> None:
    asked: list[str] = []

    def candidates() -> Iterator[tuple[float, str]]:
        for accuracy, name in ((0.3, "a"), (0.6, "b"), (0.52, "c"), (0.4, "d")):
            asked.append(name)
            yield accuracy, name

    assert first_keeping(candidates(), 0.5) == "b"
    assert asked == ["a", "b"]
    assert last_keeping(candidates(), 0.5) == "c"
    for choice in (first_keeping, last_keeping):
        assert choice(candidates(), 0.61) == "b"
        assert choice([(0.2, "a"), (0.4, "b"), (0.4, "c")], 0.5) == "b"
        assert choice([(0.0, "a")], 0.5) == "a"


def test_trials_choose_the_learning_rate_and_the_whole_training_follows(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[float, int]] = []
    real = FineTuning.train

    def watched(self: FineTuning, *rest: Any) -> Iterator[int]:
        trained.append((rest[2], rest[3]))
        return real(self, *rest)

    monkeypatch.setattr(FineTuning, "train", watched)
    ruinous = FEW | {"learning_rates": (1e-6, 1.0), "epochs": 2}
    found = ft(task, FineTuneSettings(**ruinous))
    assert trained == [(1.0, 1), (1e-6, 1), (1e-6, 2)]
    assert found.chosen == {"learning_rate": 1e-6, "epoch": 2}
    trained.clear()
    assert ft(task, FineTuneSettings(**FEW)).chosen == {"learning_rate": 1e-4, "epoch": 1}
    assert trained == [(1e-4, 1)]


# the oracle


def test_the_oracle_has_at_least_the_pa_of_prompts_without_triggers(task: Task, digits_suspect: DigitsSuspect) -> None:
    (asr, pa), (_, clean_pa) = (attacked(QUICKLY[name](task), digits_suspect) for name in ("oracle", "clean-prompts"))
    assert pa >= clean_pa
    assert pa > 0.5 > asr


def test_the_oracle_takes_the_better_of_its_two_heads(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts that are not trained at all it takes the linear head; with a head of no use it takes the prompts."""
    triggered = oracle_module.triggered_shots(task)
    monkeypatch.setattr(oracle_module, "triggered_shots", lambda _: triggered)
    everything = FeatureSet(shot_features(task), triggered, task.shots.labels)
    target = task.shots.classes.index(task.planted[0].target)
    idle = TuningSettings(epochs=1)
    linear = oracle(task, OracleSettings(strengths=(100,), learning_rates=(1e-9,), tuning=idle))
    with monkeypatch.context() as patch:
        patch.setattr(oracle_module, "linear_head", lambda *_: lambda features: torch.zeros(len(features), 10))
        prompts = oracle(task, OracleSettings(strengths=(1,), learning_rates=(0.03,), tuning=TUNING))
    zero_shot = mean_pa(task.original.logits, everything, [target])
    assert mean_pa(lambda f: linear.answer(f).logits, everything, [target]) > zero_shot
    assert mean_pa(lambda f: prompts.answer(f).logits, everything, [target]) > zero_shot
    expected = linear_head(
        torch.cat([everything.clean, triggered[0]]), everything.labels.repeat(2), 100, 1000, len(task.shots.classes)
    )
    assert torch.equal(linear.answer(everything.clean).logits, expected(everything.clean))
    assert linear.chosen == {"strength": 100}
    assert prompts.chosen["learning_rate"] == 0.03
    assert 1 <= prompts.chosen["epoch"] <= TUNING.epochs


def test_the_oracle_knows_several_triggers_and_needs_one(task: Task) -> None:
    (pair,) = task.planted
    other = pair._replace(target=next(name for name in task.shots.classes if name != pair.target))
    assert len(oracle_module.triggered_shots(replace(task, planted=(pair, other)))) == 2
    with pytest.raises(InputError, match="planted trigger"):
        oracle(replace(task, planted=()))


# CBPT


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    path = tmp_path_factory.mktemp("settings") / "quick.toml"
    path.write_text(QUICK)
    return Settings.read(path)


@pytest.fixture(scope="module")
def both(task: Task, quick: Settings) -> Iterator[tuple[Defended, Defended, int]]:
    """The paper's rule first, then the switch; and how often the suspect was purified."""
    calls = []
    real = purified.purify

    def counting(*arguments: object, **options: object) -> PurifyRun:
        calls.append(arguments)
        return real(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(purified, "purify", counting)
        prompts, switch = cbpt_prompts(task, quick), cbpt(task, quick)
        yield switch, prompts, len(calls)


def test_both_rules_come_from_one_purified_run(both: tuple[Defended, Defended, int], task: Task) -> None:
    switch, prompts, times = both
    assert times == 1
    assert switch.run is not None
    assert prompts.run is not None
    ours, paper = PurifyRun.open(switch.run), PurifyRun.open(prompts.run)
    assert switch.search == prompts.search == ours.record.search == SEARCH
    suspects = tuple(one.label for one in ours.record.candidates if one.stands_out)
    assert switch.suspects == prompts.suspects == suspects != ()
    assert switch.chosen == prompts.chosen == {"epoch": ours.record.epoch}
    assert (ours.record.rule, paper.record.rule) == ("switch", "prompts")
    assert paper.record.settings == ours.record.settings | {"rule": ours.record.settings["rule"] | {"name": "prompts"}}
    assert torch.equal(ours.head().with_rule("prompts").guarded.rows, paper.head().guarded.rows)
    features = shot_features(task)
    assert torch.equal(paper.head().answer(features).logits, ours.head().with_rule("prompts").answer(features).logits)
    assert not torch.equal(ours.head().guarded.rows, paper.head().guarded.rows)


def test_the_purified_run_says_what_it_cost(both: tuple[Defended, Defended, int], task: Task) -> None:
    cost = Cost.model_validate_json((task.folder / f"purified-{SEARCH}-cost.json").read_bytes())
    assert cost.cpu_seconds > 1
    clock = Clock()
    purified.purified_run(replace(task, clock=clock), both_settings(both))
    assert clock.read().cpu_seconds >= cost.cpu_seconds - 0.01


def both_settings(both: tuple[Defended, Defended, int]) -> Settings:
    run = both[0].run
    assert run is not None
    return Settings.model_validate(PurifyRun.open(run).record.settings)


def test_the_papers_rule_is_judged_by_its_own_numbers(both: tuple[Defended, Defended, int]) -> None:
    switch, prompts, _ = both
    assert switch.run is not None
    assert prompts.run is not None
    ours, paper = PurifyRun.open(switch.run), PurifyRun.open(prompts.run)
    assert paper.metrics.clean_accuracy_after == ours.metrics.clean_accuracy_prompts
    for what in ("asr", "pa", "max_share"):
        after = [getattr(one, f"{what}_after") for one in paper.metrics.triggers]
        assert after == [getattr(one, f"{what}_prompts") for one in ours.metrics.triggers]
    assert [one.after for one in paper.metrics.classes] == [one.after_prompts for one in ours.metrics.classes]
    assert (switch.verdict, prompts.verdict) == (ours.record.verdict.name, paper.record.verdict.name)
    bad = ours.metrics.model_copy(update={"clean_accuracy_prompts": 0.0})
    worse = purified._record(ours.record, purified._after_prompts(bad))
    assert worse.verdict.name == "not guarded"
    assert "was not kept" in " ".join(worse.verdict.reasons)


@pytest.mark.parametrize("which", [0, 1])
def test_each_rule_is_counted_through_its_exported_bundle(
    which: int, both: tuple[Defended, Defended, int], digits_suspect: DigitsSuspect, tmp_path: Path
) -> None:
    defended = both[which]
    assert isinstance(defended, Defended)
    assert defended.run is not None
    guard = GuardedClassifier.load(export(defended.run, tmp_path / "bundle", allow_unguarded=True))
    assert guard.manifest.rule.name == ("switch", "prompts")[which]
    images = torch.from_numpy(digits_suspect.trigger.apply(digits_suspect.split.test.images[:100].numpy()))
    shipped, ours = guard.run(images.numpy()), defended.answer(encode(defended.clip, images))
    assert np.abs(shipped.logits - ours.logits.numpy()).max() < 1e-2
    assert np.array_equal(shipped.triggered, ours.triggered.numpy())


def test_a_run_of_other_classes_is_refused(both: tuple[Defended, Defended, int], task: Task, quick: Settings) -> None:
    renamed = replace(task, shots=replace(task.shots, classes=("nothing", *task.shots.classes[1:])))
    with pytest.raises(CheckError, match="other classes than the task"):
        cbpt(renamed, quick)
