"""docs/trust.md is what the committed figures give, to the byte, and hostile names stand in it tamely."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trust() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        import trust

        yield trust
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_page_is_what_the_figures_give(trust: ModuleType) -> None:
    if not trust.FIGURES.exists():
        pytest.skip("the long form of the trust tests has not been run yet")
    assert trust.PAGE.read_text(encoding="utf-8") == trust.page(read(trust.FIGURES), read(trust.SOAK))


def test_the_committed_soak_took_an_hour_and_left_nothing(trust: ModuleType) -> None:
    soak = read(trust.SOAK)
    assert soak["seconds"] == 3600
    assert soak["predictions"] > 50_000
    assert (soak["differing"], soak["threads left"], soak["files left"]) == (0, 0, 0)
    assert soak["growth MiB"] < 16


def test_names_of_hostile_files_stand_in_the_page_tamely(trust: ModuleType) -> None:
    section = {"title": "T", "figures": {"n": 1234}, "tables": {"t": [["file"], ["a|b\x1b[2J<script>`x`\nc"]]}}
    text = trust.page({"checkpoints": section}, {})
    assert "| n | 1,234 |" in text
    assert "| a\\|b [2J&lt;script>'x' c |" in text
