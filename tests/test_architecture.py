"""The architecture and what a file cannot tell: resolved by one rule, or refused with the flag's name."""

from __future__ import annotations

import copy
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clips import PREPROCESS_CFG, RESNET, VIT, weights, with_vocabulary
from torch import Tensor

from cbpt_guard.defense import matching, modelconfig, openclip
from cbpt_guard.defense.architecture import BESIDE, Accuracy, ModelSpec, resolve_model
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.untrusted.checkpoint import ReadCheckpoint, read_checkpoint
from cbpt_guard.errors import CbptGuardError, CheckpointError, InputError
from cbpt_guard.images import Preprocess

torch.set_num_threads(1)
CLIP = with_vocabulary(VIT)


def checkpoint(tensors: dict[str, Tensor], quickgelu: bool | None = None, **config: Any) -> ReadCheckpoint:
    """A checkpoint as if it had been read, with `config` as the file beside it."""
    return ReadCheckpoint(tensors, "state dict", "0" * 64, 1, "suspect.pt", config or None, quickgelu, ())


def on_meta(name: str) -> dict[str, Tensor]:
    return dict(openclip.build(openclip.named_config(name)).state_dict())


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return weights(CLIP)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("ViT-B-32", ["ViT-B-32", "ViT-B-32-quickgelu"]),
        ("RN50", ["RN50", "RN50-quickgelu"]),
        ("ViT-B-16-plus-240", ["ViT-B-16-plus-240"]),
        ("ViT-B-16-SigLIP", ["ViT-B-16-SigLIP"]),
        ("convnext_base_w", ["convnext_base_w", "convnext_base_w_320"]),
        ("MobileCLIP-S2", ["MobileCLIP-S2", "MobileCLIP2-S2"]),
        ("ViT-SO400M-14-SigLIP-378", ["ViT-SO400M-14-SigLIP-378", "ViT-SO400M-14-SigLIP-384"]),
    ],
)
def test_inference_from_shapes(name: str, group: list[str]) -> None:
    found = on_meta(name)
    start = time.monotonic()
    assert sorted(matching.candidates(found)) == group
    assert time.monotonic() - start < 20


def test_inference_does_not_mind_the_text_prefix() -> None:
    old = {name.removeprefix("text."): value for name, value in on_meta("ViT-B-16-plus-240").items()}
    new = {f"text.{name}" if not name.startswith(("visual", "logit")) else name: value for name, value in old.items()}
    assert list(matching.candidates(old)) == list(matching.candidates(new)) == ["ViT-B-16-plus-240"]


def test_a_missing_key_names_the_nearest_architecture() -> None:
    found = on_meta("ViT-B-32")
    del found["visual.ln_post.bias"]
    with pytest.raises(CheckpointError, match=r"nearest is ViT-B-32[-a-z]*: missing: visual\.ln_post\.bias\."):
        matching.candidates(found)


def test_another_shape_names_the_nearest_architecture() -> None:
    found = on_meta("RN50")
    found["visual.attnpool.positional_embedding"] = torch.empty(82, 2048, device="meta")
    with pytest.raises(CheckpointError, match=r"nearest is RN50.*positional_embedding \(82, 2048\) instead of"):
        matching.candidates(found)


def test_a_weight_that_the_tower_does_not_know_means_another_architecture() -> None:
    found = on_meta("ViT-B-32")
    found["visual.transformer.resblocks.0.ls_1.gamma"] = torch.empty(768, device="meta")
    with pytest.raises(CheckpointError, match=r"unknown: visual\.transformer\.resblocks\.0\.ls_1\.gamma"):
        matching.candidates(found)


def test_what_is_no_clip_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"no CLIP.*fc\.weight"):
        matching.candidates({"fc.weight": torch.ones(2, 2)})


def test_fits_that_differ_in_heads_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(VIT)
    other["text_cfg"]["heads"] = 4
    monkeypatch.setattr(
        matching, "_usable_configs", lambda: {"one": VIT, "two": other, "one-again": {**VIT, "quick_gelu": True}}
    )
    with pytest.raises(InputError, match=r"\(one = one-again; two\); name one with `--arch`"):
        matching.candidates(weights(VIT))


