"""Work in fresh processes, several side by side: each has its own peak of memory, and its needs are met before it."""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from cbpt_guard.errors import CbptGuardError, SetupError

_PATIENCE = 10.0  # seconds for a process that was told to end
Report = Callable[[str], None]


class Step(NamedTuple):
    """A piece of work: `work(*arguments)`, picklable like its result.

    `needs` names steps that must have ended before; `words` say what begins, to whoever waits.
    """

    name: Hashable
    work: Callable[..., Any]
    arguments: tuple[object, ...]
    needs: frozenset[Hashable] = frozenset()
    words: str = ""


def nothing() -> None:
    """Prepare nothing."""


def silent(message: str) -> None:
    """Report nothing."""


def side_by_side(
    steps: Sequence[Step], *, jobs: int = 1, start: Callable[[], None] = nothing, report: Report = silent
) -> Generator[tuple[Step, Any]]:
    """Do every step in a fresh process, at most `jobs` at a time; of those that may begin, the earliest begins first.

    Close it (`contextlib.closing`) when the block that takes the results fails: that ends what still runs.

    Args:
        steps: no two of one name; what they need is among them.
        jobs: how many processes run at once, 1 or more.
        start: called first in every process; picklable.
        report: is told a step's words when it begins.

    Yields:
        A step and its result, as they end.

    Raises:
        CbptGuardError: as a step raises it; the others are ended.
        SetupError: a process died, or none could be started.
    """
    place = {step.name: number for number, step in enumerate(steps)}
    order = TopologicalSorter({number: [place[name] for name in step.needs] for number, step in enumerate(steps)})
    order.prepare()
    ready: list[int] = []
    running: dict[int, _Worker] = {}
    try:
        while order.is_active():
            for number in order.get_ready():
                heapq.heappush(ready, number)
            while ready and len(running) < jobs:
                number = heapq.heappop(ready)
                if steps[number].words:
                    report(steps[number].words)
                running[number] = _Worker(steps[number], start)
            ended = connection.wait([worker.pipe for worker in running.values()])
            for number in [number for number, worker in running.items() if worker.pipe in ended]:
                result = running[number].answer()
                del running[number]
                order.done(number)
                yield steps[number], result
    finally:
        for worker in running.values():
            worker.end()


class _Worker:
    """One process that does one step and answers through `pipe`."""

    def __init__(self, step: Step, start: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch may hang
        self.pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_answering, args=(theirs, step.work, step.arguments, start))
        try:
            with _deaf_to_ctrl_c():
                self._process.start()
        except OSError as error:
            raise SetupError(f"no process of the suite could be started: {error.strerror}") from error
        theirs.close()

    def answer(self) -> object:
        """Wait for the step's result, and for the process to end.

        Raises:
            CbptGuardError: as the step raised it.
            SetupError: the process died.
        """
        try:
            result: object = self.pipe.recv()
            self._process.join(_PATIENCE)  # it has answered, and tidies up
        except EOFError as error:
            self._process.join()
            raise SetupError(
                f"a process of the suite ended with {self._process.exitcode} before it answered; its messages stand "
                "above, and where there are none the system killed it, most likely for memory"
            ) from error
        if isinstance(result, CbptGuardError):
            raise result
        self.end()
        return result

    def end(self) -> None:
        """End the process, unless it has ended."""
        self.pipe.close()
        self._process.terminate()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Whatever starts meanwhile never sees Ctrl-C, which a terminal sends to all: this process ends it, in few words.

    Blocked, not ignored: a Ctrl-C that comes meanwhile reaches this process right afterwards.
    """
    resource_tracker.ensure_running()  # which unblocks Ctrl-C, and would do so between here and the start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answering(
    answer: Connection, work: Callable[..., object], arguments: tuple[object, ...], start: Callable[[], None]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _end)
    start()
    try:
        result = work(*arguments)
    except CbptGuardError as error:
        result = error
    except OSError as error:  # a full disk, a folder that was taken away
        result = SetupError(f"measuring failed: {error}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to tidy up
    answer.send(result)


def _end(*_: object) -> None:
    """An orderly end, once: temporary files and children go with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_with_parent() -> None:
    """A killed suite must not leave a process behind that goes on writing to its folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
