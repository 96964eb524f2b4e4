"""What the trust tests count: recorded by the tests, printed at the end, kept as JSON for docs/trust.md.

A test takes the fixture `figures` and says what it counted, in words that stand alone in a table:

    figures.add("images", "fuzzed images", 20_000)

`pytest -m trust --figures FILE` writes them all; sections that another run wrote to FILE stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECTIONS = {
    "checkpoints": "Hostile and malformed checkpoints",
    "bundle": "The bundle",
    "images": "Images and settings",
    "crashes": "Crashes",
    "load": "Load",
    "supply": "Supply chain",
}
Value = str | int | float


@dataclass
class Figures:
    """Figures and tables by section, in the order of their recording."""

    figures: dict[str, dict[str, Value]] = field(default_factory=dict)
    tables: dict[str, dict[str, list[list[str]]]] = field(default_factory=dict)

    def add(self, section: str, name: str, value: Value) -> None:
        """One counted value with its unit in its name; a later one of the same name replaces it."""
        self.figures.setdefault(_known(section), {})[name] = value

    def table(self, section: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table with its title; cells may come from hostile files, the documents' writer escapes them."""
        body = [[str(cell) for cell in row] for row in rows]
        self.tables.setdefault(_known(section), {})[title] = [list(columns), *body]

    def lines(self) -> list[str]:
        """The figures as lines for a terminal; tables are counted only."""
        found = []
        for section, title in SECTIONS.items():
            values = self.figures.get(section, {})
            found += [f"{title}: {name}: {_shown(value)}" for name, value in values.items()]
            found += [f"{title}: {name}: {len(rows) - 1} rows" for name, rows in self.tables.get(section, {}).items()]
        return found

    def write(self, path: Path) -> None:
        """Replace this run's sections in a JSON file, figure by figure and table by table."""
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for section, title in SECTIONS.items():
            if section in self.figures or section in self.tables:
                entry = kept.setdefault(section, {"title": title, "figures": {}, "tables": {}})
                entry["figures"].update(self.figures.get(section, {}))
                entry["tables"].update(self.tables.get(section, {}))
        path.write_text(json.dumps(kept, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def _known(section: str) -> str:
    if section not in SECTIONS:
        raise KeyError(f"{section!r} is no section of docs/trust.md; there are {', '.join(SECTIONS)}")
    return section


def _shown(value: Value) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value
