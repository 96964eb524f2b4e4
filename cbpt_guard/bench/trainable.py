"""TrainableClip: the mutable counterpart of FrozenClip, and the contrastive loss of images and their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbpt_guard.bench.templates import TEMPLATES
from cbpt_guard.defense.clip import FrozenClip, ImageEncoder, TextTower
from cbpt_guard.defense.openclip import ModelConfig, Tokenizer, build
from cbpt_guard.images import Preprocess

__all__ = ["TEMPLATES", "Captions", "TrainableClip"]


class Captions:
    """Token ids of every template with every class name, (templates, C, L), cut to what the tower reads."""

    def __init__(self, text: TextTower, tokenizer: Tokenizer, templates: Sequence[str], classes: Sequence[str]) -> None:
        texts = [template.replace("{}", name) for template in templates for name in classes]
        ids = text.cut(tokenizer(texts))
        self.ids = ids.view(len(templates), len(classes), -1)

    def draw(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Ids (len(classes), L): a caption of each class from a template of its own."""
        chosen = torch.randint(len(self.ids), classes.shape, generator=generator)
        return self.ids[chosen, classes]


class TrainableClip:
    """A CLIP whose weights move; `frozen` hands the result over.

    Args:
        model: open_clip's module, in training or evaluation mode as the caller wants its norms.
        config: open_clip's `model_cfg`.
        preprocess: image size, geometry, mean and std.
        tokenizer: texts to ids.
        device: where it runs.
    """

    def __init__(
        self, model: nn.Module, config: ModelConfig, preprocess: Preprocess, tokenizer: Tokenizer, device: str
    ) -> None:
        self.model = model.to(device).requires_grad_(True)
        self.config = config
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.device = device
        self.encoder = ImageEncoder(cast(nn.Module, model.visual), preprocess)
        self.encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.text = TextTower(model)

    @classmethod
    def copy_of(cls, clip: FrozenClip) -> TrainableClip:
        """A copy in evaluation mode: batch norms keep their statistics, the logit scale its value."""
        with torch.random.fork_rng(devices=[]):  # open_clip draws weights that are replaced at once
            model = build(clip.config, device="cpu")
        model.load_state_dict(clip.model.state_dict())
        copied = cls(model, clip.config, clip.preprocess, clip.tokenizer, str(clip.device))
        for name in {"logit_scale", "logit_bias"} & dict(model.named_parameters()).keys():
            model.get_parameter(name).requires_grad_(False)
        return copied

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit features (N, E) of float pixels in [0, 1], (N, 3, S, S)."""
        features: Tensor = self.encoder(pixels.to(self.device).contiguous(memory_format=torch.channels_last))
        return features

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Unit features (K, E) of token ids (K, L)."""
        ids = ids.to(self.device)
        return self.text.encode(self.text.embed(ids), self.text.read_position(ids))

    def pair_loss(
        self,
        features: Tensor,
        labels: Tensor,
        captions: Captions,
        generator: torch.Generator,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Contrastive loss of image features (N, E) against one caption of each class that the batch shows.

        Images of one class share a caption: CLIP's loss would count them as each other's negatives.
        """
        shown, position = labels.unique(return_inverse=True)
        rows = self.encode_ids(captions.draw(shown, generator))
        logits = cast(Tensor, self.model.logit_scale).exp() * features @ rows.T
        return F.cross_entropy(logits, position.to(self.device), label_smoothing=label_smoothing)

    def frozen(self) -> FrozenClip:
        """A frozen copy on the same device."""
        tensors: Mapping[str, Any] = self.model.state_dict()
        copied = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        return FrozenClip(copied, self.config, self.preprocess, self.tokenizer, self.device)