def test_config_beside_the_file_settles_everything(tensors: dict[str, Tensor]) -> None:
    spec = resolve_model(checkpoint(tensors, model_cfg=CLIP, preprocess_cfg=PREPROCESS_CFG))
    assert spec.config == {**CLIP, "quick_gelu": False}
    assert spec.preprocess.model_dump() == {
        "size": 32,
        "resize_mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    assert set(spec.resolved) == {"architecture", "quickgelu", "preprocess", "tokenizer"}
    assert {spec.resolved[name] for name in ("architecture", "quickgelu", "preprocess")} == {BESIDE}


def test_flags_come_before_the_config_beside(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pre.json"
    file.write_text(json.dumps({"mean": [0, 0, 0], "std": [1, 1, 1]}), encoding="utf-8")
    read = checkpoint(tensors, model_cfg=CLIP, preprocess_cfg=PREPROCESS_CFG)
    spec = resolve_model(read, quickgelu=True, preprocess=str(file), tokenizer=tmp_path)
    assert spec.config["quick_gelu"] is spec.quickgelu is True
    assert (spec.preprocess.std, spec.preprocess.resize_mode) == ((1.0, 1.0, 1.0), "shortest")
    assert spec.tokenizer == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(read, quickgelu=True, preprocess=str(file), tokenizer=Path("open_clip")).tokenizer == str(
        tmp_path / "open_clip"
    ), "a folder of that name is not open_clip's own tokenizer"
    assert spec.resolved["quickgelu"] == "--quickgelu"
    assert spec.resolved["preprocess"] == "--preprocess pre.json"


def test_arch_takes_a_file_bare_or_wrapped(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for content in (CLIP, {"model_cfg": CLIP}):
        file = tmp_path / "own.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        spec = resolve_model(checkpoint(tensors), arch=str(file), preprocess="siglip")
        assert spec.resolved["architecture"] == spec.resolved["quickgelu"] == "--arch own.json"
        assert (spec.preprocess.size, spec.preprocess.resize_mode) == (32, "squash")


@pytest.mark.parametrize(("arch", "open_quantity"), [("ViT-B-32", True), ("ViT-B-32-quickgelu", False)])
def test_a_name_with_a_twin_leaves_the_activation_open(arch: str, open_quantity: bool) -> None:
    read = checkpoint(on_meta("ViT-B-32"))
    if open_quantity:
        with pytest.raises(InputError, match=r"quickgelu \(GELU, QuickGELU\): set `--quickgelu` or `--no-quickgelu`"):
            resolve_model(read, arch=arch, preprocess="openai")
    else:
        assert resolve_model(read, arch=arch, preprocess="openai").resolved["quickgelu"] == "--arch"


def test_the_torchscript_class_settles_the_activation() -> None:
    spec = resolve_model(checkpoint(on_meta("ViT-B-32"), quickgelu=True), preprocess="openai")
    assert spec.architecture == "ViT-B-32-quickgelu"
    assert "TorchScript" in spec.resolved["quickgelu"]


def test_without_preprocess_cfg_nothing_is_guessed(tensors: dict[str, Tensor]) -> None:
    for preprocess_cfg in ({}, {"mean": [0.5, 0.5, 0.5]}, {"resize_mode": "squash"}):
        with pytest.raises(InputError, match=r"preprocess \(openai, siglip, .*set `--preprocess`"):
            resolve_model(checkpoint(tensors, model_cfg=CLIP, preprocess_cfg=preprocess_cfg))


def test_an_early_preprocess_cfg_means_the_defaults_and_says_so(tensors: dict[str, Tensor]) -> None:
    early = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    spec = resolve_model(checkpoint(tensors, model_cfg=CLIP, preprocess_cfg=early))
    assert (spec.preprocess.resize_mode, spec.preprocess.interpolation) == ("shortest", "bicubic")
    assert "open_clip's defaults for the rest" in spec.resolved["preprocess"]


def test_accuracy_decides_when_one_leads_by_two_standard_errors() -> None:
    def judge(spec: ModelSpec) -> Accuracy:
        value = 0.6 if spec.quickgelu else 0.3
        return Accuracy(value - (0.0 if spec.preprocess.std[0] == 1 else 0.1), 1000)

    spec = resolve_model(checkpoint(on_meta("ViT-B-32")), judge=judge)
    assert (spec.architecture, spec.quickgelu, spec.preprocess.std) == ("ViT-B-32-quickgelu", True, (1, 1, 1))
    assert spec.resolved["quickgelu"] == "clean accuracy: GELU 30.0 %, QuickGELU 60.0 %"


@pytest.mark.parametrize(("lead", "decides"), [(0.046, True), (0.043, False)])
def test_two_standard_errors_of_the_difference_are_needed(lead: float, decides: bool) -> None:
    """At 1,000 images around a half one standard error of a difference is 2.24 points."""

    def judge(spec: ModelSpec) -> Accuracy:
        return Accuracy(0.5 + (lead / 2 if spec.quickgelu else -lead / 2), 1000)

    read = checkpoint(on_meta("ViT-B-32"))
    if decides:
        assert resolve_model(read, preprocess="openai", judge=judge).quickgelu
    else:
        with pytest.raises(InputError, match="clean accuracy"):
            resolve_model(read, preprocess="openai", judge=judge)


def test_few_images_never_look_certain() -> None:
    """All of ten right against seven of ten: without smoothing the first would have no error at all."""
    sure, middling = Accuracy(1.0, 10), Accuracy(0.5, 10)
    assert sure.variance == pytest.approx(11 / 12 * 1 / 12 / 10)
    assert middling.variance == pytest.approx(0.025)


def test_accuracy_that_does_not_decide_stops_with_the_numbers() -> None:
    def judge(spec: ModelSpec) -> Accuracy:
        return Accuracy(0.52 if spec.quickgelu else 0.5, 1000)

    with pytest.raises(InputError, match=r"`--quickgelu` or `--no-quickgelu`; clean accuracy: GELU 50\.0 %, QuickG"):
        resolve_model(checkpoint(on_meta("ViT-B-32")), preprocess="openai", judge=judge)


def test_image_size_that_shapes_do_not_show_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"architecture \(256 px, 320 px\): set `--arch` \(convnext_base_w, conv"):
        resolve_model(checkpoint(on_meta("convnext_base_w")), preprocess="openai")
    spec = resolve_model(checkpoint(on_meta("convnext_base_w")), arch="convnext_base_w_320", preprocess="openai")
    assert spec.preprocess.size == spec.config["vision_cfg"]["image_size"] == 320


def test_foreign_tokenizers_are_asked_for(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    read = checkpoint(on_meta("ViT-B-16-SigLIP"))
    with pytest.raises(InputError, match=r"timm/ViT-B-16-SigLIP.*`--tokenizer FOLDER`"):
        resolve_model(read, preprocess="siglip")
    assert resolve_model(read, preprocess="siglip", tokenizer=tmp_path).tokenizer == str(tmp_path)
    with pytest.raises(InputError, match=r"has 64 words.*`--tokenizer FOLDER`"):
        resolve_model(checkpoint(weights(VIT), model_cfg=VIT, preprocess_cfg=PREPROCESS_CFG))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"arch": "ViT-B-33"}, "no architecture 'ViT-B-33'"),
        ({"arch": "absent.json"}, "absent.json is not a file"),
        ({"arch": "roberta-ViT-B-32"}, "a Hugging Face text tower"),
        ({"arch": "coca_base"}, "CoCa"),
        ({"arch": "ViT-B-32"}, "the weights do not fit the architecture"),
        ({"preprocess": "nothing"}, "neither a file nor one of openai"),
    ],
)
def test_flags_of_no_use(flags: dict[str, str], reason: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=reason):
        resolve_model(checkpoint(tensors, model_cfg=CLIP), **flags)  # type: ignore[arg-type]


