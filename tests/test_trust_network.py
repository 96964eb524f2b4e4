"""Nothing is ever fetched and no socket opened: a process that opens one ends at once, and so do its children."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import malformed
import pytest
from commands import ENVIRONMENT, QUICK, python
from figures import Figures
from PIL import Image

pytestmark = pytest.mark.trust

HOOK = """
import os, sys
def forbid(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.")):
        os.write(2, f"NETWORK {event} {arguments}\\n".encode())
        os._exit(99)
sys.addaudithook(forbid)
"""
COMMANDS = """
import json, sys
from cbpt_guard.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps(codes))
"""
PLAN = """
[datasets.digits]
model = "suspect.pt"
train = "data"
clean = "data"
test = "data"
[implants.patch]
dataset = "digits"
attacks = {{ patch = "{target}" }}
folder = "."
[[cells]]
implants = ["patch"]
defenses = ["none"]
shots = [8]
"""
READER = f"{HOOK}\nfrom pathlib import Path\nfrom cbpt_guard.defense.untrusted.reader import report_on\n"
LIBRARY = f"""{HOOK}
from cbpt_guard import GuardedClassifier
guard = GuardedClassifier.load(sys.argv[1], threads=1)
answers = guard.predict([*sys.argv[2:], "https://example.org/x.png", "hf://datasets/x.png", b"http://example.org/"])
assert [answer.error is None for answer in answers] == [True] * len(sys.argv[2:]) + [False] * 3
"""


@pytest.mark.parametrize(
    "code",
    ["import socket; socket.socket()", "import urllib.request as r; r.urlopen('http://127.0.0.1:9')"],
)
def test_the_hook_can_bite(code: str, tmp_path: Path) -> None:
    found = python(f"{HOOK}\n{code}", cwd=tmp_path)
    assert found.returncode == 99
    assert "NETWORK" in found.stderr


@pytest.fixture
def forbidden(tmp_path: Path) -> dict[str, str]:
    """An environment in which every Python process has the hook from its first line on."""
    place = tmp_path / "hook"
    place.mkdir()
    (place / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    return ENVIRONMENT | {"PYTHONPATH": str(place)}


def test_the_hook_bites_in_children_too(forbidden: dict[str, str], tmp_path: Path) -> None:
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import socket; socket.socket()']))"
    assert python(code, cwd=tmp_path, env=forbidden).returncode == 99


def test_the_whole_road_opens_no_socket(
    request: pytest.FixtureRequest,
    forbidden: dict[str, str],
    tmp_path: Path,
    amount: Callable[[int, int], int],
    figures: Figures,
) -> None:
    """Commands and the library from the suspect to the answers; the short form takes a finished run."""
    steps = [
        ["export", "--allow-unguarded"],
        ["verify", "bundle", "--deep"],
        ["inspect", "bundle"],
        ["predict", "bundle", "image.png"],
        ["predict", "bundle", "https://example.org/x.png"],
    ]
    codes: list[tuple[int, ...]] = [(0,), (0,), (0,), (0,), (1,)]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    if amount(0, 1):
        suspect = request.getfixturevalue("digits_suspect")
        (tmp_path / "quick.toml").write_text(QUICK, encoding="utf-8")
        source, data = str(suspect.folder), str(suspect.data)
        suspected = ["--model", source, "--data", data, "--settings", "quick.toml"]
        steps = [["purify", *suspected], ["scan", *suspected], *steps]
        (tmp_path / "plan.toml").write_text(PLAN.format(target=suspect.report.target), encoding="utf-8")
        (tmp_path / "data").symlink_to(suspect.data)
        roots = ["--root", source, "--root", "."]
        steps.append(["evaluate", "bundle", "--data", data])
        steps.append(["bench", "run", "--plan", "plan.toml", *roots, "--out", "lines.jsonl", "--work", "work"])
        codes = [(0, 1), (0,), *codes, (0,), (0,)]  # so quick a run need not end guarded
    else:
        shutil.copytree(request.getfixturevalue("tiny_run"), tmp_path / "purified")
    road = python(COMMANDS, json.dumps(steps), cwd=tmp_path, env=forbidden)
    assert "NETWORK" not in road.stderr
    assert road.returncode == 0, road.stderr
    found = json.loads(road.stdout.splitlines()[-1])
    assert all(code in wanted for code, wanted in zip(found, codes, strict=True)), (found, road.stderr)
    library = python(LIBRARY, tmp_path / "bundle", tmp_path / "image.png", cwd=tmp_path)
    assert library.returncode == 0, library.stderr
    figures.add("images", "commands run with sockets forbidden", len(steps))


def test_the_reader_of_checkpoints_opens_no_socket(tmp_path: Path) -> None:
    """It is a process of its own, so that the hook of its parent does not reach it."""
    names = ("loads: zip", "loads: legacy", "loads: TorchScript with hostile source text")
    for number, name in enumerate(names):
        (tmp_path / f"{number}.pt").write_bytes(malformed.LOADS[name]())
    code = f"{READER}for path in sys.argv[1:]: assert 'form' in report_on(Path(path))"
    found = python(code, *sorted(tmp_path.glob("*.pt")), cwd=tmp_path)
    assert found.returncode == 0, found.stderr


REMOTE = [name for name in malformed.PATHS if name.startswith("config: ")]


def test_remote_names_in_a_config_are_refused_and_not_looked_up(tmp_path: Path, figures: Figures) -> None:
    """Every odd config in one process that may open no socket: what builds the model, not only what reads it."""
    for number, name in enumerate(REMOTE):
        malformed.PATHS[name](tmp_path / f"{number:02d}")
    code = f"""{HOOK}
import json
from pathlib import Path
from cbpt_guard.defense.untrusted import checkpoint, reader
from cbpt_guard.defense.architecture import resolve_model
from cbpt_guard.defense.openclip import Tokenizer
from cbpt_guard.errors import CbptGuardError
def here(module, copy, size, limits):
    return reader.report_on(copy)
checkpoint.run_confined = here
told = []
for folder in map(Path, sys.argv[1:]):
    try:
        spec = resolve_model(checkpoint.read_checkpoint(folder))
        Tokenizer(spec.config)
        told.append("accepted")
    except CbptGuardError as error:
        told.append(f"{{error.exit_code}} {{error}}")
print(json.dumps(told))
"""
    found = python(code, *sorted(path for path in tmp_path.iterdir() if path.is_dir()), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    told = dict(zip(REMOTE, json.loads(found.stdout), strict=True))
    assert all(text.startswith("2 ") for text in told.values()), told
    assert "needs a download" in told["config: text tower by hf_model_name"]
    for name in ("a hub", "URL", "a folder"):
        assert "remote or local path" in next(text for case, text in told.items() if name in case and "timm" in case)
    assert "put its files into a folder" in told["config: remote tokenizer"]
    figures.add("images", "configs with remote names or hooks, refused with sockets forbidden", len(REMOTE))


def test_a_runtime_import_opens_no_socket(tmp_path: Path) -> None:
    found = python(f"{HOOK}\nimport cbpt_guard, onnxruntime, PIL.Image\ncbpt_guard.GuardedClassifier", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
