"""Under load every request is answered as it would be alone, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import load_run
import numpy as np
import pytest
from commands import ENVIRONMENT
from figures import Figures

pytestmark = pytest.mark.trust
MOST_GROWTH = 4.0  # MiB over the second half, in which the allocators' own noise stays


def run(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, load_run.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_eight_threads_get_the_answers_that_one_gets(
    served_bundle: Path, tmp_path: Path, amount: Callable[[int, int], int], figures: Figures
) -> None:
    wanted = amount(4_000, 50_000)
    found = run("serve", served_bundle, tmp_path, "--predictions", wanted, "--threads", 8)
    assert wanted <= found["predictions"] <= wanted + load_run.LIST
    assert found["bad"] == 0.01
    assert found["differing"] == 0
    assert found["threads left"] == 0
    assert found["files left"] == 0
    assert found["growth MiB"] < MOST_GROWTH
    figures.add("load", "predictions from 8 threads, 1 % of them bad inputs", found["predictions"])
    figures.add("load", "of them unlike the single-threaded answer", found["differing"])
    figures.add("load", "growth of resident memory over the second half, MiB", found["growth MiB"])
    figures.add("load", "threads left behind", found["threads left"])
    figures.add("load", "file handles left behind", found["files left"])


def test_loading_and_dropping_leaves_no_memory_and_no_file_open(
    served_bundle: Path, amount: Callable[[int, int], int], figures: Figures
) -> None:
    times = amount(40, 200)
    found = run("reload", served_bundle, "--times", times)
    assert found["files left"] == 0
    assert found["growth MiB"] < MOST_GROWTH
    figures.add("load", "times loaded and dropped", times)
    figures.add("load", "growth of resident memory over the second half of those, MiB", found["growth MiB"])
    figures.add("load", "file handles left", found["files left"])


def test_a_leak_and_a_wrong_answer_would_show() -> None:
    flat = [(place, 100.0 + place % 3) for place in range(200)]
    assert abs(load_run.growth(flat)["growth MiB"]) < 0.1
    leaking = [(place, 100.0 + 0.1 * place) for place in range(200)]
    assert load_run.growth(leaking)["growth MiB"] == pytest.approx(9.9)
    one = load_run.Prediction("a", 0, 0.5, (("a", 0.5),), False, False, "d")
    assert load_run.alike(one, one)
    for change in ({"label": "b"}, {"triggered": True}, {"score": 0.6}, {"error": "no"}):
        assert not load_run.alike(one, type(one)(**(vars(one) | change)))


def test_the_inputs_are_of_every_form_and_one_in_a_hundred_is_bad(tmp_path: Path) -> None:
    given = load_run.sources(tmp_path)
    assert {type(source) for source in given} > {bytes, np.ndarray}
    assert len(given) == 200
