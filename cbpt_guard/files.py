"""Outputs that are whole or absent: work beside the target, under a lock, and rename at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cbpt_guard.errors import CheckError, InputError, SetupError, UnsafeError


def partial_path(out: Path) -> Path:
    """Where the work towards `out` happens: `.OUT.partial` beside it, never read as a result."""
    return out.parent / f".{out.name}.partial"


def check_output(out: Path, force: bool, ours: Iterable[str] = ()) -> None:
    """Refuse an output that exists (unless `force`) or that cannot be a folder's place.

    With `force` a whole folder is replaced, so it must be empty or an earlier output of the same kind, which holds the
    files that `ours` names: a mistyped `--out` must not cost a user's images.

    Raises:
        InputError: something is there already, or `out` names no new folder.
        SetupError: the folder that it would lie in cannot be written.
    """
    if out.name in ("", ".."):
        raise InputError(f"{out} is no name for a new folder; pass another `--out`")
    if _is_there(out) and not force:
        raise InputError(f"{out} exists already; pass `--force` to replace it or `--out` to write elsewhere")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a folder; move it away or pass another `--out`")
    if out.is_dir() and any(out.iterdir()) and not all((out / name).is_file() for name in ours):
        missing = next(name for name in ours if not (out / name).is_file())
        raise InputError(
            f"{out} holds no {missing}, so it is no earlier output of this command and is not replaced; move it away "
            "or pass another `--out`"
        )
    standing = next(folder for folder in out.absolute().parents if folder.exists())
    if not standing.is_dir():
        raise InputError(f"{standing} is a file, not a folder; pass another `--out`")
    if not os.access(standing, os.W_OK):
        raise SetupError(f"{standing} cannot be written; check its permissions or pass another `--out`")


def holds(out: Path, path: Path) -> bool:
    """Whether a path is `out` or lies in it, links followed; one that leads in a circle lies where it stands."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out))


@contextmanager
def staged(
    out: Path, *, force: bool = False, ours: Iterable[str] = (), resumable: bool = False, resume: bool = False
) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends without an error.

    A block that fails leaves nothing. One that is `resumable` and was interrupted, or met a full disk, leaves
    `.OUT.partial` behind: the next start empties it, or with `resume` goes on in it. A killed process leaves
    `.OUT.partial` and `.OUT.lock` in any case. An earlier `out` is only replaced at the very end; should a process be
    killed while it moves the two folders, the next start puts the earlier one back. `ours`: see `check_output`.

    Raises:
        InputError: `out` exists and `force` is off, or it is nothing that may be replaced.
        SetupError: another process works on the same output, or the disk refuses.
    """
    ours = tuple(ours)
    check_output(out, force, ours)
    partial = partial_path(out)
    with _locked(out):
        _recover(out)
        check_output(out, force, ours)  # another command may have finished since
        try:
            _prepare(partial, resume)
            yield partial
            _replace(partial, out)
        except BaseException as error:
            refused = isinstance(error, InputError | UnsafeError | CheckError)
            if not (resume if refused else resumable):
                shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            where = f" ({error.filename})" if error.filename else ""
            raise SetupError(f"writing {out} failed: {error.strerror or error}{where}") from error


@contextmanager
def in_turn(out: Path) -> Iterator[None]:
    """Wait for others that are in turn for the same output, hold `.OUT.turn` beside it.

    A killed process leaves that file behind; whoever is next in turn takes it, and takes it away.

    Raises:
        SetupError: the disk refuses.
    """
    with _locked(out, "turn", wait=True):
        yield


@contextmanager
def _locked(out: Path, suffix: str = "lock", *, wait: bool = False) -> Iterator[None]:
    """Hold `.OUT.lock` beside the output, until it is in its place."""
    path = out.parent / f".{out.name}.{suffix}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = _hold(path, wait=wait)
    except BlockingIOError as error:
        raise SetupError(f"another command is writing {out}; wait for it or pass another `--out`") from error
    except OSError as error:
        raise SetupError(f"cannot work in {out.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held, so that nobody holds another file of this name
        os.close(handle)


def _hold(path: Path, *, wait: bool) -> int:
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it between the two calls: what is locked has no name any more


def _prepare(partial: Path, resume: bool) -> None:
    if partial.is_symlink():
        partial.unlink()  # never empty what a stranger's link points to
    partial.mkdir(exist_ok=True)
    if not resume:
        for item in partial.iterdir():
            remove(item)


def _recover(out: Path) -> None:
    """Put back what a command that was killed in the middle of `_replace` had moved away."""
    old = _old(out)
    if _is_there(old) and not _is_there(out):
        old.rename(out)


def _replace(partial: Path, out: Path) -> None:
    """Move `partial` to `out`; what was there stays whole until the new one is in place, and on the disk."""
    old = _old(out)
    for path in [partial, *partial.rglob("*")]:
        if not path.is_symlink():
            _sync(path)
    if _is_there(old):
        remove(old)
    if _is_there(out):
        out.rename(old)
    partial.rename(out)
    _sync(out.parent)
    if _is_there(old):
        remove(old)


def _sync(path: Path) -> None:
    """Have a file, or a folder's names, written to the disk: after a power loss a rename alone may stand."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # some may not be read, some disks sync no folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nowhere is there, too


def remove(path: Path) -> None:
    """Remove a folder and all in it, or a file, or a link and not what it points to; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file; `what` names it in an error, such as `plan`.

    Raises:
        InputError: it cannot be read, or is no TOML.
    """
    try:
        with path.open("rb") as file:  # read as text, a lone carriage return would end a line; TOML has no such end
            return tomllib.load(file)
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, or arrays 5,000 deep
        raise InputError(f"{what} {path}: this is no TOML: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
