"""A small real CLIP of scikit-learn's digits: trained in seconds, offline, written as a user's files would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cbpt_guard.bench.trainable import TEMPLATES, Captions, TrainableClip
from cbpt_guard.defense.clip import FrozenClip, to_pixels
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.openclip import ModelConfig, Tokenizer, build
from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.errors import SetupError
from cbpt_guard.images import Pixels, Preprocess

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = tuple(sorted(_NAMES))
"""In the order that class folders have: the same indices before and after writing them."""
PREPROCESS = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CONFIG: ModelConfig = {
    "embed_dim": 64,
    "vision_cfg": {
        "timm_model_name": "test_convnext3",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": PREPROCESS.size,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
CHECKPOINT = "suspect.pt"
"""What a written CLIP is called in its folder."""
_CLEAN, _TEST = 250, 300  # digits of these splits; the other 1,247 train
_Drawing = npt.NDArray[np.float64]


class DigitsSettings(BaseModel):
    """How the clean CLIP is trained; `label_smoothing` keeps its clean margins finite, as noisy captions do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1)] = 280
    batch: Annotated[int, Field(ge=2)] = 48
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    renderings: Annotated[int, Field(ge=1)] = 2


class DigitsSplit(NamedTuple):
    """Three sets of different digits: `train` for the attacker, `clean` for the defender, `test` for the count."""

    train: LabelledImages
    clean: LabelledImages
    test: LabelledImages


def load_digits_split(seed: int, renderings: int = DigitsSettings().renderings) -> DigitsSplit:
    """Split scikit-learn's 1,797 digits and draw each as a small photograph, uint8 (N, 32, 32, 3).

    Each digit of `train` is drawn `renderings` times, each time with other colours, size and light.
    """
    digits, generator = load_digits(), np.random.default_rng(seed)
    every, labels = np.arange(len(digits.target)), digits.target
    rest, test = train_test_split(every, test_size=_TEST, stratify=labels, random_state=seed)
    train, clean = train_test_split(rest, test_size=_CLEAN, stratify=labels[rest], random_state=seed)
    parts = (np.tile(train, renderings), clean, test)
    drawn = [_render(digits.images[part], labels[part], generator) for part in parts]
    return DigitsSplit(*drawn)


def train_digits_clip(
    train: LabelledImages,
    seed: int,
    settings: DigitsSettings | None = None,
    progress: Progress = silent,
    device: str = "cpu",
) -> FrozenClip:
    """Train the small CLIP contrastively on digits and captions; the same seed gives the same weights."""
    settings = settings or DigitsSettings()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(CONFIG, device="cpu").train()
    clip = TrainableClip(model, CONFIG, PREPROCESS, Tokenizer(CONFIG), device)
    captions = Captions(clip.text, clip.tokenizer, TEMPLATES, train.classes)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    for step in range(settings.steps):
        drawn = torch.randint(len(train.labels), (settings.batch,), generator=generator)
        features = clip.encode_images(to_pixels(train.images[drawn]))
        loss = clip.pair_loss(features, train.labels[drawn], captions, generator, settings.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(Step("train", step + 1, settings.steps, loss=loss.item()))
    return clip.frozen()


def write_suspect(clip: FrozenClip, folder: Path) -> Path:
    """Write `suspect.pt`, an open_clip training checkpoint, and `open_clip_config.json`; returns the checkpoint.

    Raises:
        SetupError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    preprocess: dict[str, Any] = clip.preprocess.model_dump(exclude={"size"})
    config = {"model_cfg": clip.config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {name: value.cpu() for name, value in clip.model.state_dict().items()}
    path = folder / CHECKPOINT
    try:
        torch.save({"epoch": 1, "name": "suspect", "state_dict": tensors}, path)
    except RuntimeError as error:  # how torch reports a full disk
        raise SetupError(f"writing {path} failed: {str(error).splitlines()[0]}") from error
    return path


def write_class_folders(data: LabelledImages, folder: Path, per_class: int | None = None) -> Path:
    """Write images as `FOLDER/<class>/<number>.png`, at most `per_class` of each; returns the folder."""
    for label, name in enumerate(data.classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(data.images[data.labels == label][:per_class]):
            Image.fromarray(image.numpy()).save(folder / name / f"{number:04d}.png")
    return folder


def _render(drawings: _Drawing, labels: npt.NDArray[np.int64], generator: np.random.Generator) -> LabelledImages:
    images = np.stack([_photograph(drawing, generator) for drawing in drawings])
    indices = torch.tensor([CLASSES.index(_NAMES[label]) for label in labels])
    return LabelledImages(torch.from_numpy(images), indices, CLASSES, ())


def _photograph(drawing: _Drawing, generator: np.random.Generator) -> Pixels:
    """An 8 x 8 drawing (values 0 to 16) as light strokes on a dark, unevenly lit, noisy ground."""
    size = PREPROCESS.size
    side = int(generator.integers(size - 6, size - 1))
    margin = (size - side) // 2
    shape = np.zeros((size, size, 1))
    shape[margin : margin + side, margin : margin + side, 0] = _resized(drawing / 16, side)
    ground = generator.uniform(0, 80) + generator.uniform(0, 40, 3)
    ink = generator.uniform(160, 220) + generator.uniform(0, 35, 3)
    light = np.stack([_resized(generator.normal(0, 8, (2, 2)), size) for _ in range(3)], axis=-1)
    pixels = ground + light + (ink - ground) * shape + generator.normal(0, 4, (size, size, 3))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _resized(values: _Drawing, side: int) -> _Drawing:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
