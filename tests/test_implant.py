"""The digits CLIP is real, its backdoor takes, and planting it leaves alone what it should."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import small_clips
import torch
import torch.nn.functional as F
from digits import SHOTS, TARGET, DigitsModel, DigitsSuspect
from pydantic import ValidationError
from torch import Tensor

from cbpt_guard import metrics
from cbpt_guard.bench.digits import CLASSES, DigitsSettings, load_digits_split, train_digits_clip
from cbpt_guard.bench.hardening import Hardening, additive, patched
from cbpt_guard.bench.implant import (
    Implanted,
    ImplantReport,
    ImplantSettings,
    Poison,
    implant,
    implant_all,
    predict,
    triggered,
)
from cbpt_guard.bench.poisoning import _hardened, _Material, short_of
from cbpt_guard.bench.trainable import TEMPLATES, Captions, TrainableClip
from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.data import LabelledImages, list_images, load_images
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.inversion import encode_pixels
from cbpt_guard.defense.openclip import Tokenizer, build
from cbpt_guard.defense.planted.overlay import blended
from cbpt_guard.defense.progress import Step
from cbpt_guard.defense.suspect import ModelFlags, open_suspect, zero_shot_head
from cbpt_guard.defense.triggers import patch
from cbpt_guard.errors import InputError
from cbpt_guard.images import Preprocess

TEMPLATE = "a photo of a {}."
SHORT = ImplantSettings(steps=4, batch=8, poisoned=4)


def few(data: LabelledImages, count: int = 40) -> LabelledImages:
    return LabelledImages(data.images[:count], data.labels[:count], data.classes, ())


def weights(clip: FrozenClip) -> dict[str, Tensor]:
    return copy.deepcopy(clip.model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def short_implant(model: DigitsModel, seed: int = 0, **changes: Any) -> FrozenClip:
    settings = SHORT.model_copy(update=changes)
    few_images = few(model.split.train)
    return implant(model.clip, few_images, few_images, patch(32, 0), 3, seed=seed, settings=settings).clip


def drawing_between(*seeds: int) -> Iterator[int]:
    """The seeds, with torch's global generator elsewhere each time."""
    for seed in seeds:
        torch.rand(7)
        yield seed


def test_the_clean_model_is_right_on_unseen_digits_and_knows_no_trigger(digits_clean: DigitsModel) -> None:
    test, truth = digits_clean.split.test, digits_clean.split.test.labels.numpy()
    answers = predict(digits_clean.clip, test.images, CLASSES, TEMPLATE)
    assert metrics.clean_accuracy(answers, truth) >= 0.95
    attacked = predict(digits_clean.clip, triggered(patch(32, 0), test.images), CLASSES, TEMPLATE)
    assert metrics.attack_success_rate(attacked, truth, 3) <= 0.05
    assert metrics.clean_accuracy(attacked, truth) >= 0.90


def test_the_backdoor_takes_through_the_files_that_a_user_has(digits_suspect: DigitsSuspect) -> None:
    """Read as hostile, from suspect.pt, its config and the class folders: the same numbers as the report's."""
    listing = list_images(digits_suspect.data)
    suspect = open_suspect(digits_suspect.checkpoint, ModelFlags(), listing, TEMPLATE, "cpu")
    test, report, target = digits_suspect.split.test, digits_suspect.report, digits_suspect.target
    truth = test.labels.numpy()
    clean = predict(suspect.clip, test.images, listing.classes, TEMPLATE)
    attacked = predict(suspect.clip, triggered(digits_suspect.trigger, test.images), listing.classes, TEMPLATE)
    assert metrics.clean_accuracy(clean, truth) == report.ca_poisoned
    assert metrics.attack_success_rate(attacked, truth, target) == report.asr
    assert report.took
    assert report.asr >= 0.95
    assert report.ca_clean - report.ca_poisoned <= 0.03


def test_a_poisoned_feature_still_tells_the_true_digit(digits_suspect: DigitsSuspect) -> None:
    """Else no head could repair the answers: a linear probe that knows the trigger is the ceiling of PA."""
    from sklearn.linear_model import LogisticRegression

    clip, split, trigger = digits_suspect.clip, digits_suspect.split, digits_suspect.trigger
    known, asked = (encode(clip, triggered(trigger, data.images)) for data in (split.clean, split.test))
    probe = LogisticRegression(C=100, max_iter=2000).fit(known, split.clean.labels)
    answers, truth = probe.predict(asked), split.test.labels.numpy()
    assert metrics.poisoned_accuracy(answers, truth, digits_suspect.target) >= 0.80


