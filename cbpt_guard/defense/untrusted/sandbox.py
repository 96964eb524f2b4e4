"""A short-lived child process for what may be hostile: little memory, little time, nothing to inherit."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cbpt_guard.errors import CbptGuardError, CheckpointError, SetupError, UnsafeError

_REPORT_BYTES = 1 << 20
_BASE_MEMORY = 1 << 30
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
# The child's first act, a second before torch is imported: PR_SET_PDEATHSIG (1) with SIGKILL (9), then a look whether
# the parent died before that could notice.
_TIED = """\
import ctypes, os, runpy, sys
module, parent = sys.argv[1:3]
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(parent):
    os._exit(1)
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
_REFUSALS: dict[str, type[CbptGuardError]] = {"unsafe": UnsafeError, "malformed": CheckpointError}


class Limits(BaseModel):
    """What reading one checkpoint may cost.

    `max_bytes` is the largest file taken. `memory_bytes` is the address space that the child may add to what
    it needs to start, by default 1 GiB and four times the file's size; it also bounds what it may write.
    `seconds` bounds its processor time and its wall time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: Annotated[int, Field(gt=0)] = 16 << 30
    memory_bytes: Annotated[int, Field(gt=0)] | None = None
    seconds: Annotated[int, Field(gt=0)] = 300

    def memory_for(self, size: int) -> int:
        """Bytes that the child may take for a file of `size` bytes."""
        return self.memory_bytes or _BASE_MEMORY + 4 * size


def require_linux() -> None:
    """Refuse operating systems that cannot bound a process or tie its life to its parent's.

    Raises:
        SetupError: this is not Linux.
    """
    if sys.platform != "linux":
        raise SetupError(
            f"checkpoints are read in a process with hard limits, which {sys.platform} does not offer; "
            "run this step on Linux (a container or WSL will do); the exported bundle needs no torch"
        )


def run_confined(module: str, source: Path, size: int, limits: Limits) -> dict[str, Any]:
    """Run `python -m module source memory seconds` as a child that dies with this process; its report on stdout.

    The module confines itself (`confine`) before it opens the source.

    Raises:
        UnsafeError: the child found code, or foreign globals.
        CheckpointError: the child found the file malformed, or a limit stopped it.
        SetupError: the child cannot start on this machine.
    """
    require_linux()
    folder = source.parent
    memory = limits.memory_for(size)
    arguments = [module, str(os.getpid()), str(source), str(memory), str(limits.seconds)]
    command = [sys.executable, "-P", "-s", "-B", "-c", _TIED, *arguments]
    with (folder / "report.json").open("wb") as report, (folder / "stderr.txt").open("wb") as log:
        try:
            code = subprocess.run(  # noqa: S603 - this interpreter on a module of ours, by a list: no shell reads it
                command,
                stdin=subprocess.DEVNULL,
                stdout=report,
                stderr=log,
                cwd=folder,
                env=child_environment(folder),
                start_new_session=True,
                timeout=limits.seconds + 60,  # starting torch is not the file's fault
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
    return _judge(folder, code, memory, limits)


def child_environment(folder: Path) -> dict[str, str]:
    """No secrets to steal, no settings to follow: only what Python and torch need to start."""
    root = Path(__file__).parents[2]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    ours = {"PYTHONPATH": str(root), "TMPDIR": str(folder), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return {**kept, **ours}


def _judge(folder: Path, code: int, memory: int, limits: Limits) -> dict[str, Any]:
    gib = memory / 2**30
    if code in (-signal.SIGXCPU, -signal.SIGALRM):
        raise CheckpointError(f"reading it took longer than {limits.seconds} s; it is forged, or this disk is slow")
    if code < 0:
        name = signal.Signals(-code).name
        raise CheckpointError(f"reading it ended with {name} within {gib:.1f} GiB; it is damaged or forged")
    text = _head(folder / "report.json")
    try:
        report: dict[str, Any] = json.loads(text)
    except ValueError as error:
        last = _head(folder / "stderr.txt").strip().rpartition("\n")[2]
        raise SetupError(f"the process that reads checkpoints did not work (exit {code}): {last}") from error
    refusal = _REFUSALS.get(str(report.get("refused")))
    if refusal is not None:
        raise refusal(str(report["message"]))
    return report


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_REPORT_BYTES).decode("utf-8", "replace")


def confine(memory: int, seconds: int) -> None:
    """Bind the calling process, for good: it dies beyond `memory` bytes or `seconds`, and gains no rights.

    The address space already in use (Python and torch) comes on top of `memory`.
    """
    import resource

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    space = pages * resource.getpagesize() + memory
    used = int(sum(os.times()[:2])) + 1
    for limit, value in (
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_CPU, used + seconds),
        (resource.RLIMIT_FSIZE, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, hard = resource.getrlimit(limit)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    signal.alarm(seconds)
