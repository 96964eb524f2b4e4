"""benchmarks/halves.py: it fits what the run was fitted to, and each half is counted by what the other one chose."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import quick_cbpt

from cbpt_guard.defense.data import list_images
from cbpt_guard.defense.head import GuardedHead, TriggerTest
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.triggers import PlantedTrigger
from cbpt_guard.errors import CheckError

if TYPE_CHECKING:
    from digits import DigitsSuspect

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def commands() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import halves
        import runs

        yield halves, runs
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def planted(
    commands: tuple[ModuleType, ModuleType], digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The digits suspect's run, as one of a work folder's."""
    _, runs = commands
    out = tmp_path_factory.mktemp("run") / "purified"
    suspect, data = digits_suspect.checkpoint, list_images(digits_suspect.data)
    run = purify(suspect, digits_suspect.data, out=out, shots=runs.SHOTS, settings=quick_cbpt.SETTINGS)
    pair = PlantedTrigger(digits_suspect.trigger, data.classes[digits_suspect.target])
    return runs.PlantedRun("digits", run, suspect, (pair,), data)


def test_the_standing_setting_is_the_runs_own(
    commands: tuple[ModuleType, ModuleType], planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves, _ = commands
    monkeypatch.setattr(halves, "GRID", tuple(one for one in halves.GRID if one[1:] in halves.ROWS[:2]))  # time
    line = halves.measured(planted)
    seen = halves.counted(planted, planted.clip())
    head = planted.run.head()
    assert line["grid"][0] == list(halves.STANDING)
    assert line["shares"][0] == halves.shares(head, head.original, seen)
    assert line["undefended"]["asr"] > 0.9
    assert line["shares"][0]["asr"] < 0.1
    by_deviations = [line["shares"][line["grid"].index([far, *halves.ROWS[0]])] for far in (1.0, 2.0, 3.0)]
    recalls = [shares["recall"] for shares in by_deviations]
    assert recalls == sorted(recalls), "a higher threshold gives clean images back"
    alike = [shares for setting, shares in zip(line["grid"], line["shares"], strict=True) if setting[0] == 2.0]
    assert len({(shares["asr"], shares["recall"]) for shares in alike}) == 1, "rows answer without the target"


def test_no_drawn_image_is_counted(commands: tuple[ModuleType, ModuleType], planted: Any) -> None:
    _, runs = commands
    target = planted.planted[0].target
    left = runs.undrawn(planted.everything, planted.drawn, 1, [target])
    drawn = {path for files in planted.drawn.files for path in files}
    assert not drawn & {path for files in left.files for path in files}
    counts = dict(zip(left.classes, map(len, left.files), strict=True))
    assert counts.pop(target) == len(planted.everything.files[0]) - runs.SHOTS > 1
    assert set(counts.values()) == {1}


def test_a_run_that_leaves_otherwise_is_refused(
    commands: tuple[ModuleType, ModuleType], planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves, _ = commands
    monkeypatch.setattr(halves, "GRID", halves.GRID[:1])
    head: GuardedHead = planted.run.head()
    off = replace(head, test=TriggerTest.none(*head.original.rows.shape))
    monkeypatch.setattr(PurifyRun, "head", lambda _: off)
    with pytest.raises(CheckError, match="and what is fitted here by its setting"):
        halves.measured(planted)


def test_each_half_is_counted_by_what_the_other_chose(commands: tuple[ModuleType, ModuleType]) -> None:
    halves, _ = commands
    low, high = (halves.Setting(far, *halves.ROWS[0]) for far in (1.0, 3.0))

    def line(implant: str, best: Any, seed: int = 0) -> dict[str, Any]:
        shares = [{"asr": 0.1, "pa": 0.5 if setting == best else 0.25, "recall": 0.6} for setting in halves.GRID]
        undefended = {"asr": 1.0, "pa": 0.0, "recall": 0.65}
        grid = [list(setting) for setting in halves.GRID]
        return {"implant": implant, "seed": seed, "grid": grid, "shares": shares, "undefended": undefended}

    stale, measured = line("a", high), [line("a", low), line("a", low, 1), line("b", high), line("c", low)]
    _, _, *rows, _, about = halves.told([stale, *measured]).splitlines()
    assert about == "First: a, c; second: b."
    assert rows == [
        "| first | second | 3 | 0.15 | 3 | 100 | 10.0 | 10.0 | 25.0 | -5.0 |",
        "| first | as they stand | 2 | 0.15 | 3 | 100 | 10.0 | 10.0 | 25.0 | -5.0 |",
        "| first | first | 1 | 0.15 | 3 | 100 | 10.0 | 10.0 | 50.0 | -5.0 |",
        "| second | first | 1 | 0.15 | 3 | 100 | 10.0 | 10.0 | 25.0 | -5.0 |",
        "| second | as they stand | 2 | 0.15 | 3 | 100 | 10.0 | 10.0 | 25.0 | -5.0 |",
        "| second | second | 3 | 0.15 | 3 | 100 | 10.0 | 10.0 | 50.0 | -5.0 |",
    ]
    assert halves.told([stale]) == "Not measured yet."
    equal = [line(name, None) for name in "ab"]
    assert halves.chosen([equal]) == halves.STANDING, "of equals the one that stands"


def test_the_table_is_what_the_lines_give(commands: tuple[ModuleType, ModuleType]) -> None:
    halves, _ = commands
    page = halves.PAGE.read_text(encoding="utf-8")
    assert page.split("<!-- halves -->\n")[1].split("\n<!-- /halves -->")[0] == halves.told(halves.read(halves.LINES))
