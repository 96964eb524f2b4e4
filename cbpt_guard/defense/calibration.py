"""What scores mean: those of clean and poisoned models of known origin, family by family.

`calibration.json` is written by `python benchmarks/calibration.py`, which makes the models and scans them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cbpt_guard.defense.settings import MANY, InversionSettings

FILE = Path(__file__).with_name("calibration.json")
SEARCH = 9
"""Raised whenever a scan of the same model with the same settings would score otherwise: families are then stale."""
Range = tuple[int, int]


def scoring(search: int, classes: int) -> int:
    """The first version of the search that scores so many classes as version `search` does.

    What 9 added, common edits, is tried with many classes alone.
    """
    return 8 if search == 9 and classes < MANY else search


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


class Looked(_Frozen):
    """What a scan looked at: how, and at how much.

    `search` numbers the search's code; `images` are the fewest and the most of a class.
    """

    search: int = SEARCH
    config: dict[str, Any]
    settings: InversionSettings
    template: str
    classes: int
    images: Range


class Family(_Frozen):
    """Models of one architecture that were scanned alike.

    `classes` and `images` are the fewest and the most classes, and images of a class, that they were scanned with.
    `clean` and `poisoned` are their scores; the models that test the calibration are not among them.
    """

    name: str
    search: int
    config: dict[str, Any]
    settings: InversionSettings
    template: str
    classes: Range
    images: Range
    clean: tuple[float, ...]
    poisoned: tuple[float, ...]

    def differs(self, scan: Looked) -> str | None:
        """Why `scan` is none like the family's; None where it is."""
        if scan.config != self.config:
            return "no model of this architecture was calibrated with"
        if scoring(scan.search, scan.classes) != scoring(self.search, scan.classes):
            return "the family was scanned by another version of the search"
        if (scan.settings, scan.template) != (self.settings, self.template):
            return "the family was scanned with other settings or another template"
        if not self.classes[0] <= scan.classes <= self.classes[1]:
            return f"{scan.classes} classes, where the family was scanned for {_span(self.classes)}"
        if not self.images[0] <= scan.images[0] <= scan.images[1] <= self.images[1]:
            return f"{_span(scan.images)} images a class, where the family was scanned with {_span(self.images)}"
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


def _span(values: Range) -> str:
    least, most = values
    return str(least) if least == most else f"{least} to {most}"


class Calibration(_Frozen):
    """Every family that scores are known of."""

    families: tuple[Family, ...] = ()

    def standing(self, score: float, scan: Looked) -> Standing | str:
        """How the largest score of a scan stands in its family, or why there is none to compare it with."""
        reason = "no model of this architecture was calibrated with"
        for family in self.families:
            difference = family.differs(scan)
            if difference is None:
                return family.standing(score)
            if scan.config == family.config:
                reason = difference
        return reason


@cache
def calibration() -> Calibration:
    """The calibration that is shipped."""
    return Calibration.model_validate_json(FILE.read_bytes())