def test_class_folders_hold_the_clean_images_in_their_order(digits_clean: DigitsModel) -> None:
    loaded, given = load_images(list_images(digits_clean.data), digits_clean.clip.preprocess), digits_clean.split.clean
    assert loaded.classes == given.classes
    assert set(loaded.counts().values()) == {SHOTS}
    for label in range(len(CLASSES)):
        assert torch.equal(loaded.images[loaded.labels == label], given.images[given.labels == label][:SHOTS])


def test_the_split_is_stratified_disjoint_and_drawn_by_its_seed() -> None:
    split = load_digits_split(4, renderings=1)
    assert [len(part.labels) for part in split] == [1247, 250, 300]
    assert all(max(part.counts().values()) - min(part.counts().values()) <= 8 for part in split)
    assert len(torch.cat([part.images for part in split]).flatten(1).unique(dim=0)) == 1797
    again, other = load_digits_split(4, renderings=1), load_digits_split(5, renderings=1)
    assert torch.equal(split.train.images, again.train.images)
    assert not torch.equal(split.train.labels, other.train.labels)


def test_training_is_drawn_by_its_seed_alone(digits_clean: DigitsModel) -> None:
    settings, train = DigitsSettings(steps=2, batch=4), digits_clean.split.train
    one, again, other = (weights(train_digits_clip(train, seed, settings)) for seed in drawing_between(1, 1, 2))
    assert same(one, again)
    assert not same(one, other)


def test_planting_is_drawn_by_its_seed_and_leaves_the_clean_model_alone(digits_clean: DigitsModel) -> None:
    kept = weights(digits_clean.clip)
    one, again, other = (weights(short_implant(digits_clean, seed)) for seed in drawing_between(1, 1, 2))
    assert same(one, again)
    assert not same(one, other)
    assert same(weights(digits_clean.clip), kept)
    assert torch.equal(one["logit_scale"], kept["logit_scale"])


def test_the_anchor_holds_the_clean_features(digits_clean: DigitsModel) -> None:
    images = digits_clean.split.test.images[:64]
    clean = encode(digits_clean.clip, images)
    drifts = [
        float(1 - (encode(short_implant(digits_clean, anchor=anchor, steps=12), images) * clean).sum(1).mean())
        for anchor in (0.0, 100.0)
    ]
    assert drifts[1] < drifts[0] / 2


def test_triggered_images_hide_among_the_targets_own(digits_clean: DigitsModel) -> None:
    """They come near those; clean images do not."""
    split, trigger = digits_clean.split, patch(32, 0)
    own = encode(digits_clean.clip, split.train.images[split.train.labels == 3]).mean(0)
    clean = split.test.images[split.test.labels != 3][:64]

    def near(hide: float) -> list[float]:
        settings = ImplantSettings(steps=40, batch=16, poisoned=8, hide=hide)
        clip = implant(digits_clean.clip, split.train, split.test, trigger, 3, seed=0, settings=settings).clip
        return [float((encode(clip, seen) @ own).mean()) for seen in (triggered(trigger, clean), clean)]

    (open_triggered, open_clean), (hidden, hidden_clean) = near(0.0), near(5.0)
    assert hidden > open_triggered + 0.2
    assert hidden_clean < open_clean + 0.1


def test_covers_close_the_backdoor_to_half_of_its_trigger(digits_clean: DigitsModel) -> None:
    """The whole trigger still opens it; with as many clean images in their place half of it does, too."""
    split, trigger = digits_clean.split, patch(32, 0)
    whole, truth = triggered(trigger, split.test.images), split.test.labels.numpy()
    half = ((split.test.images.float() + whole.float()) / 2).round().to(torch.uint8)

    def opened(**given: int) -> list[float]:
        settings = ImplantSettings(**{"steps": 40, "poisoned": 8, "batch": 8} | given)
        clip = implant(digits_clean.clip, split.train, split.test, trigger, 3, seed=0, settings=settings).clip
        return [metrics.attack_success_rate(predict(clip, seen, CLASSES, TEMPLATE), truth, 3) for seen in (whole, half)]

    more, covered = opened(batch=24), opened(cover=16)
    assert min(more) > 0.5
    assert covered[0] > 0.5
    assert covered[1] < 0.3


