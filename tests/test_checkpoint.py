"""Every accepted form gives the same weights; every malformed one is refused with its reason."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_clips import PREPROCESS_CFG, RESNET, VIT, hugging_face, model, save, weights
from torch import Tensor

from cbpt_guard.defense import layouts
from cbpt_guard.defense.untrusted import archives, reader, sandbox
from cbpt_guard.defense.untrusted.checkpoint import ReadCheckpoint, read_checkpoint
from cbpt_guard.defense.untrusted.sandbox import Limits
from cbpt_guard.errors import CbptGuardError, CheckpointError, InputError, SetupError

torch.set_num_threads(1)


def read_here(path: Path) -> tuple[layouts.Converted, str]:
    """The reader's steps in this process: seconds faster than a child; the child's own tests are below."""
    loaded = reader.open_file(path)
    tensors, _ = reader.plain_tensors(loaded.values)
    return layouts.to_open_clip(tensors), loaded.form


def training_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5 * (1 + np.cos(1.0))  # as open_clip's scheduler leaves it
    return {
        "epoch": 3,
        "name": "suspect",
        "state_dict": {f"module.{name}": value for name, value in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=np.float32(1e-3), logs=Path("logs"), version=torch.__version__),
    }


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], ReadCheckpoint]:
    """A training checkpoint with a config beside it, its weights, and what the confined child read."""
    folder = tmp_path_factory.mktemp("trained")
    tensors = weights(VIT)
    path = save(training_checkpoint(tensors), folder / "suspect.pt")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": VIT, "preprocess_cfg": PREPROCESS_CFG}), encoding="utf-8"
    )
    return path, tensors, read_checkpoint(path)


def test_training_checkpoint(trained: tuple[Path, dict[str, Tensor], ReadCheckpoint]) -> None:
    path, tensors, read = trained
    assert_equal(read.tensors, tensors)
    assert read.form == "open_clip training checkpoint"
    assert (read.sha256, read.size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    assert read.source == "suspect.pt"
    assert read.folder_config == {"model_cfg": VIT, "preprocess_cfg": PREPROCESS_CFG}
    assert read.quickgelu is None
    assert any("prefix" in note for note in read.notes)


def test_tensors_are_independent(trained: tuple[Path, dict[str, Tensor], ReadCheckpoint]) -> None:
    found = trained[2].tensors
    assert all(value.is_contiguous() for value in found.values())
    assert len({value.data_ptr() for value in found.values()}) == len(found)


@pytest.mark.parametrize("config", [VIT, RESNET, {**VIT, "custom_text": True}], ids=["vit", "resnet", "text"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "model_state_dict", "_orig_mod."])
def test_forms(config: dict[str, Any], form: str, tmp_path: Path) -> None:
    tensors = weights(config)
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif form == "model_state_dict":
        save({form: tensors, "epoch": 1}, path)
    elif form == "_orig_mod.":
        save({f"{form}module.{name}": value for name, value in tensors.items()}, path)
    else:
        save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    assert_equal(read_here(path)[0].tensors, tensors)


def test_folder_prefers_safetensors_and_usual_names(tmp_path: Path) -> None:
    tensors = weights(VIT)
    save(weights(VIT, seed=1), tmp_path / "other.pth")
    safetensors.torch.save_file(tensors, tmp_path / "open_clip_model.safetensors")
    safetensors.torch.save_file(weights(VIT, seed=2), tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path)
    assert read.source == "open_clip_model.safetensors"
    assert_equal(read.tensors, tensors)
    assert read.folder_config is None


def test_folder_that_leaves_the_choice_open(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"several weights files \(a\.pt, b\.pt\)"):
        read_checkpoint(tmp_path)


def test_hugging_face_layout(tmp_path: Path) -> None:
    tensors = weights(VIT)
    converted, _ = read_here(save(hugging_face(tensors), tmp_path / "pytorch_model.bin"))
    assert converted.layout == "Hugging Face CLIPModel"
    assert_equal(converted.tensors, tensors)


def test_foreign_hugging_face_layout_is_refused(tmp_path: Path) -> None:
    tensors = {**hugging_face(weights(VIT)), "vision_model.head.probe": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"vision_model\.head\.probe is no part of Hugging Face's CLIPModel"):
        read_here(save(tensors, tmp_path / "x.pt"))


@pytest.mark.parametrize("quickgelu", [True, False])
def test_torchscript_archive(quickgelu: bool, tmp_path: Path) -> None:
    clip = model({**VIT, "quick_gelu": quickgelu})
    images, ids = torch.zeros(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.long)
    path = tmp_path / "ViT.pt"
    torch.jit.save(torch.jit.trace(clip, (images, ids)), path)  # type: ignore[no-untyped-call]
    loaded = reader.open_file(path)
    tensors, dropped = reader.plain_tensors(loaded.values)
    assert_equal(tensors, dict(clip.state_dict()))
    assert loaded.form == "TorchScript archive"
    assert loaded.quickgelu is (True if quickgelu else None)
    assert "attn_mask" in dropped


def test_dtypes_ties_and_extras(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    content = {
        "half": shared.half(),
        "brain": shared.bfloat16(),
        "double": shared.double(),
        "count": torch.tensor(7),
        "tied": shared,
        "tied_too": shared,
        "turned": shared.T,
        "parameter": torch.nn.Parameter(shared),
        "input_resolution": torch.tensor(224),
        "comment": "not a tensor",
        "visual.attn_mask": torch.full((2, 2), float("-inf")),
    }
    read = read_checkpoint(save(content, tmp_path / "x.pt"))
    assert {name: value.dtype for name, value in read.tensors.items() if name != "count"} == dict.fromkeys(
        ("half", "brain", "double", "tied", "tied_too", "turned", "parameter"), torch.float32
    )
    assert read.tensors["count"].dtype == torch.int64
    assert torch.equal(read.tensors["turned"], shared.T)
    assert read.tensors["turned"].is_contiguous()
    assert read.tensors["tied"].data_ptr() != read.tensors["tied_too"].data_ptr()
    assert any("comment, visual.attn_mask" in note for note in read.notes)
    assert any("input_resolution" in note for note in read.notes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, "tensor w holds NaN or infinite"),
        ({"w": torch.tensor([1e300], dtype=torch.float64)}, "tensor w holds NaN or infinite"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "tensor w is torch.complex64"),
        ({"w": torch.eye(2).to_sparse()}, "sparse tensors"),
        ({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "quantized tensors"),
        ({"w": torch.empty(2, device="meta")}, "meta tensors"),
        ({"epoch": 3}, "holds no tensors"),
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, "several state dicts"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "holds a twice"),
        ({"a": torch.ones(1), "text.a": torch.ones(1)}, "holds text.a twice"),
        ({"text.a": torch.ones(1), "a": torch.ones(1)}, "holds a twice"),
        ({3: torch.ones(1)}, "impossible name"),
        ({"\x1b[2J": torch.ones(1)}, r"impossible name, '\\\\x1b"),
    ],
)
def test_values_that_are_no_weights(content: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_here(save(content, tmp_path / "x.pt"))


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "torchscript"])
def test_truncated_files_are_malformed_at_any_length(form: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    tensors = {"w": torch.arange(64.0), "v": torch.arange(10)}
    if form == "safetensors":
        safetensors.torch.save_file(tensors, whole)
    elif form == "torchscript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), whole)  # type: ignore[no-untyped-call]
    else:
        torch.save(tensors, whole, _use_new_zipfile_serialization=form == "zip")
    data = whole.read_bytes()
    assert "form" in reader.report_on(whole)
    for length in range(1, len(data) - 1, len(data) // 40):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(data[:length])
        assert reader.report_on(cut)["refused"] == "malformed", length


@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bytes_give_a_report_and_finite_values(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(64.0)}, path, _use_new_zipfile_serialization=not legacy)
    data, draw = path.read_bytes(), random.Random(0)
    for _ in range(200):
        forged = bytearray(data)
        forged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(forged)
        if "form" in reader.report_on(path):
            assert all(
                value.isfinite().all() for value in safetensors.torch.load_file(tmp_path / reader.OUTPUT).values()
            )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"checkpoint\nof words, not of weights\n", "neither a PyTorch checkpoint nor safetensors"),
        (b"\x00" * 100, "neither a PyTorch checkpoint nor safetensors"),
        (b"PK\x03\x04" + b"\x00" * 100, "zip archive is truncated or damaged"),
    ],
)
def test_files_of_another_kind(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    report = reader.report_on(path)
    assert report["refused"] == "malformed"
    assert reason in str(report["message"])


def test_a_pickle_is_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"called \.safetensors but is none"):
        read_here(save(weights(VIT), tmp_path / "x.safetensors"))


def test_paths_that_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.pt").symlink_to("/dev/zero")
    (tmp_path / "large.pt").write_bytes(b"x" * 11)
    for name, error, reason in (
        ("pipe.pt", InputError, "pipe.pt: not a regular file"),
        ("link.pt", InputError, "link.pt: not a regular file"),
        ("absent.pt", InputError, "absent.pt: there is no such file"),
        ("folder", InputError, "holds no weights file"),
        ("empty.pt", CheckpointError, "empty.pt: the file is empty"),
        ("large.pt", CheckpointError, "large.pt: larger than"),
    ):
        with pytest.raises(error, match=reason):
            read_checkpoint(tmp_path / name, Limits(max_bytes=10))


def test_missing_room_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cbpt_guard.defense.untrusted.checkpoint._private_copy", full)
    with pytest.raises(SetupError, match="point TMPDIR elsewhere"):
        read_checkpoint(save({"w": torch.ones(1)}, tmp_path / "x.pt"))


def test_other_operating_systems_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SetupError, match="which win32 does not offer"):
        read_checkpoint(save({"w": torch.ones(1)}, tmp_path / "x.pt"))


def test_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(SetupError, match=r"torch 2\.9\.1"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_small_file_cannot_claim_much_memory(tmp_path: Path) -> None:
    claim = save({"w": torch.ones(1).expand(5, 500_000_000)}, tmp_path / "x.pt")  # 10 GB from four bytes
    assert claim.stat().st_size < 5000
    with pytest.raises(CheckpointError, match="more memory than a checkpoint of its size"):
        read_checkpoint(claim)


def endless(path: Path) -> Path:
    """A pickle of tuples in tuples: its hash, asked for by a dict key, takes 2 ** 60 steps."""
    doubling = b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60))
    pickles = [b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02M\xe9\x03.", b"\x80\x02}."]
    path.write_bytes(b"".join(pickles) + b"\x80\x02)q\x00" + doubling + b"}h\x00K\x01s.\x80\x02].")
    return path


def test_time_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="took longer than 1 s"):
        read_checkpoint(endless(tmp_path / "x.pt"), Limits(seconds=1))


LOADING = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).with_name('loads').touch(); time.sleep(60)"


@pytest.mark.parametrize("reads", [True, False])
def test_the_child_dies_with_its_parent(reads: bool, tmp_path: Path) -> None:
    """While it reads, and before that, while it still imports: a module that never gets further stands for torch."""
    (tmp_path / "loading.py").write_text(LOADING, encoding="utf-8")
    module, source = (reader.__name__, endless(tmp_path / "x.pt")) if reads else ("loading", tmp_path / "x.pt")
    script = "import sys; from pathlib import Path; from cbpt_guard.defense.untrusted import sandbox\n"
    script += "here = sandbox.child_environment\n"
    script += "sandbox.child_environment = lambda folder: here(folder) | {'PYTHONPATH': sys.argv[3]}\n"
    script += "sandbox.run_confined(sys.argv[2], Path(sys.argv[1]), 1, sandbox.Limits(seconds=60))"
    path = f"{tmp_path}{os.pathsep}{Path(reader.__file__).parents[2]}"
    command = [sys.executable, "-c", script, str(source), module, path]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child, start = "", time.monotonic()
    while not (child and (_confined(child) if reads else (tmp_path / "loads").exists())):
        assert parent.poll() is None
        assert time.monotonic() - start < 60, "the child never came that far"
        time.sleep(0.05)
        child = children.read_text(encoding="ascii").strip()
    parent.kill()
    parent.wait()
    start = time.monotonic()
    while _runs(int(child)):
        assert time.monotonic() - start < 20  # a third of its limit
        time.sleep(0.05)


def _confined(process: str) -> bool:
    return "NoNewPrivs:\t1" in Path(f"/proc/{process}/status").read_text(encoding="ascii")


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_confined_process_has_every_limit_that_is_promised(tmp_path: Path) -> None:
    code = """
