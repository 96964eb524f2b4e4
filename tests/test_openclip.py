"""The one module that knows open_clip: names, builds without memory, refusals, tokenizers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clips import RESNET, VIT

from cbpt_guard.bench.words import write_tokenizer
from cbpt_guard.defense import openclip
from cbpt_guard.errors import CheckpointError, InputError


@pytest.mark.parametrize("config", [VIT, RESNET, {**VIT, "custom_text": True}])
def test_a_build_on_meta_has_the_shapes_of_a_real_one(config: dict[str, Any]) -> None:
    meta = openclip.build(config).state_dict()
    real = openclip.build(config, device="cpu").state_dict()
    assert {name: (value.shape, value.dtype) for name, value in meta.items()} == {
        name: (value.shape, value.dtype) for name, value in real.items()
    }
    assert all(value.is_meta for value in meta.values())
    assert not any(value.is_meta for value in real.values())


def test_a_real_build_is_initialised_and_frozen() -> None:
    model = openclip.build(VIT, device="cpu")
    assert not model.training
    assert all(value.isfinite().all() and not value.requires_grad for value in model.parameters())
    assert model.state_dict()["visual.conv1.weight"].std() > 0


def test_a_build_leaves_the_config_alone() -> None:
    config = json.loads(json.dumps({**VIT, "custom_text": True}))
    before = json.dumps(config)
    openclip.build(config)
    assert json.dumps(config) == before


def test_named_configs() -> None:
    assert "ViT-B-32" in openclip.architecture_names()
    assert openclip.named_config("ViT-B-32")["embed_dim"] == 512
    with pytest.raises(InputError, match="no architecture 'ViT-B-33'"):
        openclip.named_config("ViT-B-33")


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("text_cfg", {"hf_model_name": "evil/tower"}, "Hugging Face text tower"),
        ("text_cfg", {"embed_cls": True}, "class token"),
        ("vision_cfg", {"output_tokens": True}, "gives its tokens"),
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/trunk"}, "remote or local path"),
        ("vision_cfg", {"timm_model_name": "local-dir:x"}, "remote or local path"),
        ("vision_cfg", {"timm_model_name": "a/b"}, "remote or local path"),
    ],
)
def test_refusals_come_before_any_build(part: str, change: dict[str, Any], reason: str) -> None:
    config = {**VIT, part: {**VIT[part], **change}}
    assert reason in str(openclip.refusal(config))
    with pytest.raises(CheckpointError, match=reason):
        openclip.build(config)


def test_a_config_never_brings_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_download(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("timm.models._builder.load_pretrained", no_download)
    vision = {"timm_model_name": "mobilenetv2_050", "timm_model_pretrained": True, "image_size": 32}
    openclip.build({**VIT, "vision_cfg": vision})
    assert vision["timm_model_pretrained"] is True  # the caller's config stays as it is


def test_own_tokenizer_pads_to_the_context() -> None:
    ids = openclip.Tokenizer(VIT)(["a dog", "a photo of a very long sentence " * 9])
    assert ids.shape == (2, 16)
    assert ids.dtype == torch.int64
    assert ids[0, 0] == 49406
    assert ids[0].max() == ids[1].max() == 49407


def test_code_in_a_tokenizer_folder_does_not_run(tmp_path: Path) -> None:
    """transformers would import what `auto_map` names, if it were allowed to."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cbpt-guard[tokenizer]'")
    folder, canary = write_tokenizer(tmp_path / "words", ["dog"], "a {}."), tmp_path / "canary"
    (folder / "own.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n", encoding="utf-8"
    )
    named = json.loads((folder / "tokenizer_config.json").read_text())
    named |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    foreign = {**VIT, "text_cfg": {**VIT["text_cfg"], "hf_tokenizer_name": "some/tokenizer"}}
    with contextlib.suppress(InputError):  # refused or read without its code: either will do
        openclip.Tokenizer(foreign, folder)
    assert not canary.exists()
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    assert canary.exists(), "the folder is harmless and shows nothing"


def test_foreign_tokenizers_need_a_folder(tmp_path: Path) -> None:
    foreign = {**VIT, "text_cfg": {**VIT["text_cfg"], "hf_tokenizer_name": "some/tokenizer"}}
    with pytest.raises(InputError, match="`--tokenizer FOLDER`"):
        openclip.Tokenizer(foreign)
    with pytest.raises(InputError, match="is not a folder"):
        openclip.Tokenizer(foreign, tmp_path / "absent")
    with pytest.raises(InputError, match=r"no usable tokenizer|cbpt-guard\[tokenizer\]"):
        openclip.Tokenizer(foreign, tmp_path)
