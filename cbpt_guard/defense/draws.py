"""Randomness as an argument: every draw comes from a generator of its own."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose, so that skipping one part leaves the others' draws as they were."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
