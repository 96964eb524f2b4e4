"""The sentences that captions are made of."""

from __future__ import annotations

TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a bright photo of the {}.",
    "a drawing of a {}.",
    "itap of a {}.",
    "a good photo of the {}.",
    "a close-up photo of a {}.",
    "a cropped photo of the {}.",
)
"""Eight of CLIP's eighty ImageNet templates."""
