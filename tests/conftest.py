"""Fixtures that several test modules use."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from figures import Figures
from tiny import write_tiny_bundle

if TYPE_CHECKING:
    from digits import DigitsModel, DigitsSuspect

REPOSITORY = Path(__file__).parents[1]
FIGURES = pytest.StashKey[Figures]()
LONGEST = ("test_models.py", "test_road.py", "test_suite.py", "test_trust_crashes.py")
"""The files that take minutes: first, so that no worker is left alone with one at the end. pytest-xdist takes those
with many tests first, unless told `--no-loadscope-reorder`."""

os.environ.pop("COLUMNS", None)  # a worker of pytest-xdist has 80; tables are tested as they are off a terminal
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers side by side would stall each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="write what the trust tests counted to this JSON file")
    parser.addoption("--amount", choices=("short", "long"), help="of the trust tests; `-m trust` alone means long")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: commands would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[FIGURES] = Figures()
    if config.option.figures and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--figures counts in one process; leave -n out")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    if config.option.figures and exitstatus == pytest.ExitCode.OK:  # figures of a failed run are none
        config.stash[FIGURES].write(config.option.figures)
    if is_long(config) or config.option.figures:
        terminalreporter.section("trust")
        for line in config.stash[FIGURES].lines():
            terminalreporter.write_line(line)


def is_long(config: pytest.Config) -> bool:
    """Whether the trust tests take their long form: asked for by `--amount`, or by `-m trust`."""
    return (config.option.amount or ("long" if config.option.markexpr == "trust" else "short")) == "long"


@pytest.fixture(scope="session")
def amount(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """`amount(short, long)`: how much of a trust test is done in this run."""
    return lambda short, long: long if is_long(pytestconfig) else short


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Where trust tests record what they counted (see tests/figures.py)."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development models and data beside the repository; its tests skip where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"the development models and data are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def pristine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle that no test changes."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def tiny_bundle(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle for one test to use and to break."""
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


@pytest.fixture
def readonly(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody but root writes into."""
    place = tmp_path / "readonly"
    place.mkdir()
    place.chmod(0o500)
    yield place
    place.chmod(0o700)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run that no test changes."""
    from small_runs import write_run  # here, so that tests of the runtime load no torch

    return write_run(tmp_path_factory.mktemp("run") / "purified")


@pytest.fixture
def own_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run for one test to break."""
    return Path(shutil.copytree(tiny_run, tmp_path / "purified"))


@pytest.fixture(scope="session")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the small run, exported once; no test changes it."""
    from cbpt_guard.export import export

    return export(tiny_run, tmp_path_factory.mktemp("exported") / "bundle")


@pytest.fixture(scope="session")
def served_bundle(
    request: pytest.FixtureRequest, amount: Callable[[int, int], int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What is served under load and fuzzed: the purified digits CLIP in the long form, else the tiny bundle."""
    if not amount(0, 1) or not torch_is_there():
        return Path(request.getfixturevalue("pristine_bundle"))
    from quick_cbpt import purified

    from cbpt_guard.export import export

    run = purified(request.getfixturevalue("digits_suspect"), tmp_path_factory.mktemp("served") / "purified")
    return export(run, run.parent / "bundle", allow_unguarded=True)


def torch_is_there() -> bool:
    """The runtime's tests also run where only the runtime is installed."""
    return find_spec("torch") is not None


@pytest.fixture(scope="session")
def digits_clean(tmp_path_factory: pytest.TempPathFactory) -> DigitsModel:
    """A clean CLIP of handwritten digits, trained once (12 s on one core); no test changes it."""
    from digits import make_clean  # here, so that tests of the runtime load no torch

    return make_clean(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def digits_suspect(digits_clean: DigitsModel, tmp_path_factory: pytest.TempPathFactory) -> DigitsSuspect:
    """The same after poisoning with a patch (6 s more); no test changes it."""
    from digits import make_suspect

    return make_suspect(digits_clean, tmp_path_factory.mktemp("suspect"))
