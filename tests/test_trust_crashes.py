"""No crash loses work, and nothing half-written is ever read as a result: purify and export, killed and starved."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from commands import EARLIER, QUICK, assert_refused, cli, script, write_earlier
from figures import Figures
from started import PATIENCE, Started, files, limited, powerless

from cbpt_guard import GuardedClassifier
from cbpt_guard.bundle import open_bundle
from cbpt_guard.defense import data
from cbpt_guard.errors import CbptGuardError
from cbpt_guard.export import write

if TYPE_CHECKING:
    from digits import DigitsSuspect

pytestmark = pytest.mark.trust

Amount = Callable[[int, int], int]
SEED = 20261124
LONG_ONLY = "in the long form, `pytest -m trust`; the short one has it in "
PURIFY = ("purify", "--model", "suspect/suspect.pt", "--data", "clean", "--settings", "quick.toml", "--threads", "1")


@pytest.fixture
def folder(digits_suspect: DigitsSuspect, tmp_path: Path) -> Path:
    """Model, data, settings, and an earlier output that must outlive every crash."""
    (tmp_path / "suspect").symlink_to(digits_suspect.folder)
    (tmp_path / "clean").symlink_to(digits_suspect.data)
    (tmp_path / "quick.toml").write_text(QUICK)
    return earlier(tmp_path)


def earlier(folder: Path) -> Path:
    write_earlier(folder / "purified")
    return folder


@pytest.fixture(scope="module")
def unbroken(digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The same run without a crash, and its seconds."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "suspect").symlink_to(digits_suspect.folder)
    (folder / "clean").symlink_to(digits_suspect.data)
    (folder / "quick.toml").write_text(QUICK)
    start = time.monotonic()
    done = script(*PURIFY, cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    return folder / "purified", time.monotonic() - start


def is_kept(folder: Path) -> bool:
    """Whether the earlier output stands as it was; the next start puts it back when a crash fell between two moves."""
    place = next(path for path in (folder / "purified", folder / ".purified.old") if path.exists())
    return files(place) == EARLIER


# SIGKILL


def test_a_killed_purify_goes_on_to_the_same_files(
    folder: Path, unbroken: tuple[Path, float], amount: Amount, figures: Figures
) -> None:
    """Killed at seeded moments, gone on with, killed again, until it ends; then from the start."""
    wanted, seconds = files(unbroken[0]), unbroken[1]
    generator, kills, finished, resume = np.random.default_rng(SEED), 0, 0, ()
    while kills < amount(1, 20) or not finished or resume:
        patience = float(generator.uniform(0, seconds)) if kills < amount(1, 20) else PATIENCE
        command = Started(folder, *PURIFY, "--force", *resume)
        killed = command.killed(patience)
        kills += killed
        if killed and is_kept(folder):
            if (folder / ".purified.partial").exists():
                assert_refused(cli("export", "--run", folder / ".purified.partial", "--out", folder / "b"), "run")
                assert_refused(cli("inspect", folder / ".purified.partial"))
            resume = ("--resume",)
            continue
        seconds = seconds if killed else min(seconds, command.seconds)  # so that kills keep falling within a run
        assert killed or command.process.returncode in (0, 1)
        assert files(folder / "purified") == wanted  # whole, though it may have been killed right after the last move
        finished, resume = finished + 1, ()
        shutil.rmtree(folder / "purified")
        shutil.rmtree(folder / ".purified.old", ignore_errors=True)
        earlier(folder)
    assert {path.name for path in folder.glob(".*")} <= {".purified.lock"}  # which the next command takes
    figures.add("crashes", "SIGKILLs of purify at random moments", kills)
    figures.add("crashes", "runs that went on after them and ended in the same bytes as an unbroken one", finished)


def test_a_killed_export_starts_over_cleanly(
    tiny_run: Path, exported: Path, pristine_bundle: Path, tmp_path: Path, amount: Amount, figures: Figures
) -> None:
    """What stands is the earlier bundle or the whole new one, at every moment; a reader never sees another.

    Equal to the byte, card and bill of materials included, to an export in another process, where sets come in another
    order.
    """
    out, generator, kills, seconds = tmp_path / "bundle", np.random.default_rng(SEED), 0, 8.0
    shutil.copytree(pristine_bundle, out)
    before = open_bundle(out).digest
    new = open_bundle(exported).digest
    while kills < amount(1, 20):
        command = Started(tmp_path, "export", "--run", tiny_run, "--out", out, "--force")
        if kills % 2:
            command.wait_for(tmp_path / ".bundle.partial" / "manifest.json")
            kills += command.killed(float(generator.uniform(0, 0.05)))
        else:
            killed = command.killed(float(generator.uniform(0, seconds)))
            kills += killed
            seconds = seconds if killed else command.seconds  # so that kills fall within a run on any machine
        standing = out if out.exists() else tmp_path / ".bundle.old"
        assert GuardedClassifier.load(standing).digest in (before, new)
        if (tmp_path / ".bundle.partial").exists() and "manifest.json" not in os.listdir(tmp_path / ".bundle.partial"):
            with pytest.raises(CbptGuardError):
                GuardedClassifier.load(tmp_path / ".bundle.partial")
    done = script("export", "--run", tiny_run, "--out", out, "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(exported)
    assert [path.name for path in tmp_path.glob(".*")] == []
    figures.add("crashes", "SIGKILLs of export at random moments", kills)


# SIGINT and SIGTERM


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_export_leaves_nothing_but_the_earlier_bundle(
    tiny_run: Path, exported: Path, tmp_path: Path, amount: Amount, figures: Figures, number: int, code: int
) -> None:
    """At seeded moments, for the exporter calls back from many places."""
    if number == signal.SIGTERM and not amount(0, 1):
        pytest.skip(LONG_ONLY + "test_of_two_commands_on_one_output_the_second_is_refused")
    out, generator, stopped, seconds = tmp_path / "bundle", np.random.default_rng(SEED + number), 0, 3.0
    shutil.copytree(exported, out)
    while stopped < amount(1, 10):
        command = Started(tmp_path, "export", "--run", tiny_run, "--out", out, "--force")
        command.wait_for(tmp_path / ".bundle.partial")
        time.sleep(float(generator.uniform(0, seconds)))
        command.process.send_signal(number)
        found = command.end()
        if found[1]:  # it had ended, all but python itself: sooner, on so fast a machine
            seconds /= 2
            continue
        assert found[:2] == (code, ""), found
        assert "Traceback" not in found[2]
        assert files(out) == files(exported)
        assert [path.name for path in tmp_path.glob(".*")] == []
        stopped += 1
    figures.add("crashes", f"{signal.Signals(number).name}s of export, each answered by {code}", stopped)


def test_a_stopped_purify_stays_resumable_at_any_moment(
    folder: Path, unbroken: tuple[Path, float], amount: Amount, figures: Figures
) -> None:
    if not amount(0, 1):
        pytest.skip(LONG_ONLY + "tests/test_interrupt.py")
    generator, stopped, resume, seconds = np.random.default_rng(SEED), 0, (), unbroken[1]
    while stopped < 10:
        number, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[stopped % 2]
        command = Started(folder, *PURIFY, "--force", *resume)
        command.wait_for(folder / ".purified.lock")  # from here on there is work to keep
        left = max(0.0, seconds - (time.monotonic() - command.begun))
        time.sleep(float(generator.uniform(0, left / 2)))
        command.process.send_signal(number)
        found = command.end()
        if not is_kept(folder):  # it had ended, all but python itself
            assert files(folder / "purified") == files(unbroken[0])
            seconds, resume = min(seconds, command.seconds), ()
            shutil.rmtree(folder / "purified")
            earlier(folder)
            continue
        assert found[:2] == (code, ""), found
        assert "Traceback" not in found[2]
        assert is_kept(folder)
        stopped, resume = stopped + 1, ("--resume",)
    assert script(*PURIFY, "--force", "--resume", cwd=folder).returncode in (0, 1)
    assert files(folder / "purified") == files(unbroken[0])
    figures.add("crashes", "SIGINTs and SIGTERMs of purify, each resumed to the same bytes", stopped)


# A hostile environment


def test_a_full_disk_at_any_file(
    folder: Path, tiny_run: Path, exported: Path, amount: Amount, figures: Figures
) -> None:
    """Files that cannot grow beyond a seeded size: of the reader's copy, a part, the results, the graph (long form)."""
    generator, refusals = np.random.default_rng(SEED), 0
    shutil.copytree(exported, folder / "bundle")
    largest = {
        "purify": max(path.stat().st_size for path in folder.glob("suspect/*")),
        "export": max(path.stat().st_size for path in exported.iterdir()),
    }
    exporting = ("export", "--run", tiny_run, "--out", "bundle", "--force")
    commands = {"purify": (*PURIFY, "--force"), "export": exporting}
    for name, arguments in list(commands.items())[: amount(1, 2)]:
        for _ in range(amount(1, 10)):
            size = int(largest[name] ** float(generator.uniform(0.3, 0.98)))
            found = Started(folder, *arguments, preexec_fn=limited(size)).end()
            assert found[:2] == (2, ""), (size, found)
            assert "Traceback" not in found[2]
            assert is_kept(folder)
            assert files(folder / "bundle") == files(exported)
            refusals += 1
    figures.add("crashes", "full disks, at files of seeded sizes: exit 2, the earlier output untouched", refusals)


