"""What scores mean: those of clean and poisoned models of known origin, family by family.

`calibration.json` is written by `python benchmarks/calibration.py`, which makes the models and scans them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cbpt_guard.defense.settings import InversionSettings

FILE = Path(__file__).with_name("calibration.json")
_Range = tuple[int, int]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Standing(_Frozen):
    """How a score stands among the calibration models of its family: counts, and no more than counts."""

    family: str
    clean: int
    clean_as_high: int
    poisoned: int
    poisoned_as_low: int

    def __str__(self) -> str:
        return (
            f"{self.clean_as_high} of the {self.clean} clean models score as high, {self.poisoned_as_low} of the "
            f"{self.poisoned} poisoned ones as low ({self.family})"
        )


class Family(_Frozen):
    """Models of one architecture that were scanned with the same settings, and within what bounds.

    `classes` and `shots` are the fewest and the most classes, and images of a class, that they were scanned with.
    `clean` and `poisoned` are their scores; the models that test the calibration are not among them.
    """

    name: str
    config: dict[str, Any]
    settings: InversionSettings
    classes: _Range
    shots: _Range
    clean: tuple[float, ...]
    poisoned: tuple[float, ...]

    def differs(self, settings: InversionSettings, classes: int, shots: int) -> str | None:
        """Why a scan of this architecture is none like the family's; None where it is."""
        if settings != self.settings:
            return "the family was scanned with other settings"
        for what, number, (least, most) in (("classes", classes, self.classes), ("images a class", shots, self.shots)):
            if not least <= number <= most:
                bounds = str(least) if least == most else f"{least} to {most}"
                return f"{number} {what}, where the family was scanned with {bounds}"
        return None

    def standing(self, score: float) -> Standing:
        """How `score` stands among the family's."""
        return Standing(
            family=self.name,
            clean=len(self.clean),
            clean_as_high=sum(other >= score for other in self.clean),
            poisoned=len(self.poisoned),
            poisoned_as_low=sum(other <= score for other in self.poisoned),
        )


class Calibration(_Frozen):
    """Every family that scores are known of."""

    families: tuple[Family, ...] = ()

    def standing(
        self, score: float, config: dict[str, Any], settings: InversionSettings, classes: int, shots: int
    ) -> Standing | str:
        """How a score stands in its family, or why there is none to compare it with.

        Args:
            score: the largest of a scan's candidates.
            config: the scanned model's architecture, as open_clip has it.
            settings: what it was scanned with.
            classes: how many classes it was scanned for.
            shots: images of the class that had fewest.
        """
        same = [family for family in self.families if family.config == config]
        found = [family.differs(settings, classes, shots) for family in same]
        for family, difference in zip(same, found, strict=True):
            if difference is None:
                return family.standing(score)
        return found[0] or "" if found else "no model of this architecture was calibrated with"


@cache
def calibration() -> Calibration:
    """The calibration that is shipped."""
    return Calibration.model_validate_json(FILE.read_bytes())