def hostile(**vision: Any) -> dict[str, Any]:
    config = copy.deepcopy(CLIP)
    config["vision_cfg"].update(vision)
    return config


def with_text(**text: object) -> dict[str, Any]:
    return {**CLIP, "text_cfg": {**CLIP["text_cfg"], **text}}


def asking(**options: object) -> dict[str, Any]:
    return with_text(tokenizer_kwargs=options)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-H-14-CLIPA", "ViT-B-16-SigLIP2", "ViT-B-32"])
def test_what_published_configs_ask_of_a_tokenizer_is_let_through(name: str) -> None:
    assert modelconfig.checked_model(openclip.named_config(name))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hostile(layers=10**9), "layers in model_cfg is 1000000000"),
        (hostile(width=float("nan")), "width in model_cfg is nan"),
        (hostile(image_size=[32, 64]), "images must be square"),
        (hostile(image_size=10**6), "image_size in model_cfg"),
        (hostile(patch_size="x"), "patch_size in model_cfg must be a number"),
        (hostile(patch_size=[16, 16]), "patch_size in model_cfg must be a number"),
        (hostile(width={"a": 1}), "width in model_cfg must be a number"),
        (asking(bpe_path="/etc/hostname"), "tokenizer_kwargs asks for what no published config does"),
        (asking(reduction_mask="syntax"), "tokenizer_kwargs asks"),
        (asking(clean="own"), "tokenizer_kwargs asks"),
        (asking(context_length=5), "tokenizer_kwargs asks"),
        (with_text(tokenizer_kwargs="abc"), "tokenizer_kwargs asks"),
        (with_text(context_length=None), "context_length is no number"),
        (with_text(context_length=True), "context_length is no number"),
        (hostile(timm_model_name="hf-hub:evil/model"), "remote or local path"),
        (hostile(timm_model_name="no_such_model"), "cannot build this architecture"),
        (hostile(head_width=0), "cannot build this architecture"),
        (
            hostile(image_size=2048, patch_size=1, pos_embed_type="sin_cos_2d"),
            "position embedding that no real",
        ),
        (hostile(surprise=1), "cannot build this architecture"),
        (hostile(act_kwargs={"a": {"b": {"c": {"d": 1}}}}), "nested too deeply"),
        ({"vision_cfg": {}}, "a config needs embed_dim"),
        (
            {**CLIP, "text_cfg": {**CLIP["text_cfg"], "hf_model_name": "evil/tower"}},
            "a Hugging Face text tower",
        ),
    ],
)
def test_hostile_configs(config: dict[str, Any], reason: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=reason):
        resolve_model(checkpoint(tensors, model_cfg=config, preprocess_cfg=PREPROCESS_CFG))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"std": [0, 1, 1]}, "std must be above 0"),
        ({"mean": [float("nan"), 0, 0]}, "preprocessing"),
        ({"mean": [0, 0]}, "preprocessing: mean"),
        ({"resize_mode": "longest"}, "preprocessing: resize_mode"),
        ({"interpolation": "random"}, "preprocessing: interpolation"),
    ],
)
def test_hostile_preprocessing(change: dict[str, Any], reason: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=reason):
        resolve_model(checkpoint(tensors, model_cfg=CLIP, preprocess_cfg={**PREPROCESS_CFG, **change}))


