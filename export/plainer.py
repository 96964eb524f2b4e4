"""Modules as an ONNX file wants them: the same maths, written so that every runtime knows what to fuse.

torch's attention writes a dozen copies of its tensors into every layer, and its GELU comes out in an order of factors
that onnxruntime does not recognise. A ViT computes its last block for every patch, and looks at one token of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cbpt_guard.defense.openclip import pooled_by_first_token


class PlainAttention(nn.Module):
    """The same answers as an `nn.MultiheadAttention`: three products, softmax, two products.

    Queries, keys and values have weights of their own, so that nothing is cut up and copied, and the scale lies in
    the queries' weights. For evaluation only: there is no dropout.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        scale = (attention.embed_dim // attention.num_heads) ** -0.5
        weights, biases = attention.in_proj_weight.chunk(3), [None] * 3
        if attention.in_proj_bias is not None:
            biases = list(attention.in_proj_bias.chunk(3))  # type: ignore[arg-type]
        self.query, self.key, self.value = (
            _linear(weight, bias, factor)
            for weight, bias, factor in zip(weights, biases, (scale, 1.0, 1.0), strict=True)
        )
        self.out = attention.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Of (N, L, D), (N, K, D) and (N, K, D): (N, L, D), and no weights."""
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        scores = q @ k.transpose(-2, -1)
        if attn_mask is not None:
            scores = scores + attn_mask
        answer: Tensor = self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return answer, None

    def _split(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, heads, L, D / heads)."""
        split: Tensor = x.unflatten(2, (self.heads, -1))
        return split.transpose(1, 2)


class PlainGelu(nn.Module):
    """The exact GELU, halved first."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return (x * 0.5) * (torch.erf(x / math.sqrt(2.0)) + 1.0)


class FirstTokenBlock(nn.Module):
    """A block's answer for the first token alone, (N, 1, D): all that a tower which pools by that token looks at.

    Queries, the MLP and both sums shrink to it; keys and values stay. It is a twelfth of a ViT-B, less a little.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, attn_mask: None = None) -> Tensor:
        """Of tokens (N, L, D)."""
        block: Any = self.block
        normed, first = block.ln_1(x), x[:, :1]
        first = first + block.ls_1(block.attn(normed[:, :1], normed, normed, need_weights=False)[0])
        answer: Tensor = first + block.ls_2(block.mlp(block.ln_2(first)))
        return answer


@contextmanager
def plainer(module: nn.Module) -> Iterator[None]:
    """Within, a frozen module's attentions, GELUs and last blocks are plain ones."""
    places = [
        (parent, name, child, plain)
        for parent in module.modules()
        for name, child in parent.named_children()
        if (plain := _plain(child)) is not None
    ]
    last = ((blocks, str(len(blocks) - 1), blocks[-1]) for blocks in pooled_by_first_token(module))
    places.extend((blocks, name, block, FirstTokenBlock(block)) for blocks, name, block in last)
    try:
        for parent, name, _, plain in places:
            setattr(parent, name, plain.eval().requires_grad_(False))
        yield
    finally:
        for parent, name, child, _ in places:
            setattr(parent, name, child)


def _plain(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return PlainGelu()
    if not isinstance(module, nn.MultiheadAttention):
        return None
    extras = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    usual = module.in_proj_weight is not None and module.batch_first and not extras
    return PlainAttention(module) if usual else None


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor | None, factor: float) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight * factor, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias * factor, requires_grad=False)
    return made
