"""The attacks: each makes a trigger, optimised patches do what they are optimised for, clean labels stay clean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits import TARGET, DigitsModel

from cbpt_guard.bench import attacks
from cbpt_guard.bench.attacks import ATTACKS, Attacker, attack_named, poison, read_changes, recipe
from cbpt_guard.bench.carriers import perturbed
from cbpt_guard.bench.implant import ImplantSettings, Poison, triggered
from cbpt_guard.bench.optimised import (
    Objective,
    OptimisedSettings,
    badclip,
    dual_embedding,
    pasted,
    toward_text,
    trojvqa,
)
from cbpt_guard.bench.plan import Plan
from cbpt_guard.bench.poisoning import LARGER, fine_tune
from cbpt_guard.bench.steganography import SteganographySettings, train_steganography
from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.planted.patch import Patch
from cbpt_guard.defense.progress import silent
from cbpt_guard.defense.suspect import zero_shot_head
from cbpt_guard.defense.triggers import Trigger, load_trigger, patch, save_trigger
from cbpt_guard.errors import InputError
from cbpt_guard.images import Pixels

REPOSITORY = Path(__file__).parents[1]
TEMPLATE = "a photo of a {}."
SEVEN = ("badnet", "blended", "sig", "wanet", "issba", "trojvqa", "badclip")
UNSEEN = {
    "random-place": "random-place-patch",
    "bpp": "quantised",
    "rotation": "rotation",
    "refool": "reflection",
    "blur": "blur",
    "opposite-colours": "saturation",
    "jpeg": "compression",
    "large-pixels": "pixelation",
}
PATCHES = ("badnet", "trojvqa", "badclip", "label-consistent", "stripe-patch", "random-place")
QUICK = OptimisedSettings(steps=6, images=24)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is optimised or trained takes a few steps."""
    few = SteganographySettings(steps=3, batch=4, crop=16)
    monkeypatch.setattr(attacks, "train_steganography", partial(train_steganography, settings=few))
    monkeypatch.setattr(attacks, "trojvqa", partial(trojvqa, settings=QUICK))
    monkeypatch.setattr(attacks, "badclip", partial(badclip, settings=QUICK))


def attacker(model: DigitsModel, seed: int = 3) -> Attacker:
    return Attacker(model.clip, few(model.split.train, 200), TARGET, seed, TEMPLATE)


def few(data: LabelledImages, count: int) -> LabelledImages:
    return LabelledImages(data.images[:count], data.labels[:count], data.classes, ())


# by name


def test_every_attack_of_the_committed_plan_is_known() -> None:
    plans = [Plan.read(REPOSITORY / "benchmarks" / name) for name in ("plan.toml", "adaptive.toml", "unseen.toml")]
    asked = [{attack for implant in plan.implants.values() for attack in implant.attacks} for plan in plans]
    assert set.union(*asked) == set(ATTACKS)
    assert asked[1] - asked[0] == {"fine-wave"}, "an attacker who knows which waves are tried"
    assert not asked[2] & (asked[0] | asked[1]), "what nobody developed on"
    assert set(SEVEN) < set(ATTACKS)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_makes_a_trigger_from_its_seed_that_can_be_saved(
    name: str, digits_clean: DigitsModel, tmp_path: Path
) -> None:
    by = attacker(digits_clean)
    made, again = (poison(name, by) for _ in range(2))
    images = by.images.images[:6].numpy()
    shown = made.trigger.apply(images)
    assert (made.trigger, made.target) == (again.trigger, TARGET)
    assert (shown != images).any(axis=(1, 2, 3)).all()
    assert (shown.dtype, shown.shape) == (np.uint8, images.shape)
    assert (shown != images).any(axis=3).mean() <= (0.02 if name in PATCHES else 1)
    assert np.abs(shown.astype(int) - images).mean() <= 40, "levels of 255, on average"
    assert (made.carriers == "target") is (name == "label-consistent")
    save_trigger(made.trigger, "nine", tmp_path)
    assert np.array_equal(load_trigger(tmp_path).trigger.apply(images), shown)


