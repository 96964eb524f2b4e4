"""Serve a bundle from eight threads for an hour, and keep what it did to the process.

    python benchmarks/soak.py BUNDLE [--seconds 3600]

Writes benchmarks/soak.json; exits 1 where an answer differed, a thread or a file stayed, or memory grew. Its figures
go into docs/trust.md with the next `python benchmarks/trust.py page`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RUN, FIGURES = HERE.parent / "tests" / "load_run.py", HERE / "soak.json"
MOST_GROWTH = 16.0  # MiB over the second half of the hour


def main() -> None:
    """Parse the command, serve, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, RUN, "serve", args.bundle, folder, "--seconds", str(args.seconds)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": args.seconds,
        "cores": os.cpu_count(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "onnxruntime": version("onnxruntime"),
    }
    FIGURES.write_text(json.dumps(found | about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    left = found["threads left"] or found["files left"]
    if found["differing"] or left or found["growth MiB"] > MOST_GROWTH:
        sys.exit("the soak failed")


if __name__ == "__main__":
    main()
