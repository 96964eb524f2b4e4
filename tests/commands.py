"""The command line as tests call it: inside this process, or as the installed script."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from cbpt_guard.bench.processes import Piece
from cbpt_guard.cli.app import app

SCRIPT = Path(sys.executable).with_name("cbpt-guard")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

QUICK = """\
[inversion]
agnostic_steps = 5
agnostic_batch = 16
masked_steps = 60
additive_steps = 5
batch = 16
candidates = 1
stands_out = 2.0
references = 1
scan_steps = 2
scan_budget = 100
finalists = 1
[tuning]
epochs = 4
"""


def cli(*arguments: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def here(pieces: Sequence[Piece], **_: object) -> Generator[tuple[Piece, Any]]:
    """The suite's pieces in this process, one after another: takes the place of `side_by_side`."""
    for piece in pieces:
        yield piece, piece.work(*piece.arguments)


def script(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed `cbpt-guard` in a process of its own."""
    command = [str(SCRIPT), *(str(argument) for argument in arguments)]
    options = {"env": ENVIRONMENT, "timeout": 300} | options
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False, **options)


def python(code: str, *arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own."""
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    options = {"env": ENVIRONMENT, "timeout": 300} | options
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False, **options)


def blocking(*modules: str) -> str:
    """Code after which `modules` are not installed, as far as an import can tell."""
    return f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def assert_refused(
    result: Result | subprocess.CompletedProcess[str], *words: str, code: int = 2, usage: bool = False
) -> None:
    """One clear error on stderr, nothing on stdout, the exit code, and no traceback."""
    found = result.exit_code if isinstance(result, Result) else result.returncode
    assert found == code, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == (0 if usage else 1), result.stderr
    assert usage or result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr, result.stderr


EARLIER = {"run.json": b"{}", "metrics.json": b"{}", "heads.safetensors": b"", "earlier.txt": b"kept"}
"""What a run's folder holds at least, and a file of its own to be known by."""


def write_earlier(folder: Path) -> None:
    """An earlier run, as far as `--force` looks at it."""
    folder.mkdir()
    for name, content in EARLIER.items():
        (folder / name).write_bytes(content)