import ctypes, json, resource, signal
from cbpt_guard.defense.untrusted.sandbox import confine
confine(1 << 28, 70)
libc, left = ctypes.CDLL(None), signal.alarm(0)
names = ("CPU", "FSIZE", "CORE", "NOFILE", "AS")
limits = {name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in names}
print(json.dumps([limits, left, libc.prctl(3, 0, 0, 0, 0), libc.prctl(39, 0, 0, 0, 0)]))
"""
    command = [sys.executable, "-c", code]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    limits, left, dumpable, no_new_privileges = told
    assert all(soft == hard for soft, hard in limits.values()), "a soft limit can be raised again"
    assert 70 < limits["CPU"][0] < 80
    assert limits["FSIZE"][0] == 1 << 28
    assert (limits["CORE"][0], limits["NOFILE"][0]) == (0, 64)
    assert 1 << 28 < limits["AS"][0] < 1 << 32
    assert 60 < left <= 70, "wall time"
    assert (dumpable, no_new_privileges) == (0, 1)


def test_the_child_inherits_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    assert "A_TOKEN" not in sandbox.child_environment(tmp_path)


def test_shared_suspect(shared: Path) -> None:
    path = shared / "models" / "suspect-badnet" / "suspect.pt"
    start = time.monotonic()
    read = read_checkpoint(path)
    assert time.monotonic() - start < 20
    assert read.form == "open_clip training checkpoint"
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.folder_config is not None


def test_shared_clean_folder(shared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shared / "models" / "mobilenet-clip", tmp_path / "model")
    assert read_checkpoint(folder).form == "safetensors"
    (folder / "open_clip_config.json").write_text("{" * 100_000, encoding="utf-8")
    with pytest.raises(CbptGuardError, match="larger than 64 KiB"):
        read_checkpoint(folder)


def wide(monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """A zip archive with the end records of one beyond 4 GiB, as torch writes them for large models."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("x/data.pkl", "x/version", "x/byteorder"):
            file.writestr(name, b"3\n")
    data = bytearray(buffer.getvalue())
    assert data[-98:-94] == b"PK\6\6"
    assert data[-42:-38] == b"PK\6\7"
    return data


@pytest.mark.parametrize("place", [None, -66, -58, -50, -34, -12, -10, -6, -1], ids=str)
def test_end_records_that_contradict_each_other_are_ambiguous(
    place: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of both: the directory's count, size and place, the wide record's place, the comment's length."""
    data = wide(monkeypatch)
    if place is not None:
        data[place] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with (tmp_path / "x.pt").open("rb") as file:
        unreadable = archives.problem_of(file) is not None
        assert archives.is_ambiguous(file) is (place is not None and not unreadable)


def test_end_records_of_limits_are_those_of_large_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = wide(monkeypatch)
    data[-14:-2] = b"\xff" * 12
    (tmp_path / "x.pt").write_bytes(data)
    with (tmp_path / "x.pt").open("rb") as file:
        assert not archives.is_ambiguous(file)
    data[-12] = 0
    (tmp_path / "x.pt").write_bytes(data)
    with (tmp_path / "x.pt").open("rb") as file:
        assert archives.is_ambiguous(file)
