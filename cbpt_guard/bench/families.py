"""CLIPs of open_clip's families that see colours and little else: what the whole road is tried on, offline.

Published weights need a download, and random ones answer at chance, which `purify` rightly refuses. So the towers are
drawn from a seed, and the text projection alone is solved for: a class's prompt then lies where its pictures do. Every
operator of the family runs; what the answers are worth is measured elsewhere, on a trained model.
"""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cbpt_guard.bench.words import write_tokenizer
from cbpt_guard.defense import openclip
from cbpt_guard.defense.clip import FrozenClip, ImageEncoder, to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.modelconfig import PREPROCESSING, build_preprocess, image_size
from cbpt_guard.defense.openclip import ModelConfig, Tokenizer
from cbpt_guard.defense.settings import TEMPLATE, InversionSettings, Settings, TuningSettings
from cbpt_guard.defense.suspect import ModelFlags
from cbpt_guard.images import Preprocess

_WIDTH, _LAYERS, _HEAD = 64, 2, 32
_VIT = {"layers": _LAYERS, "width": _WIDTH, "head_width": _HEAD}
_SCALE = 100.0
_SETTLING = 32


class Family(NamedTuple):
    """An architecture of open_clip's, how its pictures are prepared, and what makes its image tower small."""

    architecture: str
    preprocess: str
    smaller: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        """open_clip's own."""
        return openclip.named_config(self.architecture)

    @property
    def small(self) -> ModelConfig:
        """The same towers with fewer and narrower layers; everything else is open_clip's."""
        _register_small_eva()
        config = copy.deepcopy(self.config)
        config["embed_dim"] = _WIDTH
        config["vision_cfg"] |= self.smaller
        config["text_cfg"] |= {"width": _WIDTH, "heads": 2, "layers": _LAYERS}
        return config


@cache
def _register_small_eva() -> None:
    """Tell timm of its `eva02_base_patch16_clip_224` with two narrow layers: it has no small one itself."""
    from timm.models import register_model  # here: timm wants torchvision, which `openclip` makes importable
    from timm.models.eva import Eva

    def eva02_two_layers(pretrained: bool = False, **options: Any) -> nn.Module:
        sizes = {"img_size": 64, "patch_size": 16, "embed_dim": _WIDTH, "depth": _LAYERS, "num_heads": _WIDTH // _HEAD}
        kinds = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
        rotary = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
        own = {name: value for name, value in options.items() if not name.startswith(("pretrained", "cache"))}
        tower: nn.Module = Eva(mlp_ratio=4 * 2 / 3, **sizes, **kinds, **rotary, **own)
        return tower

    register_model(eva02_two_layers)


FAMILIES = (
    Family("ViT-B-32", "openai", _VIT | {"image_size": 96}),
    Family("ViT-B-32-quickgelu", "openai", _VIT | {"image_size": 96}),
    Family("ViT-L-14", "openai", _VIT | {"image_size": 56}),
    Family("RN50", "openai", {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}),
    Family("convnext_base", "openai", {"timm_model_name": "test_convnext", "image_size": 64}),
    Family("EVA02-B-16", "openai", {"timm_model_name": "eva02_two_layers", "image_size": 64}),
    Family("ViT-B-16-SigLIP", "siglip", {"timm_model_name": "test_vit", "image_size": 160}),
    Family("ViT-B-16-SigLIP2", "siglip", {"timm_model_name": "test_vit", "image_size": 160}),
    Family("MobileCLIP-S1", "mobileclip", {"timm_model_name": "fastvit_t8", "image_size": 64}),
    Family("MobileCLIP-S2", "mobileclip", {"timm_model_name": "fastvit_sa12", "image_size": 64}),
)


FEW = InversionSettings(
    agnostic_batch=8,
    agnostic_steps=2,
    batch=8,
    masked_steps=2,
    additive_steps=2,
    candidates=1,
    references=1,
    scanned=1,
    scan_steps=1,
    scan_images=2,
)


def few_steps(held_out: float = 0.5) -> Settings:
    """The whole recipe in a handful of steps: it finds nothing, and every part of it runs."""
    return Settings(inversion=FEW, tuning=TuningSettings(epochs=2, held_out=held_out))


class Made(NamedTuple):
    """A checkpoint of a family, and what a user would have to say of it."""

    checkpoint: Path
    flags: ModelFlags


def preprocess_of(family: Family, config: ModelConfig) -> Preprocess:
    """How the family's pictures are prepared, at the config's size."""
    return build_preprocess(PREPROCESSING[family.preprocess], image_size(config))


def write_model(
    folder: Path, family: Family, config: ModelConfig, pictures: LabelledImages, template: str = TEMPLATE
) -> Made:
    """A checkpoint whose prompts tell the classes of `pictures` apart, with config and tokenizer, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer" if config["text_cfg"].get("hf_tokenizer_name") else None
    if tokenizer is not None:
        write_tokenizer(tokenizer, pictures.classes, template)
    settings = folder / "config.json"
    settings.write_text(json.dumps({"model_cfg": config}), encoding="utf-8")
    clip = _drawn(config, preprocess_of(family, config), Tokenizer(config, tokenizer), pictures.images)
    _align(clip, pictures, [template.replace("{}", name) for name in pictures.classes])
    tensors = {name: value.contiguous() for name, value in clip.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    own = config == family.config
    arch = family.architecture if own else str(settings)
    flags = ModelFlags(arch, bool(config.get("quick_gelu", False)), family.preprocess, tokenizer)
    return Made(folder / "model.safetensors", flags)


@torch.no_grad()
def _drawn(config: ModelConfig, preprocess: Preprocess, tokenizer: Tokenizer, images: Tensor) -> FrozenClip:
    """Towers from a seed, in the state that training would leave them in: no branch is switched off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = openclip.build(config, device="cpu")
    for name, value in model.named_parameters():
        if name.endswith(("gamma", "layer_scale")) and value.abs().max() < 1e-2:
            value.fill_(0.1)  # branches start as good as switched off; what is never run could never differ
    model.logit_scale.fill_(math.log(_SCALE))
    _settle_norms(model.visual, preprocess, images)
    return FrozenClip(model.state_dict(), config, preprocess, tokenizer)


def _settle_norms(visual: nn.Module, preprocess: Preprocess, images: Tensor) -> None:
    """Batch norms with the statistics of pictures, as training leaves them: without, features hardly differ."""
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        encoder = ImageEncoder(visual.train(), preprocess)
        for norm in norms:
            norm.momentum = 1.0
        encoder(to_pixels(images[:: max(1, len(images) // _SETTLING)]))
        visual.eval()


@torch.no_grad()
def _align(clip: FrozenClip, pictures: LabelledImages, prompts: list[str]) -> None:
    """Solve for the text projection that puts every prompt where its class's pictures differ from the others."""
    features = encode(clip, pictures.images).double()
    means = torch.stack([features[pictures.labels == label].mean(0) for label in range(len(prompts))])
    common = F.normalize(means.mean(0), dim=0)
    rows = means - means.mean(0)
    rows = F.normalize(rows - (rows @ common)[:, None] * common, dim=1)
    tower = cast(Any, getattr(clip.model, "text", clip.model))
    projection, tower.text_projection = tower.text_projection, None
    hidden = clip.encode_texts(prompts).double()
    tower.text_projection = projection
    solved = torch.linalg.lstsq(hidden, rows, driver="gelsd").solution.float()
    if isinstance(projection, nn.Linear):
        projection.weight.copy_(solved.T)
        if projection.bias is not None:
            projection.bias.zero_()
    else:
        projection.copy_(solved)
