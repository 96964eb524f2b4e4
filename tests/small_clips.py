"""Small CLIPs of every layout that is read, drawn from a seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbpt_guard.defense import openclip

VIT: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
RESNET: dict[str, Any] = {
    **VIT,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
}
PREPROCESS_CFG = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def with_vocabulary(config: dict[str, Any], size: int = 49408) -> dict[str, Any]:
    """The same architecture with another vocabulary, by default open_clip's."""
    changed = copy.deepcopy(config)
    changed["text_cfg"]["vocab_size"] = size
    return changed


def model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A CLIP with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return openclip.build(config, device="cpu")


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Its state dict as a plain dict."""
    return dict(model(config, seed).state_dict())


def save(content: object, path: Path, **options: Any) -> Path:
    """torch.save, with the path handed back."""
    torch.save(content, path, **options)
    return path


def hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's ViT weights under the names of Hugging Face's CLIPModel."""
    renamed: dict[str, Tensor] = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    for name, value in tensors.items():
        if name in ("text_projection", "visual.proj"):
            side = "text" if name == "text_projection" else "visual"
            renamed[f"{side}_projection.weight"] = value.T.contiguous()
        elif ".in_proj_" in name:
            start, kind = name.split(".in_proj_")
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{_hf(start)}.{part}_proj.{kind}"] = chunk
        else:
            renamed[_hf(name)] = value
    return renamed


def _hf(name: str) -> str:
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    name = name.removeprefix("visual.")
    if name == "logit_scale":
        return name
    for ours, theirs in (
        ("transformer.resblocks", "encoder.layers"),
        ("attn", "self_attn"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("c_fc", "fc1"),
        ("c_proj", "fc2"),
        ("ln_final", "final_layer_norm"),
        ("ln_pre", "pre_layrnorm"),
        ("ln_post", "post_layernorm"),
        ("class_embedding", "embeddings.class_embedding"),
        ("conv1", "embeddings.patch_embedding"),
        ("token_embedding", "embeddings.token_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
    ):
        name = name.replace(ours, theirs)
    return f"{tower}.{name}"