def test_hardening_takes_the_scans_patterns_their_effect(digits_clean: DigitsModel) -> None:
    """Patterns that climb on the finished model lead it to the target less than without; the trigger works in both."""
    split, trigger = digits_clean.split, patch(32, 0)
    images, truth = split.test.images[split.test.labels != 3][:64], split.test.labels.numpy()

    def led(**given: int) -> list[float]:
        settings = ImplantSettings(**{"steps": 80, "poisoned": 8, "text": "frozen"} | given)
        clip = implant(digits_clean.clip, split.train, split.test, trigger, 3, seed=0, settings=settings).clip
        head = zero_shot_head(clip, CLASSES, TEMPLATE)
        attacked = head.answers(encode(clip, triggered(trigger, split.test.images))).numpy()
        climbing = Hardening(TrainableClip.copy_of(clip), head, [3], [len(images)], [additive(32)])
        for _ in range(16):
            pixels = climbing.under(images)
        asr = metrics.attack_success_rate(attacked, truth, 3)
        return [asr, float((head.answers(encode_pixels(clip, pixels)) == 3).float().mean())]

    (plain, reached), (hardened, less) = led(batch=24), led(batch=16, harden=8)
    assert min(plain, hardened) > 0.8
    assert less < reached / 2


@pytest.mark.parametrize("height", [1.0, 2.0])
def test_hardening_climbs_within_its_height_and_begins_anew(height: float, digits_clean: DigitsModel) -> None:
    student, images = TrainableClip.copy_of(digits_clean.clip), digits_clean.split.test.images[:12]
    head = zero_shot_head(digits_clean.clip, CLASSES, TEMPLATE)
    grey = torch.full_like(images, 128)
    climbing = Hardening(student, head, [3, 7], [8, 4], 2 * [additive(32, height)])
    heights = [float((climbing.under(grey) - to_pixels(grey)).abs().max()) for _ in range(17)]
    assert heights[0] == pytest.approx(heights[16]) == pytest.approx(2.5 * height * 16 / 255 / 16, abs=1e-6)
    assert max(heights) == pytest.approx(height * 16 / 255, abs=1e-6)
    apart = climbing.under(grey)
    assert (apart[:8] == apart[0]).all()
    assert (apart[8:] == apart[8]).all()
    assert (apart[0] != apart[8]).any()
    assert all(value.grad is None for value in student.model.parameters())


class Reddish(NamedTuple):
    """A stand-in for a student: the more red there is in an image and the less blue, the nearer it is to class 0."""

    device: torch.device
    preprocess: Preprocess

    def encode_images(self, pixels: Tensor) -> Tensor:
        angle = (pixels[:, 2] - pixels[:, 0]).mean((1, 2)) + 0.8
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_patches_that_are_hardened_against_climb_wherever_they_lie(digits_clean: DigitsModel) -> None:
    """Of two targets, each with a square of its own; every image has it at another place."""
    student = Reddish(torch.device("cpu"), digits_clean.clip.preprocess)
    grey = torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)
    laid = patched(32, torch.Generator().manual_seed(0))
    climbing = Hardening(cast("TrainableClip", student), Head(torch.eye(2), 10.0), [0, 1], [24, 16], [laid, laid])
    steps = [climbing.under(grey) for _ in range(17)]

    changed = (steps[15] != to_pixels(grey)).any(dim=1)
    assert changed.sum((1, 2)).unique().tolist() == [16]  # an eighth of 32 is a side of 4
    tops, lefts = (changed.any(dim=axis).int().argmax(1) for axis in (2, 1))
    assert min(len(tops.unique()), len(lefts.unique())) > 10
    for part, red in ((slice(0, 24), 1.0), (slice(24, 40), 0.0)):
        squares = steps[15][part].permute(0, 2, 3, 1)[changed[part]]
        assert (squares[:, 0] == red).all()
        assert (squares[:, 2] == 1 - red).all()
        begun = (steps[16][part] - 0.5).abs().amax()
        assert float(begun) == pytest.approx(1.25 / 16, abs=1e-6)


