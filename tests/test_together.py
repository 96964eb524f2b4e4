"""Pieces of work side by side: their order, their threads, and how they end early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.defense.together import Tally, together

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def endless(progress: Progress) -> None:
    for step in range(10_000):
        progress(Step("endless", step, 10_000))
        time.sleep(0.001)


def test_results_come_in_order_whoever_is_first() -> None:
    def late(number: int, progress: Progress) -> int:
        time.sleep(0.02 * (4 - number))
        return number

    assert together([partial(late, number) for number in range(4)], silent, CPU) == [0, 1, 2, 3]


def test_two_run_at_once_with_a_thread_each_and_torch_is_left_as_it_was() -> None:
    met = threading.Barrier(2, timeout=10)

    def meet(progress: Progress) -> int:
        met.wait()
        return torch.get_num_threads()

    assert together([meet, meet], silent, CPU) == [1, 1]
    assert torch.get_num_threads() == 2


def test_alone_and_elsewhere_than_on_the_cpu_they_run_in_the_caller() -> None:
    here = threading.get_ident()
    for works, device in (([threading.get_ident], CPU), ([threading.get_ident] * 2, torch.device("meta"))):
        assert set(together([lambda _, work=work: work() for work in works], silent, device)) == {here}


def test_numbers_do_not_depend_on_the_neighbours() -> None:
    def product(seed: int, progress: Progress) -> torch.Tensor:
        left = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))
        return left @ left.T

    alone = together([partial(product, 0), lambda _: torch.zeros(1)], silent, CPU)[0]
    beside = together([partial(product, seed) for seed in range(4)], silent, CPU)[0]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("place", [0, 1])
def test_a_failure_ends_the_others_and_is_raised(place: int) -> None:
    def fail(progress: Progress) -> None:
        raise ValueError("no")

    started = time.monotonic()
    with pytest.raises(ValueError, match="no"):
        together([fail, endless] if place == 0 else [endless, fail], silent, CPU)
    assert time.monotonic() - started < 3
    assert torch.get_num_threads() == 2


def test_an_interrupt_in_progress_ends_all() -> None:
    seen: list[Step] = []
    before = threading.active_count()

    def interrupting(step: Step) -> None:
        seen.append(step)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together([endless, endless, endless], interrupting, CPU)
    assert len(seen) < 20
    assert threading.active_count() == before


def test_progress_is_told_by_one_at_a_time() -> None:
    inside = threading.Lock()

    def alone(step: Step) -> None:
        assert inside.acquire(blocking=False)
        time.sleep(0.001)
        inside.release()

    def work(progress: Progress) -> None:
        for step in range(20):
            progress(Step("x", step, 20))

    together([work, work], alone, CPU)


def test_a_tally_never_goes_back_whoever_is_late() -> None:
    steps: list[Step] = []
    tally = Tally("both", 40)

    def count(progress: Progress) -> None:
        for _ in range(10):
            tally.add(1, progress, asr=0.5)
            time.sleep(0.001)

    together([count] * 4, steps.append, CPU)
    assert steps == [Step("both", done, 40, None, 0.5) for done in range(1, 41)]
