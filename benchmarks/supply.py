"""The supply chain: what is installed is pinned by hash, has no known hole, and works at its floor too.

    pip install 'uv>=0.9' 'pip-audit>=2.9'                           into the environment that runs this
    python benchmarks/supply.py lock [--cpu-torch FOLDER]    rewrites requirements.lock, requirements-purify.lock and
                                                             constraints-floor.txt from pyproject.toml, constraints.txt
    python benchmarks/supply.py audit                        asks a vulnerability service about both locks (network)
    python benchmarks/supply.py floor                        runs the runtime's tests on the oldest versions allowed

`lock` takes torch's CPU build from PyTorch's own index, or from a folder of wheels where that cannot be reached.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SERVE, PURIFY, FLOOR = "requirements.lock", "requirements-purify.lock", "constraints-floor.txt"
WHERE = ("--python-version", "3.11", "--python-platform", "linux", "--no-header", "--no-annotate")
WHEEL = ("cbpt_guard", "export", "cli", "pyproject.toml", "README.md", "LICENSE")
TESTS = ("bundle", "classifier", "session", "format", "images", "metrics", "files", "supply", "trust_images")
TOOLS = ("pytest", "hypothesis", "onnx", "scipy")
"""What those tests take beside the runtime; `onnx` writes their graphs, scipy checks an interval."""


def main() -> None:
    """Do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lock", "audit", "floor"))
    parser.add_argument("--cpu-torch", type=Path, help="a folder with the wheel of torch's CPU build")
    args = parser.parse_args()
    if args.what == "lock":
        lock(args.cpu_torch)
    elif args.what == "audit":
        sys.exit(max(audit(name) for name in (SERVE, PURIFY)))
    else:
        sys.exit(floor())


def lock(cpu_torch: Path | None) -> None:
    """Write both locks and the floor."""
    torch = ("--find-links", cpu_torch) if cpu_torch else ("--torch-backend", "cpu")
    hashed = ("-c", "constraints.txt", "--generate-hashes")
    serving = "To serve (the extra `cpu`), x86_64 and aarch64 Linux, Python 3.11."
    offline = "To purify, export and sign (the extras `purify` and `sign`), with torch's CPU build for x86_64."
    floor = "The oldest versions that pyproject.toml allows the runtime (the extra `cpu`)."
    write(SERVE, serving, "--extra", "cpu", *hashed)
    write(PURIFY, offline, "--extra", "purify", "--extra", "sign", *hashed, *torch)
    write(FLOOR, floor, "--extra", "cpu", "--resolution", "lowest-direct")


def write(name: str, title: str, *arguments: object) -> None:
    """Resolve from nothing but the index, so that an earlier file decides nothing."""
    text = uv("pip", "compile", "pyproject.toml", *WHERE, *arguments)
    head = f"# {title}\n# Written by `python benchmarks/supply.py lock`; do not edit.\n"
    (HERE / name).write_text(head + text, encoding="utf-8")
    print(f"{name}: {sum('==' in line for line in text.splitlines())} packages")


def uv(*arguments: object) -> str:
    """uv's stdout."""
    command = [tool("uv"), "--no-config", "--quiet", *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=HERE, text=True, stdout=subprocess.PIPE, check=True).stdout


def audit(name: str) -> int:
    """pip-audit's answer for a lock: 0 when no package in it has a known vulnerability.

    The lock is complete, so nothing is resolved; a package that the service does not know fails, too. A local
    version (`+cpu`) is asked for by its public one.
    """
    text = (HERE / name).read_text(encoding="utf-8").replace("+cpu ", " ")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(text, encoding="utf-8")
        command = [tool("pip-audit"), "--strict", "--require-hashes", "--disable-pip", "-r", str(Path(folder) / name)]
        return subprocess.run(command, check=False).returncode


def floor() -> int:
    """Install the runtime's wheel at its floor, in an environment of its own, and run the tests that need no torch."""
    with tempfile.TemporaryDirectory(prefix="cbpt-guard-floor-") as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        for part in WHEEL:
            copy = shutil.copytree if (HERE / part).is_dir() else shutil.copy
            copy(HERE / part, source / part)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        python = folder / "venv" / "bin" / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, f"{source}[cpu]", *TOOLS, "-c", str(HERE / FLOOR)], check=True)
        tests = [str(HERE / "tests" / f"test_{test}.py") for test in TESTS]
        command = [str(python), "-P", "-m", "pytest", "-p", "no:cacheprovider", "-k", "not purify", *tests]
        return subprocess.run(command, cwd=HERE, check=False).returncode


def tool(name: str) -> str:
    """A program of this environment, or of the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or sys.exit(f"{name} is missing: pip install {name}")


if __name__ == "__main__":
    main()
