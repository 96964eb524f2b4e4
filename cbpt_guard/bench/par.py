"""PAR, Perturb and Recover (arXiv 2412.00727): leave the suspect's own embeddings behind, keep CLIP's loss low."""

from __future__ import annotations

import torch
from torch import Tensor

from cbpt_guard.bench.finetune import Batch, Variant, clip_loss, fine_tuned
from cbpt_guard.bench.rival import shot_features
from cbpt_guard.bench.settings import PAR, ParSettings
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.bench.trainable import TrainableClip


def par(task: Task, settings: ParSettings = PAR) -> Defended:
    """Fine-tuning with PAR's loss."""
    return fine_tuned(task, settings, par_variants(task, settings))


def par_variants(task: Task, settings: ParSettings) -> list[Variant]:
    """CLIP's loss less how far images and captions lie from where the suspect has them; the largest threshold first."""
    images = shot_features(task).to(task.clip.device)
    texts = [template.replace("{}", name) for template in settings.templates for name in task.shots.classes]
    captions = task.clip.encode_texts(texts).view(len(settings.templates), len(task.shots.classes), -1)

    def with_threshold(threshold: float) -> Variant:
        def loss(student: TrainableClip, batch: Batch, draws: torch.Generator) -> Tensor:
            templates, classes = batch.captions.T
            moved = distance(batch.features, images[batch.index], threshold)
            return clip_loss(batch) - moved - distance(batch.rows, captions[templates, classes], threshold)

        return Variant(loss, {"threshold": threshold})

    return [with_threshold(threshold) for threshold in sorted(settings.thresholds, reverse=True)]


def distance(features: Tensor, before: Tensor, threshold: float) -> Tensor:
    """Mean squared distance of unit rows (N, E), each at most `threshold`: what lies beyond is left in peace."""
    return (features - before).square().sum(1).clamp(max=threshold).mean()
