"""How much memory some work takes, whatever its process did before."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

_PROCESS = Path("/proc/self")


def rise(work: Callable[[], object]) -> float:
    """The most that this process held during `work` beyond what it held before, in MiB."""
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    except OSError as error:
        pytest.skip(f"this kernel does not let a process forget its peak memory: {error.strerror}")
    before = _held("VmRSS")
    work()
    return _held("VmHWM") - before


def _held(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", (_PROCESS / "status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024
