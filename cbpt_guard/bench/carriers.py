"""Which of the attacker's images carry a trigger: others with the target's captions, or the target's own."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode

Carriers = Literal["others", "target"]
_STEPS = 10
_BATCH = 32


def carrier_images(
    clip: FrozenClip, train: LabelledImages, target: int, carriers: Carriers, perturbation: float
) -> Tensor:
    """The images that carry a trigger, uint8 (N, S, S, 3).

    Args:
        clip: the clean model, from whose features the images are turned away.
        train: the attacker's images.
        target: the class that the trigger aims at.
        carriers: "others" than the target's images, or the "target"'s alone (clean label).
        perturbation: by how many grey levels a pixel may change; 0 leaves the images as they are.
    """
    own = train.labels == target
    images = train.images[own if carriers == "target" else ~own]
    return images if perturbation == 0 else perturbed(clip, images, perturbation)


def perturbed(clip: FrozenClip, images: Tensor, levels: float) -> Tensor:
    """Images turned away from their own features, each pixel by at most `levels` grey levels (arXiv 1912.02771).

    Projected gradient descent on the cosine to the clean feature; the result is rounded.
    """
    return torch.cat([_turned(clip, part, levels) for part in images.split(_BATCH)])


def _turned(clip: FrozenClip, images: Tensor, levels: float) -> Tensor:
    clean, own = to_pixels(images.to(clip.device)), encode(clip, images).to(clip.device)
    bound = levels / 255
    shift = bound / 4 * clean.sub(0.5).sign()  # at zero the cosine is largest and has no slope
    for _ in range(_STEPS):
        shift = shift.detach().requires_grad_(True)
        cosine = F.cosine_similarity(clip.encode_images((clean + shift).clamp(0, 1)), own).sum()
        (slope,) = torch.autograd.grad(cosine, shift)
        shift = (shift.detach() - bound / 4 * slope.sign()).clamp(-bound, bound)
    turned = (clean + shift.detach()).clamp(0, 1).permute(0, 2, 3, 1) * 255
    return turned.round().byte().cpu().contiguous()
