"""What the commands that measure share: their two sub-commands, lines that are appended, and where it was."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Parsers(NamedTuple):
    """The whole command, its sub-commands, and `measure`, to which its own arguments are added."""

    whole: argparse.ArgumentParser
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    measuring: argparse.ArgumentParser


def parsers(about: str | None) -> Parsers:
    """`measure --shared DIR --work DIR` and `table`; `about` is the module's docstring."""
    whole = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--shared", type=Path, required=True)
    measuring.add_argument("--work", type=Path, required=True)
    commands.add_parser("table")
    return Parsers(whole, commands, measuring)


def append(path: Path, *lines: dict[str, Any]) -> None:
    """Add lines to a file of them."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def machine() -> str:
    """The machine in words."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


class Ran(NamedTuple):
    """What a command took: seconds from start to end, the processors' seconds, and its peak memory in MiB."""

    seconds: float
    cpu_seconds: float
    peak_mb: int


def ran(*arguments: str | Path) -> Ran:
    """Run a `cbpt-guard` command, on Linux.

    It may say that a run is not guarded (exit 1); anything worse ends the measurement.
    """
    started = time.monotonic()
    process = subprocess.Popen([Path(sys.executable).parent / "cbpt-guard", *arguments])
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone; RUSAGE_CHILDREN is the largest of all so far
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"{arguments[0]} ended with {process.returncode}")
    return Ran(seconds, usage.ru_utime + usage.ru_stime, round(usage.ru_maxrss / 1024))


def timed(*arguments: str | Path) -> float:
    """Seconds that a `cbpt-guard` command takes from its start to its end."""
    return ran(*arguments).seconds
