"""The tables of docs/serving.md and docs/models.md are what the committed lines give, to the byte."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cbpt_guard.bench.families import FAMILIES
from cbpt_guard.defense import openclip

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def commands() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import families
        import runtime

        yield runtime, families
    finally:
        sys.path.remove(str(BENCHMARKS))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def between(page: Path, name: str) -> str:
    return page.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_the_runtimes_table(commands: tuple[ModuleType, ModuleType]) -> None:
    runtime, _ = commands
    assert between(runtime.PAGE, "measured") == runtime.table(runtime.last(lines(runtime.LINES)))
    assert {line["row"] for line in lines(runtime.LINES)} == set(runtime.ROWS)


def test_every_family_stands_in_the_table_of_models(commands: tuple[ModuleType, ModuleType]) -> None:
    _, families = commands
    found = {(line["architecture"], line["size"]): line for line in lines(families.LINES)}
    assert between(families.PAGE, "measured") == families.measured(found)
    assert {name for name, _ in found} == {family.architecture for family in FAMILIES}
    for line in found.values():
        assert line["images"] >= 200
        assert line["max_logit_difference"] <= line["bound"]


def test_every_name_that_purify_refuses_stands_on_the_page(commands: tuple[ModuleType, ModuleType]) -> None:
    _, families = commands
    page = between(families.PAGE, "refused")
    for name in openclip.architecture_names():
        if openclip.refusal(openclip.named_config(name)) is not None:
            assert name in page


def test_the_roads_tables(commands: tuple[ModuleType, ModuleType]) -> None:
    import road  # beside `commands`

    measured = lines(road.LINES)
    last = list({line["model"]: line for line in measured if line["split"] == "test"}.values())
    assert [line["model"] for line in last] == list(road.MODELS)
    assert between(road.README, "measured") == road.table(last)
    assert between(road.METHOD, "stages") == road.stages(last, [line["export_seconds"] for line in measured])
    unwatched = [{name: value for name, value in line.items() if name != "others_cores"} for line in last]
    assert "cores that other processes took: unknown" in road.stages(unwatched, [1.0, 2.0])


def test_the_time_against_fine_tuning(commands: tuple[ModuleType, ModuleType]) -> None:
    import ft_time  # beside `commands`

    assert between(ft_time.METHOD, "ft") == ft_time.told(ft_time.lines())
    line: dict[str, Any] = {"model": "a", "purify_seconds": 60.4, "ft_seconds": 100.0, "ratio": 0.604, "epochs": 10}
    line |= {"machine": "2 cores", "others_cores": 0.04}
    text = ft_time.told([line | {"ratio": 0.9}, line])
    assert (
        text == "- a: 60 s of purify, 100 s for 10 epochs of FT, 0.60 times (2 cores; other processes took 0.0 cores)"
    )
