"""A defence of one's own for plans of tests, `quick_cbpt:quick`: CBPT with few steps."""

from __future__ import annotations

import tomllib

from commands import QUICK

from cbpt_guard.bench.purified import cbpt
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.settings import Settings


def quick(task: Task) -> Defended:
    return cbpt(task, Settings.model_validate(tomllib.loads(QUICK)))
