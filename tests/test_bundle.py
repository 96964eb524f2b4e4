"""A bundle that differs from its manifest in anything is refused, by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import assert_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from started import without_rights
from tiny import LABELS, tiny_manifest

from cbpt_guard.bundle import load_golden, open_bundle, write_manifest
from cbpt_guard.errors import BundleError, CbptGuardError, InputError

FILES = ["README.md", "golden.npz", "labels.json", "model.onnx"]


def rewrite(bundle: Path, name: str, content: bytes) -> None:
    """Change a file and list it as it now is: what an attacker without the digest can do."""
    (bundle / name).write_bytes(content)
    write_manifest(bundle, tiny_manifest())


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_written_is_handed_on(tiny_bundle: Path) -> None:
    opened = open_bundle(tiny_bundle)
    assert opened.labels == tuple(LABELS)
    assert sorted(opened.manifest.files) == sorted(opened.contents) == FILES
    assert all(opened.contents[name] == (tiny_bundle / name).read_bytes() for name in FILES)
    assert opened.digest == "sha256:" + hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    assert opened.manifest == tiny_manifest().model_copy(update={"files": opened.manifest.files})


def test_writing_twice_gives_the_same_digest(tiny_bundle: Path) -> None:
    (tiny_bundle / ".lock").touch()
    assert write_manifest(tiny_bundle, tiny_manifest()) == write_manifest(tiny_bundle, tiny_manifest())
    assert ".lock" not in json.loads((tiny_bundle / "manifest.json").read_text())["files"]


def test_a_digest_pins_the_bundle(tiny_bundle: Path) -> None:
    digest = open_bundle(tiny_bundle).digest
    assert open_bundle(tiny_bundle, digest).digest == digest
    rewrite(tiny_bundle, "README.md", b"other words\n")
    assert open_bundle(tiny_bundle).digest != digest
    with pytest.raises(BundleError, match="is another bundle"):
        open_bundle(tiny_bundle, digest)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        open_bundle(tiny_bundle, digest.removeprefix("sha256:"))


def test_only_the_chosen_graph_is_kept_but_all_are_checked(tiny_bundle: Path) -> None:
    shutil.copy(tiny_bundle / "model.onnx", tiny_bundle / "model.fp16.onnx")
    manifest = tiny_manifest()
    half = manifest.variants["fp32"].model_copy(update={"file": "model.fp16.onnx"})
    write_manifest(tiny_bundle, manifest.model_copy(update={"variants": manifest.variants | {"fp16": half}}))
    assert "model.fp16.onnx" in open_bundle(tiny_bundle).contents
    assert "model.fp16.onnx" not in open_bundle(tiny_bundle, precision="fp32").contents
    with pytest.raises(InputError, match="no 'int8' graph; it has fp32, fp16"):
        open_bundle(tiny_bundle, precision="int8")
    (tiny_bundle / "model.fp16.onnx").write_bytes(b"half")
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx differs"):
        open_bundle(tiny_bundle, precision="fp32")


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(max_examples=80, deadline=None)
def test_any_changed_byte_is_refused(
    pristine_bundle: Path, tmp_path_factory: Any, name: str, at: float, flip: int
) -> None:
    folder = Path(shutil.copytree(pristine_bundle, tmp_path_factory.mktemp("flip") / "bundle"))
    content = bytearray((folder / name).read_bytes())
    content[int(at * len(content))] ^= flip
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        open_bundle(folder)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_of_the_manifest_changes_the_digest(tiny_bundle: Path, at: float, flip: int) -> None:
    """And raises nothing but our own errors, with the digest or without."""
    path = tiny_bundle / "manifest.json"
    original = path.read_bytes()
    digest = "sha256:" + hashlib.sha256(original).hexdigest()
    content = bytearray(original)
    content[int(at * len(content))] ^= flip
    path.write_bytes(content)
    try:
        with pytest.raises(BundleError, match="is another bundle"):
            open_bundle(tiny_bundle, digest)
        with suppress(CbptGuardError):
            assert open_bundle(tiny_bundle).digest != digest
    finally:
        path.write_bytes(original)


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).rename(bundle.parent / "elsewhere")
        make(bundle)

    return change


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "is no bundle"),
    "missing": (lambda b: (b / "model.onnx").unlink(), r"model\.onnx is missing"),
    "unlisted": (lambda b: (b / "extra.bin").write_bytes(b"x"), r"extra\.bin is not listed"),
    "unlisted, hidden": (lambda b: (b / ".extra").touch(), r"\.extra is not listed"),
    "cut short": (lambda b: os.truncate(b / "model.onnx", 100), r"model\.onnx differs"),
    "grown": (lambda b: os.truncate(b / "model.onnx", 2**34), r"model\.onnx is larger than"),
    "symlink": (
        replace("model.onnx", lambda b: (b / "model.onnx").symlink_to(b.parent / "elsewhere")),
        r"model\.onnx is a link",
    ),
    "hard link": (lambda b: os.link(b / "model.onnx", b.parent / "other"), r"model\.onnx is hard-linked"),
    "symlinked manifest": (
        replace("manifest.json", lambda b: (b / "manifest.json").symlink_to(b.parent / "elsewhere")),
        r"manifest\.json is a link",
    ),
    "linked signature": (lambda b: (b / "model.sig").symlink_to(b / "README.md"), r"model\.sig is a link"),
    "sub-folder": (lambda b: (b / "more").mkdir(), "more is a link, a folder"),
    "pipe": (replace("model.onnx", lambda b: os.mkfifo(b / "model.onnx")), r"model\.onnx is a link"),
    "many files": (lambda b: [(b / str(n)).touch() for n in range(64)], "at most 64"),
    "not JSON": (lambda b: (b / "manifest.json").write_text("{"), "no JSON"),
    "not text": (lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe\xfa"), "no JSON"),
    "deep JSON": (lambda b: (b / "manifest.json").write_text("[" * 100_000), "no JSON"),
    "JSON, but a list": (lambda b: (b / "manifest.json").write_text("[]"), "format None"),
    "newer format": (
        lambda b: edit_manifest(b, lambda m: m.update(format=2)),
        "is format 2; this version of .* reads 1",
    ),
    "unknown field": (
        lambda b: edit_manifest(b, lambda m: m.update(colour="red")),
        "malformed in 1 places: colour",
    ),
    "no graph": (lambda b: edit_manifest(b, lambda m: m.update(variants={})), "variants: "),
    "missing field": (lambda b: edit_manifest(b, lambda m: m.pop("variants")), "variants: Field required"),
    "no tolerance": (
        lambda b: edit_manifest(b, lambda m: m.update(golden_tolerance=float("nan"))),
        "golden_tolerance",
    ),
    "negative size": (
        lambda b: edit_manifest(b, lambda m: m["files"]["model.onnx"].update(size=-5)),
        "greater than or equal",
    ),
    "path out of the folder": (
        lambda b: edit_manifest(b, lambda m: m["files"].update({"../elsewhere": m["files"]["model.onnx"]})),
        r"lists '\.\./elsewhere'",
    ),
    "path into a sub-folder": (
        lambda b: edit_manifest(b, lambda m: m["files"].update({"more/file": m["files"]["model.onnx"]})),
        "lists 'more/file'",
    ),
    "lists itself": (
        lambda b: edit_manifest(b, lambda m: m["files"].update({"manifest.json": m["files"]["model.onnx"]})),
        r"lists 'manifest\.json'",
    ),
    "does not list its graph": (
        lambda b: edit_manifest(b, lambda m: m["files"].pop("model.onnx")),
        "does not list model",
    ),
    "does not list its golden": (
        lambda b: edit_manifest(b, lambda m: m["files"].pop("golden.npz")),
        "does not list golden",
    ),
    "labels, no JSON": (lambda b: rewrite(b, "labels.json", b"red"), r"labels\.json is no JSON"),
    "labels, no list": (lambda b: rewrite(b, "labels.json", b'{"red": 0}'), "list of class names"),
    "labels, a number": (lambda b: rewrite(b, "labels.json", b'["red", 2]'), "list of class names"),
    "labels, one": (lambda b: rewrite(b, "labels.json", b'["red"]'), "two classes or more"),
    "labels, twice": (lambda b: rewrite(b, "labels.json", b'["red", "green", "red"]'), "each once"),
    "labels, another order": (
        lambda b: rewrite(b, "labels.json", b'["green", "red"]'),
        "no 'red' at index 0",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refused_by_name(name: str, tiny_bundle: Path) -> None:
    change, message = CHANGES[name]
    open_bundle(tiny_bundle)
    change(tiny_bundle)
    with pytest.raises(BundleError, match=message):
        open_bundle(tiny_bundle)


def test_the_folder_itself(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(tiny_bundle)
    assert open_bundle(tmp_path / "current").labels == tuple(LABELS)
    (tiny_bundle / "model.sig").write_bytes(b"a signature is not listed, and allowed")
    assert "model.sig" not in open_bundle(tiny_bundle).contents
    for path in (tmp_path / "nowhere", tiny_bundle / "labels.json"):
        with pytest.raises(InputError, match="is not a bundle's folder"):
            open_bundle(path)


def test_no_permission(tiny_bundle: Path, tmp_path: Path) -> None:
    (tiny_bundle / "model.onnx").chmod(0)
    assert_refused(without_rights("verify", tiny_bundle, cwd=tmp_path), "model.onnx", "Permission denied")


def test_a_swapped_folder_changes_nothing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is opened once, so moving it between two reads cannot mix two bundles."""
    real_open = os.open

    def moving_open(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == "manifest.json":
            tiny_bundle.rename(tiny_bundle.with_name("moved"))
            tiny_bundle.mkdir()
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", moving_open)
    assert open_bundle(tiny_bundle).labels == tuple(LABELS)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


GOOD = {
    "images": np.zeros((2, 4, 4, 3), np.uint8),
    "logits": np.zeros((2, 5), np.float32),
    "logits_original": np.zeros((2, 5), np.float32),
    "triggered": np.zeros(2, bool),
}


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def pickled_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in GOOD:
            archive.writestr(f"{name}.npy", pickle.dumps(Payload()))
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    archive = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("images.npy", "w") as file:
        for _ in range(257):
            file.write(bytes(1024**2))
    return buffer.getvalue()


BAD_GOLDEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "not a zip": (lambda: b"golden", "cannot be read"),
    "pickle": (lambda: pickle.dumps(Payload()), "cannot be read"),
    "pickles in a zip": (pickled_archive, "images must be uint8"),
    "object array": (lambda: npz(**GOOD | {"images": np.array([Payload()], object)}), "cannot be read"),
    "missing array": (lambda: npz(images=GOOD["images"]), "cannot be read"),
    "unknown array": (lambda: npz(**GOOD, more=np.zeros(1)), "cannot be read"),
    "unpacks to more than is read": (zip_bomb, "unpacks to"),
    "float images": (lambda: npz(**GOOD | {"images": np.zeros((2, 4, 4, 3))}), "images must be uint8"),
    "double logits": (lambda: npz(**GOOD | {"logits": np.zeros((2, 5))}), "logits must be float32"),
    "flat logits": (lambda: npz(**GOOD | {"logits": np.zeros(10, np.float32)}), "wrong shape"),
    "other classes": (lambda: npz(**GOOD | {"logits": np.zeros((2, 4), np.float32)}), "wrong shape"),
    "empty": (lambda: npz(**{name: array[:0] for name, array in GOOD.items()}), "no images"),
    "other lengths": (lambda: npz(**GOOD | {"triggered": np.zeros(3, bool)}), "lengths"),
    "flag column": (lambda: npz(**GOOD | {"triggered": np.zeros((2, 1), bool)}), "lengths"),
    "scalars": (lambda: npz(**{name: array.flat[0] for name, array in GOOD.items()}), "wrong shape"),
}


@pytest.mark.parametrize("name", BAD_GOLDEN)
def test_malformed_golden_files_are_refused_and_never_unpickled(name: str) -> None:
    make, message = BAD_GOLDEN[name]
    with pytest.raises(BundleError, match=message):
        load_golden(make())


def test_golden_arrays_are_read(tiny_bundle: Path) -> None:
    golden = load_golden(open_bundle(tiny_bundle).contents["golden.npz"])
    assert golden.logits.shape == (4, len(LABELS))
    assert golden.triggered.tolist() == [True, False, False, False]
