"""CleanCLIP (arXiv 2303.03323): each modality is also aligned with augmented copies of itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cbpt_guard.bench.finetune import Batch, Loss, Variant, clip_loss, fine_tuned
from cbpt_guard.bench.settings import CLEANCLIP, CleanClipSettings
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.bench.trainable import TrainableClip
from cbpt_guard.defense.clip import to_pixels


def cleanclip(task: Task, settings: CleanClipSettings = CLEANCLIP) -> Defended:
    """Fine-tuning with CleanCLIP's loss."""
    return fine_tuned(task, settings, [Variant(cleanclip_loss(task, settings), {})])


def cleanclip_loss(task: Task, settings: CleanClipSettings) -> Loss:
    """inter * CLIP's loss + intra * the mean of the two modalities' own contrastive losses."""

    def loss(student: TrainableClip, batch: Batch, draws: torch.Generator) -> Tensor:
        """One step's loss, ()."""
        images = auto_augment(task.shots.images[batch.index], draws)
        texts = [
            augmented_text(settings.templates[template].replace("{}", task.shots.classes[label]), draws)
            for template, label in batch.captions.tolist()
        ]
        ids = student.text.cut(task.clip.tokenizer(texts))
        of_images = in_modal(batch.features, student.encode_images(to_pixels(images)), batch.scale)
        of_texts = in_modal(batch.rows, student.encode_ids(ids), batch.scale)
        return settings.inter * clip_loss(batch) + settings.intra * (of_images + of_texts) / 2

    return loss


def auto_augment(images: Tensor, draws: torch.Generator) -> Tensor:
    """Copies of uint8 images (N, S, S, 3), each changed by AutoAugment's policy for ImageNet (arXiv 1805.09501)."""
    from torchvision.transforms import v2  # here: FrozenClip's module makes torchvision importable beside a CPU torch

    policy = v2.AutoAugment()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator only
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=draws)))
        changed = [policy(image) for image in images.permute(0, 3, 1, 2)]
    return torch.stack(changed).permute(0, 2, 3, 1)


def in_modal(features: Tensor, augmented: Tensor, scale: float) -> Tensor:
    """InfoNCE of unit rows (N, E) against those of their augmented copies: each row's own copy is the positive."""
    return F.cross_entropy(scale * features @ augmented.T, torch.arange(len(features), device=features.device))


def augmented_text(text: str, draws: torch.Generator) -> str:
    """One of EDA's operations (arXiv 1901.11196) on a sentence: delete a word, swap two, or repeat one elsewhere.

    EDA inserts and substitutes synonyms from WordNet; without that dictionary a word of the sentence is inserted.
    """
    words = text.split()

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=draws))

    first, second = draw(len(words)), draw(len(words))
    operations: tuple[Callable[[], object], ...] = (
        lambda: words.pop(first) if len(words) > 1 else None,
        lambda: words.insert(second, words[first]),
        lambda: _swap(words, first, second),
    )
    operations[draw(len(operations))]()
    return " ".join(words)


def _swap(words: list[str], first: int, second: int) -> None:
    words[first], words[second] = words[second], words[first]
