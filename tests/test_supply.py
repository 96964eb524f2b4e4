"""What the package is made of and made with: no pickle, no code from text, pinned and hashed dependencies."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from figures import Figures
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

pytestmark = pytest.mark.trust

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("cbpt_guard", "export", "cli", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*.py")
    if not {"export", "cli"} & set(path.relative_to(REPOSITORY / folder).parts[:-1])  # links to the same files
)
CARRIERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
READERS = {"load", "loads", "Unpickler", "dump", "dumps", "Pickler"}
KNOWN = {
    ("defense/untrusted/pickles.py", "imports pickle"): "for the error that torch's restricted unpickler raises",
    (
        "defense/untrusted/torchscript.py",
        "imports pickle",
    ): "for one whose find_class knows modules without behaviour",
    ("defense/untrusted/torchscript.py", "uses pickle.Unpickler"): "the base of that class",
}


def findings(source: str) -> Iterator[str]:
    """Everything in a source text that could bring code to life from data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in CARRIERS)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in CARRIERS:
            if node.attr in READERS:
                yield f"uses {node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call):
            yield from called(node)


def called(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    said = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name in RUNNERS:
        yield f"calls {name}"
    if name in ("np.load", "numpy.load") and said.get("allow_pickle") != "False":
        yield "np.load without allow_pickle=False"
    if name in ("torch.load", "torch.jit.load", "torch.hub.load") and said.get("weights_only") != "True":
        yield f"{name} without weights_only=True"
    if said.get("allow_pickle") == "True":
        yield f"{name} with allow_pickle=True"
    if said.get("shell") == "True" or name in ("os.system", "os.popen"):
        yield f"{name} through a shell"


def test_no_source_brings_code_to_life_from_data(figures: Figures) -> None:
    found = {
        (path.relative_to(REPOSITORY).as_posix().removeprefix("cbpt_guard/"), problem)
        for path in SOURCES
        for problem in findings(path.read_text(encoding="utf-8"))
    }
    assert found == set(KNOWN)
    assert len(SOURCES) > 60
    figures.add("supply", "source files without a pickle, an eval or a shell", len(SOURCES))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "import yaml",
        "import pickle as p",
        "def late():\n    import marshal",
        "pickle.loads(data)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.jit.load(path)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_search_can_fail(source: str) -> None:
    assert list(findings(source))


def test_the_search_allows_what_is_safe() -> None:
    for source in ("np.load(p, allow_pickle=False)", "torch.load(p, weights_only=True)", "model.eval()", "import json"):
        assert list(findings(source)) == []


# Pins, hashes and floors

CVES = {
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747: code from files that were read with weights_only=True"),
    "onnx": (
        "1.21",
        "CVE-2026-27489, CVE-2026-28500, CVE-2026-34445: files outside a model's folder, forged attributes",
    ),
    "pillow": ("12.3", "CVE-2026-25990 and those that 12.3.0 lists: writes beyond a decoder's buffers"),
}
LOCKS = {"requirements.lock": ("cpu",), "requirements-purify.lock": ("purify", "sign")}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def required(*extras: str) -> list[Requirement]:
    texts = [*project()["dependencies"], *(text for e in extras for text in project()["optional-dependencies"][e])]
    return [Requirement(text) for text in texts]


def pinned(name: str) -> dict[str, str]:
    """Each `name==version` of a lock or of constraints, by its normalised name."""
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^ ]+)( \\)?", line) for line in lines]
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def floor_of(requirement: Requirement) -> Version:
    return min(Version(part.version) for part in requirement.specifier if part.operator in (">=", "=="))


def test_every_dependency_has_a_floor_above_its_known_holes() -> None:
    for requirement in required(*project()["optional-dependencies"]):
        floor, reason = CVES.get(canonicalize_name(requirement.name), ("0", ""))
        assert floor_of(requirement) >= Version(floor), f"{requirement}: {reason}"


def test_the_floor_is_what_is_tested_as_the_floor() -> None:
    floors = pinned("constraints-floor.txt")
    for requirement in required("cpu"):
        tested = Version(floors[canonicalize_name(requirement.name)])
        assert tested.release[:2] == floor_of(requirement).release[:2], requirement.name


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_everything_by_hash_to_what_was_tested(name: str, figures: Figures) -> None:
    lines = [line for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    tested, pins = pinned("constraints.txt"), pinned(name)
    entries = [index for index, line in enumerate(lines) if not line.startswith(" ")]
    assert len(pins) == len(entries)
    for start, end in zip(entries, [*entries[1:], len(lines)], strict=True):
        assert end > start + 1, lines[start]
        for line in lines[start + 1 : end]:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    pins.pop("setuptools", None)  # torch asks for it; constraints.txt is pip's own list, which leaves it out
    assert {name: version.partition("+")[0] for name, version in pins.items()}.items() <= tested.items()
    assert {canonicalize_name(requirement.name) for requirement in required(*LOCKS[name])} <= pins.keys()
    figures.add("supply", f"packages pinned by hash in {name}", len(pins))


def test_what_was_tested_satisfies_what_is_asked() -> None:
    tested = pinned("constraints.txt")
    for requirement in required("cpu", "purify", "sign", "bench", "dev"):
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), str(requirement)


def test_nothing_of_this_machine_stands_in_a_lock() -> None:
    for name in (*LOCKS, "constraints-floor.txt", "constraints.txt"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert not re.search(r"file:|://|find-links|index-url|/[a-z]+/", text), name
