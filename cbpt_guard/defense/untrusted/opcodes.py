"""What a pickle would ask for, found by walking its opcodes as CPython's unpickler does; nothing is built.

`pickletools` is stricter than the unpickler (it stops at `I0x1` or at a string with an umlaut) and knows no
stack, so that a payload can hide behind the former and plain text looks like one for lack of the latter.
"""

from __future__ import annotations

import codecs
import importlib.util
import pickletools
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from typing import BinaryIO, Final

_CODE: Final = frozenset({"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"})
_CALLS: Final = frozenset({"REDUCE", "BUILD", "NEWOBJ", "INST", "OBJ", "NEWOBJ_EX"})
_GETS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUTS: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_TEXTS: Final = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_OPCODES: Final = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_GLOBAL: Final = re.compile(r"[\w.<>-]+")
_LONGEST_TEXT: Final = 1 << 16  # no name is longer; what is longer is skipped, not held
_NEWEST_PROTOCOL: Final = 5
_LENGTHS: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


@dataclass
class Requests:
    """What the pickles of a file ask for: dotted globals, and opcodes that only code-running pickles need.

    `broken` tells that a stream ended early or is none, `ambiguous` that readers may find other streams than were
    listed; `problem` what else is wrong with the file.
    """

    globals: set[str] = field(default_factory=set)
    opcodes: set[str] = field(default_factory=set)
    broken: bool = False
    ambiguous: bool = False
    problem: str | None = None


class _BrokenError(Exception):
    """CPython's unpickler would stop here: nothing behind it is ever reached."""


Value = str | None  # a text, or anything else


def list_requests(stream: BinaryIO, found: Requests) -> bool:
    """Add what one pickle asks for; whether it went on to its STOP, where the stream is left."""
    try:
        _Walk(stream, found).run()
    except _BrokenError:
        found.broken = True
        return False
    return True


class _Walk:
    """One pickle: a stack of texts and unknown values above the newest mark, those below it, and the memo.

    `_doubtful` holds names that text asks for which may be no pickle at all: a call or a proper end vouches.
    """

    def __init__(self, stream: BinaryIO, found: Requests) -> None:
        self._stream, self._found = stream, found
        self._stack: list[Value] = []
        self._below: list[list[Value]] = []
        self._memo: dict[int, Value] = {}
        self._doubtful: set[str] = set()
        self._binary = False

    def run(self) -> None:
        """Walk to STOP; `_BrokenError` where the unpickler would give up."""
        code = _exactly(self._stream, 1)
        self._binary = code == b"\x80"  # PROTO: plain text cannot begin so
        while True:
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise _BrokenError
            argument = _argument(self._stream, opcode)
            if opcode.name == "STOP":
                self._pop(1)
                self._vouch()
                return
            self._step(opcode, argument)
            code = _exactly(self._stream, 1)

    def _step(self, opcode: pickletools.OpcodeInfo, argument: int | str | None) -> None:
        name = opcode.name
        if name == "PROTO" and isinstance(argument, int) and argument > _NEWEST_PROTOCOL:
            raise _BrokenError
        if name in _GETS:
            if argument not in self._memo:
                raise _BrokenError
            self._stack.append(self._memo[int(argument or 0)])
        elif name in _PUTS:
            (value,) = self._pop(1)
            self._memo[len(self._memo) if argument is None else int(argument)] = value
            self._stack.append(value)
        elif name == "MARK":
            self._below.append(self._stack)
            self._stack = []
        elif name == "POP" and not self._stack:
            self._to_mark()
        elif name == "DUP":
            self._stack += self._pop(1) * 2
        else:
            self._apply(opcode, argument)

    def _apply(self, opcode: pickletools.OpcodeInfo, argument: int | str | None) -> None:
        """Any opcode that takes values (perhaps all above the mark) and leaves a new one."""
        name = opcode.name
        takes = [kind.name for kind in opcode.stack_before]
        if "mark" in takes:
            above = self._to_mark()
            if name == "OBJ" and not above:
                raise _BrokenError
            takes = takes[: takes.index("mark")]
        values = self._pop(len(takes))
        if name in ("GLOBAL", "INST"):
            self._ask(*str(argument).split("\n", 1))
        elif name == "STACK_GLOBAL":
            self._ask(*values)
        if name in _CODE and (self._binary or name in _CALLS):
            self._found.opcodes.add(name)
        if name in _CALLS:
            self._vouch()
        text = argument if isinstance(argument, str) and name in _TEXTS else None
        self._stack += [text for _ in opcode.stack_after]

    def _to_mark(self) -> list[Value]:
        if not self._below:
            raise _BrokenError
        above, self._stack = self._stack, self._below.pop()
        return above

    def _pop(self, count: int) -> list[Value]:
        if len(self._stack) < count:
            raise _BrokenError
        kept = len(self._stack) - count
        taken, self._stack[kept:] = self._stack[kept:], []
        return taken

    def _ask(self, module: Value, attribute: Value) -> None:
        if module is None or attribute is None:
            self._found.opcodes.add("STACK_GLOBAL with a computed name")
            return
        module, attribute = NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute))
        name = f"{module}.{attribute}"
        if self._binary or _importable(module):
            self._found.globals.add(name)
        elif _GLOBAL.fullmatch(name):
            self._doubtful.add(name)
        else:
            raise _BrokenError  # no import gives that: it is text that looks like a pickle

    def _vouch(self) -> None:
        self._found.globals |= self._doubtful