def test_an_output_or_a_temporary_folder_that_cannot_be_written(
    folder: Path, tiny_run: Path, readonly: Path, amount: Amount, figures: Figures
) -> None:
    """In the short form export alone."""
    prefix = powerless()
    commands = (("export", "--run", tiny_run, "--out", readonly / "out"), (*PURIFY, "--out", readonly / "out"))
    for number, arguments in enumerate(commands[: amount(1, 2)], 1):
        found = Started(folder, *arguments, prefix=prefix).end()
        assert found[:2] == (2, ""), found
        assert "readonly" in found[2]
        assert "Traceback" not in found[2]
        figures.add("crashes", "read-only outputs: exit 2", number)
    assert list(readonly.iterdir()) == []


def test_no_temporary_folder_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`TMPDIR` alone proves nothing: python looks for another."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tempfile.tempdir", str(folder / "nowhere"))
    assert_refused(cli(*PURIFY, "--force"), "TMPDIR")
    assert is_kept(folder)


def test_data_that_is_removed_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures) -> None:
    """Images after the first few, with their folder."""
    monkeypatch.chdir(folder)
    copy = Path(shutil.copytree(folder / "clean", folder / "images"))
    real, seen = data.load_image, []

    def removing(source: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(source)
        if len(seen) == 3:
            shutil.rmtree(copy)
        return real(source, *arguments, **options)

    monkeypatch.setattr(data, "load_image", removing)
    assert_refused(cli("purify", "--model", "suspect/suspect.pt", "--data", "images", "--force"), "images")
    assert is_kept(folder)
    figures.add("crashes", "data or run folders removed in mid-run: exit 2", 2)


def test_a_run_that_is_removed_meanwhile(
    own_run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported, tmp_path / "bundle")
    model = (exported / "model.onnx").read_bytes()

    def removing(*_: object) -> bytes:
        shutil.rmtree(own_run)
        return model

    monkeypatch.setattr(write, "to_onnx", removing)
    assert_refused(cli("export", "--run", own_run, "--out", tmp_path / "bundle", "--force"), "purified")
    assert files(tmp_path / "bundle") == files(exported)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


# Two at once


def test_of_two_commands_on_one_output_the_second_is_refused(
    folder: Path,
    unbroken: tuple[Path, float],
    tiny_run: Path,
    exported: Path,
    pristine_bundle: Path,
    amount: Amount,
    figures: Figures,
) -> None:
    """The first one is terminated; in the long form it goes on, to what it would have been, and so does purify."""
    shutil.copytree(pristine_bundle, folder / "bundle")
    commands = (
        (("export", "--run", tiny_run, "--out", "bundle", "--force"), "bundle", files(exported)),
        ((*PURIFY, "--force"), "purified", files(unbroken[0])),
    )
    for number, (arguments, name, wanted) in enumerate(commands[: amount(1, 2)], 1):
        first = Started(folder, *arguments)
        first.wait_for(folder / f".{name}.partial")
        with first.halted():  # or it might have ended before the second one gets to the lock
            second = Started(folder, *arguments).end()
        assert second[:2] == (2, ""), second
        assert "another command is writing" in second[2]
        if amount(0, 1):
            found = first.end()
            assert found[0] in (0, 1), found
            assert files(folder / name) == wanted
        else:
            first.process.terminate()
            found = first.end()
            assert found[:2] == (143, ""), found
            assert "Traceback" not in found[2]
            assert files(folder / name) == files(pristine_bundle)
            assert list(folder.glob(".bundle*")) == []
        figures.add("crashes", "second commands on one output, refused", number)
