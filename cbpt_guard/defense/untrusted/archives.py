"""Archives that may lie: every pickle that any reader could reach is found, whatever the directory claims.

Zip readers differ: torch's ignores checksums, flags and the names in local headers, and takes `DATA.PKL` for
`data.pkl`; Python's refuses such files before it shows what is in them. So each local header is visited, and
the directory only adds names.
"""

from __future__ import annotations

import io
import mmap
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

ZIP_HEAD: Final = b"PK\x03\x04"
_HEADER: Final = 30
_END: Final = 22  # bytes of the end record
_WIDE: Final = 76  # bytes of a large archive's own end record and of its locator, before that
_LIMITS: Final = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)  # what the end record states where a number does not fit
_PICKLE_HEADS: Final = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_MOST_INFLATED: Final = 1 << 26  # bytes of one entry; torch compresses none, so this is for what is refused anyway
_DEEPEST: Final = 3


class _Entry(NamedTuple):
    """One local header: its name, its method, and where its data begins."""

    name: str
    method: int
    start: int


def is_zip(file: BinaryIO) -> bool:
    """Whether torch would take it for a zip archive: by its first bytes alone."""
    file.seek(0)
    head = file.read(len(ZIP_HEAD))
    file.seek(0)
    return head == ZIP_HEAD


def problem_of(file: BinaryIO) -> str | None:
    """What is wrong with a zip archive's directory, in words; torch stores its entries uncompressed."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except Exception as error:  # zipfile raises more than BadZipFile on forged fields
        return f"its zip archive is truncated or damaged ({ascii(str(error))[1:-1][:160]}); fetch it again"
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED and "/code/" not in entry.filename:  # TorchScript's source text
            return f"entry {ascii(entry.filename)[1:-1][:160]} is compressed, as torch never does; save it again"
    return None


def is_ambiguous(file: BinaryIO) -> bool:
    """Whether readers may disagree on where a zip archive's directory lies, and so on what the archive holds.

    torch goes to the place that the end record states, Python to where a directory of the stated size would end, and
    each has a way of its own to the wide record of large archives. torch's writer leaves nothing behind the end record
    and nothing between the directory and its end; whoever does otherwise hides something.
    """
    try:
        archive = zipfile.ZipFile(file)
    except Exception:  # `problem_of` says so
        return False
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _WIDE - _END))
    tail = file.read()
    end, behind = tail[-_END:], size - _END
    if not end.startswith(b"PK\5\6") or end[-2:] != bytes(2):
        return True
    stated = struct.unpack("<HII", end[10:20])
    if tail[-_END - 20 : -_END].startswith(b"PK\6\7"):
        record, (place,) = tail[: _WIDE - 20], struct.unpack("<Q", tail[-_END - 12 : -_END - 4])
        narrow, stated, behind = stated, struct.unpack("<QQQ", record[32:56]), size - _END - _WIDE
        agree = all(few in (many, limit) for few, many, limit in zip(narrow, stated, _LIMITS, strict=True))
        if not record.startswith(b"PK\6\6") or place != behind or not agree:
            return True
    count, length, start = stated
    return (count, start, start + length) != (len(archive.infolist()), archive.start_dir, behind)


def storage_sizes(path: Path) -> set[int] | None:
    """Sizes in bytes of a torch archive's storages; None where the file is no zip archive."""
    with path.open("rb") as file:
        if not is_zip(file):
            return None
        entries = zipfile.ZipFile(file).infolist()
    return {entry.file_size for entry in entries if "/data/" in entry.filename}


def zip_pickles(file: BinaryIO) -> Iterator[BinaryIO]:
    """Each stream of a zip archive that a reader may take for a pickle, also of archives inside it."""
    directory = _directory(file)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _pickles(file, data, directory, 0)


def _pickles(
    source: BinaryIO, data: mmap.mmap | bytes, directory: dict[int, str] | None, depth: int
) -> Iterator[BinaryIO]:
    """The same of `data`, which `source` reads; `directory` has names by the place of their headers."""
    position = data.find(ZIP_HEAD)
    while position >= 0:
        entry = _entry(data, position)
        names = (entry.name, "" if directory is None else directory.get(position, ""))
        named = any(name.lower().endswith(".pkl") for name in names)
        if named or (directory is None and data[entry.start : entry.start + 2] in _PICKLE_HEADS):
            source.seek(entry.start)
            yield source
        inflated = _inflate(data, entry) if entry.method or named else b""
        if named and inflated:
            yield io.BytesIO(inflated)
        if depth < _DEEPEST and inflated.startswith(ZIP_HEAD):
            yield from _pickles(io.BytesIO(inflated), inflated, None, depth + 1)
        position = data.find(ZIP_HEAD, position + len(ZIP_HEAD))


def _entry(data: mmap.mmap | bytes, position: int) -> _Entry:
    header = data[position : position + _HEADER]
    method, name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (8, 26, 28))
    start = position + _HEADER
    return _Entry(data[start : start + name].decode("latin-1"), method, start + name + extra)


def _inflate(data: mmap.mmap | bytes, entry: _Entry) -> bytes:
    """The start of what a compressed entry holds; empty where it is not compressed."""
    try:
        source = data[entry.start : entry.start + _MOST_INFLATED]
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(source, _MOST_INFLATED)
    except zlib.error:
        return b""


def _directory(file: BinaryIO) -> dict[int, str] | None:
    """The directory's names by the place of their local headers; None where it cannot be read."""
    try:
        return {entry.header_offset: entry.filename for entry in zipfile.ZipFile(file).infolist()}
    except Exception:  # zipfile raises more than BadZipFile on forged fields
        return None


def tar_names(file: BinaryIO) -> list[str]:
    """The names in a tar archive, as far as they can be read; none of any other file."""
    file.seek(0)
    names: list[str] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            names += (member.name for member in archive)
    except Exception:  # tarfile raises anything on a forged header; most files are no tar at all
        return names
    return names
