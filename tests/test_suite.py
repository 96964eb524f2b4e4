"""The suite on the digits CLIP: plans, shards, counting, lines, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, QUICK, SCRIPT, assert_refused, cli, here
from lines import line as written

from cbpt_guard import GuardedClassifier, metrics
from cbpt_guard.bench import cell, counting, suite
from cbpt_guard.bench.cell import Job, cells_folder, measure
from cbpt_guard.bench.counting import FeatureStore, ImageSet
from cbpt_guard.bench.digits import write_class_folders
from cbpt_guard.bench.implant import predict, triggered
from cbpt_guard.bench.lines import Line, read_lines
from cbpt_guard.bench.plan import Group, Places, Plan
from cbpt_guard.bench.processes import Piece
from cbpt_guard.bench.settings import ABLATIONS, INDEPENDENT, SETTINGS, ProbeSettings
from cbpt_guard.bench.suite import PLANTINGS, READS, lines_in, missing, picked, run_suite
from cbpt_guard.bench.suspects import implant_folder, make_triggers, plant, planted_triggers, provide, trigger_source
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.data import list_images
from cbpt_guard.defense.head import Answer, GuardedHead, TriggerTest
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import Settings
from cbpt_guard.defense.suspect import open_suspect
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.export import export

if TYPE_CHECKING:
    from digits import DigitsSuspect

REPOSITORY = Path(__file__).parents[1]
TEMPLATE, SHOTS = "a photo of a {}.", 8
PLAN = """
[minutes]
implant = 6
trigger = 2
none = 3
probe = 6
[datasets.digits]
model = "clean/suspect.pt"
train = "train"
clean = "data"
test = "test"
[implants.badnet]
dataset = "digits"
attacks = {{ badnet = "{target}" }}
folder = "poisoned"
[[cells]]
implants = ["badnet"]
defenses = ["none", "probe"]
shots = [8]
off = ["none"]
[[cells]]
implants = ["badnet"]
defenses = ["none"]
shots = [8]
control = true
"""


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """A checkpoint is read in a confined process, two seconds each time: once is enough in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell, "open_suspect", cache(open_suspect))
        yield


@pytest.fixture(scope="module")
def root(digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to what the plan names, as a machine would have them."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "poisoned").symlink_to(digits_suspect.folder)
    (folder / "data").symlink_to(digits_suspect.data)
    (folder / "clean").symlink_to(digits_suspect.data.parent / "model")
    write_class_folders(digits_suspect.split.train, folder / "train", per_class=30)
    write_class_folders(digits_suspect.split.test, folder / "test")
    text = PLAN.format(target=digits_suspect.split.test.classes[digits_suspect.target])
    (folder / "plan.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    return Plan.read(root / "plan.toml")


@pytest.fixture
def places(root: Path, tmp_path: Path) -> Places:
    return Places((tmp_path, root), tmp_path / "work")


def counted(plan: Plan, places: Places, group: Group, split: Any = "clean") -> list[Line]:
    return measure(provide(plan, group, places, split, "cpu"))


def timeless(lines: list[Line]) -> set[str]:
    """Lines without what differs from one process to the next."""
    return {
        line.model_copy(update={"seconds": 0.0, "cpu_seconds": 0.0, "peak_mb": 0}).model_dump_json() for line in lines
    }


# plans


def test_a_plan_gives_every_combination_suspects_together(plan: Plan) -> None:
    groups = plan.groups()
    assert [(g.unit, g.defense) for g in groups] == [("badnet", "none"), ("badnet", "probe"), ("clean digits", "none")]
    keys = [key for group in groups for key in plan.keys(group, "clean")]
    assert [(k.attack, k.defense, k.shots) for k in keys] == [
        ("badnet", "none", 8),
        ("off", "none", 8),
        ("badnet", "probe", 8),
        ("none", "none", 8),
    ]
    assert plan.hours(groups) == (3 + 6 + 3) / 60, "its implant comes from a folder"
    own = plan.implants["badnet"].model_copy(update={"folder": None})
    planting = plan.model_copy(update={"implants": {"badnet": own}})
    assert planting.hours(groups) == (6 + 3 + 6 + 3) / 60
    assert planting.hours(groups[2:]) == (2 + 3) / 60, "the control alone makes the triggers"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('dataset = "digits"', 'dataset = "letters"', "data set 'letters', which the plan lacks"),
        (
            'implants = ["badnet"]\ndefenses = ["none"]',
            'implants = ["sig"]\ndefenses = ["none"]',
            "'sig', which the plan",
        ),
        ("control = true", "control = false", "ask for the same line: clean badnet badnet none 0 8"),
        ("shots = [8]", "shots = [0]", r"cells.0.shots.0: .*greater than or equal to 1"),
        ("off =", "of =", "cells.0.of: Extra inputs"),
        ('off = ["none"]', 'off = ["nonee"]', "`off` names 'nonee'"),
        ('"probe"', '"prob"', "'prob' is no defence; known are none, "),
        ("[minutes]", "[minutes", "this is no TOML"),
    ],
)
def test_a_plan_that_does_not_fit_together_is_refused(
    before: str, after: str, words: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "plan.toml").write_text((root / "plan.toml").read_text().replace(before, after))
    with pytest.raises(InputError, match=words):
        Plan.read(tmp_path / "plan.toml")


