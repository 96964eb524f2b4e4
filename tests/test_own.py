"""The attack and the defence of one's own that docs/evidence.md shows, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import cli, here
from digits import DigitsModel

from cbpt_guard.bench.digits import write_class_folders, write_suspect
from cbpt_guard.bench.lines import read_lines

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
MOST_LINES = 10


def shown(name: str) -> str:
    """The block of code that follows a file's name in the page."""
    found = re.search(
        rf"`{re.escape(name)}`[^`]*(?:`--root`[^`]*)?```\w*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None, name
    return found[1]


@pytest.mark.parametrize("name", ["own_attack.py", "own_defense.py"])
def test_ten_lines_are_enough(name: str) -> None:
    assert len(shown(name).splitlines()) <= MOST_LINES


def test_the_shown_attack_meets_the_shown_defence(
    digits_clean: DigitsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own_attack.py", "own_defense.py"):
        (tmp_path / name).write_text(shown(name))
    (tmp_path / "own.toml").write_text(shown("own.toml").replace(', "cbpt"]', "]"))
    write_suspect(digits_clean.clip, tmp_path / "model")
    for name in ("train", "clean", "test"):
        write_class_folders(getattr(digits_clean.split, name), tmp_path / name, per_class=30)
    monkeypatch.setattr("cbpt_guard.bench.suite.side_by_side", here)  # for speed
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    result = cli("bench", "run", "--plan", "own.toml", "--root", ".", "--work", "work", "--out", "lines.jsonl")
    assert result.exit_code == 0, result.stderr
    none, ours = read_lines(tmp_path / "lines.jsonl")
    assert (none.implant, none.attack, none.target) == ("yellow", "own_attack:corner", "three")
    assert none.took
    assert none.asr > 0.8
    assert ours.defense == "own_defense:class_means"
    assert ours.ca > 0.8
    assert ours.suspect_sha256 == none.suspect_sha256
    assert (ours.ca, ours.asr) != (none.ca, none.asr)
    assert "own\\_defense:class\\_means" in cli("bench", "table", "lines.jsonl").stdout
