"""CBPT with few steps: of a suspect, and as a defence of one's own for plans of tests, `quick_cbpt:quick`."""

from __future__ import annotations

import tomllib
from pathlib import Path

from commands import QUICK
from digits import DigitsModel

from cbpt_guard.bench.purified import cbpt
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.settings import Settings

SETTINGS = Settings.model_validate(tomllib.loads(QUICK))


def purified(suspect: DigitsModel, out: Path) -> Path:
    return purify(suspect.checkpoint, suspect.data, out=out, settings=SETTINGS).path


def quick(task: Task) -> Defended:
    return cbpt(task, SETTINGS)
