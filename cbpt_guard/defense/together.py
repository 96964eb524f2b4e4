"""Independent pieces of work side by side: one core each does more than all cores on one small batch after another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch

from cbpt_guard.defense.progress import Progress, Step

Result = TypeVar("Result")


class Tally:
    """What pieces side by side have done of a stage of `steps`, counted together: progress never goes back."""

    def __init__(self, stage: str, steps: int) -> None:
        self._stage, self._steps = stage, steps
        self._done, self._lock = 0, threading.Lock()

    def add(self, count: int, progress: Progress, loss: float | None = None, asr: float | None = None) -> None:
        """So many steps more, with the loss and ASR (in [0, 1]) there, told to the `progress` of the piece."""
        with self._lock:
            self._done += count
            progress(Step(self._stage, self._done, self._steps, loss, asr))


class _StoppedError(Exception):
    """Raised inside a piece of work whose result nobody waits for any more."""


def together(works: Sequence[Callable[[Progress], Result]], progress: Progress, device: torch.device) -> list[Result]:
    """The results of `works`, in their order, of as many at once as torch may use threads.

    Each of several pieces runs on one thread, whatever else runs beside it, so that its numbers do not depend on that;
    a piece within a piece does, too. It gets a progress callback of its own, which ends it when another piece fails or
    the wait is interrupted. On an accelerator they run one after another, and a piece alone runs as torch is set. While
    they run, torch's number of threads, which is the process's, is 1.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or min(len(works), threads) < 2:
        return [work(progress) for work in works]
    stop, lock = threading.Event(), threading.Lock()

    def report(step: Step) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            progress(step)

    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(len(works), threads), initializer=partial(torch.set_num_threads, 1))
    try:
        pending = [pool.submit(work, report) for work in works]
        for future in wait(pending, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in pending]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
