"""Work in fresh processes, several side by side: each has its own peak of memory, and its needs are met before it."""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from cbpt_guard.errors import CbptGuardError, SetupError

_PATIENCE = 10.0  # seconds for a process that was told to end
Report = Callable[[str], None]


class Piece(NamedTuple):
    """A piece of work: `work(*arguments)`, picklable like its result.

    `needs` names pieces that must have ended before; `words` say what begins, to whoever waits.
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
    pieces: Sequence[Piece], *, jobs: int = 1, start: Callable[[], None] = nothing, report: Report = silent
) -> Generator[tuple[Piece, Any]]:
    """Do every piece in a fresh process, at most `jobs` at a time; of those that may begin, the earliest begins first.

    Close it (`contextlib.closing`) when the block that takes the results fails: that ends what still runs.

    Args:
        pieces: no two of one name; what they need is among them.
        jobs: how many processes run at once.
        start: called first in every process; picklable.
        report: is told a piece's words when it begins.

    Yields:
        A piece and its result, as they end.

    Raises:
        CbptGuardError: as a piece raises it; what has ended beside it is yielded before, the others are ended.
        SetupError: a process died, or none could be started.
        ValueError: `jobs` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"{jobs} jobs do nothing")
    place = {piece.name: number for number, piece in enumerate(pieces)}
    order = TopologicalSorter({number: [place[name] for name in piece.needs] for number, piece in enumerate(pieces)})
    order.prepare()
    ready: list[int] = []
    running: dict[int, _Worker] = {}
    try:
        while order.is_active():
            for number in order.get_ready():
                heapq.heappush(ready, number)
            while ready and len(running) < jobs:
                number = heapq.heappop(ready)
                if pieces[number].words:
                    report(pieces[number].words)
                running[number] = worker = _Worker(pieces[number], start)
                worker.begin()
            connection.wait([worker.pipe for worker in running.values()])
            failed: CbptGuardError | None = None
            while (ended := next((n for n, worker in running.items() if worker.pipe.poll()), None)) is not None:
                try:
                    result = running[ended].answer()
                except CbptGuardError as error:
                    failed = failed or error
                    _end_all([running.pop(ended)])
                    continue
                del running[ended]
                order.done(ended)
                yield pieces[ended], result
            if failed is not None:
                raise failed
    finally:
        _end_all(running.values())


class _Worker:
    """One process that does one piece and answers through `pipe`."""

    pipe: Connection

    def __init__(self, piece: Piece, start: Callable[[], None]) -> None:
        self._arguments = piece.work, piece.arguments, start
        self._process: BaseProcess | None = None

    def begin(self) -> None:
        """Start the process; whoever is interrupted meanwhile must end it.

        Raises:
            SetupError: the system refuses.
        """
        context = multiprocessing.get_context("spawn")  # a forked torch may hang
        try:
            self.pipe, theirs = context.Pipe(duplex=False)
            self._process = context.Process(target=_answering, args=(theirs, *self._arguments))
            with _deaf():
                self._process.start()
        except OSError as error:
            raise SetupError(f"no process of the suite could be started: {error.strerror}") from error
        theirs.close()

    def answer(self) -> object:
        """Wait for the piece's result, and for the process to end if it gives one.

        Raises:
            CbptGuardError: as the piece raised it.
            SetupError: the process died.
        """
        try:
            result: object = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.end(_PATIENCE)
            raise SetupError(
                f"a process of the suite ended with {self._exitcode} before it answered; its messages stand "
                "above, and where there are none the system killed it, most likely for memory"
            ) from error
        if isinstance(result, CbptGuardError):
            raise result
        self.end(_PATIENCE)  # it has answered, and tidies up
        return result

    def tell(self) -> None:
        """Tell the process to end, if it runs."""
        if self._process is not None and self._process.pid is not None:
            self._process.terminate()

    def end(self, patience: float) -> None:
        """Wait so many seconds for the process to end, then kill it."""
        if self._process is not None and self._process.pid is not None:
            self._process.join(patience)
            self._process.kill()
            self._process.join()

    @property
    def _exitcode(self) -> int | None:
        return None if self._process is None else self._process.exitcode


def _end_all(workers: Collection[_Worker]) -> None:
    """All are told before the first is waited for, and have the same time."""
    for worker in workers:
        worker.tell()
    last = time.monotonic() + _PATIENCE
    for worker in workers:
        worker.end(max(0.0, last - time.monotonic()))


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