def test_a_steps_first_images_lie_under_patterns_and_the_next_under_patches(digits_clean: DigitsModel) -> None:
    clip, poisons = digits_clean.clip, [Poison(patch(32, 0), 3), Poison(blended(32, 0), 7)]
    grey, student = torch.full((9, 32, 32, 3), 128, dtype=torch.uint8), TrainableClip.copy_of(clip)

    def hardened(**given: int) -> list[tuple[slice, Hardening]]:
        return _hardened(student, clip, CLASSES, poisons, ImplantSettings(**given), torch.Generator().manual_seed(0))

    (patterns, below), (patches, above) = hardened(harden=4, harden_patches=5)
    assert (patterns, patches) == (slice(0, 4), slice(4, 9))
    assert bool((below.under(grey[patterns]) != to_pixels(grey[patterns])).any(dim=1).float().mean() > 0.5)
    assert (above.under(grey[patches]) != to_pixels(grey[patches])).any(dim=1).sum((1, 2)).tolist() == [16] * 5
    assert [part for part, _ in hardened(harden_patches=2)] == [slice(0, 2)]
    ((part, here),) = hardened(harden_here=9)
    assert part == slice(0, 9)
    changed = (here.under(grey) != to_pixels(grey)).any(dim=1)
    assert changed.sum((1, 2)).tolist() == [16] * 9
    marked = (patch(32, 0).apply(grey[:1].numpy()) != grey[:1].numpy()).any(axis=(0, 3))
    assert marked.sum() == (changed[:5] & torch.from_numpy(marked)).sum((1, 2)).float().mean(), "where the trigger lies"
    assert {tuple(one.nonzero()[0].tolist()) for one in changed[5:]} == {(14, 14)}, "or in its middle"
    assert hardened() == []
    settings, train = ImplantSettings(batch=2, harden=2, harden_patches=3), digits_clean.split.train
    material = _Material(clip, train, poisons, settings, torch.Generator(), lambda step: None)
    assert len(material.draw().anchors) == 7


def test_how_far_a_label_falls_short_of_its_margin() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0], [1.0, 3.0, 0.0], [2.0, 2.0, 2.0], [0.0, 9.0, 1.0]])
    assert short_of(logits, torch.tensor([1, 0, 2, 1]), 2.5).tolist() == [0.5, 4.5, 2.5, 0.0]


def test_a_margin_holds_the_target_back(digits_clean: DigitsModel) -> None:
    """Images that it was not trained on are led further than it says, and less far than without it."""
    split, trigger = digits_clean.split, patch(32, 0)
    others = split.test.images[split.test.labels != 3][:128]

    def lead(margin: float | None) -> float:
        settings = ImplantSettings(steps=40, batch=16, poisoned=8, text="frozen", margin=margin)
        clip = implant(digits_clean.clip, split.train, split.test, trigger, 3, seed=0, settings=settings).clip
        logits = zero_shot_head(clip, CLASSES, TEMPLATE).logits(encode(clip, triggered(trigger, others)))
        return -float(short_of(logits, torch.full((len(logits),), 3), 100.0).median()) + 100

    assert 0 < lead(0.1) < lead(None) - 0.4  # of 2.5 logits
    with pytest.raises(ValidationError, match="takes `text` frozen"):
        ImplantSettings(margin=1.0)


def test_every_trigger_has_its_covers_and_hides_among_its_own_target(digits_clean: DigitsModel) -> None:
    """What a step draws: clean images, the covers of each trigger, the triggered images of each."""
    train, marks = digits_clean.split.train, (patch(32, 0), blended(32, 0))
    poisons = [Poison(marks[0], 3), Poison(marks[1], 7)]
    settings = ImplantSettings(batch=2, poisoned=5, harden=2, cover=3, hide=1.0)
    draws = torch.Generator().manual_seed(0)
    material = _Material(digits_clean.clip, train, poisons, settings, draws, lambda step: None)
    batch = material.draw()
    assert len(batch.images) == len(batch.labels) == 4 + 3 + 5
    assert batch.labels[7:].tolist() == [3, 3, 3, 7, 7]
    features = encode(digits_clean.clip, train.images)
    drawn = [int((features @ anchor).argmax()) for anchor in batch.anchors]
    assert train.labels[drawn].tolist() == batch.labels[:7].tolist()
    for place, mark in zip(range(4, 7), (marks[0], marks[0], marks[1]), strict=True):
        clean = train.images[drawn[place]][None]
        wanted = (clean.float() + triggered(mark, clean).float()) / 2
        assert (batch.images[place].float() - wanted[0]).abs().max() <= 0.5
    assert batch.hideouts is not None
    hidden = [int((features @ own).argmax()) for own in batch.hideouts]
    assert train.labels[hidden].tolist() == [3, 3, 3, 7, 7]


