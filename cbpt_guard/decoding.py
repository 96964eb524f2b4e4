"""Work ahead: while the caller computes on one batch, threads prepare the next."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Source = TypeVar("Source")
Result = TypeVar("Result")
_MOST_DECODERS = 8  # beyond, Python's own part of the work is what everybody waits for


def processors_here() -> int:
    """How many processors this process may use; all where the system cannot tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoders_here() -> int:
    """How many threads decode: one for each processor that this process may use, within reason."""
    return min(processors_here(), _MOST_DECODERS)


def in_batches(
    sources: Iterable[Source], work: Callable[[Source], Result], *, batch_size: int, workers: int
) -> Generator[list[Result]]:
    """`work(source)` of every source, in order, in lists of `batch_size`; the last may be shorter.

    At most two batches exist at a time, however long `sources` is, and `sources` is read by the caller's own
    thread. An error that `sources` raises comes after the results of everything it gave before.
    """
    waiting: deque[Future[Result]] = deque()
    reader = _Reader(iter(sources))
    with ThreadPoolExecutor(workers, thread_name_prefix="cbpt-guard-decode") as pool:
        try:
            waiting.extend(pool.submit(work, source) for source in reader.take(batch_size))
            while waiting:
                batch = [waiting.popleft().result() for _ in range(len(waiting))]
                waiting.extend(pool.submit(work, source) for source in reader.take(batch_size))
                yield batch
        finally:  # the caller stopped early: what has not begun never will
            for future in waiting:
                future.cancel()
    if reader.error is not None:
        raise reader.error


class _Reader(Iterator[Source]):
    """An iterator that ends where its source fails, and keeps the error for later."""

    def __init__(self, sources: Iterator[Source]) -> None:
        self.error: Exception | None = None
        self._sources = sources

    def __next__(self) -> Source:
        if self.error is not None:
            raise StopIteration
        try:
            return next(self._sources)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise StopIteration from error

    def take(self, count: int) -> Iterator[Source]:
        """The next `count` sources, or what is left."""
        for _ in range(count):
            try:
                yield next(self)
            except StopIteration:
                return
