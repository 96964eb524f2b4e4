"""Ctrl-C and SIGTERM in the middle of a real purify: nothing half-written, and `--resume` ends where it would have."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from commands import EARLIER, ENVIRONMENT, QUICK, SCRIPT, assert_refused, cli, write_earlier
from safetensors.torch import load_file

if TYPE_CHECKING:
    from digits import DigitsSuspect

_PATIENCE = 120.0


def interrupted(folder: Path, arguments: list[str], part: str, number: signal.Signals) -> tuple[int, str, str]:
    """Start a purify, send it a signal once a part is in its journal, and return (exit code, stdout, stderr)."""
    journal = folder / ".purified.partial" / "journal"
    with subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        end = time.monotonic() + _PATIENCE
        while not list(journal.glob(part)) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(process.pid, number)
        stdout, stderr = process.communicate(timeout=_PATIENCE)
    return process.returncode, stdout, stderr


@pytest.fixture
def folder(digits_suspect: DigitsSuspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Model, data, settings, and an earlier output that must outlive every interruption."""
    (tmp_path / "suspect").symlink_to(digits_suspect.folder)
    (tmp_path / "clean").symlink_to(digits_suspect.data)
    (tmp_path / "quick.toml").write_text(QUICK)
    write_earlier(tmp_path / "purified")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)  # `--threads` sets it for the whole process


def test_an_interrupted_run_goes_on_to_the_same_tensors(folder: Path) -> None:
    purify = [
        "purify",
        "--model",
        "suspect/suspect.pt",
        "--data",
        "clean",
        "--settings",
        "quick.toml",
        "--threads",
        "1",
    ]
    unbroken = cli(*purify, "--out", "unbroken")
    assert unbroken.exit_code in (0, 1), unbroken.stderr

    for number, part, resume, code, word in (
        (signal.SIGINT, "agnostic.safetensors", [], 130, "interrupted"),
        (signal.SIGTERM, "masked-*.safetensors", ["--resume"], 143, "terminated"),
    ):
        found = interrupted(folder, [*purify, "--force", *resume], part, number)
        assert found[:2] == (code, ""), found
        assert word in found[2]
        assert "--resume" in found[2]
        assert "Traceback" not in found[2]
        assert {path.name: path.read_bytes() for path in (folder / "purified").iterdir()} == EARLIER
        assert_refused(cli("export", "--run", ".purified.partial"), "no finished run")

    agnostic = folder / ".purified.partial" / "journal" / "agnostic.safetensors"
    written = agnostic.stat().st_mtime_ns
    assert_refused(cli(*purify, "--force", "--resume", "--seed", 1), "begun with another seed")
    assert agnostic.stat().st_mtime_ns == written

    resumed = cli(*purify, "--force", "--resume")
    assert resumed.exit_code == unbroken.exit_code, resumed.stderr
    assert not (folder / ".purified.partial").exists()
    for name in ("heads", "triggers", "prompts", "model"):
        ours, theirs = (load_file(folder / run / f"{name}.safetensors") for run in ("purified", "unbroken"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert (folder / "purified" / "metrics.json").read_bytes() == (folder / "unbroken" / "metrics.json").read_bytes()


def test_a_start_without_resume_starts_over(folder: Path) -> None:
    """What an earlier run left behind is not mixed in, be it ever so broken."""
    journal = folder / ".purified.partial" / "journal"
    journal.mkdir(parents=True)
    (journal / "key.json").write_text("not even JSON")
    (journal / "features.safetensors").write_text("no tensor")
    arguments = ("purify", "--model", "suspect/suspect.pt", "--data", "clean", "--settings", "quick.toml", "--force")
    assert_refused(cli(*arguments, "--resume"), "a key that cannot be read", "without `--resume`")
    assert (journal / "key.json").exists()
    assert cli(*arguments).exit_code in (0, 1)
    assert (folder / "purified" / "run.json").is_file()
