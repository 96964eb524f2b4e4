"""Folded batch norms: the same features and gradients, and hands off what cannot be folded."""

from __future__ import annotations

import pytest
import small_clips
import torch
from torch import Tensor, nn

from cbpt_guard.bench.digits import CONFIG
from cbpt_guard.defense.folding import folded
from cbpt_guard.defense.openclip import ModelConfig, build

SIZE = 32
TIMM: ModelConfig = {
    **CONFIG,
    "vision_cfg": {**CONFIG["vision_cfg"], "timm_model_name": "mobilenetv2_035", "timm_pool": "avg"},
}


class Shared(nn.Module):
    """One norm behind two convolutions: it cannot be folded into either."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.one(x)) - self.norm(self.two(x))).mean((2, 3))


class Branching(nn.Module):
    """The convolution's own output is used, too: folding would change it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x + 3 * self.norm(x)).mean((2, 3))


def lived(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with statistics and weights that are not their initial values."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_var, module.weight):
                value.data.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
            for value in (module.running_mean, module.bias):
                value.data.normal_(0, 0.2, generator=generator)  # type: ignore[union-attr]
    return model.eval().requires_grad_(False)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("config", [TIMM, small_clips.RESNET], ids=["timm", "open_clip-resnet"])
def test_the_same_features_and_gradients_without_norms(config: ModelConfig) -> None:
    visual = lived(build(config, device="cpu").visual).double()  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    size = 64
    changed = folded(visual, size)
    assert norms(visual) > 10
    assert norms(changed) == 0
    gradients = []
    for model in (visual, changed):
        pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        features = model(pixels.requires_grad_())
        features.square().sum().backward()
        gradients.append((features.detach(), pixels.grad))
    for one, other in zip(*gradients, strict=True):
        assert one.std() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())


@pytest.mark.parametrize("make", [Shared, Branching])
def test_what_cannot_be_folded_is_left_alone(make: type[nn.Module]) -> None:
    visual = lived(make())
    changed = folded(visual, SIZE)
    pixels = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(changed(pixels), visual(pixels))
    assert norms(changed) == 1


def test_a_tower_without_norms_stays_itself() -> None:
    visual = build(small_clips.VIT, device="cpu").visual
    assert folded(visual, SIZE) is visual  # type: ignore[arg-type]
