"""Ablations: one that changes nothing is CBPT itself, each other changes the answers, and none is there twice."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import quick_cbpt
import torch
from digits import make_task
from torch import Tensor

from cbpt_guard.bench import ablations
from cbpt_guard.bench.ablations import Change, SharedPrompts, ablated
from cbpt_guard.bench.clock import Cost
from cbpt_guard.bench.oracle import triggered_shots
from cbpt_guard.bench.purified import cbpt, cbpt_prompts
from cbpt_guard.bench.rival import Shots, shot_features
from cbpt_guard.bench.settings import settings_of
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.data import list_images
from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.edits import edits
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import Family, TriggerBank, encode
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.stage2 import guard
from cbpt_guard.defense.tuning import FeatureSet, tune
from cbpt_guard.errors import CheckError

if TYPE_CHECKING:
    from digits import DigitsSuspect

PAPER = {"rule": "prompts", "answers": "prompts"}
TUNING = quick_cbpt.SETTINGS.tuning.model_copy(update={"batch": 32})  # several batches: what is drawn must be the same
SETTINGS = quick_cbpt.SETTINGS.model_copy(update={"tuning": TUNING})


@pytest.fixture(scope="module")
def task(digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(digits_suspect, list_images(digits_suspect.data).drawn(8, 0), tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module")
def unchanged(task: Task) -> tuple[Defended, Defended]:
    """The switch and the paper's rule, of one purified run."""
    return cbpt(task, SETTINGS), cbpt_prompts(task, SETTINGS)


@pytest.fixture(scope="module")
def features(task: Task) -> Tensor:
    """Clean and triggered ones."""
    return torch.cat([shot_features(task), *triggered_shots(task)])


@pytest.mark.parametrize(("number", "change"), [(0, Change()), (1, Change(**PAPER))], ids=["switch", "prompts"])
def test_one_that_changes_nothing_answers_as_the_run_does(
    unchanged: tuple[Defended, Defended], task: Task, features: Tensor, number: int, change: Change
) -> None:
    same = ablated(task, change, SETTINGS)
    assert (same.search, same.suspects) == (unchanged[number].search, unchanged[number].suspects)
    planted = ablated(task, Change(true_trigger=True), SETTINGS)
    assert planted.search is None, "no found trigger is in it"
    wanted, found = unchanged[number].answer(features), same.answer(features)
    assert wanted.triggered.any()
    assert torch.equal(found.triggered, wanted.triggered)
    assert found.logits.allclose(wanted.logits, atol=1e-2)


