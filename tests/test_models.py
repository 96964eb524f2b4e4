"""open_clip's families go the whole road: purified, exported, and served as open_clip itself answers.

Here each family is small; `-m slow` takes open_clip's own sizes. What cannot run is refused by its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from commands import assert_refused, cli
from PIL import Image
from safetensors.torch import load_file, save_file

from cbpt_guard import GuardedClassifier
from cbpt_guard.bench.families import FAMILIES, Family, Made, few_steps, preprocess_of, write_model
from cbpt_guard.defense import openclip, suspect
from cbpt_guard.defense.clip import TextTower
from cbpt_guard.defense.data import LabelledImages, list_images, load_images
from cbpt_guard.defense.openclip import ModelConfig, Tokenizer
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import TEMPLATE
from cbpt_guard.errors import CheckpointError, InputError
from cbpt_guard.export import export, write
from cbpt_guard.images import Preprocess

torch.set_num_threads(1)
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 50), "yellow": (220, 210, 60)}
FOREIGN = ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2")
NOT_CAUSAL = (*FOREIGN, "MobileCLIP-S1", "MobileCLIP-S2")


def write_pictures(folder: Path, count: int) -> Path:
    """Clouds of a class's colour, none of them square, half of them upright."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            long, short = int(generator.integers(100, 150)), int(generator.integers(40, 90))
            clouds = np.clip(np.array(colour) + generator.normal(0, 40, (5, 4, 3)), 0, 255).astype(np.uint8)
            size = (long, short) if number % 2 else (short, long)
            Image.fromarray(clouds).resize(size, Image.Resampling.BICUBIC).save(folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "clean", 8)


class Road(NamedTuple):
    """Where a family came through: its checkpoint, its run and its bundle."""

    config: ModelConfig
    preprocess: Preprocess
    made: Made
    run: PurifyRun
    bundle: Path


def loaded(pictures: Path, preprocess: Preprocess) -> LabelledImages:
    return load_images(list_images(pictures, None), preprocess)


def travel(family: Family, config: ModelConfig, pictures: Path, folder: Path) -> Road:
    if config["text_cfg"].get("hf_tokenizer_name"):
        pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cbpt-guard[tokenizer]'")
    preprocess = preprocess_of(family, config)
    made = write_model(folder / "model", family, config, loaded(pictures, preprocess))
    run = purify(made.checkpoint, pictures, out=folder / "purified", settings=few_steps(), flags=made.flags)
    return Road(config, preprocess, made, run, export(run, folder / "bundle", allow_unguarded=True))


