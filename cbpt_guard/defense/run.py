"""PurifyRun: the directory that `purify` leaves and `export` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, cast
from zipfile import BadZipFile

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cbpt_guard.defense.clip import ImageEncoder
from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.defense.openclip import build
from cbpt_guard.defense.record import RunMetrics, RunRecord
from cbpt_guard.errors import InputError
from cbpt_guard.problems import problems

MODEL: Final = "model.safetensors"
SAMPLES: Final = "samples.npz"
PROMPTS: Final = "prompts.safetensors"
HEADS: Final = "heads.safetensors"
TRIGGERS: Final = "triggers.safetensors"
BESIDE: Final = "beside.safetensors"
RECORD: Final = "run.json"
METRICS: Final = "metrics.json"
PICTURES: Final = "pictures"
OURS: Final = (RECORD, METRICS, HEADS)
"""By these files a folder is known as a run, which another may replace."""

_EDITED = 9  # the first search that tried edits

_Record = TypeVar("_Record", bound=BaseModel)


@dataclass(frozen=True)
class PurifyRun:
    """A finished run; its parts are read when asked for."""

    path: Path
    record: RunRecord
    metrics: RunMetrics

    @classmethod
    def open(cls, path: str | Path) -> PurifyRun:
        """Read a run directory.

        Raises:
            InputError: it is missing, unfinished or malformed.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(f"{folder} is no run directory; `cbpt-guard purify` makes one")
        return cls(folder, _read(folder / RECORD, RunRecord), _read(folder / METRICS, RunMetrics))

    def head(self) -> GuardedHead:
        """Both heads and the rule."""
        return GuardedHead.load(self.path / HEADS)

    def bank(self) -> TriggerBank:
        """The found triggers that the guard was fitted to."""
        return TriggerBank.load(self.path / TRIGGERS)

    def beside(self) -> TriggerBank:
        """Telling edits that the bank lacks; searches before the ninth left none."""
        if (self.record.search or 0) < _EDITED:
            return TriggerBank(())
        return TriggerBank.load(self.path / BESIDE)

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Held-out images uint8 (N, S, S, 3) and labels int64 (N,)."""
        try:
            with np.load(self.path / SAMPLES, allow_pickle=False) as file:
                return file["images"], file["labels"]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(f"{self.path / SAMPLES} is missing or malformed: {error}") from error

    def image_encoder(self) -> ImageEncoder:
        """The frozen image encoder with the suspect's own weights, on the CPU in float32."""
        try:
            tensors = load_file(self.path / MODEL)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path / MODEL} is missing or malformed: {error}") from error
        visual = cast(nn.Module, build(self.record.model.config, device="cpu").visual)
        prefix = "visual."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            visual.load_state_dict(own)
        except RuntimeError as error:
            raise InputError(f"{self.path / MODEL} does not fit its architecture: {str(error)[:300]}") from error
        return ImageEncoder(visual, self.record.model.preprocess).eval().requires_grad_(False)


def _read(path: Path, model: type[_Record]) -> _Record:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {path.parent} is no finished run") from error
    except ValidationError as error:
        raise InputError(f"{path} is malformed at {problems(error, most=1)}") from error
