"""The corpus of checkpoints that may be hostile: what runs code when a careless reader opens it.

    python tests/hostile.py FOLDER      writes every case below FOLDER; do not open them with anything else

Each case says what is expected of it; the malformed and the harmless ones are in tests/malformed.py. A hostile one
carries a canary: it creates a file, or connects to a port, when it runs.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import pickle
import re
import runpy
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Expected = Literal["hostile", "malformed", "loads"]
TENSORS = {"w": torch.arange(6.0)}


@dataclass(frozen=True)
class Canary:
    """What shows that code ran: a file that appears, or a connection to a listening port."""

    file: Path
    port: int

    @property
    def touch(self) -> str:
        return f"touch {self.file}"

    @property
    def connect(self) -> str:
        return f"__import__('socket').create_connection(('127.0.0.1', {self.port}), 1).sendall(b'{self.file.name}')"


@dataclass(frozen=True)
class Case:
    """One file: `make` writes it at a path; `live` tells that a plain `torch.load` or `pickle.load` runs it."""

    name: str
    expected: Expected
    make: Callable[[Path, Canary], object]
    suffix: str = ".pt"
    live: bool = False


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


class Built:
    """Pickles as an object whose state is set by a call (BUILD)."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __setstate__(self, state: dict[str, str]) -> None:
        os.system(state["command"])  # noqa: S605 - the canary that must never fire


def system(canary: Canary) -> Reduced:
    return Reduced(os.system, canary.touch)