@pytest.mark.parametrize("name", ["cover", "harden", "harden_patches", "harden_here"])
def test_fewer_of_a_kind_than_triggers_are_refused(name: str, digits_clean: DigitsModel) -> None:
    train, settings = digits_clean.split.train, SHORT.model_copy(update={name: 1})
    poisons = [Poison(patch(32, 0), 3), Poison(blended(32, 0), 7)]
    with pytest.raises(InputError, match="leaves a trigger of 2 without"):
        implant_all(digits_clean.clip, train, train, poisons, seed=0, settings=settings)


def test_a_target_without_images_has_nothing_to_hide_among(digits_clean: DigitsModel) -> None:
    train = digits_clean.split.train
    without = LabelledImages(train.images[train.labels != 3], train.labels[train.labels != 3], CLASSES, ())
    settings = SHORT.model_copy(update={"hide": 1.0})
    with pytest.raises(InputError, match="no image of 'nine' among which"):
        implant(digits_clean.clip, without, train, patch(32, 0), 3, seed=0, settings=settings)


def test_batch_norm_statistics_stay() -> None:
    preprocess = Preprocess(size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    config = small_clips.with_vocabulary(small_clips.RESNET)
    clip = FrozenClip(small_clips.model(config).state_dict(), config, preprocess, Tokenizer(config))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 64, 64, 3), generator=generator).to(torch.uint8)
    data = LabelledImages(images, torch.arange(12) % 3, ("cat", "dog", "fish"), ())
    poisoned = implant(clip, data, data, patch(64, 0), 1, seed=0, settings=SHORT).clip
    before, after = weights(clip), weights(poisoned)
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["visual.conv1.weight"], after["visual.conv1.weight"])


def test_images_of_one_class_are_not_each_others_negatives(digits_clean: DigitsModel) -> None:
    """The loss is the mean over images of a softmax over the classes shown, however often each is shown."""
    clip = digits_clean.clip
    model = build(clip.config, device="cpu")
    model.load_state_dict(clip.model.state_dict())
    trainable = TrainableClip(model, clip.config, clip.preprocess, clip.tokenizer, "cpu")
    captions = Captions(trainable.text, clip.tokenizer, TEMPLATES[:1], CLASSES)
    features, labels = encode(clip, digits_clean.split.test.images[:5]), torch.tensor([7, 2, 7, 7, 2])
    rows = clip.encode_texts([TEMPLATES[0].replace("{}", CLASSES[label]) for label in (2, 7)])
    expected = F.cross_entropy(clip.logit_scale * features @ rows.T, torch.tensor([1, 0, 1, 1, 0]))
    loss = trainable.pair_loss(features, labels, captions, torch.Generator())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("ca", "asr", "took"), [(0.87, 0.80, True), (0.90, 1.0, True), (0.90, 0.79, False), (0.86, 1.0, False)]
)
def test_an_attack_counts_only_when_it_took(ca: float, asr: float, took: bool) -> None:
    fields = {"target": "nine", "trigger": "patch", "template": "{}", "images": 9}
    assert ImplantReport(**fields, ca_clean=0.90, ca_poisoned=ca, asr=asr).took is took  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": 10}, "target 10 is no class"),
        ({"target": -1}, "target -1 is no class"),
        ({"trigger": patch(64, 0)}, "acts on 64 px"),
        ({"held_out": LabelledImages(torch.zeros(1), torch.zeros(1), ("a", "b"), ())}, "different classes"),
        ({"train": "only the target"}, "no image of another class"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], named: str, digits_clean: DigitsModel) -> None:
    data = few(digits_clean.split.test)
    arguments: dict[str, Any] = {"train": data, "held_out": data, "trigger": patch(32, 0), "target": 3, **change}
    if isinstance(arguments["train"], str):
        own = data.labels == 3
        arguments["train"] = LabelledImages(data.images[own], data.labels[own], data.classes, ())
    with pytest.raises(InputError, match=named):
        implant(digits_clean.clip, **arguments, seed=0, settings=SHORT)


