"""The bundle: the one contract between the offline half that writes it and the runtime that serves it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cbpt_guard.errors import BundleError, InputError, SetupError
from cbpt_guard.manifest import (
    Agreement,
    FileEntry,
    Gate,
    Graph,
    Manifest,
    ModelEntry,
    Parity,
    RuleEntry,
    Suspect,
    Variant,
    parse_manifest,
)
from cbpt_guard.onnxfile import check_self_contained

__all__ = [
    "Agreement",
    "FileEntry",
    "Gate",
    "Golden",
    "Graph",
    "Manifest",
    "ModelEntry",
    "OpenedBundle",
    "Parity",
    "RuleEntry",
    "Suspect",
    "Variant",
    "file_entry",
    "load_golden",
    "open_bundle",
    "read_signature",
    "write_manifest",
]

MANIFEST, LABELS, GOLDEN = "manifest.json", "labels.json", "golden.npz"
MODEL, PROMPTS, CARD, SBOM = "model.onnx", "prompts.safetensors", "README.md", "sbom.cdx.json"
SIGNATURE = "model.sig"  # the one file that the manifest cannot list: it signs the manifest too

GRAPH_INPUT = "image"
GRAPH_OUTPUTS = ("logits", "triggered", "logits_original", "embedding")

_GRAPH = ".onnx"
_REPLACED = (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO)  # it is not the plain file that was listed
_MAX_FILES = 64
_MAX_MANIFEST = 16 * 1024**2
_MAX_FILE = 2 * 1024**3  # an ONNX file cannot be larger
_MAX_GOLDEN = 256 * 1024**2
_MAX_SIGNATURE = 1024**2


@dataclass(frozen=True)
class Golden:
    """Inputs of the self-test, uint8 (N, S, S, 3), and what the graph answered: logits (N, C), flags (N,)."""

    images: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    logits_original: npt.NDArray[np.float32]
    triggered: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OpenedBundle:
    """A bundle whose every file was checked; `contents` holds the very bytes that were hashed."""

    manifest: Manifest
    labels: tuple[str, ...]
    contents: Mapping[str, bytes]
    digest: str


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Hash every file of `folder`, write `manifest.json` listing them, and return the bundle's digest.

    Call it last. Names with a leading dot (the lock of an unfinished output) are not part of a bundle.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    files = {name: file_entry(folder / name) for name in names if name not in (MANIFEST, SIGNATURE)}
    data = (manifest.model_copy(update={"files": files}).model_dump_json(indent=2) + "\n").encode()
    (folder / MANIFEST).write_bytes(data)
    return _digest(data)


def open_bundle(path: str | os.PathLike[str], digest: str | None = None, precision: str | None = None) -> OpenedBundle:
    """Read a bundle's files once, check each against the manifest, and hand the same bytes on.

    Args:
        path: the bundle's folder.
        digest: "sha256:..." of its manifest.json, when the caller knows which bundle it must be.
        precision: keep the graph of this variant only; the others are checked and let go.

    Raises:
        BundleError: a file is missing, unlisted, changed, a link or malformed; a graph asks for operators or
            files from elsewhere; or the digest is another.
        InputError: there is no such folder, or no such precision.
        SetupError: the folder or a file cannot be read.
    """
    if digest is not None and not (digest.startswith("sha256:") and len(digest) == 71):
        raise InputError(f"{digest!r} is no bundle digest; it reads sha256: and 64 hexadecimal digits")
    with _folder(path) as folder:
        names = _plain_files(folder)
        if MANIFEST not in names:
            raise BundleError(f"{path} is no bundle: it has no {MANIFEST}")
        data = _read(folder, MANIFEST, _MAX_MANIFEST)
        if digest is not None and digest != _digest(data):
            raise BundleError(f"{path} is another bundle: {MANIFEST} has {_digest(data)}, expected {digest}")
        manifest = parse_manifest(data)
        _check_names(names, manifest)
        if precision is not None and precision not in manifest.variants:
            raise InputError(f"{path} has no {precision!r} graph; it has {', '.join(manifest.variants)}")
        contents, graphs = {}, _graphs(manifest)
        let_go = _other_graphs(manifest, precision)
        for name, entry in manifest.files.items():
            content = _checked(folder, name, entry)
            if name in graphs:
                check_self_contained(content, name)
            if name not in let_go:
                contents[name] = content
    return OpenedBundle(manifest, _parse_labels(contents[LABELS], manifest), contents, _digest(data))


def read_signature(path: str | os.PathLike[str]) -> bytes | None:
    """The bytes of a bundle's `model.sig`, or None where it has none.

    Raises:
        BundleError: it is a link, no file, or larger than a signature can be.
        InputError: there is no such folder.
        SetupError: the folder or the file cannot be read.
    """
    with _folder(path) as folder:
        return _read(folder, SIGNATURE, _MAX_SIGNATURE) if SIGNATURE in _plain_files(folder) else None


def load_golden(data: bytes) -> Golden:
    """The self-test of a `golden.npz`, never unpickled; `BundleError` when it is malformed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > _MAX_GOLDEN:
            raise BundleError(f"{GOLDEN} unpacks to {unpacked:,} bytes; at most {_MAX_GOLDEN:,} are read")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            golden = Golden(**{name: np.asarray(arrays[name]) for name in arrays})
    except BundleError:
        raise
    except Exception as error:  # numpy and zipfile raise anything on malformed bytes
        raise BundleError(f"{GOLDEN} cannot be read: {error}") from error
    _check_golden(golden)
    return golden


