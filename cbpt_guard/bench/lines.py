"""Lines of evidence: one JSON object for each attack x defence x seed, appended whole and read back."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from cbpt_guard.errors import InputError, SetupError
from cbpt_guard.problems import problems

CONTROL, OFF = "none", "off"
"""Names that stand for an attack: the triggers on the clean model, and the suspect with its triggers switched off."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shares(_Frozen):
    """Shares in [0, 1] of one (trigger, target) pair, or their mean over several; see `cbpt_guard.metrics`.

    `false_positives` is the share of *clean* images of other classes that are answered as the target: what ASR comes
    to when no trigger works.
    """

    ca: float
    asr: float
    pa: float
    max_share: float
    target_recall: float
    false_positives: float
    flag_clean: float
    flag_triggered: float


class PairShares(Shares):
    """The shares of one (trigger, target) pair of an implant that has several."""

    trigger: str
    target: str


class Key(NamedTuple):
    """What makes a line this line and no other."""

    split: str
    implant: str
    attack: str
    defense: str
    seed: int
    shots: int


class ClassRecall(_Frozen):
    """Recall of one class on clean images, in [0, 1]: with the defence, and by the zero-shot classifier."""

    name: str
    recall: float
    undefended: float


class Line(Shares):
    """One cell of the evidence.

    Attributes:
        attack: the planted attacks; `none`: their triggers on the clean model; `off`: the implant, triggers off.
        implant: the plan's name of the implant whose triggers and targets are counted.
        target: the class, or classes, that the attacker wants.
        took: whether the implant counts as an attack; None where the clean model was counted.
        split: `clean` (the images that were not drawn as shots) or `test`.
        images: how many images were counted.
        asr_worst: the highest ASR of the pairs; `asr` and the other shares are means over the pairs.
        pairs: each pair's own shares, where there are several.
        undefended: the zero-shot classifier's shares on the same images.
        verdict: what the defence says of itself.
        suspects: the recall of each class that the defence suspects, planted or not. None in lines from before it was
            kept.
        search: version of CBPT's search for targets. None in lines of rivals and in those from before it was kept.
        chosen: what it chose on held-out shots, such as a learning rate or an epoch (from 1), by name; of CBPT its
            prompts' epoch. None in lines from before it was kept.
        warnings: what it warned of, such as an undefended accuracy near chance.
        seconds: what the defence took on the clock; counting is not part of it.
        cpu_seconds: the same in processor time, which other work on the machine lengthens less.
        peak_mb: highest resident memory of the defence's own process, in MiB.
        settings: digest of what the plan says of the line and of the defence's own settings; see `Plan.settings`.
        versions: of the libraries whose arithmetic it depends on.
        machine: its class.
        suspect_sha256: of the checkpoint that was defended; the same recipe gives another on another machine. None in
            lines from before it was kept.
    """

    attack: str
    defense: str
    seed: int
    target: str
    dataset: str
    implant: str
    took: bool | None
    split: str
    shots: int
    images: int
    asr_worst: float
    pairs: tuple[PairShares, ...]
    undefended: Shares
    verdict: str | None
    seconds: float
    cpu_seconds: float
    peak_mb: int
    settings: str
    versions: dict[str, str]
    machine: str
    suspect_sha256: str | None = None
    suspects: tuple[ClassRecall, ...] | None = None
    search: int | None = None
    chosen: dict[str, float] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """What makes it this line."""
        return Key(self.split, self.implant, self.attack, self.defense, self.seed, self.shots)


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a file, none where there is no file; the last of equal keys stands, at its own place.

    A last line without its end was torn by a crash and is left out.

    Raises:
        InputError: the file cannot be read, or holds a line that is none of ours.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    lines = [_parsed(text, f"{path} line {number}") for number, text in enumerate(whole, 1)]
    last = {line.key: number for number, line in enumerate(lines)}
    return [line for number, line in enumerate(lines) if last[line.key] == number]


def read_together(paths: Iterable[Path]) -> list[Line]:
    """The lines of several files, file after file.

    Raises:
        InputError: as `read_lines` raises it, or two files hold the same cell, which would pass for two seeds.
    """
    lines: list[Line] = []
    held: dict[tuple[str, Key], Path] = {}
    for path in paths:
        found = {(line.dataset, line.key): line for line in read_lines(path)}
        for cell in (cell for cell in found if cell in held):
            raise InputError(f"{path} and {held[cell]} both hold {' '.join(map(str, cell[1]))}; pass one of them")
        lines += found.values()
        held |= dict.fromkeys(found, path)
    return lines


class Appender:
    """Appends whole lines to a file that it holds locked."""

    def __init__(self, file: RawIOBase, name: Path) -> None:
        self._file, self._name = file, name

    def __call__(self, lines: Iterable[Line]) -> None:
        """Write the lines in one piece and see them onto the disk.

        Raises:
            SetupError: the disk refuses.
        """
        rest = "".join(line.model_dump_json() + "\n" for line in lines).encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SetupError(f"writing {self._name} failed: {error.strerror}") from error


@contextmanager
def appending(path: Path) -> Iterator[Appender]:
    """Open a file of lines for appending; a torn last line is cut off first.

    Raises:
        SetupError: another command appends to it, or the disk refuses.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # without a buffer: what a full disk refused would be written once more when the file closes
            file = stack.enter_context(path.open("a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        except BlockingIOError as error:
            raise SetupError(f"another command appends to {path}; wait for it or pass another `--out`") from error
        except OSError as error:
            raise SetupError(f"writing {path} failed: {error.strerror}") from error
        yield Appender(file, path)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append an object as a line of its own to a log that several commands may write, unless it stands there already.

    A last line that a crash tore is cut off first.

    Raises:
        SetupError: the disk refuses.
    """
    text = json.dumps(record).encode()
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
            if text not in whole.splitlines():
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {error.strerror}") from error


def _parsed(text: bytes, where: str) -> Line:
    try:
        return Line.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{where} is no line of evidence: {problems(error, 'JSON', most=1)}") from error