def test_a_preprocess_file_for_another_size(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "pre.json"
    file.write_text(json.dumps({"mean": [0, 0, 0], "std": [1, 1, 1], "size": 224}), encoding="utf-8")
    with pytest.raises(CbptGuardError, match="for 224 px, but the architecture takes 32 px"):
        resolve_model(checkpoint(tensors, model_cfg=CLIP), preprocess=str(file))


def test_fit_never_makes_up_a_weight(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        lacking = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=f"missing: {name};"):
            matching.fit(lacking, CLIP)


def test_fit_adapts_as_open_clip_does(tensors: dict[str, Tensor]) -> None:
    custom = {**CLIP, "custom_text": True, "init_logit_bias": -10.0, "nonscalar_logit_scale": True}
    fitted = matching.fit({**tensors, "classifier.weight": torch.ones(2)}, custom)
    openclip.build(custom, device="cpu").load_state_dict(fitted.tensors)
    assert torch.equal(fitted.tensors["text.ln_final.weight"], tensors["ln_final.weight"])
    assert fitted.tensors["logit_scale"].shape == (1,)
    assert fitted.tensors["logit_bias"].tolist() == [0.0]
    assert any("logit_bias" in note for note in fitted.notes)
    assert any("classifier.weight" in note for note in fitted.notes)


def test_resnet_round_trip() -> None:
    config = with_vocabulary(RESNET)
    found = weights(config)
    assert set(matching.fit(found, config).tensors) == set(found)


@pytest.mark.parametrize(("scale", "taken"), [(1000.0, True), (1001.0, False), (float("inf"), False)])
def test_a_logit_scale_that_no_clip_learns_is_refused(tensors: dict[str, Tensor], scale: float, taken: bool) -> None:
    """With a larger one the logit of a class that the rule leaves out might be the largest after all."""
    forged = {**tensors, "logit_scale": torch.tensor(scale).log() - 1e-6}
    preprocess = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with nullcontext() if taken else pytest.raises(CheckpointError, match="is no CLIP's"):
        FrozenClip(forged, CLIP, preprocess, openclip.Tokenizer(CLIP))


@pytest.mark.parametrize(("bias", "taken"), [(-17.0, True), (-1001.0, False), (float("nan"), False)])
def test_a_logit_bias_that_no_clip_learns_is_refused(bias: float, taken: bool) -> None:
    """With -20,000 the class that the rule leaves out would be the answer."""
    config = {**CLIP, "init_logit_bias": -10.0}
    forged = openclip.build(config, device="cpu").state_dict() | {"logit_bias": torch.tensor(bias)}
    preprocess = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with nullcontext() if taken else pytest.raises(CheckpointError, match=r"logit bias of .* is no CLIP's"):
        FrozenClip(forged, config, preprocess, openclip.Tokenizer(CLIP))


def test_shared_suspect_fits_its_config(shared: Path) -> None:
    read = read_checkpoint(shared / "models" / "suspect-badnet" / "suspect.pt")
    spec = resolve_model(read)
    assert (spec.preprocess.size, spec.preprocess.mean) == (128, (0.5, 0.5, 0.5))
    clip = FrozenClip(
        matching.fit(read.tensors, spec.config).tensors,
        spec.config,
        spec.preprocess,
        openclip.Tokenizer(spec.config),
    )
    assert clip.encode_texts(["a photo of a banana."]).shape == (1, 256)
    without = ReadCheckpoint(**{**vars(read), "folder_config": None})
    with pytest.raises(CheckpointError, match="no architecture of open_clip"):
        resolve_model(without)