def test_the_committed_plan_has_the_shape_that_the_evidence_needs() -> None:
    plan = Plan.read(REPOSITORY / "benchmarks" / "plan.toml")
    assert plan.hours(plan.groups()) <= 16
    for of in (8, 10):
        assert max(plan.hours(plan.shard(number, of)) for number in range(1, of + 1)) <= 2
    first = {name: implant for name, implant in plan.implants.items() if implant.dataset == "tiny-imagenet"}
    assert len({target for implant in first.values() for target in implant.attacks.values()}) >= 4
    assert [name for name, implant in first.items() if len(implant.attacks) > 1] == ["two"]
    assert {attack for implant in first.values() for attack in implant.attacks} >= {
        *("badnet", "blended", "sig", "wanet", "issba", "trojvqa", "badclip"),
        *("ftrojan", "label-consistent", "filter", "stripe-patch", "full-stripes", "triangles", "watermark"),
    }
    control = [group for group in plan.groups() if group.control]
    assert {name for group in control for name in group.implants} == set(plan.implants)
    for dataset in {implant.dataset for implant in plan.implants.values()}:
        own = [group for group in plan.groups() if group.dataset == dataset]
        met = {group.defense for group in own if not group.control}
        clean = {group.defense for group in own if group.control}
        assert clean == met - {"oracle"}, "what a defence costs where nothing is to defend"


def test_the_committed_prices_are_what_the_lines_took() -> None:
    """Half of their processor time and a little more; both rules of CBPT share a run, which `cbpt` pays for."""
    plan, taken = Plan.read(REPOSITORY / "benchmarks" / "plan.toml"), dict[str, list[float]]()
    for line in lines_in(REPOSITORY / "benchmarks" / "evidence"):
        if line.dataset == "tiny-imagenet" and line.shots == 16 and line.attack not in ("off", "none"):
            taken.setdefault(line.defense, []).append(line.cpu_seconds / 60)
    assert set(taken) == set(SETTINGS)
    for name, minutes in taken.items():
        least = 0 if name == "cbpt-prompts" else median(minutes) / 2
        assert least < plan.minutes[name] <= 1.2 * least + 1.5, name


@pytest.mark.parametrize("of", [1, 3, 7])
def test_shards_are_the_whole_plan_and_share_no_suspect(of: int) -> None:
    plan = Plan.read(REPOSITORY / "benchmarks" / "plan.toml")
    parts = [plan.shard(number, of) for number in range(1, of + 1)]
    units = [{group.unit for group in part} for part in parts]
    assert sum(map(len, units)) == len(set.union(*units))
    assert sorted(map(str, (group for part in parts for group in part))) == sorted(map(str, plan.groups()))
    assert parts[0] == plan.shard(1, of)
    with pytest.raises(InputError, match="is none"):
        plan.shard(of + 1, of)