def test_edits_beside_the_bank_lower_the_threshold_and_move_the_rows_as_in_the_run(
    unchanged: tuple[Defended, Defended], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = replace(edits(task.clip.image_size)["upside down"], target=2)
    given, answered = list[Any](), list[Any]()
    monkeypatch.setattr(
        "cbpt_guard.bench.ablations.fit_test", lambda *parts: given.append(parts[6]) or fit_test(*parts)
    )
    monkeypatch.setattr(
        "cbpt_guard.bench.ablations.guard",
        lambda *parts, beside: answered.append(beside) or guard(*parts, beside=beside),
    )
    ablated(task, Change(), SETTINGS)
    monkeypatch.setattr(PurifyRun, "beside", lambda _: TriggerBank((edit,)))
    try:
        for change in (Change(), Change(without=("warp",)), Change(true_trigger=True)):
            ablated(task, change, SETTINGS)
    finally:
        for file in task.folder.glob("beside-*"):
            file.unlink()
    before, ((target, under),), *without = given
    kept = Shots.of(task, SETTINGS.tuning.held_out).kept
    assert target == edit.target
    assert torch.allclose(under, encode(task.clip, task.shots.images[kept], edit), atol=1e-5)
    assert [before, *without] == [[], [], []], "an edit that is a warp is left out with the warps"
    assert [len(one) for one in answered] == [0, 1, 0, 0]
    assert answered[1][0] is under


def test_features_under_the_found_triggers_are_shared_and_cost_each_variant(
    unchanged: tuple[Defended, Defended], task: Task
) -> None:
    (cost,) = task.folder.glob("found-*.npy-cost.json")
    assert Cost.model_validate_json(cost.read_bytes()).cpu_seconds > 0


def test_what_is_not_named_stays_as_the_caller_has_it() -> None:
    own = SETTINGS.model_copy(update={"anchor": SETTINGS.anchor.model_copy(update={"label_weight": 0.7})})
    assert Change().applied(own) == own
    changed = Change(kl_weight=0.0, label_weight=1.0, strength=10.0).applied(own)
    assert (changed.tuning.kl_weight, changed.anchor.label_weight, changed.anchor.strength) == (0.0, 1.0, 10.0)


@pytest.mark.parametrize(
    "change",
    [
        Change(families=("masked",)),
        Change(true_trigger=True),
        Change(answers="prompts"),
        Change(label_weight=1.0),
        Change(rule="prompts"),
        Change(kl_weight=0.0, **PAPER),
        Change(prompts=SharedPrompts, **PAPER),
        Change(template="photo of {}.", **PAPER),
    ],
    ids=[
        "families",
        "true trigger",
        "switch with prompts",
        "labels alone",
        "anchored alone",
        "no KL",
        "shared context",
        "2 tokens",
    ],
)
def test_every_other_one_changes_the_answers(
    unchanged: tuple[Defended, Defended], task: Task, features: Tensor, change: Change
) -> None:
    found = ablated(task, change, SETTINGS).answer(features).logits
    for ours in unchanged:
        assert not found.allclose(ours.answer(features).logits, atol=1e-2)


def test_shared_prompts_stay_one_context(task: Task) -> None:
    names = list(task.shots.classes)
    prompts = SharedPrompts(task.clip, names, task.template, torch.arange(len(names)))
    features = shot_features(task)
    data = FeatureSet(features, features.new_zeros(0, *features.shape), task.shots.labels)
    before = prompts.state()
    tune(prompts, task.original, data, SETTINGS.tuning, generator(0, "shared"), lambda *seen: None)
    after = prompts.state()
    assert not torch.equal(after, before)
    assert after.allclose(after[:1], atol=1e-6)


def test_the_variants_differ_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[Change] = []
    monkeypatch.setattr(ablations, "ablated", lambda task, change: changes.append(change))
    own = [f for f in vars(ablations).values() if inspect.isfunction(f) and f.__module__ == ablations.__name__]
    variants = [f for f in own if list(inspect.signature(f).parameters) == ["task"]]
    for variant in variants:
        variant(None)
    assert len(variants) >= 10
    assert len(set(changes)) == len(changes) == len(variants)
    assert Change() not in changes


def test_their_lines_age_with_the_methods_settings() -> None:
    assert settings_of("cbpt_guard.bench.ablations:masked_only") == settings_of("cbpt")
    assert settings_of("somebody:else") == {}


def test_a_run_of_other_settings_is_refused(unchanged: tuple[Defended, Defended], task: Task) -> None:
    other = SETTINGS.model_copy(update={"anchor": SETTINGS.anchor.model_copy(update={"strength": 3.0})})
    with pytest.raises(CheckError, match="other settings; remove"):
        cbpt(task, other)


def test_a_run_of_another_search_is_left_alone(
    unchanged: tuple[Defended, Defended], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of an older search are measured again, perhaps in a folder that holds its runs."""
    made: list[Path] = []

    def stopped(*_: object, out: Path, **__: object) -> None:
        made.append(out)
        raise CheckError("not here")

    monkeypatch.setattr("cbpt_guard.bench.purified.SEARCH", SEARCH + 1)
    monkeypatch.setattr("cbpt_guard.bench.purified.purify", stopped)
    with pytest.raises(CheckError, match="not here"):
        cbpt(task, SETTINGS)
    assert unchanged[0].run is not None
    assert unchanged[0].run.exists()
    assert made == [task.folder / f"purified-{SEARCH + 1}"] != [unchanged[0].run]


def test_a_copy_by_prompts_of_another_run_is_refused(unchanged: tuple[Defended, Defended], task: Task) -> None:
    (path,) = task.folder.glob("*.prompts/run.json")
    kept = path.read_text()
    record = json.loads(kept)
    path.write_text(json.dumps(record | {"created": "2001-01-01T00:00:00+00:00"}))
    try:
        with pytest.raises(CheckError, match="is of another run"):
            cbpt_prompts(task, SETTINGS)
    finally:
        path.write_text(kept)


def test_what_is_left_out_leaves_every_other_family() -> None:
    assert set(Change().kept) == set(get_args(Family))
    assert set(Change(without=("warp", "tint")).kept) == set(get_args(Family)) - {"warp", "tint"}
    assert Change(families=("masked", "patch"), without=("patch",)).kept == ("masked",)
