"""A user's own check of a bundle, against counts worked out by hand on pictures of known colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import assert_refused, blocking, cli, python
from PIL import Image
from tiny import SIZE

from cbpt_guard import GuardedClassifier
from cbpt_guard.defense.triggers import Patch, save_trigger
from cbpt_guard.errors import CheckError, ImageError, InputError
from cbpt_guard.evaluation import Evaluation, evaluate
from cbpt_guard.images import Pixels
from cbpt_guard.listing import Listing, list_images

REDDISH, GREEN, BLUE = (230, 40, 40), (0, 200, 0), (0, 0, 250)
PICTURES = {"red": [REDDISH, REDDISH], "green": [GREEN, GREEN, GREEN], "blue": [BLUE, GREEN]}
CA = 6 / 7
HEAVY = ("torch", "torchvision", "open_clip", "onnx", "onnxscript", "safetensors", "sklearn", "timm")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Class folders; one picture of `blue` is green."""
    for name, colours in PICTURES.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (40, 32), colour).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def trigger(tmp_path: Path) -> Path:
    """Paints the whole image in a red so full that the tiny bundle's rule leaves `red` out."""
    (tmp_path / "planted").mkdir()
    full = Patch(SIZE, top=0, left=0, height=SIZE, width=SIZE, pixels=bytes((255, 0, 0)) * SIZE**2)
    return save_trigger(full, "red", tmp_path / "planted")


def test_clean_accuracy_alone(tiny_bundle: Path, data: Path) -> None:
    found = evaluate(GuardedClassifier.load(tiny_bundle), list_images(data))
    assert found.images == 7
    assert found.guarded == found.undefended
    assert found.guarded.ca.share == CA
    assert 0 < found.guarded.ca.low < CA < found.guarded.ca.high <= 1
    assert (found.guarded.asr, found.target, found.flag_triggered) == (None, None, None)
    assert found.flag_clean == 0


def test_under_a_trigger_the_images_of_the_target_are_left_out(tiny_bundle: Path, data: Path) -> None:
    def red(images: Pixels) -> Pixels:
        return np.broadcast_to(np.array((255, 0, 0), np.uint8), images.shape).copy()

    found = evaluate(GuardedClassifier.load(tiny_bundle), list_images(data), red, "red")
    for shares, asr in ((found.undefended, 1.0), (found.guarded, 0.0)):
        assert shares.ca.share == CA
        assert (shares.asr and shares.asr.share, shares.asr and shares.asr.images) == (asr, 5)
        assert (shares.pa and shares.pa.share, shares.pa and shares.pa.images) == (0, 5)
        assert shares.max_share == 1  # the guarded answer moved elsewhere, all of it
        assert (shares.target_recall and shares.target_recall.share) == 1
    assert (found.flag_clean, found.flag_triggered) == (0, 1)