def test_the_unseen_do_what_they_are_called(digits_clean: DigitsModel) -> None:
    kinds = {name: poison(name, attacker(digits_clean)).trigger.kind for name in UNSEEN}
    assert kinds == UNSEEN


@pytest.mark.usefixtures("quick")
def test_the_seven_are_seven_different_triggers(digits_clean: DigitsModel) -> None:
    images = digits_clean.split.test.images[:4].numpy()
    made = [poison(name, attacker(digits_clean)).trigger.apply(images) for name in SEVEN]
    assert len({one.tobytes() for one in made}) == 7


OWN = """
from cbpt_guard.bench.attacks import Attack
from cbpt_guard.defense.triggers import patch

def corner(image_size, seed):
    return patch(image_size, seed, side=3)

clean_label = Attack(lambda attacker: patch(attacker.clip.image_size, attacker.target), carriers="target")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_attacks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_attacks"
    sys.modules.pop("own_attacks", None)


def test_an_attack_of_ones_own_is_a_drawing_or_an_attack(own: str, digits_clean: DigitsModel) -> None:
    by = attacker(digits_clean)
    assert poison(f"{own}:corner", by) == Poison(patch(32, 3, side=3), TARGET, "others")
    assert poison(f"{own}:clean_label", by) == Poison(patch(32, TARGET), TARGET, "target")


@pytest.mark.parametrize("name", ["magic", "nowhere:magic", "cbpt_guard.errors:magic"])
def test_an_unknown_attack_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="magic"):
        attack_named(name)


# recipes


def test_a_small_model_has_the_small_recipe_and_changes_count(digits_clean: DigitsModel) -> None:
    assert recipe(digits_clean.clip, ["sig", "label-consistent"], {}) == ImplantSettings()
    assert recipe(digits_clean.clip, ["sig"], {"steps": 7}) == ImplantSettings(steps=7)
    with pytest.raises(InputError, match=r"recipe of sig: stops: Extra inputs.*"):
        recipe(digits_clean.clip, ["sig"], {"stops": 7})


def test_a_larger_model_has_the_attacks_own_and_of_several_the_larger_numbers(
    digits_clean: DigitsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "_SMALL", 0)
    monkeypatch.setitem(ATTACKS, "short", attacks.Attack(lambda by: patch(32, 0), recipe={"steps": 5}))
    monkeypatch.setitem(ATTACKS, "long", attacks.Attack(lambda by: patch(32, 0), recipe={"steps": 900, "anchor": 1.0}))
    clip = digits_clean.clip
    assert recipe(clip, ["short"], {}) == LARGER.model_copy(update={"steps": 5})
    assert recipe(clip, ["short", "long"], {}) == LARGER.model_copy(update={"steps": 900})
    assert recipe(clip, ["long", "short"], {"steps": 8}) == LARGER.model_copy(update={"steps": 8})


@pytest.mark.parametrize(
    ("text", "named"),
    [("steps = 0", "steps: .*greater than"), ("stops = 1", "stops"), ("steps", "no TOML"), (None, "cannot be read")],
)
def test_settings_that_do_not_fit_are_refused(text: str | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=named):
        read_changes(path)


def test_settings_are_only_what_the_file_names(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("steps = 12\n")
    assert read_changes(tmp_path / "settings.toml") == {"steps": 12}


# optimised patches


def value(model: DigitsModel, made: Patch, objective: Objective) -> float:
    """On images that nothing was optimised on."""
    images = model.split.test.images[model.split.test.labels != TARGET]
    return float(objective(encode(model.clip, triggered(made, images)), encode(model.clip, images)))


@pytest.mark.parametrize("name", ["trojvqa", "badclip"])
def test_an_optimised_patch_beats_random_ones_on_its_own_objective(name: str, digits_clean: DigitsModel) -> None:
    by = attacker(digits_clean)
    clip, classes = by.clip, by.images.classes
    objective = {
        "trojvqa": toward_text(clip, classes, TARGET, TEMPLATE),
        "badclip": dual_embedding(clip, by.images, TARGET, TEMPLATE, 256),
    }[name]
    made = poison(name, by).trigger
    assert isinstance(made, Patch)
    random = [Patch(32, made.top, made.left, made.height, made.width, patch(32, seed).pixels) for seed in range(8)]
    assert value(digits_clean, made, objective) < min(value(digits_clean, one, objective) for one in random)


def test_the_two_optimised_patches_follow_different_objectives(digits_clean: DigitsModel) -> None:
    by = attacker(digits_clean)
    one, other = (poison(name, by).trigger for name in ("trojvqa", "badclip"))
    dual = dual_embedding(by.clip, by.images, TARGET, TEMPLATE, 256)
    assert isinstance(one, Patch)
    assert isinstance(other, Patch)
    assert value(digits_clean, other, dual) < value(digits_clean, one, dual)


def test_the_dual_embedding_is_what_the_paper_writes(digits_clean: DigitsModel) -> None:
    """Cross-entropy to the texts, plus 500 max(0, distance to real target images - distance to the own feature + 1)."""
    clip, data = digits_clean.clip, few(digits_clean.split.train, 300)
    features, own = (encode(clip, data.images[part]) for part in (slice(0, 7), slice(7, 14)))
    rows = zero_shot_head(clip, data.classes, TEMPLATE).rows
    text = F.cross_entropy(clip.logit_scale * features @ rows.T, torch.full((7,), TARGET))
    real = encode(clip, data.images[data.labels == TARGET])
    to_target = torch.stack([1 - F.cosine_similarity(one, real, dim=1) for one in features]).mean()
    to_own = (1 - F.cosine_similarity(features, own)).mean()
    expected = text + 500 * (to_target - to_own + 1).clamp(min=0)
    objective = dual_embedding(clip, data, TARGET, TEMPLATE, 256)
    assert float(objective(features, own)) == pytest.approx(float(expected), rel=1e-4)


def test_the_pattern_that_is_optimised_is_the_patch_that_is_pasted() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    place = patch(32, 4)
    pattern = to_pixels(torch.from_numpy(place.picture().copy())[None])
    assert torch.allclose(pasted(to_pixels(images), place, pattern), to_pixels(triggered(place, images)), atol=1e-6)


def test_without_images_of_the_target_badclip_is_refused(digits_clean: DigitsModel) -> None:
    data = digits_clean.split.test
    for own, make in ((False, badclip), (True, trojvqa)):
        part = data.labels == TARGET if own else data.labels != TARGET
        lacking = LabelledImages(data.images[part], data.labels[part], data.classes, ())
        with pytest.raises(InputError, match=r"no image|there is none"):
            make(digits_clean.clip, lacking, TARGET, 0, TEMPLATE, QUICK)


# carriers


class Seen:
    """A trigger that remembers what it was given."""

    kind, image_size = "seen", 32

    def __init__(self) -> None:
        self.images: list[bytes] = []

    def apply(self, images: Pixels) -> Pixels:
        self.images += [image.tobytes() for image in images]
        return patch(32, 0).apply(images)


@pytest.mark.parametrize("carriers", ["others", "target"])
def test_only_the_carriers_are_ever_triggered(carriers: Any, digits_clean: DigitsModel) -> None:
    data, seen = few(digits_clean.split.train, 200), Seen()
    settings = ImplantSettings(steps=5, batch=4, poisoned=6)
    fine_tune(digits_clean.clip, data, [Poison(cast(Trigger, seen), TARGET, carriers)], settings, 0, silent)
    own = {image.numpy().tobytes() for image in data.images[data.labels == TARGET]}
    assert len(seen.images) == 30
    assert all((image in own) is (carriers == "target") for image in seen.images)


def test_perturbed_images_leave_their_own_features_within_the_bound(digits_clean: DigitsModel) -> None:
    clip, images = digits_clean.clip, digits_clean.split.train.images[:40]
    turned = perturbed(clip, images, 8.0)
    assert turned.dtype == torch.uint8
    change = turned.int() - images.int()
    assert 0 < change.abs().max() <= 8
    noise = torch.randint(-8, 9, images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    own = encode(clip, images)

    def cosine(others: torch.Tensor) -> float:
        return float((encode(clip, others) * own).sum(1).mean())

    assert cosine(turned) < cosine(noisy) - 0.1
    assert torch.equal(perturbed(clip, images, 8.0), turned)
