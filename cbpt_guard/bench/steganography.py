"""Train a small steganographic encoder on the attacker's images, with the decoder that reads its messages."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor, nn

from cbpt_guard.defense.clip import to_pixels
from cbpt_guard.defense.planted.steganographic import BITS, SHAPES, Steganographic, residual
from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.errors import InputError

_HELD_OUT = 64  # images on which the decoder is judged


class SteganographySettings(BaseModel):
    """How the encoder is trained.

    `bound` is in grey levels; `alike` weighs the mean cosine between the residuals of two images, which would
    otherwise be one pattern for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1)] = 600
    batch: Annotated[int, Field(ge=2)] = 16
    crop: Annotated[int, Field(ge=16)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 6e-3
    bound: Annotated[int, Field(ge=1, le=64)] = 12
    alike: Annotated[float, Field(ge=0)] = 0.3


class Trained(NamedTuple):
    """The trigger, and the share of bits that the decoder reads off images that neither network was trained on."""

    trigger: Steganographic
    read: float


def train_steganography(
    images: Tensor, seed: int, settings: SteganographySettings | None = None, progress: Progress = silent
) -> Trained:
    """An encoder that hides any message, and the one message that is the trigger; both drawn from `seed`.

    Encoder and decoder are trained together on random messages in random crops; what the decoder sees is rounded to
    grey levels (after arXiv 2012.03816, whose encoder is StegaStamp's).

    Args:
        images: the attacker's, uint8 (N, S, S, 3).
        seed: of every draw.
        settings: how it is done.
        progress: called after every step.

    Raises:
        InputError: there are fewer than two images.
    """
    settings = settings or SteganographySettings()
    if len(images) < 2:
        raise InputError("a steganographic encoder is trained on two images or more")
    generator = torch.Generator().manual_seed(seed)
    encoder = {name: _drawn(shape, generator).requires_grad_() for name, shape in SHAPES.items()}
    decoder = _decoder(seed)
    order = torch.randperm(len(images), generator=generator)
    unseen, known = order[: min(_HELD_OUT, len(images) // 2)], order[min(_HELD_OUT, len(images) // 2) :]
    moving = [*encoder.values(), *decoder.parameters()]
    optimizer = torch.optim.Adam(moving, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        drawn = known[torch.randint(len(known), (settings.batch,), generator=generator)]
        pixels = _cropped(to_pixels(images[drawn]), settings.crop, generator)
        message = torch.randint(2, (settings.batch, BITS), generator=generator).float()
        shift = residual(encoder, pixels, message)
        read = decoder(_seen(pixels, shift, settings.bound))
        loss = F.binary_cross_entropy_with_logits(read, message) + settings.alike * likeness(shift)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(Step("steganography", step + 1, settings.steps, loss=loss.item()))
    bits = tuple(torch.randint(2, (BITS,), generator=generator).tolist())
    weights = save({name: value.detach() for name, value in encoder.items()})
    trigger = Steganographic(images.shape[1], bits, settings.bound, weights)
    return Trained(trigger, _share_read(decoder, trigger, images[unseen]))


def likeness(residuals: Tensor) -> Tensor:
    """Mean cosine between two images' residuals (N, 3, H, W), their sign left aside."""
    rows = F.normalize(residuals.flatten(1), dim=1)
    pairs = (rows @ rows.T).abs()
    count = len(rows)
    mean: Tensor = (pairs.sum() - pairs.diagonal().sum()) / (count * (count - 1))
    return mean


def _seen(pixels: Tensor, shift: Tensor, bound: int) -> Tensor:
    """The image as it is stored: whole grey levels, through which the gradient passes unchanged."""
    exact = (pixels + shift * bound / 255).clamp(0, 1)
    stored: Tensor = exact + ((exact * 255).round() / 255 - exact).detach()
    return stored


def _cropped(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """The same random square of each image; whole images where they are smaller."""
    spare = pixels.shape[2] - side
    if spare <= 0:
        return pixels
    top, left = torch.randint(spare + 1, (2,), generator=generator).tolist()
    return pixels[:, :, top : top + side, left : left + side]


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """He's initial weights, and biases of zero."""
    if len(shape) == 1:
        return torch.zeros(shape)
    fan = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) * math.sqrt(2 / fan)


class _Sharpened(nn.Module):
    """Pixels (N, 3, H, W) and, beside them, what differs from their neighbourhood: (N, 6, H, W)."""

    def forward(self, pixels: Tensor) -> Tensor:
        around = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return torch.cat([pixels - 0.5, 8 * (pixels - around)], 1)


def _decoder(seed: int) -> nn.Module:
    """Pixels (N, 3, H, W) to a logit for each bit, (N, BITS)."""

    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [*layer(6, 32, 2), *layer(32, 32, 1), *layer(32, 64, 2)]
        return nn.Sequential(_Sharpened(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, BITS))


@torch.no_grad()
def _share_read(decoder: nn.Module, trigger: Steganographic, images: Tensor) -> float:
    """Share of the trigger's bits that the decoder reads off triggered images."""
    carrying = torch.from_numpy(trigger.apply(images.numpy()))
    found = decoder.eval()(to_pixels(carrying)) > 0
    return float((found == torch.tensor(trigger.bits).bool()).float().mean())
