"""The recipe's settings: frozen, readable from TOML, written into every run as they were used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cbpt_guard.errors import InputError
from cbpt_guard.files import read_toml
from cbpt_guard.manifest import RuleName
from cbpt_guard.problems import problems

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InversionSettings(_Frozen):
    """Stage 1: how targets and triggers are looked for; what a scan's score depends on is among these.

    `epsilon` bounds additive patterns: where those reach every class the scan takes lower ones; else higher ones are
    tried last, beside what stands out by then. `wave_amplitude` is half a wave's height, in pixels of [0, 1]; waves
    have 1 to `wave_periods` periods a side, and some finer ones besides. `shift` is a share of the image's side. The
    scan's and the waves' `finalists` get a second heat; waves are tried on `wave_images` images, and on 16 times as
    many there. `stands_out` says how many times as likely as all others a class is under the agnostic trigger, a plain
    wave, or a patch, a warp or a tint of its own, or under its own pattern in a short scan of every class, if its odds
    there are as many times those of the rest. Where none is, masks are compared (of classes that one of these hints at,
    too, whatever is): of the classes whose share grew most (`candidates` at most) or by `clear_share`, and of the
    `scanned` leaders of the scan, one stands out that needs so many times less area than `references` classes of middle
    rank. Where the scan took fainter patterns a class stands out, too, whose odds at some height are the square of it
    times those of the rest and whose area is less by the root of it. A warp has `warp_points` control points a side,
    and moves them by at most `warp_shift`, a share of the image's side. A tint changes each colour's gain by at most
    `tint_gain` and adds at most `tint_offset` at its control points, `tint_points` a side; between them the bicubic
    field may go further. A patch is a square whose side is `patch_side` of the image's, of 2 pixels at least; it is
    learnt like a mask, in as many steps as an additive pattern, and then tried at `patch_places` places each way.
    """

    epsilon: Annotated[float, Field(gt=0, le=1)] = 16 / 255
    temperature: Positive = 0.07
    alike_weight: Annotated[float, Field(ge=0)] = 0.5
    moved_weight: Annotated[float, Field(ge=0)] = 0.1
    learning_rate: Positive = 0.1
    mask_learning_rate: Positive = 0.2
    agnostic_batch: Annotated[int, Field(ge=2)] = 64
    agnostic_steps: Count = 60
    batch: Annotated[int, Field(ge=2)] = 32
    masked_steps: Count = 120
    additive_steps: Count = 80
    candidates: Count = 3
    references: Count = 2
    scanned: Count = 2
    clear_share: Share = 0.1
    scan_steps: Count = 8
    scan_images: Count = 4
    scan_budget: Count = 8000
    finalists: Count = 8
    wave_amplitude: Annotated[float, Field(gt=0, le=1)] = 32 / 255
    wave_periods: Count = 10
    wave_images: Count = 8
    asr_goal: Share = 0.97
    area_weight: Annotated[float, Field(ge=0)] = 60.0
    shift: Share = 1 / 64
    warp_points: Annotated[int, Field(ge=2)] = 4
    warp_shift: Annotated[float, Field(gt=0, le=0.25)] = 3 / 64
    tint_points: Annotated[int, Field(ge=2)] = 3
    tint_gain: Annotated[float, Field(gt=0, lt=1)] = 0.4
    tint_offset: Annotated[float, Field(gt=0, le=1)] = 0.2
    patch_side: Annotated[float, Field(gt=0, le=0.5)] = 1 / 8
    patch_places: Annotated[int, Field(ge=2)] = 5
    stands_out: Annotated[float, Field(ge=1e-6, le=1e6)] = 4.0


class TuningSettings(_Frozen):
    """Stage 2: how the class-wise prompts are tuned."""

    epochs: Count = 30
    batch: Count = 512
    learning_rate: Positive = 1e-2
    triggered_weight: Annotated[float, Field(ge=0)] = 1.0
    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    accuracy_slack: Share = 0.005
    chunk: Count = 64


class AnchorSettings(_Frozen):
    """Stage 2: how far anchored rows may go from the zero-shot ones (scikit-learn's C), in how many iterations.

    `label_weight` is the label's share in what they are taught; the rest is what the zero-shot head makes of the clean
    image at `temperature`.
    """

    strength: Positive = 100.0
    iterations: Count = 100
    label_weight: Share = 0.15
    temperature: Positive = 3.0


class RuleSettings(_Frozen):
    """The answer rule and where its test's threshold lies, in standard deviations of clean target images.

    It is lowered by up to half of them where it would miss images under a known trigger (`flag.py`).
    """

    name: RuleName = "switch"
    clean_deviations: Positive = 2.0


class VerdictSettings(_Frozen):
    """The bounds that a run must keep to be called guarded; shares in [0, 1]."""

    found_asr: Share = 0.05
    fresh_asr: Share = 0.10
    accuracy_loss: Share = 0.02
    recall_loss: Share = 0.05
    false_alarms: Share = 0.01


MANY = 20
"""Classes from which common edits are tried: of two kinds of apple another hue makes one the other."""
TEMPLATE = "a photo of a {}."
"""What a class name stands in, unless the user says otherwise."""


class Settings(_Frozen):
    """Everything that may be set in `--settings FILE.toml`, one table for each part."""

    inversion: InversionSettings = InversionSettings()
    tuning: TuningSettings = TuningSettings()
    anchor: AnchorSettings = AnchorSettings()
    rule: RuleSettings = RuleSettings()
    verdict: VerdictSettings = VerdictSettings()

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Settings from a TOML file; what it does not name keeps its default.

        Raises:
            InputError: the file is missing, no TOML, or names an unknown or impossible setting.
        """
        try:
            return cls.model_validate(read_toml(path, "settings"))
        except ValidationError as error:
            raise InputError(f"settings {path}: {problems(error)}") from error
