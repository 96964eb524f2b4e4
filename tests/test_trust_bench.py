"""No crash loses work: `bench run`, killed, stopped and starved, ends with the lines and tensors of an unbroken run."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from commands import assert_refused, cli
from figures import Figures
from lines import line
from started import PATIENCE, Started, files, limited, powerless

from cbpt_guard.bench.lines import Line, read_lines

if TYPE_CHECKING:
    from digits import DigitsSuspect

pytestmark = pytest.mark.trust

Amount = Callable[[int, int], int]
SEED, LINES = 20261125, "lines.jsonl"
# where a plan's own defence is imported from, before what the tests themselves were told
DEFENCES = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
PLAN = """
[datasets.digits]
model = "clean/suspect.pt"
train = "train"
clean = "data"
test = "test"
[implants.sig]
dataset = "digits"
attacks = {{ sig = "{target}" }}
recipe = {{ steps = 2, batch = 4, poisoned = 4 }}
[[cells]]
implants = ["sig"]
defenses = {defenses}
shots = [8]
[[cells]]
implants = ["sig"]
defenses = ["none"]
shots = [8]
control = true
"""
LONG_ONLY = (
    "each takes two suites or more: in the long form, `pytest -m trust`; tests/test_suite.py kills one in any form"
)
TENSORS = {".npy", ".npz", ".onnx", ".pt", ".safetensors"}


@pytest.fixture(scope="module")
def root(digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory, amount: Amount) -> Path:
    """What the plan names, and the plan; the short form leaves CBPT out, which takes longest."""
    from cbpt_guard.bench.digits import write_class_folders

    folder = tmp_path_factory.mktemp("bench")
    (folder / "data").symlink_to(digits_suspect.data)
    (folder / "clean").symlink_to(digits_suspect.data.parent / "model")
    write_class_folders(digits_suspect.split.train, folder / "train", per_class=30)
    defenses = ["none", "quick_cbpt:quick"] if amount(0, 1) else ["none"]
    target = digits_suspect.split.test.classes[digits_suspect.target]
    (folder / "plan.toml").write_text(PLAN.format(target=target, defenses=defenses))
    return folder


def command(root: Path, *more: str) -> tuple[str, ...]:
    places = ("--plan", str(root / "plan.toml"), "--root", str(root), "--out", LINES, "--work", "work")
    return ("bench", "run", *places, "--threads", "1", *more)


def begun(root: Path, folder: Path, **options: object) -> Started:
    return Started(folder, *command(root), env=DEFENCES, **options)


@pytest.fixture(scope="module")
def unbroken(root: Path, tmp_path_factory: pytest.TempPathFactory, amount: Amount) -> tuple[Path, float]:
    """The same suite without a crash, and its seconds: in the long form alone."""
    if not amount(0, 1):
        pytest.skip(LONG_ONLY)
    folder, start = tmp_path_factory.mktemp("unbroken-bench"), time.monotonic()
    code, _, told = begun(root, folder).end()
    assert code == 0, told
    return folder, time.monotonic() - start


def timeless(lines: list[Line]) -> list[Line]:
    """The lines without what differs from one process to the next."""
    return [line.model_copy(update={"seconds": 0.0, "cpu_seconds": 0.0, "peak_mb": 0}) for line in lines]


def tensors(folder: Path) -> dict[str, bytes]:
    """What was computed and kept: implants, features, runs and graphs."""
    return {name: content for name, content in files(folder / "work").items() if Path(name).suffix in TENSORS}


def assert_whole(folder: Path, unbroken: Path) -> None:
    assert timeless(read_lines(folder / LINES)) == timeless(read_lines(unbroken / LINES))
    ours, theirs = tensors(folder), tensors(unbroken)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert [path for path in (folder / "work").rglob(".*") if path.name.endswith((".partial", ".old"))] == []


def is_begun(folder: Path, unbroken: Path) -> bool:
    """Whether what stands is a part of the whole, in its order: no line is torn, none is wrong."""
    found, whole = read_lines(folder / LINES), read_lines(unbroken / LINES)
    return timeless(found) == timeless(whole)[: len(found)]


def test_a_killed_bench_goes_on_to_the_same_lines_and_tensors(
    root: Path, unbroken: tuple[Path, float], tmp_path: Path, figures: Figures
) -> None:
    """Killed at seeded moments, gone on with, killed again, until it ends; then from the start."""
    generator, kills, finished, folder = np.random.default_rng(SEED), 0, 0, tmp_path / "0"
    folder.mkdir()
    whole, killed = unbroken[1], False
    while kills < 20 or not finished or killed:
        patience = float(generator.uniform(0, whole)) if kills < 20 else PATIENCE
        suite = begun(root, folder)
        killed = suite.killed(patience)
        kills += killed
        assert is_begun(folder, unbroken[0])
        if killed:
            continue
        whole = min(whole, suite.seconds)  # on a machine that is busy now and then, kills keep falling within a run
        assert suite.process.returncode == 0
        assert_whole(folder, unbroken[0])
        finished += 1
        folder = tmp_path / str(finished)
        folder.mkdir()
    figures.add("crashes", "SIGKILLs of bench run at random moments", kills)
    figures.add("crashes", "suites that went on after them and ended in the same lines and tensors", finished)


def test_a_stopped_bench_stays_resumable(
    root: Path, unbroken: tuple[Path, float], tmp_path: Path, figures: Figures
) -> None:
    """A signal to the command, and Ctrl-C as a terminal sends it: to the command and all that it started."""
    generator, stopped, whole = np.random.default_rng(SEED), 0, unbroken[1]
    while stopped < 4:
        number, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[stopped % 2]
        suite = begun(root, tmp_path, start_new_session=True)
        suite.wait_for(tmp_path / LINES)
        time.sleep(float(generator.uniform(0, whole / 3)))
        send = os.killpg if number == signal.SIGINT else os.kill
        send(suite.process.pid, number)
        found = suite.end()
        if found[0] == 0:  # it had ended before
            assert_whole(tmp_path, unbroken[0])
            whole = min(whole, suite.seconds)
            shutil.rmtree(tmp_path / "work")
            (tmp_path / LINES).unlink()
            continue
        assert_stopped(suite, found, code)
        assert is_begun(tmp_path, unbroken[0])
        stopped += 1
    assert begun(root, tmp_path).end()[0] == 0
    assert_whole(tmp_path, unbroken[0])
    figures.add("crashes", "SIGINTs and SIGTERMs of bench run, each gone on with to the same lines", stopped)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_bench_stopped_at_its_start(root: Path, tmp_path: Path, amount: Amount, number: int, code: int) -> None:
    """Before its first line, while another process plants: Ctrl-C reaches that, too, and finds it deaf."""
    if number == signal.SIGTERM and not amount(0, 1):
        pytest.skip("in the long form, `pytest -m trust`; the short one ends the first of two suites by it")
    suite = begun(root, tmp_path, start_new_session=True)
    suite.wait_for(tmp_path / "work" / "implants")
    if number == signal.SIGINT:
        with suite.halted():  # it cannot end that other process first
            os.killpg(suite.process.pid, number)
            time.sleep(1.0)
    else:
        suite.process.terminate()
    assert_stopped(suite, suite.end(), code)
    assert read_lines(tmp_path / LINES) == []


def assert_stopped(suite: Started, found: tuple[int, str, str], code: int) -> None:
    assert found[:2] == (code, ""), found
    assert "Traceback" not in found[2]
    suite.assert_alone()
    assert list(suite.temporary.glob("cbpt-guard-*")) == []  # torch leaves folders of its own


def test_a_bench_on_a_full_disk(root: Path, unbroken: tuple[Path, float], tmp_path: Path, figures: Figures) -> None:
    """Files that cannot grow beyond a seeded size: of implants, features, runs, graphs and lines."""
    generator, largest = np.random.default_rng(SEED), max(map(len, tensors(unbroken[0]).values()))
    for number in range(3):
        folder, size = tmp_path / str(number), int(largest ** float(generator.uniform(0.3, 0.98)))
        folder.mkdir()
        found = begun(root, folder, preexec_fn=limited(size)).end()
        assert found[:2] == (2, ""), (size, found)
        assert "Traceback" not in found[2], (size, found[2])
        assert is_begun(folder, unbroken[0])
        assert begun(root, folder).end()[0] == 0
        assert_whole(folder, unbroken[0])
        figures.add("crashes", "full disks of bench run: exit 2, then gone on with to the same lines", number + 1)


def test_a_bench_that_may_not_write(root: Path, readonly: Path, tmp_path: Path, figures: Figures) -> None:
    """Neither its lines nor its work; what was there stays."""
    (tmp_path / LINES).write_text(written(2))
    for place in (("--out", readonly / LINES), ("--work", readonly / "work")):
        arguments = [*command(root), *map(str, place)]
        found = Started(tmp_path, *arguments, prefix=powerless(), env=DEFENCES).end()
        assert found[:2] == (2, ""), found
        assert "readonly" in found[2]
        assert "Traceback" not in found[2]
    assert list(readonly.iterdir()) == []
    assert (tmp_path / LINES).read_text() == written(2)
    figures.add("crashes", "read-only outputs of bench run: exit 2", 2)


def test_a_bench_whose_data_is_removed_meanwhile(root: Path, unbroken: tuple[Path, float], tmp_path: Path) -> None:
    own = tmp_path / "root"
    own.mkdir()
    for path in root.iterdir():
        (own / path.name).symlink_to(path.resolve())
    suite = begun(own, tmp_path)
    suite.wait_for(tmp_path / LINES)
    with suite.halted():
        (own / "data").unlink()
    found = suite.end()
    assert found[:2] == (2, ""), found
    assert "data" in found[2]
    assert "Traceback" not in found[2]
    (own / "data").symlink_to((root / "data").resolve())
    assert begun(own, tmp_path).end()[0] == 0
    assert timeless(read_lines(tmp_path / LINES)) == timeless(read_lines(unbroken[0] / LINES))


def test_of_two_suites_on_one_file_of_lines_the_second_is_refused(root: Path, tmp_path: Path, figures: Figures) -> None:
    first = begun(root, tmp_path)
    first.wait_for(tmp_path / "work")  # which comes after the lines are locked
    with first.halted():
        before = files(tmp_path / "work")
        second = begun(root, tmp_path).end()
        assert files(tmp_path / "work") == before
    assert second[:2] == (2, ""), second
    assert "another command appends to" in second[2]
    first.process.terminate()
    assert_stopped(first, first.end(), 143)
    figures.add("crashes", "second suites on one file of lines, refused", 1)


def test_half_written_lines_are_no_lines(tmp_path: Path) -> None:
    """A table of a file that ends in the middle of a line has the whole ones, and one of none says so."""
    content = written(3).encode()
    for cut in (1, len(content) // 2, len(content) - 1):
        (tmp_path / LINES).write_bytes(content[:cut])
        assert len(read_lines(tmp_path / LINES)) == content[:cut].count(b"\n")
    assert_refused(cli("bench", "table", tmp_path / "nowhere.jsonl"), "does not exist")


def written(count: int) -> str:
    """So many lines of evidence as a file has them."""
    return "".join(line(seed=seed).model_dump_json() + "\n" for seed in range(count))
