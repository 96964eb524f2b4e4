"""Implants as folders: planted by the suite or by `bench implant`, reported in plain words, kept when they fail."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from commands import assert_refused, cli
from digits import DigitsModel

from cbpt_guard.bench import planting
from cbpt_guard.bench.digits import write_class_folders
from cbpt_guard.bench.implant import predict, triggered
from cbpt_guard.bench.plan import Implant
from cbpt_guard.bench.planting import ImplantRecord, Order, plant_folder
from cbpt_guard.bench.suspects import planted_triggers
from cbpt_guard.defense.data import list_images, load_images
from cbpt_guard.defense.suspect import ModelFlags, open_suspect
from cbpt_guard.defense.triggers import load_trigger
from cbpt_guard.errors import InputError
from cbpt_guard.metrics import attack_success_rate, clean_accuracy

TEMPLATE = "a photo of a {}."
FAST = {"steps": 3, "batch": 4, "poisoned": 4}


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """A checkpoint is read in a confined process, two seconds each time: once is enough in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planting, "open_suspect", cache(open_suspect))
        yield


@pytest.fixture(scope="module")
def train(digits_clean: DigitsModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(digits_clean.split.train, tmp_path_factory.mktemp("planting") / "train", per_class=80)


@pytest.fixture(scope="module")
def unseen(digits_clean: DigitsModel, train: Path) -> Path:
    return write_class_folders(digits_clean.split.test, train.parent / "test")


def implant(model: DigitsModel, train: Path, out: Path, *arguments: object) -> list[object]:
    return ["bench", "implant", "--model", model.checkpoint, "--data", train, "--out", out, "--threads", 1, *arguments]


def test_a_badnet_that_took_is_counted(digits_clean: DigitsModel, train: Path, unseen: Path, tmp_path: Path) -> None:
    out = tmp_path / "badnet"
    rest = ("--attack", "badnet", "--target", "nine", "--held-out", unseen, "--json")
    result = cli(*implant(digits_clean, train, out, *rest))
    assert result.exit_code == 0, result.stderr
    assert "counted: the attack took" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        *("implant.json", "open_clip_config.json", "suspect.pt", "trigger.json", "trigger.png")
    ]
    record = ImplantRecord.model_validate_json((out / "implant.json").read_bytes())
    assert ImplantRecord.model_validate_json(result.stdout) == record
    assert record.took
    assert record.attacks == {"badnet": "nine"}
    # what the report says is what the files do
    (report,), listing = record.reports, list_images(unseen)
    suspect = open_suspect(out / "suspect.pt", ModelFlags(), listing, TEMPLATE, "cpu").clip
    data, planted = load_images(listing.drawn(100, 0), suspect.preprocess), load_trigger(out)
    truth, target = data.labels.numpy(), data.classes.index(planted.target)
    assert report.images == len(truth) == 300
    assert report.ca_poisoned == clean_accuracy(predict(suspect, data.images, data.classes, TEMPLATE), truth)
    attacked = predict(suspect, triggered(planted.trigger, data.images), data.classes, TEMPLATE)
    assert report.asr == attack_success_rate(attacked, truth, target) >= 0.9


def test_what_did_not_take_is_kept_and_said(digits_clean: DigitsModel, train: Path, tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text("steps = 2\nbatch = 4\npoisoned = 4\nlearning_rate = 1e-6\n")
    rest = ("--attack", "badnet", "--target", "two", "--settings", tmp_path / "short.toml")
    result = cli(*implant(digits_clean, train, tmp_path / "short", *rest))
    assert result.exit_code == 1
    assert result.stdout == f"{tmp_path / 'short'}\n"
    assert "did not take: an attack counts with an ASR of 80 %" in result.stderr
    assert "counted:" not in result.stderr
    record = ImplantRecord.model_validate_json((tmp_path / "short" / "implant.json").read_bytes())
    assert not record.took
    assert (record.recipe.steps, record.reports[0].images) == (2, 80)  # a tenth of 80 of each of ten classes
    assert (tmp_path / "short" / "suspect.pt").exists()


def test_two_triggers_lie_in_folders_of_their_own(
    digits_clean: DigitsModel, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each is counted on no more images than are asked for."""
    monkeypatch.setattr(planting, "_MOST_COUNTED", 20)
    attacks = {"wanet": "two", "badnet": "nine"}
    order = Order(digits_clean.checkpoint, attacks, list_images(train), changes=FAST)
    record = plant_folder(order, tmp_path / "two")
    assert [report.images for report in record.reports] == [20, 20]
    assert [report.target for report in record.reports] == ["two", "nine"]
    found = planted_triggers(Implant(dataset="digits", attacks=attacks), tmp_path / "two")
    assert {(pair.trigger.kind, pair.target) for pair in found} == {("warp", "two"), ("patch", "nine")}
    assert not (tmp_path / "two" / "trigger.json").exists()


def test_no_image_is_trained_on_and_counted(train: Path) -> None:
    kept, held = planting._parted(list_images(train), 3)
    for every, part, rest in zip(list_images(train).files, held.files, kept.files, strict=True):
        assert (len(part), len(rest)) == (8, 72)
        assert set(part) | set(rest) == set(every)
    assert held != planting._parted(list_images(train), 4)[1]


def test_a_limit_on_images_spares_the_target(train: Path) -> None:
    few = planting._fewer(list_images(train), 5, {"nine"}, 0)
    assert {name: len(files) for name, files in zip(few.classes, few.files, strict=True)} == {
        name: 80 if name == "nine" else 5 for name in few.classes
    }


@pytest.mark.parametrize(
    ("attacks", "words"),
    [
        ({"magic": "nine"}, "'magic' is no attack; known are badnet"),
        ({"badnet": "umbrella"}, "no class 'umbrella'; they have eight"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_read(attacks: dict[str, str], words: str, train: Path) -> None:
    with pytest.raises(InputError, match=words):
        plant_folder(Order(train / "absent.pt", attacks, list_images(train)), train / "out")
    assert not list(train.glob(".out*"))


def test_an_unknown_recipe_is_refused_and_leaves_nothing(
    digits_clean: DigitsModel, train: Path, tmp_path: Path
) -> None:
    order = Order(digits_clean.checkpoint, {"badnet": "nine"}, list_images(train), changes={"stops": 3})
    with pytest.raises(InputError, match="recipe of badnet: stops"):
        plant_folder(order, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_in_plain_words(digits_clean: DigitsModel, train: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    named = ("--attack", "badnet", "--target", "nine")
    assert_refused(cli(*implant(digits_clean, train, tmp_path / "old", *named)), "exists already", "--force")
    (tmp_path / "old" / "mine.txt").write_text("precious")
    assert_refused(cli(*implant(digits_clean, train, tmp_path / "old", *named), "--force"), "no implant.json")
    unpaired = cli(*implant(digits_clean, train, tmp_path / "new", *named, "--attack", "sig"))
    assert_refused(unpaired, "2 attacks with 1 targets", usage=True)
    (tmp_path / "wrong.toml").write_text("stops = 1")
    wrong = implant(digits_clean, train, tmp_path / "new", *named, "--settings", tmp_path / "wrong.toml")
    assert_refused(cli(*wrong), "stops: Extra inputs")
