"""Work in fresh processes, several side by side: each has its own peak of memory, and its needs are met before it."""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Sequence
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
        jobs: how many processes run at once.
        start: called first in every process; picklable.
        report: is told a step's words when it begins.

    Yields:
        A step and its result, as they end.

    Raises:
        CbptGuardError: as a step raises it; what had ended beside it is yielded before, the others are ended.
        SetupError: a process died, or none could be started.
        ValueError: `jobs` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"{jobs} jobs do nothing")
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
                running[number] = worker = _Worker(steps[number], start)
                worker.begin()
            ended = connection.wait([worker.pipe for worker in running.values()])
            failed: CbptGuardError | None = None
            for number in [number for number, worker in running.items() if worker.pipe in ended]:
                try:
                    result = running[number].answer()
                except CbptGuardError as error:
                    failed = failed or error
                    continue
                del running[number]
                order.done(number)
                yield steps[number], result
            if failed is not None:
                raise failed
    finally:
        _end_all(running.values())


class _Worker:
    """One process that does one step and answers through `pipe`."""

    def __init__(self, step: Step, start: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch may hang
        self.pipe, self._theirs = context.Pipe(duplex=False)
        arguments = (self._theirs, step.work, step.arguments, start)
        self._process = context.Process(target=_answering, args=arguments)

    def begin(self) -> None:
        """Start the process; whoever is interrupted meanwhile must `end` it."""
        try:
            with _deaf():
                self._process.start()
        except OSError as error:
            raise SetupError(f"no process of the suite could be started: {error.strerror}") from error
        self._theirs.close()

    def answer(self) -> object:
        """Wait for the step's result, and for the process to end if it gives one.

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
        _end_all([self])
        return result

    def tell(self) -> None:
        """Tell the process to end, if it runs."""
        if self._process.pid is not None:
            self._process.terminate()

    def end(self) -> None:
        """Wait for the process, which was told to end, and kill it if it does not."""
        if self._process.pid is not None:
            self._process.join(_PATIENCE)
            self._process.kill()
            self._process.join()
        self.pipe.close()


def _end_all(workers: Collection[_Worker]) -> None:
    """All are told before the first is waited for."""
    for worker in workers:
        worker.tell()
    for worker in workers:
        worker.end()


@contextmanager
def _deaf() -> Iterator[None]:
    """Whatever starts meanwhile never sees Ctrl-C, which a terminal sends to all: this process ends it, in few words.

    Blocked, not ignored: a signal that comes meanwhile reaches this process right afterwards. SIGTERM waits, too, for
    it would leave a process behind that nobody knows; whatever has started lets it in again.
    """
    resource_tracker.ensure_running()  # which unblocks Ctrl-C, and would do so between here and the start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answering(
    answer: Connection, work: Callable[..., object], arguments: tuple[object, ...], start: Callable[[], None]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
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