def test_answers_are_those_that_a_service_gets(exported: Path, tmp_path: Path) -> None:
    """More images than one batch holds, in the bundle's classes, whose order differs from the folders'."""
    guard, random = GuardedClassifier.load(exported), np.random.default_rng(0)
    files = []
    for number in range(70):
        name = list(guard.classes_)[2 + number % 2]
        files.append(tmp_path / name / f"{number}.png")
        files[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(files[-1])
    right = sum(answer.label == path.parent.name for path, answer in zip(files, guard.predict(files), strict=True))
    assert evaluate(guard, list_images(tmp_path)).guarded.ca.share == right / 70


@pytest.mark.parametrize(
    ("change", "given", "error", "words"),
    [
        ("pink", {}, InputError, "'pink' is no class of this bundle"),
        (None, {"target": "pink", "trigger": np.copy}, InputError, "'pink' is no class"),
        (None, {"trigger": np.copy}, InputError, "belong together"),
        (None, {"target": "red"}, InputError, "belong together"),
        (None, {"target": "grey", "trigger": np.copy}, InputError, "no image of the target 'grey' to count"),
        ("red alone", {"target": "red", "trigger": np.copy}, InputError, "no image of any class but the target 'red'"),
        (None, {"target": "red", "trigger": np.zeros_like}, CheckError, "not finite"),
        ("bad", {}, ImageError, r"blue/0\.png: .*no image of"),
        (None, {"target": "nope", "trigger": np.copy}, InputError, r"it answers '[a-z]+', '"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    change: str | None, given: dict[str, Any], error: type[Exception], words: str, tiny_bundle: Path, data: Path
) -> None:
    if change == "pink":
        (data / "blue").rename(data / "pink")
    if change == "bad":
        (data / "blue" / "0.png").write_text("text")
    listing = list_images(data)
    if change == "red alone":
        listing = Listing(("red",), (listing.files[listing.classes.index("red")],))
    with pytest.raises(error, match=words):
        evaluate(GuardedClassifier.load(tiny_bundle), listing, **given)


# the command


def test_evaluate_prints_both_classifiers(tiny_bundle: Path, data: Path, trigger: Path) -> None:
    result = cli("evaluate", tiny_bundle, "--data", data, "--trigger", trigger)
    assert result.exit_code == 0, result.stderr
    undefended, guarded = result.stdout.splitlines()
    assert undefended.startswith("undefended\tCA 85.7 [")
    assert "\tASR 100.0 [61.4, 100.0]\t" in undefended
    assert "\tASR 0.0 [0.0, 38.1]\t" in guarded
    assert "7 images, triggered toward 'red'" in result.stderr
    assert "verdict: guarded; flagged: 0.0 % of clean images, 100.0 % of triggered ones" in result.stderr


def test_evaluate_as_json_is_the_same_each_time(tiny_bundle: Path, data: Path, trigger: Path) -> None:
    first = cli("evaluate", tiny_bundle, "--data", data, "--trigger", trigger.parent, "--target", "red", "--json")
    again = cli("evaluate", tiny_bundle, "--data", data, "--trigger", trigger, "--json")
    assert Evaluation.model_validate_json(first.stdout) == Evaluation.model_validate_json(again.stdout)
    other = cli("evaluate", tiny_bundle, "--data", data, "--trigger", trigger, "--target", "green", "--json")
    counts = json.loads(other.stdout)["undefended"]
    assert (counts["asr"]["share"], counts["asr"]["images"], counts["pa"]["share"]) == (0, 4, 0.5)


def test_class_folders_may_be_renamed(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    (data / "blue").rename(data / "n03")
    (tmp_path / "names").write_text("n03\tblue\n")
    result = cli("evaluate", tiny_bundle, "--data", data, "--classes", tmp_path / "names", "--json")
    assert json.loads(result.stdout)["guarded"]["ca"]["share"] == CA


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--data", "nowhere"], "nowhere does not exist", 2),
        (["--data", "DATA", "--target", "red"], "pass `--trigger` with it", 2),
        (["--data", "DATA", "--trigger", "nowhere.json"], "nowhere.json cannot be read", 2),
        (["--data", "DATA", "--trigger", "TRIGGER", "--target", "pink"], "'pink' is no class", 2),
        (["--data", "DATA", "--provider", "abacus"], "abacus", 2),
        (["--data", "DATA", "--digest", "sha256:" + "0" * 64], "is another bundle", 1),
    ],
)
def test_evaluate_refuses_bad_input(
    arguments: list[str], words: str, code: int, tiny_bundle: Path, data: Path, trigger: Path
) -> None:
    named = {"DATA": data, "TRIGGER": trigger}
    assert_refused(cli("evaluate", tiny_bundle, *(named.get(word, word) for word in arguments)), words, code=code)


def test_clean_accuracy_needs_the_runtime_alone_and_a_trigger_no_open_clip(
    tiny_bundle: Path, data: Path, trigger: Path
) -> None:
    main = "\nfrom cbpt_guard.cli import main\nmain()"
    alone = python(blocking(*HEAVY) + main, "evaluate", tiny_bundle, "--data", data, cwd=data)
    assert (alone.returncode, len(alone.stdout.splitlines())) == (0, 2), alone.stderr
    with_trigger = ("evaluate", tiny_bundle, "--data", data, "--trigger", trigger)
    assert python(blocking("open_clip", "onnx", "sklearn") + main, *with_trigger, cwd=data).returncode == 0
    assert_refused(python(blocking("torch") + main, *with_trigger, cwd=data), "pip install 'cbpt-guard[purify]'")
