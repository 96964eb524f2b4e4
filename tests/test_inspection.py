"""A run or a bundle, summed up from its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cbpt_guard.errors import BundleError, InputError
from cbpt_guard.inspection import inspect


def test_a_bundle(tiny_bundle: Path) -> None:
    summary = inspect(tiny_bundle)
    assert (summary["kind"], summary["classes"], summary["verdict"]) == ("bundle", 5, "guarded")
    assert summary["variants"]["fp32"]["gate"]["found_trigger_asr"] == 0.0
    json.dumps(summary)


def test_a_run(own_run: Path) -> None:
    summary = inspect(own_run)
    assert (summary["kind"], summary["classes"], summary["rule"]) == ("run", 5, "switch")
    assert summary["model"]["source"] == "suspect.pt"
    assert summary["metrics"]["clean_accuracy_after"] == 1.0
    record = json.loads((own_run / "run.json").read_text())
    assert (summary["warnings"], summary["data"]) == (record["warnings"], record["data"])
    json.dumps(summary)


def test_nothing_heavy_is_imported(tiny_run: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime'): sys.modules[name] = None\n"
        "from cbpt_guard.inspection import inspect\n"
        "print(inspect(sys.argv[1])['kind'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_run)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("run\n", 0), done.stderr


def test_neither(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="run directory"):
            inspect(path)


def test_malformed_pieces(own_run: Path, tiny_bundle: Path) -> None:
    (tiny_bundle / "labels.json").write_text("{}")
    with pytest.raises(InputError, match=r"labels\.json must hold a JSON list"):
        inspect(tiny_bundle)
    (tiny_bundle / "manifest.json").write_text("[]")
    with pytest.raises(BundleError, match="format"):
        inspect(tiny_bundle)
    record = json.loads((own_run / "run.json").read_text())
    del record["verdict"]
    (own_run / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="'verdict' is missing"):
        inspect(own_run)
    (own_run / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"metrics\.json cannot be read"):
        inspect(own_run)
