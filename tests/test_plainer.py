"""What is written plainer for ONNX answers as before, and the module is its old self afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import small_clips
import torch
from torch import nn

from cbpt_guard.export.plainer import PlainAttention, PlainGelu, plainer


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_torchs(bias: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    query, other = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    mask = torch.zeros(5, 7).masked_fill(torch.rand(5, 7) < 0.3, float("-inf"))
    for arguments in ((query, query, query, None), (query, other, other + 1, None), (query, other, other, mask)):
        *inputs, attn_mask = arguments
        wanted = attention(*inputs, need_weights=False, attn_mask=attn_mask)[0]
        found = PlainAttention(attention)(*inputs, need_weights=False, attn_mask=attn_mask)[0]
        assert torch.allclose(found, wanted, atol=1e-5)


def test_gelu_is_torchs() -> None:
    x = torch.linspace(-8, 8, 1001)
    assert torch.allclose(PlainGelu()(x), nn.GELU()(x), atol=1e-6)


def test_a_tower_is_plainer_within_and_its_old_self_afterwards() -> None:
    tower = small_clips.model(small_clips.VIT).visual
    assert isinstance(tower, nn.Module)
    before = [id(module) for module in tower.modules()]
    pixels = torch.rand(2, 3, 32, 32)
    wanted = tower(pixels)
    with plainer(tower):
        assert not any(isinstance(module, nn.MultiheadAttention | nn.GELU) for module in tower.modules())
        assert torch.allclose(tower(pixels), wanted, atol=1e-5)
    assert [id(module) for module in tower.modules()] == before
    assert torch.equal(tower(pixels), wanted)


@pytest.mark.parametrize(("pool_type", "tokens"), [("tok", [17, 1]), ("avg", [17, 17])])
def test_the_last_block_computes_what_is_looked_at(pool_type: str, tokens: list[int]) -> None:
    """One token, in a tower that pools by it; all of them where it pools otherwise."""
    config = {**small_clips.VIT, "vision_cfg": {**small_clips.VIT["vision_cfg"], "pool_type": pool_type}}
    tower: Any = small_clips.model(config).visual
    seen: list[int] = []
    for block in tower.transformer.resblocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    pixels = torch.rand(2, 3, 32, 32)
    wanted = tower(pixels)
    with plainer(tower):
        seen.clear()
        assert torch.allclose(tower(pixels), wanted, atol=1e-5)
    assert seen == tokens


@pytest.mark.parametrize(
    "unusual",
    [
        nn.MultiheadAttention(8, 2, batch_first=False),
        nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        nn.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=True),
        nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4),
        nn.GELU("tanh"),
    ],
)
def test_what_is_unusual_is_left_alone(unusual: nn.Module) -> None:
    module = nn.Sequential(unusual)
    with plainer(module):
        assert module[0] is unusual
