"""What people see: notes, tables and progress on stderr; data goes to stdout elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cbpt_guard.defense.progress import Step
    from cbpt_guard.errors import CbptGuardError

_WIDTH_OFF_TERMINAL = 120


def plain(text: str) -> str:
    """`text` without anything that a terminal would obey: class names and paths come from strangers."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def one_line(text: str) -> str:
    """`plain` text on one line: a name must not pass itself off as a message."""
    return plain(text).replace("\n", " ")


def note(text: str) -> None:
    """One message on stderr."""
    sys.stderr.write(plain(text).rstrip("\n") + "\n")
    sys.stderr.flush()


def refused(error: CbptGuardError) -> int:
    """Say what was refused, and answer its exit code; indented, so that a name with a line break forges no message."""
    note("error: " + str(error).replace("\n", "\n  "))
    return error.exit_code


def outline(value: Any, depth: int = 0) -> Iterator[str]:
    """Nested JSON values as indented `name: value` lines."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in pairs:
        if isinstance(item, dict | list) and item:
            yield f"{'  ' * depth}{name}:"
            yield from outline(item, depth + 1)
        else:
            yield f"{'  ' * depth}{name}: {'-' if item in (None, [], {}) else item}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one digit, or a dash."""
    return "-" if share is None else f"{100 * share:.1f}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table under its title, on stderr; the first column is text, the others are numbers."""
    note(title)
    built = Table()
    for number, column in enumerate(columns):
        built.add_column(Text(plain(column)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(one_line(cell)) for cell in row))
    console = _console()
    console.print(built)


def _console() -> Console:
    width = None if sys.stderr.isatty() else shutil.get_terminal_size((_WIDTH_OFF_TERMINAL, 0)).columns
    return Console(stderr=True, width=width)


@contextmanager
def live() -> Iterator[Callable[[Step], None]]:
    """A progress callback: a bar per stage with loss, ASR and time left on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console()) as bars:
        tasks: dict[str, int] = {}

        def show(step: Step) -> None:
            if step.stage not in tasks or (bars.tasks[tasks[step.stage]].finished and step.step < step.steps):
                tasks[step.stage] = bars.add_task(one_line(step.stage), total=step.steps, numbers="")
            loss = "" if step.loss is None else f"loss {step.loss:7.3f}"
            asr = "" if step.asr is None else f"  ASR {percent(step.asr)} %"
            bars.update(bars.task_ids[tasks[step.stage]], total=step.steps, completed=step.step, numbers=loss + asr)

        yield show