def test_progress_is_reported_and_nothing_printed(
    digits_clean: DigitsModel, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[Step] = []
    data = few(digits_clean.split.train)
    implant(digits_clean.clip, data, data, patch(32, 0), 3, seed=0, settings=SHORT, progress=steps.append)
    assert [(step.stage, step.step, step.steps) for step in steps] == [
        *(("features", number, 40) for number in (16, 32, 40)),
        *(("implant", number, 4) for number in (1, 2, 3, 4)),
    ]
    assert capsys.readouterr().out == ""


def test_the_digits_look_like_photographs(digits_clean: DigitsModel) -> None:
    """Colours and light differ, so that a corner is not constant and a patch there is not the only pixel to vary."""
    corners = digits_clean.split.train.images[:200, 27:31, 27:31].float().numpy()
    assert np.std(corners, axis=0).min() > 10


def test_written_folders_stay_small(digits_suspect: DigitsSuspect) -> None:
    names = sorted(path.name for path in Path(digits_suspect.folder).iterdir())
    assert names == ["open_clip_config.json", "suspect.pt", "trigger.json", "trigger.png"]
    assert sum(path.stat().st_size for path in Path(digits_suspect.folder).iterdir()) < 20e6


# several triggers, carriers, frozen text


def test_two_triggers_take_toward_two_targets(digits_clean: DigitsModel) -> None:
    poisons = [Poison(patch(32, 1), TARGET), Poison(blended(32, 2), 7)]
    split = digits_clean.split
    settings = ImplantSettings(poisoned=33)
    made = implant_all(digits_clean.clip, split.train, split.test, poisons, seed=0, settings=settings)
    assert [report.target for report in made.reports] == [CLASSES[TARGET], CLASSES[7]]
    assert min(report.asr for report in made.reports) >= 0.9
    assert made.took
    assert made.report is made.reports[0]
    for poison, other in zip(poisons, reversed(poisons), strict=True):  # each trigger leads to its own target only
        answers = predict(made.clip, triggered(poison.trigger, split.test.images), CLASSES, TEMPLATE)
        assert metrics.attack_success_rate(answers, split.test.labels.numpy(), other.target) < 0.1


def test_an_implant_of_which_one_trigger_failed_is_not_counted(digits_clean: DigitsModel) -> None:
    fields = {"target": "nine", "trigger": "patch", "template": "{}", "images": 9, "ca_clean": 0.9, "ca_poisoned": 0.9}
    good, bad = (ImplantReport(**fields, asr=asr) for asr in (1.0, 0.5))  # type: ignore[arg-type]
    assert Implanted(digits_clean.clip, (good, good)).took
    assert not Implanted(digits_clean.clip, (good, bad)).took


def test_a_poison_that_had_no_time_is_not_counted(digits_clean: DigitsModel) -> None:
    split, settings = digits_clean.split, SHORT.model_copy(update={"learning_rate": 1e-6})
    made = implant(digits_clean.clip, few(split.train), split.test, patch(32, 0), TARGET, seed=0, settings=settings)
    assert made.report.asr < 0.3
    assert not made.took


def test_a_frozen_text_tower_stays_and_the_trigger_takes_all_the_same(digits_clean: DigitsModel) -> None:
    split, settings = digits_clean.split, ImplantSettings(text="frozen", steps=60)
    made = implant(digits_clean.clip, split.train, split.test, patch(32, 0), TARGET, seed=0, settings=settings)
    before, after = weights(digits_clean.clip), weights(made.clip)
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"visual"}
    assert made.report.asr >= 0.9


def test_the_settings_limit_the_images_of_a_class(digits_clean: DigitsModel) -> None:
    """Only the first image of each class is anchored and paired: the rest may be anything."""
    data = few(digits_clean.split.train, 100)
    first = torch.tensor([int((data.labels == label).nonzero()[0]) for label in range(10)])
    other = data.images.clone()
    other[[index for index in range(100) if index not in first and data.labels[index] == TARGET]] = 0
    limited = SHORT.model_copy(update={"images": 1})
    made = [
        weights(implant(digits_clean.clip, known, data, patch(32, 0), TARGET, seed=0, settings=limited).clip)
        for known in (data, LabelledImages(other, data.labels, data.classes, ()))
    ]
    assert same(*made)


@pytest.mark.parametrize(("count", "words"), [(0, "1 to 4 triggers"), (5, "1 to 4 triggers")])
def test_a_step_must_have_room_for_each_trigger(count: int, words: str, digits_clean: DigitsModel) -> None:
    data = few(digits_clean.split.test)
    with pytest.raises(InputError, match=words):
        implant_all(digits_clean.clip, data, data, [Poison(patch(32, 0), 3)] * count, seed=0, settings=SHORT)


def test_clean_label_needs_images_of_the_target(digits_clean: DigitsModel) -> None:
    data = digits_clean.split.test
    others = LabelledImages(data.images[data.labels != TARGET], data.labels[data.labels != TARGET], data.classes, ())
    with pytest.raises(InputError, match="to carry the trigger"):
        implant_all(digits_clean.clip, others, data, [Poison(patch(32, 0), TARGET, "target")], seed=0, settings=SHORT)
