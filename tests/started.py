"""Commands in processes of their own that tests kill, stop, halt and starve."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT, SCRIPT

PATIENCE, MOMENT = 300.0, 5.0
TIMES = {"created", "seconds"}


class Started:
    """A command in a process, and a temporary folder, of its own."""

    def __init__(self, folder: Path, *arguments: object, **options: Any) -> None:
        self.begun = time.monotonic()
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*options.pop("prefix", ()), str(SCRIPT), *(str(argument) for argument in arguments)],
            cwd=folder,
            env=ENVIRONMENT | {"TMPDIR": str(self.temporary)} | options.pop("env", {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def wait_for(self, path: Path) -> None:
        """Until the path exists, or the command has ended."""
        end = time.monotonic() + PATIENCE
        while not path.exists() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)

    @contextmanager
    def halted(self) -> Iterator[None]:
        """The command and its children stand still meanwhile, with all that they hold; it must run still."""
        self.process.send_signal(signal.SIGSTOP)  # first: it starts no child any more
        halted = [self.process.pid, *self._family()]
        try:
            for process in halted:
                os.kill(process, signal.SIGSTOP)
            assert self.process.poll() is None
            yield
        finally:
            for process in halted:
                os.kill(process, signal.SIGCONT)

    def end(self) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr, once it has ended; `seconds` says how long it took."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE)
        self.seconds = time.monotonic() - self.begun
        return self.process.returncode, stdout, stderr

    def killed(self, after: float) -> bool:
        """SIGKILL after so many seconds; whether it was still running. No child of it lives on."""
        try:
            self.process.wait(after)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.wait()
        self.assert_alone()  # first: a child that lives on would keep the pipes open
        self.end()
        return self.process.returncode == -signal.SIGKILL

    def assert_alone(self) -> None:
        """No child outlived the command; the system needs a moment, and a child that has just begun one more."""
        end = time.monotonic() + MOMENT
        while (left := self.children()) and time.monotonic() < end:
            time.sleep(0.01)
        assert not left, left

    def children(self) -> list[str]:
        """Processes that know this command's temporary folder: by their command line, or by what they inherited."""
        return list(self._family().values())

    def _family(self) -> dict[int, str]:
        """The same by process id, with the command itself while it runs."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            told = b""
            for name in ("cmdline", "environ"):  # the reader of checkpoints shows its environment to root alone
                with suppress(OSError):
                    told += (process / name).read_bytes()
            if str(self.temporary).encode() in told:
                found[int(process.name)] = told.replace(b"\0", b" ").decode(errors="replace")
        return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; times in run.json left out."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "run.json":
            content = json.dumps({k: v for k, v in json.loads(content).items() if k not in TIMES}).encode()
        found[path.relative_to(folder).as_posix()] = content
    return found


def limited(size: int) -> Callable[[], None]:
    """What makes a disk look full to a command, and to its children: no file of theirs grows beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def powerless() -> tuple[str, ...]:
    """What takes root's right to ignore permissions away; nothing for other users."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere, and there is no setpriv to prevent it")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def without_rights(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command to its end, by somebody whom permissions bind."""
    command = [*powerless(), str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
