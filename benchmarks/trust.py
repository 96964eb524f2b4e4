"""Every trust test in its long form, and docs/trust.md from what they counted.

    python benchmarks/trust.py measure      runs `pytest -m trust` (under 45 minutes on two cores), then writes the page
    python benchmarks/trust.py page         rewrites docs/trust.md from benchmarks/trust.json and benchmarks/soak.json

A run that fails changes neither. The hour of benchmarks/soak.py stands apart; its figures are the page's last section.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES, SOAK, PAGE = HERE / "trust.json", HERE / "soak.json", HERE.parent / "docs" / "trust.md"
_TOOLS = ("torch", "onnxruntime", "pillow", "safetensors", "picklescan", "hypothesis")
_SOAK = {
    "predictions": "predictions through a bundle",
    "bad": "share of bad inputs",
    "differing": "answers unlike the single-threaded ones",
    "growth MiB": "growth of resident memory over the second half, MiB",
    "MiB": "resident memory at the end, MiB",
    "seconds": "seconds it was asked to serve",
}
_HEAD = """\
# What the trust tests count

Written by `python benchmarks/trust.py` from benchmarks/trust.json and benchmarks/soak.json. What is promised stands
in [security.md](security.md).
{about}
"""


def main() -> None:
    """Parse the command and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "page"))
    if parser.parse_args().command == "measure":
        measure()
    found, soak = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {} for path in (FIGURES, SOAK))
    PAGE.write_text(page(found, soak), encoding="utf-8")
    print(PAGE)


def measure() -> None:
    """Run the tests; figures are kept when all passed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "trust.json"
        command = [sys.executable, "-m", "pytest", "-m", "trust", "--figures", str(found)]
        # torch's threads spin while they wait for each other: on a busy machine that costs more than they do
        subprocess.run(command, cwd=HERE.parent, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        figures = json.loads(found.read_text(encoding="utf-8"))
    figures["about"] = {
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in _TOOLS},
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def page(found: dict[str, Any], soak: dict[str, Any]) -> str:
    """The Markdown page: a section for each part, its figures as one table, then its lists; the soak is the last."""
    about = found.get("about", {})
    told = f"Last run: {about.pop('date')}, {about.pop('minutes')} minutes with " if about else ""
    parts = [_HEAD.format(about=told + ", ".join(f"{name} {value}" for name, value in about.items()))]
    for section in found.values():
        if "title" not in section:
            continue
        parts.append(f"## {section['title']}\n")
        rows = [[name, _shown(value)] for name, value in section["figures"].items()]
        parts.append(_table(["counted", "value"], rows))
        for title, (columns, *body) in section["tables"].items():
            parts.append(f"{title}:\n\n{_table(columns, body)}")
    if soak:
        rows = [[_SOAK.get(name, name), _shown(value)] for name, value in soak.items()]
        parts.append(f"## The soak: `python benchmarks/soak.py BUNDLE`\n\n{_table(['counted', 'value'], rows)}")
    return "\n".join(parts)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
