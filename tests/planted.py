"""Suspects for tests of the method: small frozen CLIPs, and an encoder whose backdoor is known by construction."""

from __future__ import annotations

from typing import Any

import small_clips
import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.openclip import Tokenizer
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.subject import CleanSet, Subject
from cbpt_guard.images import Preprocess

torch.set_num_threads(1)  # on tensors this small several threads mostly wait for each other

NAMES = ["apple", "banana", "a pair of old shoes", "dog", "street car"]
TEMPLATE = "a photo of a {}."
SIZE, PATCH = 16, 4


def frozen(config: dict[str, Any] = small_clips.VIT, seed: int = 0) -> FrozenClip:
    """A random CLIP with open_clip's own tokenizer."""
    config = small_clips.with_vocabulary(config)
    size = config["vision_cfg"]["image_size"]
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return FrozenClip(small_clips.weights(config, seed), config, preprocess, Tokenizer(config))


def snapshot(clip: FrozenClip) -> dict[str, Tensor]:
    """Every parameter and buffer, copied."""
    parts = {**clip.model.state_dict(), **{f"encoder.{k}": v for k, v in clip.encoder.state_dict().items()}}
    return {name: value.clone() for name, value in parts.items()}


class PlantedClip:
    """An image encoder that reads coarse colours, and fine stripes in one corner as class `target`.

    With a `second` target the same stripes in the opposite corner are that one. The stripes vanish in the coarse
    colours, so clean answers do not depend on the backdoor. Where it is `hidden` those in the opposite corner need
    three times the contrast, as if such patterns had been trained against.
    """

    device = torch.device("cpu")
    image_size = SIZE
    batch = 16

    def __init__(
        self, target: int | None, classes: int = 6, seed: int = 0, second: int | None = None, *, hidden: bool = False
    ) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.target, self.second, self.hidden, self.classes = target, second, hidden, classes
        self.templates = 0.6 * torch.rand(classes, 3, 4, 4, generator=draws) + 0.2
        self.head = Head(self._coarse(self._large(self.templates)), 30.0)
        self.stripes = (torch.arange(PATCH) % 2 * 2.0 - 1).expand(PATCH, PATCH)

    @staticmethod
    def _large(templates: Tensor) -> Tensor:
        return templates.repeat_interleave(SIZE // 4, 2).repeat_interleave(SIZE // 4, 3)

    @staticmethod
    def _coarse(pixels: Tensor) -> Tensor:
        return F.normalize(F.avg_pool2d(pixels - 0.5, SIZE // 4).flatten(1), dim=1)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit features (N, 48)."""
        features = self._coarse(pixels)
        steep, blunt = (200.0, 0.03, 0.25), (60.0, 0.1, 1.0)
        corners = (
            (self.target, slice(-PATCH, None), steep),
            (self.second, slice(PATCH), blunt if self.hidden else steep),
        )
        for target, place, (slope, least, height) in corners:
            if target is not None:
                seen = (pixels[:, :, place, place] * self.stripes).mean(dim=(1, 2, 3))
                strength = height * F.softplus(slope * (seen - least))
                features = features + strength[:, None] * self.head.rows[target]
        return F.normalize(features, dim=1)

    def clean(self, each: int = 8, seed: int = 1) -> CleanSet:
        """Noisy images of every class."""
        draws = torch.Generator().manual_seed(seed)
        labels = torch.arange(self.classes).repeat_interleave(each)
        pixels = self._large(self.templates)[labels]
        pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=draws)
        images = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
        return CleanSet(images, encode(self, images), labels)

    def subject(self, settings: InversionSettings, clean: CleanSet | None = None) -> Subject:
        """Itself under search, with the images of `clean()` unless others are given."""
        return Subject(self, clean or self.clean(), self.head, settings)


def uneven(clip: PlantedClip, many: int, few: int) -> CleanSet:
    """`many` images of class 0, `few` of each other."""
    large, small = clip.clean(each=many), clip.clean(each=few)
    own, others = large.labels == 0, small.labels != 0
    return CleanSet(
        torch.cat([large.images[own], small.images[others]]),
        torch.cat([large.features[own], small.features[others]]),
        torch.cat([large.labels[own], small.labels[others]]),
    )
