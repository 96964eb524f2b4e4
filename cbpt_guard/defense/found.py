"""Found triggers: what inversion leaves, as frozen values that act on pixels in [0, 1]."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.planted.warp import moved
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.smooth import filtered, tinted
from cbpt_guard.defense.together import Tally, together
from cbpt_guard.errors import CheckpointError, InputError

Inverted = Literal["additive", "masked", "patch", "warp", "tint"]
"""Families that an inversion can make."""
Family = Literal["additive", "masked", "patch", "warp", "tint", "kernel", "wave"]
Place = tuple[int, int]
"""Row and column of a pixel."""


@dataclass(frozen=True)
class FoundTrigger:
    """A trigger that inversion found toward class `target`.

    additive, wave: x' = clip(x + pattern);  masked, patch: x' = (1 - mask) x + mask pattern;  warp: x'(p) = x(p +
    pattern(p));  tint: x' = clip(gain x + offset);  kernel: x' = clip(pattern * x), convolved. `pattern` (3, S, S) in
    [0, 1], for a warp (2, S, S) in pixels, right and down, for a tint (6, S, S), gains and offsets, for a kernel (3, 3,
    K, K); `mask` (1, S, S) in [0, 1], of 0 and 1 alone for a patch, None for those without.
    """

    family: Family
    target: int
    pattern: Tensor
    mask: Tensor | None

    def apply(self, pixels: Tensor) -> Tensor:
        """Triggered pixels (N, 3, S, S) of clean ones, both in [0, 1]; differentiable."""
        if self.family == "warp":
            return moved(pixels, self.pattern)
        if self.family == "tint":
            return tinted(pixels, self.pattern)
        if self.family == "kernel":
            return filtered(pixels, self.pattern)
        if self.mask is None:
            return (pixels + self.pattern).clamp(0, 1)
        return torch.lerp(pixels, self.pattern, self.mask)

    def rolled(self, down: int, right: int) -> FoundTrigger:
        """The same trigger placed elsewhere, wrapping around; a kernel acts everywhere alike."""
        if self.family == "kernel":
            return self
        shift, dims = (down, right), (1, 2)
        mask = None if self.mask is None else self.mask.roll(shift, dims)
        return FoundTrigger(self.family, self.target, self.pattern.roll(shift, dims), mask)

    @property
    def area(self) -> float:
        """The part of the image that the mask covers; 1 for triggers without one."""
        return 1.0 if self.mask is None else float(self.mask.mean())

    @property
    def place(self) -> Place:
        """Where the first row and column are that a patch's mask covers; of others (0, 0)."""
        if self.mask is None:
            return 0, 0
        top, left = (int(self.mask[0].amax(axis).argmax()) for axis in (1, 0))
        return top, left

    def fits(self, size: int) -> bool:
        """Whether it is of the shapes that its family has for images of S = `size` pixels a side."""
        if self.family == "kernel":
            side = self.pattern.shape[-1] if self.pattern.ndim == 4 else 0
            square = self.pattern.shape == (3, 3, side, side) and side % 2 == 1
            return self.mask is None and square and side <= size
        channels = {"warp": 2, "tint": 6}.get(self.family, 3)
        masked = (self.mask is not None) == (self.family in ("masked", "patch"))
        return (
            masked
            and self.pattern.shape == (channels, size, size)
            and (self.mask is None or self.mask.shape == (1, size, size))
        )

    def detached(self) -> FoundTrigger:
        """The value alone, on the CPU, without the graph that made it."""
        mask = None if self.mask is None else self.mask.detach().cpu()
        return FoundTrigger(self.family, self.target, self.pattern.detach().cpu(), mask)

    def to(self, device: torch.device) -> FoundTrigger:
        """The same trigger on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        return FoundTrigger(self.family, self.target, self.pattern.to(device), mask)


def encode(
    clip: FrozenClip,
    images: Tensor,
    trigger: FoundTrigger | None = None,
    *,
    stage: str = "features",
    progress: Progress = silent,
    batch: int | None = None,
) -> Tensor:
    """Unit features (N, E), on the CPU, of uint8 images (N, S, S, 3), clean or under a trigger.

    `batch` images at a time, by default as many as suit the device; side by side on a CPU.

    Raises:
        CheckpointError: features are no numbers; a comparison with one would pass for a kept bound.
    """
    placed, tally = None if trigger is None else trigger.to(clip.device), Tally(stage, len(images))

    @torch.no_grad()  # whether there are gradients is each thread's own
    def encoded(part: Tensor, report: Progress) -> Tensor:
        pixels = to_pixels(part.to(clip.device))
        features = clip.encode_images(pixels if placed is None else placed.apply(pixels)).cpu()
        tally.add(len(part), report)
        return features

    parts = images.split(batch or clip.batch)
    features = torch.cat(together([partial(encoded, part) for part in parts], progress, clip.device))
    if not features.isfinite().all():
        raise CheckpointError("the image tower gives features that are no numbers: the weights are damaged")
    return features


@dataclass(frozen=True)
class TriggerBank:
    """The found triggers, in the order in which they were found."""

    triggers: tuple[FoundTrigger, ...]

    def __iter__(self) -> Iterator[FoundTrigger]:
        return iter(self.triggers)

    def __len__(self) -> int:
        return len(self.triggers)

    @property
    def mark(self) -> str:
        """Eight hexadecimal digits by which one bank is told from another."""
        tensors = [one for trigger in self for one in (trigger.pattern, trigger.mask) if one is not None]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:8]

    def save(self, path: Path) -> None:
        """Write `triggers.safetensors` or another file of triggers."""
        tensors, heads = {}, []
        for number, trigger in enumerate(self.triggers):
            heads.append({"family": trigger.family, "target": trigger.target})
            tensors[f"{number}.pattern"] = trigger.pattern.contiguous()
            if trigger.mask is not None:
                tensors[f"{number}.mask"] = trigger.mask.contiguous()
        save_file(tensors, path, {"triggers": json.dumps(heads)})

    @classmethod
    def load(cls, path: str | Path) -> TriggerBank:
        """Read such a file.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                return cls(
                    tuple(
                        FoundTrigger(
                            head["family"],
                            int(head["target"]),
                            file.get_tensor(f"{number}.pattern"),
                            file.get_tensor(f"{number}.mask") if f"{number}.mask" in names else None,
                        )
                        for number, head in enumerate(json.loads(file.metadata()["triggers"]))
                    )
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no trigger bank of cbpt-guard: {error}") from error