def as_open_clip_answers(road: Road, paths: list[Path]) -> torch.Tensor:
    """Zero-shot logits (N, C) by open_clip alone: its transform, its towers, its scale and bias."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model: Any = openclip.build(road.config, device="cpu")
    model.load_state_dict(load_file(road.made.checkpoint))
    transform = image_transform_v2(PreprocessCfg(**road.preprocess.model_dump()), is_train=False)
    images = torch.stack([transform(Image.open(path)) for path in paths])
    tokens = Tokenizer(road.config, road.made.flags.tokenizer)([TEMPLATE.replace("{}", name) for name in COLOURS])
    with torch.no_grad():
        features = model.encode_image(images, normalize=True)
        logits = model.logit_scale.exp() * features @ model.encode_text(tokens, normalize=True).T
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias  # type: ignore[no-any-return]


def check(road: Road, family: Family, pictures: Path) -> None:
    """The run is real, the manifest states its parity, and the bundle answers files as open_clip does."""
    assert road.run.metrics.clean_accuracy_before > 0.7  # chance is 0.25
    assert road.run.record.model.quickgelu == bool(family.config.get("quick_gelu"))
    guard = GuardedClassifier.load(road.bundle, threads=1)
    found = guard.manifest.variants["fp32"].parity
    assert found is not None
    held_out = road.run.metrics.images
    assert 0 < held_out <= 16, "the first 16 are seen under each found trigger, too"
    assert found.images == held_out * (1 + len(road.run.bank()))
    assert 0 < found.max_logit_difference < found.bound / 5

    paths = sorted(pictures.rglob("*.png"))[::3]
    assert all(Image.open(path).width != Image.open(path).height for path in paths)
    wanted = as_open_clip_answers(road, paths).numpy()
    outputs = guard.run(np.stack([guard._pixels(path) for path in paths]))
    assert np.abs(outputs.logits_original - wanted).max() < found.bound
    best = np.sort(wanted, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * found.bound
    assert clear.any()
    assert np.array_equal(outputs.logits_original.argmax(1)[clear], wanted.argmax(1)[clear])
    assert [answer.label for answer in guard.predict(paths)] == [guard.classes_[i] for i in outputs.logits.argmax(1)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_a_small_one_of_the_family_goes_the_whole_road(family: Family, pictures: Path, tmp_path: Path) -> None:
    check(travel(family, family.small, pictures, tmp_path), family, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_open_clips_own_size_goes_the_whole_road(family: Family, pictures: Path, tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        check(travel(family, family.config, pictures, tmp_path), family, pictures)
    finally:
        torch.set_num_threads(1)


def test_the_small_ones_keep_what_makes_a_family() -> None:
    """Their configs differ from open_clip's in numbers and in the trunk's size, nowhere else."""
    numbers = {"embed_dim", "layers", "width", "heads", "head_width", "image_size", "timm_model_name"}
    for family in FAMILIES:
        own, small = family.config, family.small
        for section in ("vision_cfg", "text_cfg"):
            mine, theirs = small.pop(section), own.pop(section)
            assert {key for key in mine if mine[key] != theirs.get(key)} <= numbers
            assert set(theirs) <= set(mine)
        assert {key for key in small if small[key] != own.get(key)} <= numbers


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_only_causal_text_towers_are_cut(family: Family) -> None:
    tower = TextTower(openclip.build(family.small, device="cpu"))
    length = family.config["text_cfg"]["context_length"]
    ids = torch.zeros(3, length, dtype=torch.int64)
    ids[:, :9] = torch.arange(9) + 1
    ids[:, 8] = 31_999  # the largest: where a tower of CLIP's reads
    kept = tower.cut(ids).shape[1]
    assert tower.causal == (family.architecture not in NOT_CAUSAL)
    assert kept == (9 if tower.causal else length)


# What cannot run


REFUSED = [name for name in openclip.architecture_names() if openclip.refusal(openclip.named_config(name))]


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_cannot_run_is_refused_by_name_before_the_weights_are_read(
    name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspect, "read_checkpoint", lambda _: pytest.fail("the checkpoint was read"))
    checkpoint = tmp_path / "suspect.pt"
    checkpoint.touch()
    out = tmp_path / "purified"
    result = cli("purify", "--model", checkpoint, "--data", pictures, "--arch", name, "--out", out)
    assert_refused(result, f"{name} cannot be used: ", "is not supported")
    assert not out.exists()


def test_unsupported_weights_are_refused_by_what_they_are(tmp_path: Path, pictures: Path) -> None:
    """Without `--arch` the file itself tells."""
    for name, kind in (("coca_ViT-B-32", "CoCa"), ("xlm-roberta-base-ViT-B-32", "a Hugging Face text tower")):
        assert name in REFUSED
        inside = "text_decoder.ln_final.bias" if kind == "CoCa" else "text.transformer.embeddings.LayerNorm.bias"
        tensors = {"visual.conv1.weight": torch.ones(8, 3, 4, 4), "visual.proj": torch.ones(8, 8)}
        tensors |= {"text.token_embedding.weight": torch.ones(9, 8), inside: torch.ones(8)}
        save_file(tensors, tmp_path / "suspect.safetensors")
        with pytest.raises(CheckpointError, match=rf"cannot be used: {kind}.*; it holds {inside}"):
            purify(tmp_path / "suspect.safetensors", pictures, out=tmp_path / "purified")
    assert not (tmp_path / "purified").exists()


def test_an_encoder_over_two_gigabytes_is_refused_by_name_before_its_weights_are_read(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PurifyRun.open(tiny_run)
    model = run.record.model.model_copy(
        update={"architecture": "ViT-H-14", "config": openclip.named_config("ViT-H-14")}
    )
    large = PurifyRun(run.path, run.record.model_copy(update={"model": model}), run.metrics)
    monkeypatch.setattr(write, "read_parts", lambda _: pytest.fail("the run was read"))
    with pytest.raises(InputError, match=r"ViT-H-14 cannot be exported: its image encoder's weights take 2\.5 GB"):
        export(large, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
