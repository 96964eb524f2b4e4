"""No altered byte is served: whatever is done to a bundle, `load` and `verify` refuse it and name the file."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from figures import Figures
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

import cbpt_guard.bundle
from cbpt_guard import GuardedClassifier
from cbpt_guard.bundle import open_bundle, write_manifest
from cbpt_guard.errors import BundleError, CbptGuardError
from cbpt_guard.export import verify
from cbpt_guard.manifest import parse_manifest
from cbpt_guard.onnxfile import check_self_contained

pytestmark = pytest.mark.trust

Amount = Callable[[int, int], int]
Change = Callable[[onnx.ModelProto], object]
SEED = 20261124


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that `export` really wrote."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def count(figures: Figures) -> Callable[[str], None]:
    """One more of something that was tried and refused."""

    def add(name: str) -> None:
        figures.add("bundle", name, int(figures.figures.get("bundle", {}).get(name, 0)) + 1)

    return add


def names_of(bundle: Path) -> list[str]:
    return sorted(path.name for path in bundle.iterdir())


def assert_refused(bundle: Path, *names: str, **pinned: Any) -> None:
    """Both readers refuse the bundle, in the same words, and name the file (or one of those that were mixed up)."""
    said = []
    for read in (GuardedClassifier.load, verify):
        with pytest.raises(BundleError) as caught:
            read(bundle, **pinned)
        said.append(str(caught.value))
    assert said[0] == said[1]
    subject = re.sub(r"(in|from) manifest\.json", "", said[0])  # which a message may mention beside the file it means
    assert any(name in subject for name in names), said[0]


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    original = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(original)


def relist(bundle: Path) -> None:
    """Hash everything again, as an attacker would whom no digest and no signature stops."""
    write_manifest(bundle, parse_manifest((bundle / "manifest.json").read_bytes()))


# Bytes


def test_every_changed_byte_is_refused(bundle: Path, amount: Amount, count: Callable[[str], None]) -> None:
    """Every file, at seeded places; the manifest against the digest, for nothing else can vouch for it."""
    generator, digest = np.random.default_rng(SEED), open_bundle(bundle).digest
    assert len(names_of(bundle)) == 7
    for name in names_of(bundle):
        content = (bundle / name).read_bytes()
        for place in generator.choice(len(content), min(amount(8, 50), len(content)), replace=False):
            other = bytes([content[place] ^ int(generator.integers(1, 256))])
            with changed(bundle / name, content[:place] + other + content[place + 1 :]):
                assert_refused(bundle, name, digest=digest)
                if name != "manifest.json":
                    assert_refused(bundle, name)
            count("single-byte changes, each refused by load and by verify")
    GuardedClassifier.load(bundle, digest=digest)


def test_a_rewritten_manifest_is_refused_by_the_digest_alone(bundle: Path, count: Callable[[str], None]) -> None:
    """Whoever hashes everything again is stopped by nothing else: the same bundle loads where no digest is pinned."""
    digest = open_bundle(bundle).digest
    (bundle / "README.md").write_text("another card")
    relist(bundle)
    assert_refused(bundle, "manifest.json", digest=digest)
    assert GuardedClassifier.load(bundle).digest != digest
    count("rewritten bundles whose hashes are right, refused by the pinned digest")


def test_files_cut_short_or_grown(bundle: Path, amount: Amount, count: Callable[[str], None]) -> None:
    generator, digest = np.random.default_rng(SEED), open_bundle(bundle).digest
    for name in names_of(bundle):
        content = (bundle / name).read_bytes()
        cuts = generator.integers(0, len(content), amount(2, 20)).tolist()
        for other in (b"", content[:-1], content + b"\0", *(content[:cut] for cut in cuts)):
            with changed(bundle / name, other):
                assert_refused(bundle, name, digest=digest)
            count("files cut short or grown")


# The folder


def test_two_files_swapped(bundle: Path, count: Callable[[str], None]) -> None:
    digest, names = open_bundle(bundle).digest, names_of(bundle)
    for one, other in ((a, b) for a in names for b in names if a < b):
        contents = (bundle / one).read_bytes(), (bundle / other).read_bytes()
        with changed(bundle / one, contents[1]), changed(bundle / other, contents[0]):
            assert_refused(bundle, one, other, digest=digest)
            assert_refused(bundle, one, other, "this bundle is format")
        count("pairs of files swapped")


def test_a_file_removed_added_or_linked(bundle: Path, tmp_path: Path, count: Callable[[str], None]) -> None:
    outside, stray = tmp_path / "outside", "model.int8.onnx"
    for name in names_of(bundle):
        path = bundle / name
        path.rename(outside)
        assert_refused(bundle, name)
        path.symlink_to(outside)
        assert_refused(bundle, name)
        path.unlink()
        os.link(outside, path)
        assert_refused(bundle, name)
        path.unlink()
        path.mkdir()
        assert_refused(bundle, name)
        path.rmdir()
        outside.rename(path)
        for _ in range(4):
            count("files removed, linked or replaced by a folder")
    for name in (stray, ".hidden", "weights.bin", "manifest.json.bak", "Model.sig"):
        (bundle / name).write_bytes((bundle / "model.onnx").read_bytes())
        assert_refused(bundle, name)
        (bundle / name).unlink()
        count("files added")
    GuardedClassifier.load(bundle)


# Graphs whose hashes are right


def edited(bundle: Path, change: Change) -> None:
    model = onnx.load(bundle / "model.onnx")
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    relist(bundle)


def foreign(model: onnx.ModelProto, *, imported: bool = True) -> None:
    """onnxruntime knows this domain by itself: it needs no import."""
    node = model.graph.node[0]
    model.graph.node.append(helper.make_node("Gelu", [node.output[0]], ["unused"], domain="com.microsoft"))
    if imported:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def foreign_in_a_branch(model: onnx.ModelProto) -> None:
    inner = [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")]
    body = helper.make_graph(inner, "body", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    node = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    outer = helper.make_graph([node], "outer", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=outer, else_branch=outer))


def outside(tensor: TensorProto, *, flag: bool = True, place: str = "../secret.bin") -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    if flag:
        tensor.data_location = TensorProto.EXTERNAL
    if place:
        tensor.external_data.add(key="location", value=place)
    return tensor


def weight() -> TensorProto:
    return numpy_helper.from_array(np.zeros(3, np.float32), "elsewhere")


def sparse() -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.arange(3), "places")
    return helper.make_sparse_tensor(outside(weight()), indices, [9])


def own_function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], body, [helper.make_opsetid("", 18)]))


GRAPHS: dict[str, Change] = {
    "a foreign operator": foreign,
    "a foreign operator that is not imported": lambda m: foreign(m, imported=False),
    "a foreign domain that is imported only": lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3)),
    "a foreign operator in a branch of a branch": foreign_in_a_branch,
    "weights in another file": lambda m: m.graph.initializer.append(outside(weight())),
    "weights in an absolute file": lambda m: m.graph.initializer.append(outside(weight(), place="/etc/passwd")),
    "weights elsewhere, said by the flag only": lambda m: m.graph.initializer.append(outside(weight(), place="")),
    "weights elsewhere, said by the place only": lambda m: m.graph.initializer.append(outside(weight(), flag=False)),
    "a constant in another file": lambda m: m.graph.node.append(
        helper.make_node("Constant", [], ["hidden"], value=outside(weight()))
    ),
    "sparse weights in another file": lambda m: m.graph.sparse_initializer.append(sparse()),
    "a sparse constant in another file": lambda m: m.graph.node.append(
        helper.make_node("Constant", [], ["hidden"], sparse_value=sparse())
    ),
    "a function of its own": own_function,
    "a training graph": lambda m: m.training_info.add(),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_asks_for_more_is_refused_though_it_is_listed(
    bundle: Path, name: str, count: Callable[[str], None]
) -> None:
    edited(bundle, GRAPHS[name])
    assert_refused(bundle, "model.onnx")
    count("hostile graphs whose hashes are right")


def test_bytes_that_are_no_onnx_file(bundle: Path, count: Callable[[str], None]) -> None:
    """Also onnxruntime's own format, which it would load from the same bytes unasked, and odd encodings."""
    content = (bundle / "model.onnx").read_bytes()
    for other in (
        *(b"", b"\x0a", b"\x08\x0a", b"\x0b\x0c", b"\x00\x01", b"\x3a\x7f", b"\xff" * 20, b"\x3a\x00\x3f"),
        content[:4] + b"ORTM" + content[8:],
        content + b"\x88\x80\x80\x80\x80\x01\x00",  # a field's number beyond 32 bits: parsers disagree on it
        content[: len(content) // 2],
    ):
        (bundle / "model.onnx").write_bytes(other)
        relist(bundle)
        assert_refused(bundle, "model.onnx")
        count("hostile graphs whose hashes are right")


def parsed(data: bytes) -> onnx.ModelProto | None:
    """onnx's own reading of the bytes, where both it and ours accept them."""
    try:
        model = onnx.load_model_from_string(data)
        check_self_contained(data, "model.onnx")
    except (DecodeError, BundleError):
        return None
    return model


def test_the_reader_of_graphs_agrees_with_onnx(exported: Path, amount: Amount, figures: Figures) -> None:
    """What ours lets pass holds no foreign domain, no function and no outer file by onnx's own parser either."""
    content = (exported / "model.onnx").read_bytes()
    generator, tries = np.random.default_rng(SEED), amount(300, 5000)
    places = [i for i in range(len(content) - 1) if content[i : i + 2] == b"\x3a\x00"]  # near nodes' empty domains
    both = 0
    for attempt in range(tries):
        near = int(generator.choice(places)) + int(generator.integers(0, 3)) if places and attempt % 3 == 0 else None
        place = int(generator.integers(len(content))) if near is None else near
        model = parsed(content[:place] + bytes([int(generator.integers(256))]) + content[place + 1 :])
        if model is None:
            continue
        both += 1
        assert not model.functions
        assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert not any(tensor.external_data or tensor.data_location for tensor in model.graph.initializer)
    assert both > tries // 4
    figures.add("bundle", "flipped graphs that our reader and onnx's were compared on", tries)


# Variants


def test_an_extra_variant(bundle: Path, count: Callable[[str], None]) -> None:
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    fp32 = manifest.variants["fp32"].model_dump(mode="json")
    listed = json.loads((bundle / "manifest.json").read_text())
    for variant, named in (
        (fp32 | {"file": "model.fp16.onnx"}, "does not list model.fp16.onnx"),
        (fp32 | {"file": "../model.onnx"}, "does not list ../model.onnx"),
        (fp32 | {"file": "README.md"}, "README.md is no ONNX file"),
        ({key: value for key, value in fp32.items() if key != "gate"}, "variants.int8.gate: Field required"),
    ):
        listed["variants"]["int8"] = variant
        (bundle / "manifest.json").write_text(json.dumps(listed))
        assert_refused(bundle, named)
        count("extra variants")
    shutil.copy(bundle / "model.onnx", bundle / "model.int8.onnx")
    write_manifest(bundle, manifest)  # listed, but no variant: it passed no gate
    assert_refused(bundle, "model.int8.onnx is a graph that is no variant")
    count("extra variants")


# What is hashed is what is served


def test_nothing_is_read_twice(bundle: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures) -> None:
    """Each file is replaced right after it was read: what was hashed is served all the same."""
    before = GuardedClassifier.load(bundle)
    image = np.random.default_rng(SEED).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    real, replaced = cbpt_guard.bundle._read, []

    def reading(folder: int, name: str, limit: int) -> bytes:
        content = real(folder, name, limit)
        (bundle / name).unlink()
        (bundle / name).write_bytes(b"another file")
        replaced.append(name)
        return content

    monkeypatch.setattr(cbpt_guard.bundle, "_read", reading)
    guard = GuardedClassifier.load(bundle, digest=before.digest)
    assert sorted(replaced) == names_of(bundle)
    assert (guard.digest, guard.manifest) == (before.digest, before.manifest)
    assert np.array_equal(guard.run(image).logits, before.run(image).logits)
    monkeypatch.undo()
    with pytest.raises(CbptGuardError):
        GuardedClassifier.load(bundle)
    figures.add("bundle", "files replaced right after they were read, without effect", len(replaced))


def test_each_file_is_opened_once(bundle: Path) -> None:
    """Seen from below, by the interpreter's own audit events; onnxruntime is given no path at all."""
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from cbpt_guard import GuardedClassifier
opened.clear()
GuardedClassifier.load(sys.argv[1])
print("\\n".join(opened))
"""
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    opened = [Path(line).name for line in done.stdout.splitlines()]
    assert {name: opened.count(name) for name in names_of(bundle)} == dict.fromkeys(names_of(bundle), 1)


def test_a_file_that_becomes_something_else_between_list_and_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, outside = cbpt_guard.bundle._read, tmp_path / "outside"
    for make in (lambda path: path.symlink_to(outside), os.mkfifo, Path.mkdir):
        path = bundle / "model.onnx"
        path.rename(outside)
        path.touch()

        def reading(folder: int, name: str, limit: int, make: Any = make, path: Path = path) -> bytes:
            if name == path.name:
                path.unlink()
                make(path)
            return real(folder, name, limit)

        with monkeypatch.context() as patch:
            patch.setattr(cbpt_guard.bundle, "_read", reading)
            with pytest.raises(BundleError, match=r"model\.onnx"):
                open_bundle(bundle)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        outside.rename(path)


def test_a_golden_file_with_an_object_array_never_unpickles(bundle: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    with np.load(bundle / "golden.npz") as file:
        arrays = dict(file)
    for name in arrays:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays | {name: np.array([Payload()], object)})
        (bundle / "golden.npz").write_bytes(buffer.getvalue())
        relist(bundle)
        assert_refused(bundle, "golden.npz")
    assert not canary.exists()
