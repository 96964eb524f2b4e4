"""Outputs that are whole or absent: work beside the target, under a lock, and rename at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cbpt_guard.errors import CheckError, InputError, SetupError, UnsafeError


def partial_path(out: Path) -> Path:
    """Where the work towards `out` happens: `.OUT.partial` beside it, never read as a result."""
    return out.parent / f".{out.name}.partial"


def check_output(out: Path, force: bool) -> None:
    """Refuse an output that exists (unless `force`) or that cannot be a folder's place.

    Raises:
        InputError: something is there already.
        SetupError: the folder that it would lie in cannot be written.
    """
    if _is_there(out) and not force:
        raise InputError(f"{out} exists already; pass `--force` to replace it or `--out` to write elsewhere")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a folder; move it away or pass another `--out`")
    standing = next(folder for folder in out.absolute().parents if folder.exists())
    if not standing.is_dir():
        raise InputError(f"{standing} is a file, not a folder; pass another `--out`")
    if not os.access(standing, os.W_OK):
        raise SetupError(f"{standing} cannot be written; check its permissions or pass another `--out`")


@contextmanager
def staged(out: Path, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends without an error.

    An interrupted block leaves `.OUT.partial` behind: the next start empties it, or with `resume` goes on
    in it. A block that refuses its input leaves nothing, unless it was resumed. An earlier `out` is only
    replaced at the very end.

    Raises:
        InputError: `out` exists and `force` is off.
        SetupError: another process works on the same output, or the disk refuses.
    """
    check_output(out, force)
    partial = partial_path(out)
    with _locked(partial):
        try:
            for item in partial.iterdir():
                if item.name != _LOCK and not resume:
                    _remove(item)
            yield partial
            _replace(partial, out)
        except (InputError, UnsafeError, CheckError):
            if not resume:
                _remove(partial)
            raise
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise SetupError(f"writing {out} failed: {error.strerror or error}{where}") from error


_LOCK = ".lock"


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SetupError(f"cannot work in {partial}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(f"another command is writing {partial}; wait for it or pass another `--out`") from error
        yield
    finally:
        os.close(handle)


def _replace(partial: Path, out: Path) -> None:
    """Move `partial` to `out`; what was there stays whole until the new one is in place."""
    (partial / _LOCK).unlink()
    if not _is_there(out):
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.old"
    if _is_there(old):
        _remove(old)
    out.rename(old)
    partial.rename(out)
    _remove(old)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nowhere is there, too


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