def _importable(module: str) -> bool:
    """Whether an import of it could find anything here; nothing is imported to tell."""
    top = module.partition(".")[0]
    return top in sys.modules or (top.isidentifier() and importlib.util.find_spec(top) is not None)


def _argument(stream: BinaryIO, opcode: pickletools.OpcodeInfo) -> int | str | None:
    """An opcode's argument: a text, a number, `module\\nname`, or None where none matters."""
    if opcode.arg is None:
        return None
    try:
        if opcode.arg.n == pickletools.UP_TO_NEWLINE:
            return _from_lines(opcode.name, stream)
        if opcode.arg.n >= 0:
            return int.from_bytes(_exactly(stream, opcode.arg.n), "little")
        length = int.from_bytes(_exactly(stream, _LENGTHS[opcode.arg.n]), "little")
        data = _exactly(stream, length)
        if opcode.name not in _TEXTS or len(data) > _LONGEST_TEXT:
            return None
        return data.decode("utf-8", "surrogatepass" if "UNICODE" in opcode.name else "replace")
    except ValueError as error:
        raise _BrokenError from error


def _from_lines(name: str, stream: BinaryIO) -> int | str | None:
    line = _line(stream)
    if name in ("GLOBAL", "INST"):
        return "\n".join(part.decode("utf-8", "replace") for part in (line, _line(stream)))
    if name in ("GET", "PUT"):
        return int(line)
    if name != "PERSID" and len(line) < _LONGEST_TEXT:
        return _text(line) if name == "STRING" else _literal(name, line)
    return None


def _text(line: bytes) -> str:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise _BrokenError
    return codecs.escape_decode(line[1:-1])[0].decode("utf-8", "replace")


def _literal(name: str, line: bytes) -> str | None:
    """A text, or None for a number; `ValueError` where it is neither."""
    if name == "UNICODE":
        return line.decode("raw-unicode-escape")
    if name == "FLOAT":
        float(line)
        return None
    digits = line.removesuffix(b"L").strip() if name == "LONG" else line.strip()
    int(digits, 8 if digits[:1] == b"0" and digits.isdigit() else 0)  # C takes 007, too
    return None


def _line(stream: BinaryIO) -> bytes:
    """Up to the next newline, which must come; of a very long line only its start."""
    start = part = stream.readline(_LONGEST_TEXT)
    while part and not part.endswith(b"\n"):
        part = stream.readline(_LONGEST_TEXT)
    if not part:
        raise _BrokenError
    return start.removesuffix(b"\n")


def _exactly(stream: BinaryIO, count: int) -> bytes:
    """`count` bytes, which must be there; of many only the first."""
    start = stream.read(min(count, _LONGEST_TEXT + 1))
    left, got = count - len(start), len(start)
    while left > 0 and got:
        got = len(stream.read(min(left, _LONGEST_TEXT)))
        left -= got
    if left > 0:
        raise _BrokenError
    return start
