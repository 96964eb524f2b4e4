"""Settings of the process that only a command may make: threads and the C library's allocator."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEEP = 1 << 28


def threads_of_each(jobs: int) -> int | None:
    """Threads of torch for each of several processes, an equal part of the cores; of one torch knows best."""
    return max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 else None


def prepare_torch(threads: int | None) -> None:
    """Set torch's threads, and keep freed memory in the process.

    glibc returns every large tensor to the system and pays for fresh pages at the next; a trigger inversion
    allocates the same tensors thousands of times. With one arena inversions side by side take from one store; with an
    arena for each thread every one keeps what its own largest step took. Elsewhere than glibc this does nothing.

    cuDNN takes algorithms that give the same numbers each time: a signed step makes a rounding error a whole one.
    """
    import torch

    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        kept = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _KEEP), (_M_ARENA_MAX, 1))
        for option, value in kept:
            libc.mallopt(option, value)
