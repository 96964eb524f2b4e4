"""`--device`: whatever computes with torch stays on the device that it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commands import ENVIRONMENT
from elsewhere import NAME

if TYPE_CHECKING:
    from digits import DigitsSuspect

HERE = Path(__file__).parent
DEVICES = [NAME, *(["cuda"] if torch.cuda.is_available() else [])]
LEAST = 50
"""Operations: the linear probe has the encoder alone on the device, and scikit-learn fits its features."""

MIXED = f"""
import elsewhere, torch
elsewhere.register()
there, here = torch.ones(2, 2, device={NAME!r}), torch.ones(2, 2)
assert (there @ there).cpu().tolist() == [[2, 2], [2, 2]]
assert there[torch.tensor([0])].shape == (1, 2) and (there * torch.tensor(2)).device.type == {NAME!r}
there @ here
"""


def test_the_device_of_these_tests_refuses_tensors_that_are_elsewhere() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MIXED], cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "expected all tensors to be on one device, but aten.mm.default got one on the CPU" in done.stderr


@pytest.mark.parametrize("device", DEVICES)
def test_everything_stays_on_its_device(device: str, digits_suspect: DigitsSuspect, tmp_path: Path) -> None:
    command = [sys.executable, "on_device.py", device, digits_suspect.checkpoint, digits_suspect.data, tmp_path]
    done = subprocess.run(
        list(map(str, command)), cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    parts: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        parts[said["part"]] = said
    assert parts["purify"]["outcome"] == [digits_suspect.target]
    assert parts["ensemble"]["outcome"] > 0.9, "it defends nothing"
    assert parts["oracle"]["outcome"] < 0.1
    assert parts["cell of none"]["outcome"] > 0.9
    assert parts["cell of quick_cbpt:quick"]["outcome"] < 0.1, "counted through its exported bundle"
    if device == NAME:
        assert min(part["operations"] for part in parts.values()) > LEAST
