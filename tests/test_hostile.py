"""Files that would run code are refused with exit code 3, and nothing of them runs."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clips import VIT, model, save

from cbpt_guard.defense.untrusted import reader, torchscript
from cbpt_guard.defense.untrusted.checkpoint import read_checkpoint
from cbpt_guard.errors import UnsafeError


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


CALLS: dict[str, Callable[[str], Reduced]] = {
    "posix.system": lambda canary: Reduced(os.system, f"touch {canary}"),
    "builtins.eval": lambda canary: Reduced(eval, f"open({canary!r}, 'w')"),
    "builtins.exec": lambda canary: Reduced(exec, f"open({canary!r}, 'w')"),
    "builtins.getattr": lambda canary: Reduced(getattr, {}, "x", f"{canary}"),
    "io.open": lambda canary: Reduced(open, canary, "w"),
    "subprocess.Popen": lambda canary: Reduced(subprocess.Popen, ["touch", canary]),
    "importlib.import_module": lambda _: Reduced(importlib.import_module, "antigravity"),
    "torch.hub.load": lambda canary: Reduced(torch.hub.load, canary, "x"),
    "torch.serialization.load": lambda canary: Reduced(torch.load, canary),
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def assert_refused(path: Path, name: str, canary: Path) -> None:
    report = reader.report_on(path)
    assert report.get("refused") == "unsafe", report
    assert name in str(report["message"])
    assert not canary.exists()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("legacy", [False, True])
def test_calls(name: str, legacy: bool, tmp_path: Path, canary: Path) -> None:
    content = {"state_dict": {"w": torch.ones(2)}, "extra": CALLS[name](str(canary))}
    path = save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert_refused(path, name, canary)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol(protocol: int, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(CALLS["posix.system"](str(canary)), protocol=protocol))
    assert_refused(path, "posix.system", canary)


@pytest.mark.parametrize("protocol", range(6))
def test_torch_files_of_every_protocol(protocol: int, tmp_path: Path, canary: Path) -> None:
    content = {"w": torch.ones(2), "x": CALLS["posix.system"](str(canary))}
    assert_refused(save(content, tmp_path / "x.pt", pickle_protocol=protocol), "posix.system", canary)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (b"(S'touch CANARY'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'touch CANARY'\no.", "os.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93S'touch CANARY'\n\x85R.", "os.system"),
        (
            b"\x80\x04c_codecs\nencode\n\x8c\x02os\x85R\x8c\x06system\x93S'touch CANARY'\n\x85R.",
            "STACK_GLOBAL",
        ),
        (b"\x80\x02\x82\x01S'touch CANARY'\n\x85R.", "EXT1"),
        (b"\x80\x02c__builtin__\neval\nS'1'\n\x85R.", "builtins.eval"),
    ],
    ids=["INST", "OBJ", "memo", "computed", "EXT1", "python2"],
)
@pytest.mark.parametrize("form", ["bare", "torch"])
def test_opcodes(template: bytes, name: str, form: str, tmp_path: Path, canary: Path) -> None:
    data = template.replace(b"CANARY", str(canary).encode())
    path = tmp_path / "x.pt"
    if form == "bare":
        path.write_bytes(data)
    else:
        archive(path, {"x/data.pkl": data, "x/version": b"3", "x/byteorder": b"little"})
    assert_refused(path, name, canary)


def archive(path: Path | io.BytesIO, entries: dict[str, bytes]) -> Path | io.BytesIO:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def test_archive_inside_an_archive(tmp_path: Path, canary: Path) -> None:
    inner = io.BytesIO()
    torch.save({"x": CALLS["posix.system"](str(canary))}, inner)
    path = tmp_path / "x.pt"
    archive(path, {"x/version": b"3", "x/inner.pt": inner.getvalue()})
    assert_refused(path, "posix.system", canary)


def test_disguised_as_safetensors(tmp_path: Path, canary: Path) -> None:
    assert_refused(save({"x": CALLS["posix.system"](str(canary))}, tmp_path / "x.safetensors"), "posix.system", canary)


def test_truncated_but_hostile(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "x.pt"
    data = pickle.dumps({"x": CALLS["posix.system"](str(canary)), "y": "z" * 100}, protocol=2)
    path.write_bytes(data[:-60])
    assert_refused(path, "posix.system", canary)


@pytest.mark.parametrize("entry", ["x/data.pkl", "x/constants.pkl"])
def test_inside_a_torchscript_archive(entry: str, tmp_path: Path, canary: Path) -> None:
    entries = {"x/data.pkl": b"\x80\x02}.", "x/constants.pkl": b"\x80\x02).", "x/code/__torch__.py": b""}
    entries[entry] = pickle.dumps(CALLS["posix.system"](str(canary)), protocol=2)
    path = tmp_path / "x.pt"
    archive(path, entries)
    assert_refused(path, "posix.system", canary)


def test_the_torchscript_reader_refuses_by_itself(tmp_path: Path, canary: Path) -> None:
    hostile = pickle.dumps(CALLS["posix.system"](str(canary)), protocol=2)
    path = tmp_path / "x.pt"
    archive(path, {"x/data.pkl": hostile, "x/constants.pkl": b"\x80\x02)."})
    with pytest.raises(UnsafeError, match=r"asks for posix\.system"):
        torchscript.load(path)
    assert not canary.exists()


def test_script_names_mean_nothing_outside_a_torchscript_archive(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02c__torch__.M\nforward\n)R.")
    assert_refused(path, "__torch__.M.forward", canary)


def test_a_whole_model_names_its_class_and_the_way_out(tmp_path: Path) -> None:
    path = save(model(VIT), tmp_path / "x.pt")
    with pytest.raises(UnsafeError, match=r"open_clip\.model\.CLIP.*save `model\.state_dict\(\)`") as caught:
        read_checkpoint(path)
    assert caught.value.exit_code == 3


def test_terminal_codes_do_not_reach_the_message(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02cos\x1b[2J\nsystem\n.")
    assert "\x1b" not in str(reader.report_on(path)["message"])


def test_through_the_child(tmp_path: Path, canary: Path) -> None:
    path = save({"w": torch.ones(1), "x": CALLS["posix.system"](str(canary))}, tmp_path / "x.pt")
    with pytest.raises(UnsafeError, match=r"x\.pt: refused, nothing was run: its pickle asks for posix\.system"):
        read_checkpoint(path)
    assert not canary.exists()


def test_the_canary_can_sing(tmp_path: Path, canary: Path) -> None:
    path = save({"x": CALLS["posix.system"](str(canary))}, tmp_path / "x.pt")
    torch.load(path, weights_only=False)
    assert canary.exists()
