"""Foreign names of the same weights: wrappers' prefixes, OpenAI's extras, Hugging Face's CLIPModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cbpt_guard.errors import CheckpointError

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
_WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")

_HF_RENAMES = (
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (
        r"vision_model\.pre_lay(?:er|r)norm\.(\w+)",
        r"visual.ln_pre.\1",
    ),  # Hugging Face's own spelling lacks an e
    (r"vision_model\.post_layernorm\.(\w+)", r"visual.ln_post.\1"),
    (r"logit_scale", "logit_scale"),
)
_HF_BLOCK = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_HF_BLOCK_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_HF_IGNORED = re.compile(r"(text|vision)_model\.embeddings\.position_ids")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class Converted(NamedTuple):
    """Tensors under open_clip's names, the layout they came in (None: its own), and what was changed."""

    tensors: dict[str, Tensor]
    layout: str | None
    notes: tuple[str, ...]


def to_open_clip(tensors: Mapping[str, Tensor]) -> Converted:
    """Rename a state dict to open_clip's names; values are fused or transposed, never invented.

    Raises:
        CheckpointError: the layout is another library's that cannot be converted, or names collide.
    """
    stripped, notes = _without_wrappers(tensors)
    if any(name.startswith("vision_model.") for name in stripped):
        converted = _from_hugging_face(stripped)
        return Converted(converted, "Hugging Face CLIPModel", (*notes, "converted from Hugging Face's names"))
    if any(name.startswith("image_encoder.model.") for name in stripped):
        raise CheckpointError(
            "this is Apple's own MobileCLIP layout; load it once with open_clip where you trust it and save "
            "`model.state_dict()`"
        )
    extras = [name for name in _OPENAI_EXTRAS if name in stripped]
    if extras:
        notes = (*notes, f"dropped OpenAI's {', '.join(extras)}")
    return Converted({name: value for name, value in stripped.items() if name not in extras}, None, notes)


def _without_wrappers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    stripped: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = _WRAPPER_PREFIX.sub("", name).replace("._orig_mod.", ".")
        if plain in stripped or f"text.{plain}" in stripped or plain.removeprefix("text.") in stripped:
            raise CheckpointError(f"it holds {plain} twice, with and without a prefix")
        stripped[plain] = value
    changed = sum(name not in tensors for name in stripped)
    return stripped, (f"removed a wrapper's prefix from {changed} names",) if changed else ()


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if _HF_IGNORED.fullmatch(name):
            continue
        if name in _HF_PROJECTIONS and value.ndim == 2:
            converted[_HF_PROJECTIONS[name]] = value.T.contiguous()
            continue
        block = _HF_BLOCK.fullmatch(name)
        if block is not None and block[3] in _QKV:
            target = f"{_blocks(block[1])}.{block[2]}.attn.in_proj_{block[4]}"
            fused.setdefault(target, {})[block[3]] = value
            continue
        converted[_hf_name(name)] = value
    return converted | {target: _fuse(target, parts) for target, parts in fused.items()}


def _blocks(tower: str) -> str:
    return "transformer.resblocks" if tower == "text" else "visual.transformer.resblocks"


def _hf_name(name: str) -> str:
    block = _HF_BLOCK.fullmatch(name)
    if block is not None and block[3] in _HF_BLOCK_PARTS:
        return f"{_blocks(block[1])}.{block[2]}.{_HF_BLOCK_PARTS[block[3]]}.{block[4]}"
    for pattern, replacement in _HF_RENAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise CheckpointError(
        f"{name} is no part of Hugging Face's CLIPModel; its other models (SigLIP, AltCLIP ...) cannot be "
        "converted: save the open_clip version of the model"
    )


def _fuse(target: str, parts: Mapping[str, Tensor]) -> Tensor:
    missing = [part for part in _QKV if part not in parts]
    if missing or len({value.shape for value in parts.values()}) > 1:
        raise CheckpointError(f"cannot build {target}: {', '.join(missing) or 'q, k and v differ in shape'}")
    return torch.cat([parts[part] for part in _QKV])
