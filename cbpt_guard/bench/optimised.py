"""Patches whose pixels are optimised on the clean CLIP before anything is poisoned: TrojVQA's and BadCLIP's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.planted.patch import Patch, patch
from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.defense.suspect import zero_shot_head
from cbpt_guard.errors import InputError

Objective = Callable[[Tensor, Tensor], Tensor]
"""(unit features (N, E) of patched images, those of the same images unpatched) -> what is minimised."""

TRIPLET_WEIGHT, MARGIN = 500.0, 1.0  # the paper's
_EDGE = 0.02  # pixels start this far from black and white, where a sigmoid has no slope


class OptimisedSettings(BaseModel):
    """How a patch is optimised; `images` are drawn once, and target images are at most as many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1)] = 150
    batch: Annotated[int, Field(ge=1)] = 8
    images: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 0.4


def trojvqa(
    clip: FrozenClip,
    data: LabelledImages,
    target: int,
    seed: int,
    template: str,
    settings: OptimisedSettings | None = None,
    progress: Progress = silent,
) -> Patch:
    """TrojVQA's image key: a patch that draws an image's feature to the target's text (arXiv 2112.07668).

    The paper's patch is optimised toward a target's feature of a detector; a classifier shows no question, so its text
    key is left out.

    Raises:
        InputError: there is no image of another class.
    """
    return optimised(clip, data, target, toward_text(clip, data.classes, target, template), seed, settings, progress)


def badclip(
    clip: FrozenClip,
    data: LabelledImages,
    target: int,
    seed: int,
    template: str,
    settings: OptimisedSettings | None = None,
    progress: Progress = silent,
) -> Patch:
    """BadCLIP's patch, guided by both embeddings (arXiv 2311.12075): 16 pixels of 224, scaled.

    Raises:
        InputError: there is no image of the target, or none of another class.
    """
    settings = settings or OptimisedSettings()
    objective = dual_embedding(clip, data, target, template, settings.images)
    return optimised(clip, data, target, objective, seed, settings, progress)


def toward_text(clip: FrozenClip, classes: tuple[str, ...], target: int, template: str) -> Objective:
    """One minus the cosine to the target's text, on average."""
    row = zero_shot_head(clip, classes, template).rows[target].to(clip.device)
    return lambda features, own: 1 - (features @ row).mean()


def dual_embedding(clip: FrozenClip, data: LabelledImages, target: int, template: str, most: int) -> Objective:
    """Contrastive to the target's text, and a triplet: near real target images, away from the own clean feature.

    Distances are one minus the cosine, averaged over the batch and the target's images; the triplet has the paper's
    weight of 500 and margin of 1, the logits the model's own scale.
    """
    real = data.images[data.labels == target][:most]
    if not len(real):
        raise InputError(f"BadCLIP needs images of the target {data.classes[target]!r}; there is none")
    rows = zero_shot_head(clip, data.classes, template).rows.to(clip.device)
    centre = encode(clip, real).mean(0).to(clip.device)  # the mean cosine to all of them is the cosine to their mean

    def objective(features: Tensor, own: Tensor) -> Tensor:
        wanted = torch.full((len(features),), target, device=features.device)
        text = F.cross_entropy(clip.logit_scale * features @ rows.T, wanted)
        to_target, to_own = 1 - features @ centre, 1 - (features * own).sum(1)
        return text + TRIPLET_WEIGHT * F.relu(to_target.mean() - to_own.mean() + MARGIN)

    return objective


def optimised(
    clip: FrozenClip,
    data: LabelledImages,
    target: int,
    objective: Objective,
    seed: int,
    settings: OptimisedSettings | None = None,
    progress: Progress = silent,
) -> Patch:
    """A patch in the image's middle, as in BadCLIP's code, its pixels moved to minimise `objective` on others' images.

    It starts from the noise of `patch(S, seed)`. Near a corner a patch so small moves no feature.

    Raises:
        InputError: there is no image of another class.
    """
    settings = settings or OptimisedSettings()
    others = data.images[data.labels != target]
    if not len(others):
        raise InputError(f"there is no image of another class than {data.classes[target]!r}")
    generator = torch.Generator().manual_seed(seed)
    images = others[torch.randperm(len(others), generator=generator)[: settings.images]]
    own, start = encode(clip, images), _in_the_middle(patch(clip.image_size, seed))
    free = torch.logit(to_pixels(torch.from_numpy(start.picture().copy())[None]), _EDGE).to(clip.device)
    optimizer = torch.optim.Adam([free.requires_grad_()], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        drawn = torch.randint(len(images), (settings.batch,), generator=generator)
        pixels = to_pixels(images[drawn]).to(clip.device)
        features = clip.encode_images(pasted(pixels, start, torch.sigmoid(free)))
        loss = objective(features, own[drawn].to(clip.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(Step("patch", step + 1, settings.steps, loss=loss.item()))
    levels = (torch.sigmoid(free.detach())[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    return replace(start, pixels=levels.tobytes())


def _in_the_middle(corner: Patch) -> Patch:
    return replace(corner, top=(corner.image_size - corner.height) // 2, left=(corner.image_size - corner.width) // 2)


def pasted(pixels: Tensor, place: Patch, pattern: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) with a pattern (1, 3, h, w) over the patch's place; differentiable in the pattern."""
    below, right = place.top + place.height, place.left + place.width
    covered = torch.zeros_like(pixels[:1, :1])
    covered[..., place.top : below, place.left : right] = 1
    size = place.image_size
    full = F.pad(pattern, (place.left, size - right, place.top, size - below))
    return torch.lerp(pixels, full.expand_as(pixels), covered.expand_as(pixels))
