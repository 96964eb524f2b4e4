"""Changes that are smooth over the image, values bicubic between few control points, or the same at every place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth(control: Tensor, size: int) -> Tensor:
    """Values (N, S, S), bicubic between those (N, k, k) at control points that span the image."""
    return F.interpolate(control[None], (size, size), mode="bicubic", align_corners=True)[0]


def tinted(pixels: Tensor, tint: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) in [0, 1] by a tint (6, S, S): each colour's gain, then each colour's offset, at every place.

    What light, a colour cast, a fade or a vignette do to a photograph, to first order; differentiable in the tint.
    """
    gain, offset = tint.split(3)
    changed: Tensor = (pixels * gain + offset).clamp(0, 1)
    return changed


def filtered(pixels: Tensor, kernel: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) in [0, 1] by a kernel (3, 3, K, K), K odd, mirrored at the edges.

    What focus, movement or another mixing of the colours does to a photograph. By Fourier transforms, for the widest
    blur is a quarter of the image.
    """
    side = pixels.shape[-1]
    wide = F.pad(pixels, [kernel.shape[-1] // 2] * 4, mode="reflect")
    size = wide.shape[-2:]
    weights = torch.fft.rfft2(kernel, s=size).conj()
    mixed = torch.einsum("nihw,oihw->nohw", torch.fft.rfft2(wide), weights)
    changed: Tensor = torch.fft.irfft2(mixed, s=size)[..., :side, :side].clamp(0, 1)
    return changed