def _check_golden(golden: Golden) -> None:
    kinds = {"images": np.uint8, "logits": np.float32, "logits_original": np.float32, "triggered": np.bool_}
    for name, kind in kinds.items():
        if (found := getattr(golden, name).dtype) != kind:
            raise BundleError(f"{GOLDEN}: {name} must be {kind.__name__}, not {found}")
    rows, shape = golden.triggered.size, golden.logits.shape
    if rows == 0 or len(shape) != 2 or shape != golden.logits_original.shape or golden.images.ndim != 4:
        raise BundleError(f"{GOLDEN} holds no images, or arrays of a wrong shape")
    if golden.triggered.shape != (rows,) or not rows == len(golden.images) == len(golden.logits):
        raise BundleError(f"{GOLDEN} holds arrays whose lengths do not fit each other")


@contextmanager
def _folder(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of the folder: files are opened relative to it, so that a swapped path changes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} is not a bundle's folder: {error.strerror}; `cbpt-guard export` makes one") from error
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error
    try:
        yield descriptor
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error}") from error
    finally:
        os.close(descriptor)


def _plain_files(folder: int) -> set[str]:
    names = os.listdir(folder)
    if len(names) > _MAX_FILES:
        raise BundleError(f"the folder holds {len(names)} entries; a bundle has at most {_MAX_FILES}")
    for name in names:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{name} is a link, a folder or a device; a bundle holds plain files only")
        if status.st_nlink > 1:
            raise BundleError(f"{name} is hard-linked and could change from elsewhere; copy the bundle")
    return set(names)


def _check_names(names: set[str], manifest: Manifest) -> None:
    listed, graphs = set(manifest.files), _graphs(manifest)
    needed = {LABELS, GOLDEN, *graphs, *(variant.golden for variant in manifest.variants.values())}
    for name in sorted(listed):
        if name != Path(name).name or name.startswith(".") or name in (MANIFEST, SIGNATURE):
            raise BundleError(f"{MANIFEST} lists {name!r}, which cannot be a bundle's file")
    for name in sorted(needed - listed):
        raise BundleError(f"{MANIFEST} does not list {name}, which a bundle needs")
    for name in sorted(listed - names):
        raise BundleError(f"{name} is missing")
    for name in sorted(names - listed - {MANIFEST, SIGNATURE}):
        raise BundleError(f"{name} is not listed in {MANIFEST}; remove it")
    for name in sorted(listed - graphs):
        if name.endswith(_GRAPH):
            raise BundleError(f"{name} is a graph that is no variant of the {MANIFEST}: it passed no gate")


def _graphs(manifest: Manifest) -> set[str]:
    return {variant.file for variant in manifest.variants.values()}


def _other_graphs(manifest: Manifest, precision: str | None) -> set[str]:
    if precision is None:
        return set()
    return _graphs(manifest) - {manifest.variants[precision].file, manifest.variants[precision].golden, LABELS, GOLDEN}


def _checked(folder: int, name: str, entry: FileEntry) -> bytes:
    content = _read(folder, name, min(entry.size, _MAX_FILE))
    if len(content) != entry.size or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleError(f"{name} differs from {MANIFEST}: changed or cut short; copy or export it again")
    return content


def _read(folder: int, name: str, limit: int) -> bytes:
    try:
        with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder), "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        if error.errno in _REPLACED:
            raise BundleError(f"{name} was replaced while the bundle was read: {error.strerror}") from error
        raise SetupError(f"cannot read {name}: {error.strerror}") from error
    if len(content) > limit:
        raise BundleError(f"{name} is larger than the {limit:,} bytes it may have")
    return content


def _parse_labels(data: bytes, manifest: Manifest) -> tuple[str, ...]:
    try:
        labels = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{LABELS} is no JSON: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        raise BundleError(f"{LABELS} must be a list of class names")
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise BundleError(f"{LABELS} must name two classes or more, each once")
    for suspect in manifest.rule.suspects:
        if not 0 <= suspect.index < len(labels) or labels[suspect.index] != suspect.label:
            raise BundleError(f"{LABELS} has no {suspect.label!r} at index {suspect.index}, as the rule says")
    return tuple(labels)


def file_entry(path: Path) -> FileEntry:
    """Digest and size of a file."""
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _digest(manifest: bytes) -> str:
    return "sha256:" + hashlib.sha256(manifest).hexdigest()
