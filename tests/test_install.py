"""What `pip install '.[cpu]'` brings to a service: the runtime and its commands, and nothing of the offline half."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from figures import Figures
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
SHIPPED = ("cbpt_guard", "export", "cli", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
OFFLINE = ("cannot connect", "Connection", "NewConnectionError", "Temporary failure", "ProxyError", "Max retries")


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, text=True, capture_output=True, check=False, env=clean, timeout=600)


def installed(*arguments: object, cwd: Path) -> None:
    """pip; where no package index can be reached the tests cannot say anything."""
    result = run(*arguments, cwd=cwd)
    if result.returncode and any(word in result.stderr for word in OFFLINE):
        pytest.skip(f"no package index can be reached: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout ships, without build leftovers."""
    folder = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel that pip builds of it."""
    installed(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", source / "dist", ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def service(source: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with base + cpu; returns its `bin`."""
    folder = tmp_path_factory.mktemp("service")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder).returncode == 0
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check")
    installed(*pip, "install", "-q", f"{wheel}[cpu]", "-c", "constraints.txt", cwd=source)
    return folder / "bin"


@pytest.mark.trust
def test_the_wheel_holds_the_listed_packages_and_nothing_else(wheel: Path, source: Path, figures: Figures) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info/" not in name]
    setuptools = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    wanted, data = set[str](), setuptools["package-data"]
    for package in setuptools["packages"]:
        folder = source / setuptools["package-dir"].get(package, package.replace(".", "/"))
        files = [path for pattern in ("*.py", *data.get(package, ())) for path in folder.glob(pattern)]
        wanted |= {f"{package.replace('.', '/')}/{path.name}" for path in files}
    assert {"cbpt_guard/py.typed", "cbpt_guard/defense/calibration.json"} <= wanted
    assert sorted(names) == sorted(wanted)
    figures.add("supply", "files in the wheel, each of a package that pyproject.toml lists", len(names))


def test_the_runtime_is_there_and_the_offline_half_is_not(service: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, json, cbpt_guard
names = ("torch", "open_clip", "onnx", "safetensors", "sklearn", "onnxruntime", "numpy")
print(json.dumps([cbpt_guard.__version__, cbpt_guard.__file__, *(n for n in names if importlib.util.find_spec(n))]))
"""
    result = run(service / "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    version, file, *found = json.loads(result.stdout)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version == project["version"]
    assert Path(file).is_relative_to(service.parent)
    assert found == ["onnxruntime", "numpy"]


def test_it_serves_a_bundle(service: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 32), (0, 200, 0)).save(tmp_path / "green.png")
    code = "import cbpt_guard\nprint(cbpt_guard.GuardedClassifier.load('bundle').predict('green.png').label)"
    result = run(service / "python", "-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "green\n"), result.stderr
    command = service / "cbpt-guard"
    answer = run(command, "predict", "bundle", "green.png", "--json", cwd=tmp_path)
    assert json.loads(answer.stdout)["label"] == "green", answer.stderr
    verified = run(command, "verify", "bundle", cwd=tmp_path)
    assert verified.stdout.splitlines()[-1].startswith("sha256:"), verified.stderr
    assert "kind: bundle" in run(command, "inspect", "bundle", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "command",
    [["scan", "--model", "m.pt", "--data", "d"], ["purify", "--model", "m.pt", "--data", "d"], ["export"], ["demo"]],
)
def test_the_offline_commands_name_their_extra(service: Path, command: list[str], tmp_path: Path) -> None:
    result = run(service / "cbpt-guard", *command, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "pip install 'cbpt-guard[purify]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