def test_what_a_line_depends_on_changes_its_settings(plan: Plan) -> None:
    (key, *_) = plan.keys(plan.groups()[0], "clean")
    changed = plan.implants["badnet"].model_copy(update={"recipe": {"steps": 3}})
    others = [
        plan.settings(key._replace(seed=1)),
        plan.settings(key._replace(split="test")),
        plan.model_copy(update={"template": "{}"}).settings(key),
        plan.model_copy(update={"implants": {"badnet": changed}}).settings(key),
    ]
    assert len({plan.settings(key), *others}) == 5
    assert plan.model_copy(update={"minutes": {}}).settings(key) == plan.settings(key)


def test_lines_of_another_search_are_measured_again(plan: Plan, tmp_path: Path) -> None:
    """Also those from before a line said which; a rival's says none, nor does a defence of one's own."""
    out, first = tmp_path / "lines.jsonl", plan.groups()[0].model_copy(update={"off": False})
    for defense, search, again in (
        ("cbpt", SEARCH, False),
        ("cbpt", SEARCH - 1, True),
        ("cbpt-prompts", None, True),
        (f"{ABLATIONS}no_patch", None, True),
        (f"{ABLATIONS}true_trigger", None, False),
        ("own:defence", None, False),
        ("own:defence", SEARCH - 1, True),
        ("probe", None, False),
    ):
        group = first.model_copy(update={"defense": defense})
        (key,) = plan.keys(group, "clean")
        found = written(**key._asdict(), search=search, settings=plan.settings(key))
        out.write_text(found.model_dump_json() + "\n")
        assert missing(plan, [group], out, "clean") == [group] * again


