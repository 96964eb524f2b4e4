"""What export takes out of a run, read and checked to fit together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.defense.run import HEADS, PROMPTS, RECORD, SAMPLES, TRIGGERS, PurifyRun
from cbpt_guard.defense.settings import VerdictSettings
from cbpt_guard.errors import InputError
from cbpt_guard.export.graph import GuardedGraph
from cbpt_guard.images import Pixels
from cbpt_guard.problems import problems


@dataclass(frozen=True)
class Parts:
    """The module to export; held-out images uint8 (N, S, S, 3) with labels (N,); found triggers; bounds."""

    graph: GuardedGraph
    images: Pixels
    labels: npt.NDArray[np.int64]
    bank: TriggerBank
    bounds: VerdictSettings


def read_parts(run: PurifyRun) -> Parts:
    """Read a run's files.

    Raises:
        InputError: one is missing, malformed or does not fit the others.
    """
    if not (run.path / PROMPTS).is_file():
        raise InputError(f"{run.path / PROMPTS} is missing: {run.path} is no finished run")
    graph = GuardedGraph(run.image_encoder(), run.head())
    images, labels = run.samples()
    parts = Parts(graph, images, labels, run.bank(), _bounds(run))
    _check_head(run, graph.head)
    _check_samples(run, parts)
    _check_bank(run, parts)
    return parts


def _bounds(run: PurifyRun) -> VerdictSettings:
    try:
        return VerdictSettings.model_validate(run.record.settings.get("verdict"))
    except ValidationError as error:
        raise InputError(f"{run.path / RECORD} holds no bounds of a verdict: {problems(error, most=1)}") from error


def _check_head(run: PurifyRun, head: GuardedHead) -> None:
    shape = (len(head.classes), run.record.model.config["embed_dim"])
    tensors = (head.original.rows, head.guarded.rows, head.test.directions)
    if any(tensor.shape != shape for tensor in tensors) or head.test.thresholds.shape != shape[:1]:
        raise InputError(f"{run.path / HEADS} does not hold heads of {shape[0]} classes and width {shape[1]}")
    suspects = {suspect.index: suspect.label for suspect in run.record.suspects}
    if head.rule != run.record.rule or suspects != {i: head.classes[i] for i in head.suspects}:
        raise InputError(f"{run.path / HEADS} holds another rule or other suspects than {RECORD}")


def _check_samples(run: PurifyRun, parts: Parts) -> None:
    size, classes = run.record.model.preprocess.size, len(parts.graph.head.classes)
    images, labels = parts.images, parts.labels
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or len(images) == 0:
        raise InputError(f"{run.path / SAMPLES} must hold images uint8 (N, {size}, {size}, 3), N above 0")
    fits = labels.dtype == np.int64 and labels.shape == (len(images),)
    if not fits or labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{run.path / SAMPLES} must hold one label of {classes} classes for each image")


def _check_bank(run: PurifyRun, parts: Parts) -> None:
    size, classes = run.record.model.preprocess.size, len(parts.graph.head.classes)
    for trigger in parts.bank:
        if not trigger.fits(size) or not 0 <= trigger.target < classes:
            raise InputError(f"{run.path / TRIGGERS} holds a trigger of another image size or class list")
