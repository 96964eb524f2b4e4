"""Open a suspect: read it safely, settle what it is, and freeze it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cbpt_guard.defense.architecture import OPEN_CLIP_TOKENIZER, Accuracy, ModelSpec, check_arch, resolve_model
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import Listing, load_images
from cbpt_guard.defense.found import encode
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.matching import fit
from cbpt_guard.defense.openclip import Tokenizer
from cbpt_guard.defense.record import ModelRecord
from cbpt_guard.defense.untrusted.checkpoint import ReadCheckpoint, read_checkpoint
from cbpt_guard.errors import InputError

_JUDGED_IMAGES = 400


@dataclass(frozen=True)
class ModelFlags:
    """What a user may say of a checkpoint that the file itself cannot tell; None where it was not said."""

    arch: str | None = None
    quickgelu: bool | None = None
    preprocess: str | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Suspect:
    """A frozen suspect, its tensors as read, and the record of how it was understood."""

    clip: FrozenClip
    tensors: dict[str, Tensor]
    record: ModelRecord


def open_suspect(path: Path, flags: ModelFlags, listing: Listing, template: str, device: str) -> Suspect:
    """Read a checkpoint and build it; the clean images judge what only accuracy can tell.

    Raises:
        UnsafeError: the checkpoint would run code.
        CheckpointError: it is malformed or fits no architecture.
        InputError: something stays open; the flag to set is named.
    """
    check_arch(flags.arch)  # first: reading a large file takes a while
    checkpoint = read_checkpoint(path)
    spec = resolve_model(
        checkpoint,
        arch=flags.arch,
        quickgelu=flags.quickgelu,
        preprocess=flags.preprocess,
        tokenizer=flags.tokenizer,
        judge=lambda candidate: _accuracy(checkpoint, candidate, listing, template, device),
    )
    fitted = fit(checkpoint.tensors, spec.config)
    clip = _freeze(spec, fitted.tensors, device)
    record = ModelRecord(
        source=checkpoint.source,
        source_sha256=checkpoint.sha256,
        form=checkpoint.form,
        architecture=spec.architecture,
        config=spec.config,
        preprocess=spec.preprocess,
        quickgelu=spec.quickgelu,
        tokenizer=spec.tokenizer,
        resolved=spec.resolved,
        notes=(*checkpoint.notes, *fitted.notes),
    )
    return Suspect(clip, fitted.tensors, record)


def zero_shot_head(clip: FrozenClip, classes: tuple[str, ...], template: str) -> Head:
    """The undefended classifier: one text row per class from the template."""
    rows = clip.encode_texts([template.replace("{}", name) for name in classes]).cpu()
    return Head(rows, clip.logit_scale, clip.logit_bias)


def _freeze(spec: ModelSpec, tensors: dict[str, Tensor], device: str) -> FrozenClip:
    folder = None if spec.tokenizer == OPEN_CLIP_TOKENIZER else Path(spec.tokenizer)
    return FrozenClip(tensors, spec.config, spec.preprocess, Tokenizer(spec.config, folder), device)


def _accuracy(checkpoint: ReadCheckpoint, spec: ModelSpec, listing: Listing, template: str, device: str) -> Accuracy:
    """Zero-shot accuracy of one way to understand the checkpoint, on a few of the clean images."""
    per_class = max(1, _JUDGED_IMAGES // len(listing.classes))
    few = listing.drawn(per_class, seed=0).thinned(_JUDGED_IMAGES)
    data = load_images(few, spec.preprocess, skip_bad=True)
    clip = _freeze(spec, fit(checkpoint.tensors, spec.config).tensors, device)
    head = zero_shot_head(clip, data.classes, template)
    answers = head.answers(encode(clip, data.images))
    return Accuracy(float((answers == data.labels).float().mean()), len(data.labels))


def check_device(device: str) -> str:
    """`device` if torch has it.

    Raises:
        InputError: torch does not know it or cannot reach it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device {device!r} is not available to this torch: {str(error).splitlines()[0]}"
        ) from error
    return device
