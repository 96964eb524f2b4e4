"""Fold frozen batch norms into the convolutions before them: the same features in about two thirds of the time."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_AGREE = 1e-3  # relative; float32 rounding alone stays far below


@torch.no_grad()
def folded(visual: nn.Module, image_size: int) -> nn.Module:
    """A copy of an image tower in evaluation mode whose batch norms are folded away.

    Which convolution feeds which norm is read off one forward pass, and the copy must give the same features on it;
    a tower without such pairs, or one whose features would differ, is returned as it is.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in visual.modules()):
        return visual
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(2, 3, image_size, image_size, generator=generator).to(next(visual.parameters()))
    pairs = _pairs(visual, probe)
    changed = copy.deepcopy(visual)
    for conv, norm in pairs:
        one = cast(nn.Conv2d, changed.get_submodule(conv))
        _replace(changed, conv, fuse_conv_bn_eval(one, _plain(changed.get_submodule(norm))))
        _replace(changed, norm, _after(changed.get_submodule(norm)))
    expected = visual(probe)
    same = torch.allclose(changed(probe), expected, rtol=0, atol=_AGREE * float(expected.abs().max()))
    return changed if same else visual


def _pairs(visual: nn.Module, probe: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, norm) where the norm's input is the convolution's output."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept: a freed one's id may come again
    pairs: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module) -> Any:
        def look(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                made[id(output)] = (name, output)
            elif id(inputs[0]) in made:
                pairs.append((made[id(inputs[0])][0], name))

        return module.register_forward_hook(look)

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [watch(name, module) for name, module in visual.named_modules() if isinstance(module, kinds)]
    visual(probe)
    for hook in hooks:
        hook.remove()
    once = {name for pair in pairs for name in pair if sum(name in other for other in pairs) == 1}
    return [pair for pair in pairs if once.issuperset(pair)]


def _plain(norm: nn.Module) -> nn.BatchNorm2d:
    """The norm alone: timm's may carry an activation."""
    norm = cast(nn.BatchNorm2d, norm)
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, affine=norm.affine).to(norm.running_mean).eval()
    plain.load_state_dict(norm.state_dict())
    return plain


def _after(norm: nn.Module) -> nn.Module:
    """What a norm does besides normalising."""
    return nn.Sequential(*(child for child in norm.children() if not isinstance(child, nn.Identity)))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)
