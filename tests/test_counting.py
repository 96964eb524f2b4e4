"""How the bench counts, against shares worked out by hand on pictures of known colours; and what is not tested."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import ENVIRONMENT
from PIL import Image
from tiny import COLOURS, LABELS, SCALE, SIZE
from torch import Tensor

from cbpt_guard import GuardedClassifier
from cbpt_guard.bench import counting
from cbpt_guard.bench.counting import FeatureStore, ImageSet
from cbpt_guard.bench.lines import ClassRecall
from cbpt_guard.defense.data import Listing
from cbpt_guard.defense.head import Answer, Head
from cbpt_guard.defense.triggers import Patch, PlantedTrigger
from cbpt_guard.errors import CheckError, InputError
from cbpt_guard.images import Preprocess

REPOSITORY = Path(__file__).parents[1]
COUNTED = ("cbpt_guard/metrics.py", "cbpt_guard/bench/counting.py", "cbpt_guard/evaluation.py")
EVALUATED = (
    "clean_accuracy_alone",
    "under_a_trigger_the_images_of_the_target_are_left_out",
    "what_cannot_be_counted_is_refused",
)
BY_HAND = (
    "tests/test_metrics.py",
    "tests/test_counting.py",
    *(f"tests/test_evaluate.py::test_{name}" for name in EVALUATED),
)
AVERAGED = tuple(f"cbpt_guard/bench/{name}.py" for name in ("table", "bars", "limits", "summary"))
SUMMED = "tests/test_evidence.py::test_a_summary_is_the_mean_over_attacks_of_the_means_over_seeds"
FROM_LINES = (*(f"tests/test_{name}.py" for name in ("bench_table", "bars", "limits")), SUMMED)
REDDISH, GREEN, BLUE, YELLOW, GREY = (230, 40, 40), (0, 200, 0), (0, 0, 250), (200, 200, 30), (150, 150, 150)
QUIETLY = {"cwd": REPOSITORY, "env": ENVIRONMENT, "capture_output": True, "text": True}
PICTURES = {
    "red": [REDDISH, REDDISH, GREEN],
    "green": [GREEN, GREEN, GREEN, GREEN],
    "blue": [BLUE, GREEN],
    "yellow": [YELLOW],
    "grey": [GREY],
}
FULL_RED = Patch(SIZE, top=0, left=0, height=SIZE, width=SIZE, pixels=bytes((255, 0, 0)) * SIZE**2)
TO_RED, TO_BLUE = PlantedTrigger(FULL_RED, "red"), PlantedTrigger(FULL_RED, "blue")


@dataclass
class ColourClip:
    """The tiny bundle's encoder in torch: the mean colour, as a unit vector."""

    device = torch.device("cpu")
    batch = 2
    encoded: int = 0

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        return F.normalize(pixels.mean((2, 3)), dim=1)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Eleven pictures; one of `red` and one of `blue` are green."""
    files = []
    for name, colours in PICTURES.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        paths = tuple(tmp_path / "data" / name / f"{number}.png" for number in range(len(colours)))
        for path, colour in zip(paths, colours, strict=True):
            Image.new("RGB", (SIZE, SIZE), colour).save(path)
        files.append(paths)
    preprocess = Preprocess(size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return ImageSet(Listing(tuple(PICTURES), tuple(files)), None, preprocess)


def undefended(features: Tensor) -> Answer:
    """The zero-shot head of the tiny bundle."""
    logits = Head(F.normalize(torch.from_numpy(COLOURS), dim=1), SCALE).logits(features)
    return Answer(logits, torch.zeros(len(features), dtype=torch.bool), logits)


def test_a_head_is_counted_as_by_hand(images: ImageSet) -> None:
    clip = ColourClip()
    classify = counting.by_head(undefended, lambda trigger: counting.encoded(clip, images, trigger))
    red, blue = counting.shares(classify, [TO_RED, TO_BLUE], images)
    assert (red.ca, red.asr, red.pa, red.max_share, red.target_recall) == (9 / 11, 1, 0, 1, 2 / 3)
    # all eleven turn red: toward blue, of nine images none goes and the three of `red` are right
    assert (blue.ca, blue.asr, blue.pa, blue.max_share, blue.target_recall) == (9 / 11, 0, 3 / 9, 1, 1 / 2)
    assert (red.false_positives, red.flag_clean, red.flag_triggered, red.target) == (0, 0, 0, "red")
    both = counting.mean([red, blue])
    assert (both.ca, both.asr, both.pa, both.target_recall) == pytest.approx((9 / 11, 1 / 2, 1 / 6, 7 / 12))
    (green,) = counting.shares(classify, [PlantedTrigger(FULL_RED, "green")], images)
    assert green.false_positives == 2 / 7


def test_the_recall_of_suspected_classes_is_counted_as_by_hand(images: ImageSet) -> None:
    """Before all is called green; after, two of three of `red` and one of two of `blue` are right."""

    def green(features: Tensor) -> Answer:
        logits = torch.zeros(len(features), len(LABELS))
        logits[:, list(PICTURES).index("green")] = 1
        return Answer(logits, torch.zeros(len(features), dtype=torch.bool), logits)

    def told(names: tuple[str, ...], data: ImageSet) -> tuple[ClassRecall, ...]:
        before, after = (
            counting.by_head(answer, lambda trigger: counting.encoded(ColourClip(), data, trigger))
            for answer in (green, undefended)
        )
        return counting.recalls(before, after, names, data)

    red, blue, most = told(("red", "blue", "green"), images)
    assert (red.name, red.recall, red.undefended) == ("red", 2 / 3, 0)
    assert (blue.recall, blue.undefended) == (1 / 2, 0)
    assert (most.recall, most.undefended) == (1, 1)
    assert told((), images) == ()
    drawn = replace(images, shots=Listing(tuple(PICTURES), ((), (), images.listing.files[2], (), ())))
    assert [one.name for one in told(("red", "blue"), drawn)] == ["red"], "no blue is left"


def test_a_bundle_is_counted_as_by_hand(images: ImageSet, pristine_bundle: Path) -> None:
    """Its rule leaves red out where a picture is so full of it, and the next best is yellow."""
    (red,) = counting.shares(counting.by_bundle(GuardedClassifier.load(pristine_bundle), images), [TO_RED], images)
    assert (red.ca, red.asr, red.pa, red.max_share, red.target_recall) == (9 / 11, 0, 1 / 8, 1, 2 / 3)
    assert (red.flag_clean, red.flag_triggered) == (0, 1)


def test_of_equal_logits_the_first_class_counts(images: ImageSet) -> None:
    def level(features: Tensor) -> Answer:
        logits = torch.zeros(len(features), len(LABELS))
        return Answer(logits, torch.ones(len(features), dtype=torch.bool), logits)

    classify = counting.by_head(level, lambda trigger: counting.encoded(ColourClip(), images, trigger))
    (red,) = counting.shares(classify, [TO_RED], images)
    assert (red.ca, red.asr, red.pa, red.target_recall, red.flag_clean) == (3 / 11, 1, 0, 1, 1)


def test_what_is_no_number_is_not_counted(images: ImageSet) -> None:
    def broken(features: Tensor) -> Answer:
        logits = torch.full((len(features), len(LABELS)), torch.nan)
        return Answer(logits, torch.zeros(len(features), dtype=torch.bool), logits)

    classify = counting.by_head(broken, lambda trigger: counting.encoded(ColourClip(), images, trigger))
    with pytest.raises(CheckError, match="not finite"):
        classify(None)


def test_shots_are_not_counted_and_a_class_may_have_nothing_else(images: ImageSet) -> None:
    part = replace(images, shots=images.listing.drawn(1, 0))
    assert part.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert [len(pixels) for pixels in part.batches()] == [2, 3, 1]
    assert [len(pixels) for pixels in part.batches(everything=True)] == [3, 4, 2, 1, 1]
    classify = counting.by_head(undefended, lambda trigger: counting.encoded(ColourClip(), part, trigger))
    with pytest.raises(InputError, match="no image"):
        counting.shares(classify, [PlantedTrigger(FULL_RED, "grey")], part)


def test_features_are_made_once_for_a_model_and_a_trigger(images: ImageSet, tmp_path: Path) -> None:
    clip, store = ColourClip(), FeatureStore(tmp_path / "kept", "one")
    clean = store.features(clip, images, None)
    part = replace(images, shots=images.listing.drawn(1, 0))
    assert torch.equal(store.features(clip, part, None), clean[part.counted])
    assert clip.encoded == 11
    assert not torch.equal(store.features(clip, images, FULL_RED), clean)
    replace(store, model="another").features(clip, images, None)
    assert clip.encoded == 33


def test_features_that_two_ask_for_at_once_are_made_once(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, encoded = ColourClip(), counting.encoded

    def slowly(*given: Any, everything: bool) -> torch.Tensor:
        time.sleep(0.2)
        return encoded(*given, everything=everything)

    monkeypatch.setattr(counting, "encoded", slowly)
    with ThreadPoolExecutor(2) as pool:
        ask = [pool.submit(FeatureStore(tmp_path, "it").features, clip, images, None) for _ in range(2)]
        found = [one.result() for one in ask]
    assert clip.encoded == 11
    assert torch.equal(*found)


def test_answers_are_made_once_for_a_trigger(images: ImageSet) -> None:
    clip = ColourClip()
    classify = counting.by_head(undefended, lambda trigger: counting.encoded(clip, images, trigger))
    counting.shares(counting.remembered(classify), [TO_RED, TO_BLUE], images)
    assert clip.encoded == 22


@pytest.mark.parametrize(
    ("covered", "by"), [(COUNTED, BY_HAND), (AVERAGED, FROM_LINES)], ids=["images", "lines of evidence"]
)
def test_every_branch_of_what_counts_is_tested(covered: tuple[str, ...], by: tuple[str, ...], tmp_path: Path) -> None:
    """By cases that were worked out by hand, in a process that measures it."""
    coverage = (sys.executable, "-m", "coverage")
    kept = f"--data-file={tmp_path / 'coverage'}"
    counted = (f"--include={','.join(covered)}", kept)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not every_branch", *by)
    ran = subprocess.run([*coverage, "run", "--branch", *counted, *tests], check=False, **QUIETLY)
    assert ran.returncode == 0, ran.stdout
    told = subprocess.run([*coverage, "report", "--show-missing", "--fail-under=100", kept], check=False, **QUIETLY)
    assert told.returncode == 0, told.stdout
    assert all(name in told.stdout for name in covered)
