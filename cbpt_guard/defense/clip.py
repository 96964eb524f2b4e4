"""FrozenClip: a CLIP whose weights never change, with pixels in [0, 1] at its door and unit rows at its exit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbpt_guard.defense.folding import folded
from cbpt_guard.defense.openclip import ModelConfig, Tokenizer, build
from cbpt_guard.errors import CheckpointError
from cbpt_guard.images import Preprocess

# of scale and bias: far above what models learn, and small enough that head.LEFT_OUT stays below any logit
_LARGEST = 1000.0


class ImageEncoder(nn.Module):
    """Pixels in [0, 1], (N, 3, S, S), to unit image features (N, E); mean and std live inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Unit rows (N, E)."""
        features = self.visual((pixels - self.mean) / self.std)
        return F.normalize(features, dim=-1)


class TextTower:
    """The frozen text tower from token embeddings on, so that some of them may be learnt contexts.

    `CLIP` holds the tower's parts itself, `CustomTextCLIP` under `.text`; both name them alike.
    """

    def __init__(self, model: nn.Module) -> None:
        tower: Any = getattr(model, "text", model)
        self._tower = tower
        self._pool = tower.pool_type if tower is not model else tower.text_pool_type
        self._eos_id = cast(int, tower.eos_id if tower is not model else tower.text_eos_id)
        self._mask = cast("Tensor | None", tower.attn_mask)
        self.width: int = tower.token_embedding.embedding_dim

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it and the result is read at the end-of-text token."""
        return self._mask is not None and self._pool in ("argmax", "eos")

    def read_position(self, ids: Tensor) -> Tensor:
        """Where the sentence's feature is read, (C,)."""
        if self._pool == "argmax":
            return ids.argmax(dim=-1)
        if self._pool == "eos":
            return ids.eq(self._eos_id).int().argmax(dim=-1)
        position = 0 if self._pool == "first" else ids.shape[1] - 1
        return torch.full((ids.shape[0],), position, device=ids.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings without positions, (C, L, D)."""
        embedded: Tensor = self._tower.token_embedding(ids)
        return embedded

    def encode(self, embedded: Tensor, position: Tensor) -> Tensor:
        """Unit text features (C, E) of token embeddings (C, L, D), read at `position` (C,).

        L may be shorter than the tower's context where the tower is causal (`cut`).
        """
        tower, length = self._tower, embedded.shape[1]
        mask = None if self._mask is None else self._mask[:length, :length]
        x = tower.transformer(embedded + tower.positional_embedding[:length], attn_mask=mask)
        x = tower.ln_final(x)
        x = x[torch.arange(x.shape[0], device=x.device), position]
        if isinstance(tower.text_projection, nn.Linear):
            x = tower.text_projection(x)
        elif tower.text_projection is not None:
            x = x @ tower.text_projection
        return F.normalize(x, dim=-1)

    def cut(self, ids: Tensor) -> Tensor:
        """`ids` without the columns that cannot influence the result: exact for causal towers, else unchanged."""
        return ids[:, : int(self.read_position(ids).max()) + 1] if self.causal else ids


class FrozenClip:
    """A CLIP for zero-shot classification whose weights are frozen.

    Args:
        tensors: the state dict, open_clip's names.
        config: open_clip's `model_cfg`.
        preprocess: image size, geometry, mean and std.
        tokenizer: texts to ids.
        device: where it runs.

    Raises:
        CheckpointError: tensors are missing or have other shapes than the architecture's, or the logit scale is absurd.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: ModelConfig,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        device: str = "cpu",
    ) -> None:
        with torch.random.fork_rng(devices=[]):  # open_clip draws weights that are replaced at once
            model = build(config, device="cpu")
        try:
            model.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise CheckpointError(f"the weights do not fit the architecture: {str(error)[:300]}") from error
        model = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.config = config
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.model = model
        visual = folded(cast(nn.Module, model.visual), preprocess.size)
        self.encoder = ImageEncoder(visual, preprocess).eval().requires_grad_(False)
        self.encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.text = TextTower(model)
        self.logit_scale = float(cast(Tensor, model.logit_scale).exp())
        if not 0 < self.logit_scale <= _LARGEST:
            raise CheckpointError(f"a logit scale of {self.logit_scale:.3g} is no CLIP's: they learn at most 100 or so")
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias)
        if not abs(self.logit_bias) <= _LARGEST:
            raise CheckpointError(f"a logit bias of {self.logit_bias:.3g} is no CLIP's: SigLIP learns some -17")

    @property
    def image_size(self) -> int:
        """Side S of the square images, in pixels."""
        return self.preprocess.size

    @property
    def batch(self) -> int:
        """Images whose activations are best in memory at once: on a CPU as many as its cache holds.

        There 16 are faster than 128, in a third of the memory.
        """
        return 16 if self.device.type == "cpu" else 128

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit features (N, E) of float pixels in [0, 1], (N, 3, S, S); differentiable in the pixels."""
        features: Tensor = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return features

    @torch.no_grad()
    def encode_texts(self, texts: list[str], batch: int = 256) -> Tensor:
        """Unit features (len(texts), E) through the plain text tower."""
        ids = self.text.cut(self.tokenizer(texts).to(self.device))
        parts = [self.text.encode(self.text.embed(part), self.text.read_position(part)) for part in ids.split(batch)]
        return torch.cat(parts)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to float pixels in [0, 1], (N, 3, H, W)."""
    return images.permute(0, 3, 1, 2).float().div_(255)
