"""What the commands that measure share: their two sub-commands, lines that are appended, and where it was."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cbpt_guard import __version__
from cbpt_guard.cli.show import refused
from cbpt_guard.errors import CbptGuardError


class Parsers(NamedTuple):
    """The whole command, its sub-commands, and `measure`, to which its own arguments are added."""

    whole: argparse.ArgumentParser
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    measuring: argparse.ArgumentParser


def parsers(about: str | None) -> Parsers:
    """`measure --shared DIR --work DIR` and `table`; `about` is the module's docstring."""
    found = _bare(about)
    found.measuring.add_argument("--shared", type=Path, required=True)
    found.measuring.add_argument("--work", type=Path, required=True)
    return found


def implant_parsers(about: str | None) -> Parsers:
    """`measure --plan PLAN --root DIR ... --work DIR`, of what `bench run` left there, and `table`."""
    found = _bare(about)
    found.measuring.add_argument("--plan", type=Path, required=True)
    found.measuring.add_argument("--root", type=Path, action="append", required=True)
    found.measuring.add_argument("--work", type=Path, required=True)
    return found


def _bare(about: str | None) -> Parsers:
    whole = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    commands.add_parser("table")
    return Parsers(whole, commands, measuring)


def plainly(main: Callable[[], None]) -> None:
    """Run a command; what it refuses it says as `cbpt-guard` does, on stderr and with its exit code."""
    try:
        main()
    except CbptGuardError as error:
        sys.exit(refused(error))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of them, none where there is no file."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def stamp() -> dict[str, Any]:
    """What every line says of where and when it was measured."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"cbpt_guard": __version__, "machine": machine(), "when": when}


def append(path: Path, *lines: dict[str, Any]) -> None:
    """Add lines to a file of them."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def machine() -> str:
    """The machine in words."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


# A process starts with the peak memory of the one that started it, so a small one stands between.
_LAUNCHER = """
import json, os, sys, time
started = time.monotonic()
child = os.fork()
if not child:
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    finally:
        os._exit(127)
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as told:
    json.dump([time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss], told)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Ran(NamedTuple):
    """What a command took: seconds from start to end, the processors' seconds, and its peak memory in MiB."""

    seconds: float
    cpu_seconds: float
    peak_mb: int


def ran(*arguments: str | Path) -> Ran:
    """Run a `cbpt-guard` command, on Linux; one that fails ends the measurement.

    `purify` may say that its run is not guarded (exit 1).
    """
    with tempfile.NamedTemporaryFile() as told:
        command = [Path(sys.executable).parent / "cbpt-guard", *arguments]
        code = subprocess.run([sys.executable, "-S", "-c", _LAUNCHER, told.name, *command], check=False).returncode
        if code not in ((0, 1) if arguments[0] == "purify" else (0,)):
            raise SystemExit(f"{arguments[0]} ended with {code}")
        seconds, cpu_seconds, peak_kb = json.loads(Path(told.name).read_bytes())
    return Ran(seconds, cpu_seconds, round(peak_kb / 1024))


def timed(*arguments: str | Path) -> float:
    """Seconds that a `cbpt-guard` command takes from its start to its end."""
    return ran(*arguments).seconds
