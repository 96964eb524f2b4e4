"""The product's three lines and the documents' Python, verbatim, on files that a user would have."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from commands import QUICK, blocking, python, script
from PIL import Image

from cbpt_guard import GuardedClassifier
from cbpt_guard.defense import purify
from cbpt_guard.defense.settings import Settings

if TYPE_CHECKING:
    from digits import DigitsSuspect

REPOSITORY = Path(__file__).parents[1]
SERVING = REPOSITORY / "docs" / "serving.md"
OFFLINE = ("torch", "torchvision", "open_clip", "onnx", "onnxscript", "safetensors", "sklearn", "timm")


def blocks(path: Path, after: str = "") -> list[str]:
    """The code blocks of a document behind a heading."""
    text = path.read_text(encoding="utf-8").partition(after)[2] if after else path.read_text(encoding="utf-8")
    return re.findall(r"^```(?:python)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tiny_run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, its bundle and an image under the names that the documents use."""
    shutil.copytree(tiny_run, tmp_path / "purified")
    shutil.copytree(exported, tmp_path / "bundle")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_shows_its_point(tmp_path: Path) -> None:
    """The README's main job, with the settings that users get: exit 0 says that the attack took and the guard held."""
    done = script("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    undefended, guarded = done.stdout.splitlines()
    assert undefended.startswith("undefended")
    assert guarded.startswith("guarded")


def test_the_three_lines_of_the_product(digits_suspect: DigitsSuspect, tmp_path: Path) -> None:
    """Verbatim from the README, in a folder with a checkpoint, its config and clean images; then in a service."""
    for name in ("suspect.pt", "open_clip_config.json"):
        shutil.copy(digits_suspect.folder / name, tmp_path)
    shutil.copytree(digits_suspect.data, tmp_path / "clean")
    shutil.copy(next((tmp_path / "clean" / "one").iterdir()), tmp_path / "cat.jpg")
    commands, service = blocks(REPOSITORY / "README.md", "## Use it")[:2]
    assert len(commands.splitlines()) == 2
    for line in commands.splitlines():
        program, *arguments = line.split()
        assert program == "cbpt-guard"
        done = script(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout in ("purified\n", "bundle\n")
    answer = python(
        f"{blocking(*OFFLINE)}\n{service}\nprint(_.label)".replace(
            "GuardedClassifier.load(", "_ = GuardedClassifier.load("
        ),
        cwd=tmp_path,
    )
    assert (answer.returncode, answer.stdout) == (0, "one\n"), answer.stderr


def test_the_documents_lines_for_a_service_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = blocks(SERVING)[0]
    second = blocks(SERVING, "## In a service that has torch already")[0]
    served: dict[str, Any] = {}
    exec(first, served)
    assert capsys.readouterr().out.startswith(f"{served['answer'].label} ")

    images = np.random.default_rng(1).integers(0, 256, (16, 32, 32, 3), np.uint8)
    guard: GuardedClassifier = served["guard"]
    with_torch: dict[str, Any] = {}
    exec(second, with_torch)
    labels = with_torch["classify"](torch.from_numpy(guard.run(images).embedding))
    answers = guard.predict(list(images))
    assert labels == [answer.label for answer in answers]
    assert f"{sum(a.triggered for a in answers)} of 16 images look triggered" in capsys.readouterr().out


def test_the_documents_lines_without_commands_run(
    digits_suspect: DigitsSuspect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "quick.toml").write_text(QUICK)
    quick = Settings.read(tmp_path / "quick.toml")
    monkeypatch.setattr(purify, "Settings", lambda: quick)  # the lines take the defaults, which take longer
    for name in ("suspect.pt", "open_clip_config.json"):
        (tmp_path / name).symlink_to(digits_suspect.folder / name)
    (tmp_path / "clean").symlink_to(digits_suspect.data)
    monkeypatch.chdir(tmp_path)
    (lines,) = blocks(SERVING, "## As Python instead of commands")
    done: dict[str, Any] = {}
    exec(lines, done)
    run = done["run"]
    assert (run.path, (tmp_path / "bundle").exists()) == (Path("purified"), run.record.verdict.name == "guarded")
    assert f"{run.record.verdict.name} {run.metrics.clean_accuracy_after}" in capsys.readouterr().out