def test_a_defences_own_settings_change_its_lines_alone(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {group.defense: plan.keys(group, "clean")[0] for group in plan.groups() if not group.control}
    before = {name: plan.settings(key) for name, key in keys.items()}
    monkeypatch.setitem(SETTINGS, "probe", ProbeSettings(iterations=7))
    assert plan.settings(keys["probe"]) != before["probe"]
    assert plan.settings(keys["none"]) == before["none"]


# counting


def test_no_defence_is_counted_as_the_implants_report_counts(
    plan: Plan, places: Places, digits_suspect: DigitsSuspect
) -> None:
    """On the test images, which are the same in both; then with the triggers off."""
    attacked, off = counted(plan, places, plan.groups()[0], "test")
    report, test, target = digits_suspect.report, digits_suspect.split.test, digits_suspect.target
    assert (attacked.ca, attacked.asr, attacked.images) == (report.ca_poisoned, report.asr, 300)
    answers = predict(digits_suspect.clip, triggered(digits_suspect.trigger, test.images), test.classes, TEMPLATE)
    assert attacked.pa == metrics.poisoned_accuracy(answers, test.labels.numpy(), target)
    assert (attacked.target, attacked.split, attacked.flag_triggered) == (report.target, "test", 0)
    assert attacked.asr > 0.9 > off.asr
    assert (off.attack, off.asr) == ("off", off.false_positives)
    clean = predict(digits_suspect.clip, test.images, test.classes, TEMPLATE)
    assert off.asr == metrics.attack_success_rate(clean, test.labels.numpy(), target)
    for line in (attacked, off):  # the defence that touches nothing repeats the undefended row exactly
        assert all(getattr(line, name) == value for name, value in line.undefended)


def test_development_counts_on_what_was_not_drawn(plan: Plan, places: Places, digits_suspect: DigitsSuspect) -> None:
    (line, _) = counted(plan, places, plan.groups()[0])
    assert line.images == 10 * (20 - SHOTS)
    everything = list_images(digits_suspect.data)
    images = ImageSet(everything, everything.drawn(SHOTS, 0), digits_suspect.clip.preprocess)
    assert len(images.labels) == sum(len(part) for part in images.batches()) == line.images
    assert sum(len(part) for part in images.batches(everything=True)) == 200
    assert (np.bincount(images.labels) == 20 - SHOTS).all()


def test_the_control_is_the_clean_model_under_the_same_trigger(plan: Plan, places: Places) -> None:
    (line,) = counted(plan, places, plan.groups()[2])
    assert (line.attack, line.implant, line.took) == ("none", "badnet", None)
    assert line.asr < 0.1
    assert line.pa > 0.8


def test_shots_that_leave_nothing_to_count_are_refused(plan: Plan, places: Places) -> None:
    with pytest.raises(InputError, match="no image"):
        counted(plan, places, plan.groups()[0].model_copy(update={"shots": 20}))


def counting_on(plan: Plan, folder: str) -> Plan:
    datasets = {name: one.model_copy(update={"test": folder}) for name, one in plan.datasets.items()}
    return plan.model_copy(update={"datasets": datasets})


def test_shots_are_not_counted_where_they_lie_among_the_test_images(plan: Plan, places: Places) -> None:
    own = counting_on(plan, "data")
    (line, _) = counted(own, places, own.groups()[0], split="test")
    assert line.images == 10 * (20 - SHOTS)


def test_test_images_of_other_classes_are_refused(plan: Plan, places: Places, root: Path, tmp_path: Path) -> None:
    for folder in sorted((root / "test").iterdir())[1:]:
        (tmp_path / "fewer" / folder.name).parent.mkdir(exist_ok=True)
        (tmp_path / "fewer" / folder.name).symlink_to(folder)
    own, elsewhere = counting_on(plan, "fewer"), Places((tmp_path, *places.roots), places.work)
    with pytest.raises(InputError, match="other classes than the clean ones"):
        counted(own, elsewhere, own.groups()[0], split="test")


def test_features_that_a_full_disk_tore_are_made_again(
    digits_suspect: DigitsSuspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageSet(list_images(digits_suspect.data), None, digits_suspect.clip.preprocess)
    store = FeatureStore(tmp_path, "torn")

    def tearing(path: Path, _: np.ndarray) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cbpt_guard.bench.counting.np.save", tearing)
        with pytest.raises(OSError, match="No space"):
            store.features(digits_suspect.clip, images, None)
    assert len(store.features(digits_suspect.clip, images, None)) == len(images.labels)


@pytest.fixture(scope="module")
def quick_run(digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A purified run of the poisoned digits CLIP, with few steps."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "quick.toml").write_text(QUICK)
    settings = Settings.read(folder / "quick.toml")
    return purify(
        digits_suspect.checkpoint, digits_suspect.data, out=folder / "run", shots=SHOTS, settings=settings
    ).path


@pytest.fixture(scope="module")
def quick_bundle(quick_run: Path) -> Path:
    return export(quick_run, quick_run.parent / "bundle", allow_unguarded=True)


def test_a_head_over_kept_features_answers_as_the_bundle_does(
    quick_run: Path, quick_bundle: Path, digits_suspect: DigitsSuspect, tmp_path: Path
) -> None:
    guard = GuardedClassifier.load(quick_bundle)
    head, clip = PurifyRun.open(quick_run).head(), digits_suspect.clip
    everything = list_images(digits_suspect.data)
    images, store = ImageSet(everything, everything.drawn(SHOTS, 0), clip.preprocess), FeatureStore(tmp_path, "it")
    by_head = counting.by_head(head.answer, lambda trigger: store.features(clip, images, trigger))
    by_bundle = counting.by_bundle(guard, images)
    for trigger in (None, digits_suspect.trigger):
        ours, theirs = by_head(trigger), by_bundle(trigger)
        assert np.array_equal(ours.predicted, theirs.predicted)
        assert np.array_equal(ours.flagged, theirs.flagged)
    (part, *_) = images.batches()
    first = [answer.index for answer in guard.predict(list(part))]
    assert by_bundle(None).predicted[: len(part)].tolist() == first


def test_a_defence_that_leaves_a_run_is_counted_through_its_bundle(
    quick_run: Path,
    quick_bundle: Path,
    plan: Plan,
    places: Places,
    digits_suspect: DigitsSuspect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[Path] = []
    head = PurifyRun.open(quick_run).head()
    everything = list_images(digits_suspect.data)
    images = ImageSet(everything, everything.drawn(SHOTS, 0), digits_suspect.clip.preprocess)
    outputs = [GuardedClassifier.load(quick_bundle).run(part) for part in images.batches()]
    before, after = (
        [metrics.class_recall(np.concatenate(logits).argmax(1), images.labels, index) for index in range(10)]
        for logits in zip(*((part.logits_original, part.logits) for part in outputs), strict=True)
    )
    told = max(range(10), key=lambda index: abs(before[index] - after[index]))

    def leaving(task: Task) -> Defended:
        return Defended(task.clip, head.answer, "guarded", quick_run, ("careful",), (task.shots.classes[told],))

    def once(run: Path, out: Path, **_: bool) -> Path:
        exported.append(run)
        return quick_bundle

    monkeypatch.setattr(cell, "export", once)
    monkeypatch.setitem(cell.DEFENSES, "leaving", leaving)
    (line,) = counted(plan, places, plan.groups()[1].model_copy(update={"defense": "leaving"}))
    assert (line.verdict, line.warnings) == ("guarded", ("careful",))
    (suspected,) = line.suspects or ()
    assert suspected.name == images.listing.classes[told]
    assert suspected.undefended == before[told] != after[told] == suspected.recall
    assert exported == [quick_run]


def test_what_defences_share_costs_each_of_them(plan: Plan, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

    def sharing(task: Task) -> Defended:
        path = task.folder / "shared"
        task.clock.once(path, lambda: (busy(), path.touch()))
        return cell.DEFENSES["none"](task)

    for name in ("first", "second"):
        monkeypatch.setitem(cell.DEFENSES, name, sharing)
    group = plan.groups()[1]
    costs = [counted(plan, places, group.model_copy(update={"defense": name}))[0] for name in ("first", "second")]
    assert all(line.cpu_seconds >= 0.3 for line in costs)
    counted(plan, places, group.model_copy(update={"defense": "probe"}))
    assert list(places.work.glob("cells/*/*/shots.npy-cost.json")), "the shots' features are shared, too"


def test_the_row_without_a_defence_sees_features_that_were_kept_wrongly(
    plan: Plan, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = FeatureStore.features
    monkeypatch.setattr(FeatureStore, "features", lambda *arguments: -kept(*arguments))
    line, *_ = counted(plan, places, plan.groups()[0])
    assert line.ca > 0.8
    assert line.undefended.ca < 0.2


def test_a_changed_encoder_is_counted_with_its_own_features(
    plan: Plan, places: Places, digits_clean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defence that swaps the poisoned encoder for the clean one."""

    def swap(task: Task) -> Defended:
        head = GuardedHead(task.original, task.original, TriggerTest.none(10, 64), task.shots.classes)
        return Defended(digits_clean.clip, head.answer)

    monkeypatch.setitem(cell.DEFENSES, "swap", swap)
    (line,) = counted(plan, places, plan.groups()[1].model_copy(update={"defense": "swap"}))
    assert line.asr < 0.2
    assert line.undefended.asr > 0.9


def test_of_two_triggers_the_mean_counts_and_the_worst_is_kept(
    plan: Plan, places: Places, digits_suspect: DigitsSuspect
) -> None:
    job = provide(plan, plan.groups()[0], places, "clean", "cpu")
    (pair,) = job.planted["badnet"]
    other = pair._replace(target=next(name for name in digits_suspect.split.test.classes if name != pair.target))
    (line, _) = measure(replace(job, planted={"badnet": (pair, other)}))
    assert [found.target for found in line.pairs] == [pair.target, other.target] == line.target.split("+")
    assert line.asr == pytest.approx(sum(found.asr for found in line.pairs) / 2)
    assert line.asr_worst == line.pairs[0].asr > 0.9 > line.asr


def test_answers_that_are_not_finite_are_refused(digits_suspect: DigitsSuspect) -> None:
    broken = counting.by_head(lambda f: Answer(f * float("nan"), f[:, 0] > 0, f), lambda _: torch.ones(2, 3))
    with pytest.raises(CheckError, match="not finite"):
        broken(None)


# suspects


def test_an_implant_is_planted_once_from_its_recipe(plan: Plan, places: Places) -> None:
    target = plan.implants["badnet"].attacks["badnet"]
    own = plan.implants["badnet"].model_copy(
        update={"folder": None, "attacks": {"sig": target}, "recipe": {"steps": 2, "batch": 4, "poisoned": 4}}
    )
    changed = plan.model_copy(update={"implants": {"badnet": own}})
    planting = plant(changed, "badnet", places, "cpu")
    folder = implant_folder(changed, "badnet", places)
    assert json.loads((folder / "implant.json").read_text())["took"] is False
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert plant(changed, "badnet", places, "cpu") == planting
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (line, _) = counted(changed, places, changed.groups()[0])
    assert (line.attack, line.took) == ("sig", False)
    assert planting is not None
    assert (planting["implant"], planting["took"]) == ("badnet", False)
    assert line.suspect_sha256 == planting["suspect_sha256"] == sha256((folder / "suspect.pt").read_bytes()).hexdigest()
    assert planting["reports"][0]["images"] > 0


def test_a_planting_is_written_down_beside_the_lines(
    plan: Plan, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planting = {"implant": "badnet", "suspect_sha256": "1"}
    monkeypatch.setattr("cbpt_guard.bench.suite._plant", lambda *_: planting)
    monkeypatch.setattr("cbpt_guard.bench.suite._measure", lambda *_: [])
    monkeypatch.setattr("cbpt_guard.bench.suite.side_by_side", here)
    assert run_suite(plan, places, tmp_path / "lines.jsonl") == 0
    assert [json.loads(text) for text in (tmp_path / PLANTINGS).read_text().splitlines()] == [planting]


def test_a_group_waits_for_its_implants_and_for_what_it_may_share(plan: Plan) -> None:
    first, _, control = plan.groups()
    names = ["cbpt", "none", "cbpt-prompts", f"{ABLATIONS}no_patch", "own:defence", "probe", f"{ABLATIONS}no_wave"]
    groups = [first.model_copy(update={"defense": name, "seed": seed}) for seed in (0, 1) for name in names]
    planting, *measuring = suite._pieces(plan, [*groups, control], Places((), Path()), "clean", "cpu")
    assert planting.name == (suite._plant, "badnet"), "asked for once; the control takes the implant's own triggers"
    assert [step.name for step in measuring] == [*groups, control]
    assert all(planting.name in step.needs for step in measuring)
    waits = [[(g.defense, g.seed) for g in step.needs - {planting.name}] for step in measuring]
    once = [[], [], ["cbpt"], ["cbpt"], ["cbpt-prompts"], [], ["cbpt"]]
    assert waits == [*([(name, seed) for name in before] for seed in (0, 1) for before in once), []]
    triggers, alone = suite._pieces(plan, [control], Places((), Path()), "clean", "cpu")
    assert (triggers.name, alone.needs) == ((suite._triggers, "badnet"), {(suite._triggers, "badnet")})


def test_both_rules_of_cbpt_share_a_run_and_no_rival_does() -> None:
    assert set(SETTINGS) - set(INDEPENDENT) == {"cbpt", "cbpt-prompts"}
    assert set(INDEPENDENT) <= set(SETTINGS)


def test_a_run_that_cannot_write_its_lines_ends_what_it_began(
    plan: Plan, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def watched(steps: Sequence[Piece], *, jobs: int, **_: object) -> Generator[tuple[Piece, Any]]:
        try:
            yield steps[1], [cell]  # which is no line
        finally:
            ended.append(f"with {jobs} jobs")

    monkeypatch.setattr("cbpt_guard.bench.suite.side_by_side", watched)
    with pytest.raises(AttributeError) as kept:
        run_suite(plan, places, tmp_path / "lines.jsonl", jobs=3)
    assert ended == ["with 3 jobs"], kept


def test_several_jobs_share_the_cores(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, Any]] = []
    monkeypatch.setattr(
        "cbpt_guard.bench.suite.run_suite", lambda *_, jobs, start, **__: asked.append((jobs, *start.args)) or 0
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    options = ("--plan", root / "plan.toml", "--out", tmp_path / "lines.jsonl", "--work", tmp_path)
    for more in ((), ("--jobs", 2), ("--jobs", 20), ("--jobs", 2, "--threads", 3)):
        assert cli("bench", "run", *options, *more).exit_code == 0
    assert asked == [(1, None), (2, 4), (20, 1), (2, 3)]


def test_the_control_makes_the_triggers_alone(plan: Plan, places: Places) -> None:
    """The same that planting makes, here an optimised one, and where the implant was planted its own."""
    target = plan.implants["badnet"].attacks["badnet"]
    own = plan.implants["badnet"].model_copy(
        update={
            "folder": None,
            "attacks": {"trojvqa": target},
            "recipe": {"steps": 1, "batch": 4, "poisoned": 4, "images": 4},
        }
    )
    changed = plan.model_copy(update={"implants": {"badnet": own}})
    make_triggers(changed, "badnet", places, "cpu")
    alone = trigger_source(changed, "badnet", places)
    assert sorted(path.name for path in alone.iterdir()) == ["trigger.json", "trigger.png"]
    (line,) = counted(changed, places, changed.groups()[2])
    assert (line.attack, line.target, line.took) == ("none", target, None)
    assert plant(changed, "badnet", places, "cpu") is not None
    planted = implant_folder(changed, "badnet", places)
    assert trigger_source(changed, "badnet", places) == planted != alone
    assert [(planted / name).read_bytes() for name in ("trigger.json", "trigger.png")] == [
        (alone / name).read_bytes() for name in ("trigger.json", "trigger.png")
    ]


def test_an_implant_is_kept_by_its_template_too(plan: Plan, places: Places) -> None:
    own = plan.implants["badnet"].model_copy(update={"folder": None})
    first, second = (
        plan.model_copy(update={"implants": {"badnet": own}, "template": text}) for text in ("a {}", "the {}")
    )
    assert implant_folder(first, "badnet", places) != implant_folder(second, "badnet", places)


def test_runs_of_another_planting_lie_elsewhere(tmp_path: Path) -> None:
    once, again = (cells_folder(tmp_path, "badnet", digit * 64) for digit in "12")
    assert once != again
    assert once.parent == again.parent == tmp_path / "cells"


def test_triggers_that_aim_elsewhere_than_the_plan_says_are_refused(plan: Plan, places: Places) -> None:
    wrong = plan.implants["badnet"].model_copy(update={"attacks": {"badnet": "nine hundred"}})
    with pytest.raises(InputError, match="the plan says \\['nine hundred'\\]"):
        planted_triggers(wrong, implant_folder(plan, "badnet", places))


@pytest.mark.parametrize("name", ["magic", "nowhere:magic", "cbpt_guard.errors:magic"])
def test_an_unknown_defence_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="magic"):
        cell.defense_named(name)


# runs


def test_a_killed_run_goes_on_and_ends_with_the_same_lines(plan: Plan, root: Path, places: Places) -> None:
    out, command = places.work / "lines.jsonl", [str(SCRIPT), "bench", "run", "--threads", str(torch.get_num_threads())]
    for option, value in (("plan", root / "plan.toml"), ("root", root), ("out", out), ("work", places.work)):
        command += [f"--{option}", str(value)]
    first = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out.exists() and out.read_bytes()):
        time.sleep(0.05)
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = read_lines(out)
    assert 0 < len(kept) < 4
    out.write_bytes(out.read_bytes() + b'{"torn')
    done = subprocess.run([*command, "--jobs", "2"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{4 - len(kept)} lines added" in done.stderr
    lines = read_lines(out)
    assert lines[: len(kept)] == kept
    assert timeless(lines) == timeless([line for group in plan.groups() for line in counted(plan, places, group)])
    assert all(line.peak_mb > 100 and line.seconds >= 0 for line in lines)
    assert {line.defense: sorted(line.chosen or ()) for line in lines} == {"none": [], "probe": ["strength"]}
    assert all({"torch", "onnxruntime", "torchvision"} <= set(line.versions) for line in lines)
    assert missing(plan, plan.groups(), out, "clean") == []
    assert run_suite(plan, places, out) == 0


def test_a_dry_run_prices_what_is_missing_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    options = ("--plan", root / "plan.toml", "--out", out, "--work", tmp_path / "work", "--dry-run")
    result = cli("bench", "run", *options)
    assert result.stdout.splitlines()[-1] == "0.20 h\tin all, expected on two cores with --jobs 2\t3 defences"
    assert cli("bench", "run", *options, "--shard", "2/2").stdout.startswith("0.05 h\tclean digits\t1 defences")
    assert list(tmp_path.iterdir()) == []
    assert_refused(cli("bench", "run", *options, "--shard", "3/2"), "shard 3/2 is none")
    assert_refused(cli("bench", "run", *options, "--shard", "half"), "--shard", usage=True)
    assert cli("bench", "run", *options, "--defense", "probe").stdout.splitlines()[-1].endswith("\t1 defences")
    assert_refused(cli("bench", "run", *options, "--only", "sig"), "'sig' is no suspect of this plan")
    groups = Plan.read(root / "plan.toml").groups()
    seeds = [group.model_copy(update={"seed": seed}) for group in groups for seed in (0, 1)]
    assert [group.seed for group in picked(seeds, seeds=[1])] == [1] * len(groups)
    assert picked(seeds, suspects=[groups[0].unit], defenses=["none"], seeds=[0]) == [groups[0]]
    assert_refused(cli("bench", "run", *options, "--seed", "7"), "7 is no seed of this plan or part; there are 0")


def test_only_final_reads_the_test_images_and_each_read_is_logged(
    plan: Plan, root: Path, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for speed; the folder of test images is absent in development."""
    monkeypatch.setattr("cbpt_guard.bench.suite.side_by_side", here)
    for name in ("clean", "data", "poisoned", "train"):
        (tmp_path / name).symlink_to(root / name)
    blind, out = Places((tmp_path,), places.work), tmp_path / "lines.jsonl"
    only = plan.model_copy(update={"cells": plan.cells[1:]})
    assert run_suite(only, blind, out) == 1
    assert not (tmp_path / READS).exists()
    with pytest.raises(InputError, match=r"none of the roots .* has test"):
        run_suite(only, blind, out, split="test")
    assert run_suite(only, places, out, split="test") == 1
    assert run_suite(only, places, out, split="test") == 0  # nothing is missing, so nothing is read
    reads = [json.loads(text) for text in (tmp_path / READS).read_text().splitlines()]
    assert [(read["split"], read["plan"]) for read in reads] == [("test", only.digest)] * 2
    assert [line.split for line in read_lines(out)] == ["clean", "test"]


def test_a_missing_place_names_the_option(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name one with `--root`"):
        provide(plan, plan.groups()[0], Places((tmp_path,), tmp_path), "clean", "cpu")


def test_a_job_is_a_value_that_another_process_can_get(plan: Plan, places: Places) -> None:
    job = provide(plan, plan.groups()[0], places, "clean", "cpu")
    assert isinstance(job, Job)
    assert job.suspect.checkpoint.name == "suspect.pt"