def archive(entries: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytearray:
    """A zip archive; pairs may repeat a name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            file.writestr(name, data)
    return bytearray(buffer.getvalue())


def torch_zip(data: bytes, **more: bytes) -> dict[str, bytes]:
    """The entries of a torch archive around a pickle."""
    extra = {f"x/{name}": value for name, value in more.items()}
    return {"x/data.pkl": data, "x/version": b"3\n", "x/byteorder": b"little", **extra}


def saved(content: object, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _bytes(build: Callable[[Canary], bytes | bytearray]) -> Callable[[Path, Canary], object]:
    return lambda path, canary: path.write_bytes(build(canary))


CALLS: dict[str, tuple[Callable[[Canary], Reduced], bool]] = {
    "system": (system, True),
    "eval a connection": (lambda c: Reduced(eval, c.connect), True),
    "exec a connection": (lambda c: Reduced(exec, c.connect), True),
    "open a file": (lambda c: Reduced(open, str(c.file), "w"), True),
    "Popen": (lambda c: Reduced(subprocess.Popen, ["touch", str(c.file)]), True),
    "import a module": (lambda _: Reduced(importlib.import_module, "antigravity"), False),
    "run a path": (lambda c: Reduced(runpy.run_path, str(c.file)), False),
    "getattr of a module": (lambda c: Reduced(getattr, {}, str(c.file)), False),
    "torch.hub.load": (lambda c: Reduced(torch.hub.load, str(c.file), "x"), False),
    "torch.load again": (lambda c: Reduced(torch.load, str(c.file)), False),
    "pickles in a pickle": (lambda c: Reduced(pickle.loads, pickle.dumps(system(c))), True),
    "a file is removed": (lambda c: Reduced(os.remove, str(c.file)), False),
    "a library is loaded": (lambda _: Reduced(ctypes.CDLL, "evil.so"), False),
}

# what stands for TOUCH is the canary's shell command
OPCODES: dict[str, tuple[bytes, bool]] = {
    "INST": (b"(S'TOUCH'\nios\nsystem\n.", True),
    "OBJ": (b"(cos\nsystem\nS'TOUCH'\no.", True),
    "NEWOBJ_EX": (b"\x80\x04csubprocess\nPopen\n(](U\x02shU\x02-cU\xffTOUCH255et}\x92.", False),
    "EXT1": (b"\x80\x02\x82\x01S'TOUCH'\n\x85R.", False),
    "python 2 names": (b'\x80\x02c__builtin__\neval\nS\'__import__("os").system("TOUCH")\'\n\x85R.', True),
    "STACK_GLOBAL from the memo": (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93S'TOUCH'\n\x85R.",
        True,
    ),
    "STACK_GLOBAL by DUP and POP": (b"\x80\x04\x8c\x02os2\x8c\x01x00\x8c\x06system\x93S'TOUCH'\n\x85R.", True),
    "STACK_GLOBAL with a computed name": (
        b"\x80\x04c_codecs\nencode\n\x8c\x02os\x85R\x8c\x06system\x93S'TOUCH'\n\x85R.",
        False,
    ),
    "a memo entry written twice": (
        b"\x80\x04\x8c\x03abcq\x000\x8c\x02osq\x000h\x00\x8c\x06system\x93S'TOUCH'\n\x85R.",
        True,
    ),
    "names behind a mark": (b"\x80\x04\x8c\x02os(\x8c\x01x1\x8c\x06system\x93S'TOUCH'\n\x85R.", True),
    "behind a number in hexadecimal": (b"I0x1\n0cos\nsystem\n(S'TOUCH'\ntR.", True),
    "behind a number in octal": (b"I007\n0cos\nsystem\n(S'TOUCH'\ntR.", True),
    "behind an umlaut": (b"S'\xc3\xbc'\n0cos\nsystem\n(S'TOUCH'\ntR.", False),  # torch decodes it, plain pickle not
    "behind a long string": (b"S'" + b"z" * 200_000 + b"'\n0cos\nsystem\n(S'TOUCH'\ntR.", True),
    "behind a name of any kind": (b"ctorch.ops\na b c\n0cos\nsystem\n(S'TOUCH'\ntR.", False),
    "with its end cut off": (b"\x80\x02cos\nsystem\nS'TOUCH'\n\x85R", True),
    "garbage behind the call": (b"\x80\x02cos\nsystem\nS'TOUCH'\n\x85R\xff\xff\xff", True),
    "a module that acts on import": (b"cantigravity\nfly\n.", False),
    "a brace as ninth byte": (b"S'aaaaa{'\n0cos\nsystem\n(S'TOUCH'\ntR.", True),
    "a safetensors length as its head": (
        b"T \x00\x00\x00\x00\x00\x00{" + b" " * 28 + b"0cos\nsystem\n(S'TOUCH'\ntR.",
        True,
    ),
    "a name with terminal codes": (b"\x80\x02cos\nsystem\x1b[2J\n(VTOUCH\ntR.", False),
    "the platform's own name": (b"\x80\x04N0cposix\nsystem\n(VTOUCH\ntR.", True),
}


def _opcode(template: bytes, canary: Canary) -> bytes:
    command = canary.touch.encode()
    padded = (b"exec " + command).ljust(255)
    return template.replace(b"TOUCH255", padded).replace(b"TOUCH", command)


def _first_entry(canary: Canary) -> bytearray:
    return archive(torch_zip(pickle.dumps(system(canary), protocol=2)))


def _wrong_crc(canary: Canary) -> bytes:
    data = _first_entry(canary)
    for place in (14, data.index(b"PK\x01\x02") + 16):
        data[place] ^= 0xFF
    return bytes(data)


def _encrypted_flag(canary: Canary) -> bytes:
    data = _first_entry(canary)
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def _other_local_name(canary: Canary) -> bytes:
    data = _first_entry(canary)
    data[30:40] = b"x/data.txt"
    return bytes(data)


def _two_directories(canary: Canary) -> bytes:
    """The directory that the end record points to (torch reads it) is not the one before it (Python reads it)."""
    evil, tame = _first_entry(canary), archive(torch_zip(pickle.dumps({"a": 1}, protocol=2)))
    directory, end = tame.index(b"PK\x01\x02"), tame.index(b"PK\x05\x06")
    start = evil.index(b"PK\x01\x02")
    shifted = bytes(evil[: evil.index(b"PK\x05\x06")]) + bytes(tame[:directory])
    record = bytearray(tame[end:])
    record[16:20] = struct.pack("<I", start)
    return shifted + bytes(tame[directory:end]) + bytes(record)


def _two_directories_of_one_size(canary: Canary) -> bytes:
    """Both directories know the hostile entry, by names of one length; only the one that torch reads calls it a pickle.

    The local header has a harmless name, too: walking those finds nothing either.
    """
    evil = pickle.dumps(system(canary), protocol=2)
    both = archive({"x/pad": bytes(4096), "x/version": b"3\n", "x/byteorder": b"little", "x/note.txt": evil})
    start, end = both.index(b"PK\x01\x02"), both.index(b"PK\x05\x06")
    tame = bytearray(both[start:end])
    for place in (
        found.start() for found in re.finditer(b"PK\x01\x02", both[start:end])
    ):  # Python adds what the second directory lies too late
        offset = int.from_bytes(tame[place + 42 : place + 46], "little") - len(tame)
        tame[place + 42 : place + 46] = (offset % 2**32).to_bytes(4, "little")
    torchs = both[start:end].replace(b"x/note.txt", b"x/data.pkl")
    return bytes(both[:start] + torchs + tame + both[end:])


def _tar(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(system(canary), protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


FORMS: dict[str, tuple[Callable[[Canary], bytes | bytearray], bool]] = {
    "zip: DATA.PKL": (
        lambda c: archive({"x/DATA.PKL": pickle.dumps(system(c), protocol=2), "x/version": b"3\n"}),
        True,
    ),
    "zip: wrong checksum": (_wrong_crc, True),
    "zip: encryption flag": (_encrypted_flag, False),
    "zip: another name in the local header": (_other_local_name, True),
    "zip: compressed": (lambda c: archive(torch_zip(pickle.dumps(system(c), protocol=2)), zipfile.ZIP_DEFLATED), True),
    "zip: two directories": (_two_directories, True),
    "zip: two directories of one size": (_two_directories_of_one_size, True),
    "zip: a comment": (lambda c: _first_entry(c)[:-2] + b"\2\0hi", True),
    "zip: data.pkl twice, the second hostile": (
        lambda c: archive([*torch_zip(b"\x80\x02}.").items(), ("x/data.pkl", pickle.dumps(system(c), protocol=2))]),
        False,
    ),
    "zip: data.pkl twice, the first hostile": (
        lambda c: archive([*torch_zip(pickle.dumps(system(c), protocol=2)).items(), ("x/data.pkl", b"\x80\x02}.")]),
        False,
    ),
    "zip: an archive inside": (lambda c: archive(torch_zip(b"\x80\x02}.", inner=saved({"x": system(c)}))), False),
    "zip: an archive inside, compressed": (
        lambda c: archive(torch_zip(b"\x80\x02}.", inner=saved({"x": system(c)})), zipfile.ZIP_DEFLATED),
        False,
    ),
    "zip: without a directory": (lambda c: _first_entry(c)[: _first_entry(c).index(b"PK\x01\x02")], False),
    "zip: path traversal": (lambda c: archive({"../../x/data.pkl": pickle.dumps(system(c), protocol=2)}), False),
    "zip: behind a pickle": (lambda c: pickle.dumps(system(c), protocol=2) + archive(torch_zip(b"\x80\x02}.")), True),
    "zip: hostile, behind a tame pickle": (lambda c: b"\x80\x02}." + _first_entry(c), False),
    "legacy: the fourth pickle": (
        lambda c: saved({"w": torch.ones(1), "x": system(c)}, _use_new_zipfile_serialization=False),
        True,
    ),
    "legacy: the last pickle": (
        lambda c: b"".join(
            pickle.dumps(part, protocol=2)
            for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001}, {}, system(c))
        ),
        True,
    ),
    "legacy: tar": (_tar, True),
    "TorchScript: data.pkl": (
        lambda c: archive(
            torch_zip(pickle.dumps(system(c), protocol=2), **{"constants.pkl": b"\x80\x02).", "code/__torch__.py": b""})
        ),
        False,
    ),
    "TorchScript: constants.pkl": (
        lambda c: archive(torch_zip(b"\x80\x02}.", **{"constants.pkl": pickle.dumps(system(c), protocol=2)})),
        False,
    ),
    "a whole module": (lambda _: saved(torch.nn.Linear(2, 2)), False),
    "a persistent id that calls": (
        lambda c: archive(torch_zip(b"\x80\x02cos\nsystem\nS'" + c.touch.encode() + b"'\n\x85RQ.")),
        True,
    ),
    "BUILD": (lambda c: saved({**TENSORS, "x": Built(c.touch)}), True),
    "hidden among the weights": (lambda c: saved({"state_dict": TENSORS, "args": {"deep": [system(c)]}}), True),
    "an argument of a harmless class": (
        lambda c: b"\x80\x02cargparse\nNamespace\ncos\nsystem\nS'" + c.touch.encode() + b"'\n\x85R\x85R.",
        True,
    ),
}


def hostile_cases() -> Iterator[Case]:
    """Everything that must be refused as unsafe (exit code 3)."""
    for protocol in range(6):
        make = _bytes(lambda c, protocol=protocol: pickle.dumps(system(c), protocol=protocol))  # type: ignore[misc]
        yield Case(f"pickle of protocol {protocol}", "hostile", make, live=True)
    for name, (build, live) in CALLS.items():
        content = _bytes(lambda c, build=build: saved({**TENSORS, "x": build(c)}))  # type: ignore[misc]
        yield Case(f"torch.save: {name}", "hostile", content, live=live)
    for name, (template, live) in OPCODES.items():
        bare = _bytes(lambda c, template=template: _opcode(template, c))  # type: ignore[misc]
        yield Case(f"opcodes: {name}", "hostile", bare, live=live)
        inside = _bytes(lambda c, template=template: archive(torch_zip(_opcode(template, c))))  # type: ignore[misc]
        yield Case(f"opcodes in a zip: {name}", "hostile", inside, live=live)
    for name, (form, live) in FORMS.items():
        yield Case(name, "hostile", _bytes(form), live=live)
    yield Case(
        "a pickle called .safetensors", "hostile", _bytes(lambda c: pickle.dumps([system(c)])), ".safetensors", True
    )


def cases() -> list[Case]:
    """The whole corpus."""
    from malformed import other_cases

    return [*hostile_cases(), *other_cases()]


def write_corpus(folder: Path, port: int) -> list[tuple[Case, Path, Canary]]:
    """Write every case into `folder`/files; canaries would appear in `folder`/canaries."""
    (folder / "files").mkdir(parents=True)
    (folder / "canaries").mkdir()
    written = []
    for number, case in enumerate(cases()):
        canary = Canary(folder / "canaries" / f"canary-{number}", port)
        path = folder / "files" / f"{number:03d}{case.suffix}"
        case.make(path, canary)
        written.append((case, path, canary))
    return written


if __name__ == "__main__":
    for case, path, _ in write_corpus(Path(sys.argv[1]), port=9):
        print(f"{path}\t{case.expected}\t{case.name}")
