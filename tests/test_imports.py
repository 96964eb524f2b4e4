"""Imports point one way: root <- defense <- export <- bench <- cli; heavy libraries have one door each."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LAYERS = ["root", "defense", "export", "bench", "cli"]
FOLDERS = {
    "root": "cbpt_guard",
    "defense": "cbpt_guard/defense",
    "export": "export",
    "bench": "cbpt_guard/bench",
    "cli": "cli",
}
OFFLINE_ONLY = {"torch", "torchvision", "open_clip", "onnx", "onnxscript", "safetensors", "sklearn", "timm"}


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Each imported (module, name) of a source text, wherever it stands; `import a.b` gives ("a.b", "")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def uses(source: str, dotted: str) -> bool:
    """Whether a source text imports `dotted` or reads it as an attribute."""
    names = {f"{module}.{name}" for module, name in imported(source)} | {module for module, _ in imported(source)}
    attributes = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return any(name == dotted or name.startswith(dotted + ".") for name in names | attributes)


def violations(layer: str, path: str, source: str) -> list[str]:
    """What a module of that layer may not import, in words."""
    found = []
    for module, name in imported(source):
        package, top = module.split("."), module.split(".")[0]
        if module.startswith("."):
            found.append(f"{path}: a relative import")
        if top == "cbpt_guard":
            target = next((part for part in [*package[1:2], name] if part in LAYERS), "root")
            if LAYERS.index(target) > LAYERS.index(layer):
                found.append(f"{path}: {layer} imports {target}")
        if layer == "root" and top in OFFLINE_ONLY:
            found.append(f"{path}: the runtime imports {top}")
        if top == "open_clip" and path != "cbpt_guard/defense/openclip.py":
            found.append(f"{path}: imports open_clip")
        if top == "onnxruntime" and layer in ("root", "defense") and path != "cbpt_guard/session.py":
            found.append(f"{path}: imports onnxruntime")
        if top in ("onnx", "onnxscript") and layer == "defense":
            found.append(f"{path}: defense knows {top}")
    if uses(source, "torch.onnx") and layer != "export":
        found.append(f"{path}: uses torch.onnx")
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    folder = REPOSITORY / FOLDERS[layer]
    files = sorted(folder.glob("*.py") if layer == "root" else folder.rglob("*.py"))
    assert files, f"{FOLDERS[layer]} holds no modules"
    texts = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert [problem for path, text in texts.items() for problem in violations(layer, path, text)] == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("root", "import torch"),
        ("root", "from torch.nn import functional"),
        ("root", "def late():\n    import open_clip"),
        ("root", "import onnx.helper"),
        ("root", "import onnxruntime"),
        ("root", "from cbpt_guard.defense import clip"),
        ("root", "from cbpt_guard import defense"),
        ("root", "from .defense import clip"),
        ("defense", "import cbpt_guard.export.graph"),
        ("defense", "import open_clip"),
        ("defense", "import onnx"),
        ("defense", "import onnxruntime as ort"),
        ("defense", "import torch\ntorch.onnx.export(None)"),
        ("export", "from cbpt_guard.bench.suite import run"),
        ("bench", "from cbpt_guard.cli import main"),
        ("bench", "from torch import onnx"),
        ("cli", "from torch.onnx import export"),
    ],
)
def test_the_check_can_fail(layer: str, source: str) -> None:
    assert violations(layer, "some/module.py", source)


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("root", "import numpy\nfrom cbpt_guard.errors import InputError"),
        ("defense", "import torch\nfrom cbpt_guard.images import prepare"),
        ("export", "import torch.onnx\nimport onnx\nfrom cbpt_guard.defense.clip import FrozenClip"),
        ("cli", "from cbpt_guard import GuardedClassifier\nfrom cbpt_guard.bench import suite\nimport torch"),
    ],
)
def test_the_check_allows_the_arrows(layer: str, source: str) -> None:
    assert violations(layer, "some/module.py", source) == []


def package_folders() -> dict[str, str]:
    """Every folder with Python modules that must ship, by its import name."""
    folders = {"cbpt_guard.export": "export", "cbpt_guard.cli": "cli"}
    found = {}
    for top in ("cbpt_guard", "export", "cli"):
        for folder in {path.parent for path in (REPOSITORY / top).rglob("*.py")}:
            relative = folder.relative_to(REPOSITORY).as_posix()
            inside = {value: key for key, value in folders.items()}
            first, _, rest = relative.partition("/")
            found[".".join(filter(None, [inside.get(first, first), rest.replace("/", ".")]))] = relative
    return found


def test_the_package_list_equals_the_folders() -> None:
    """A forgotten sub-package would not ship, and nothing else would say so."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(package_folders())
    assert setuptools["package-dir"] == {"cbpt_guard.export": "export", "cbpt_guard.cli": "cli"}
