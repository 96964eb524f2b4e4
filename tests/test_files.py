"""Outputs are whole or absent, whatever happens on the way."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cbpt_guard.errors import InputError
from cbpt_guard.files import check_output, holds, in_turn, partial_path, read_toml, staged, write_text


def fill(out: Path, text: str = "new", *, force: bool = False, resume: bool = False) -> None:
    with staged(out, force=force, resume=resume) as folder:
        (folder / "result").write_text(text)


def interrupt(
    out: Path, error: type[BaseException], *, force: bool = False, resume: bool = False, resumable: bool = True
) -> None:
    with staged(out, force=force, resumable=resumable, resume=resume) as folder:
        (folder / "half").mkdir(exist_ok=True)
        (folder / "half" / "part").write_text("done")
        raise error


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_block_that_ends_leaves_the_output_and_nothing_else(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as folder:
        (folder / "result").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path) == {"deep/out/result": "x"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_no_output(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    with pytest.raises(error):
        interrupt(out, error)
    assert not out.exists()
    assert (partial_path(out) / "half" / "part").exists(), "kept for --resume"
    fill(out)
    assert contents(out) == {"result": "new"}, "a new start begins empty"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_a_block_that_cannot_be_resumed_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        interrupt(tmp_path / "out", error, resumable=False)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_input_leaves_nothing_but_what_was_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError):
        interrupt(out, InputError)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        interrupt(out, KeyboardInterrupt)
    with pytest.raises(InputError):
        interrupt(out, InputError, resume=True)
    assert (partial_path(out) / "half" / "part").exists()


def test_an_earlier_output_stays_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    with pytest.raises(InputError, match="exists already; pass `--force`"):
        fill(out)
    with pytest.raises(RuntimeError):
        interrupt(out, RuntimeError, force=True)
    assert contents(out) == {"result": "old"}
    with staged(out, force=True) as folder:
        (folder / "other").write_text("new")
        assert contents(out) == {"result": "old"}
    assert contents(out) == {"other": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt(out, KeyboardInterrupt)
    fill(out, resume=True)
    assert contents(out) == {"half/part": "done", "result": "new"}


def test_another_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"from pathlib import Path; from cbpt_guard.files import staged\nwith staged(Path({str(out)!r})): pass"
    with staged(out) as folder:
        (folder / "mine").write_text("x")
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert "SetupError: another command is writing" in other.stderr
        assert (folder / "mine").exists()
    assert contents(out) == {"mine": "x"}


def test_another_process_in_turn_waits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from cbpt_guard.files import in_turn
with in_turn(Path({str(out)!r})):
    print(Path({str(out)!r}).read_text())
"""
    with in_turn(out):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
        out.write_text("made")
    assert other.communicate(timeout=30)[0] == "made\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_FULL_DISK = """
import resource, sys
from pathlib import Path
from cbpt_guard.files import staged
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with staged(Path(sys.argv[1]), force=True) as folder:
    (folder / "small").write_text("x")
    (folder / "large").write_bytes(bytes(100_000))
"""


def test_a_full_disk_is_a_setup_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, out], capture_output=True, text=True, check=False)
    assert f"SetupError: writing {out} failed: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == [out]
    assert contents(out) == {"result": "old"}


@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_a_linked_output_is_replaced_and_its_target_left_alone(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    out = tmp_path / "out"
    out.symlink_to(tmp_path / target)
    with pytest.raises(InputError, match="exists already"):
        fill(out)
    fill(out, force=True)
    assert not out.is_symlink()
    assert contents(out) == {"result": "new"}
    assert contents(tmp_path / "folder") == {"precious": "x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out"]


@pytest.mark.parametrize("linked", [False, True])
def test_leftovers_of_a_crash_while_replacing_do_not_matter(tmp_path: Path, linked: bool) -> None:
    out, old = tmp_path / "out", tmp_path / ".out.old"
    fill(out, "old")
    if linked:
        old.symlink_to(tmp_path / "elsewhere")
    else:
        old.mkdir()
        (old / "older").write_text("x")
    fill(out, force=True)
    assert contents(out) == {"result": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_new_output_is_on_the_disk_before_the_earlier_one_goes(tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    events: list[str] = []
    sync, gone = os.fsync, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(shutil, "rmtree", lambda path, *rest, **how: events.append(str(path)) or gone(path, *rest))
    fill(out, "new", force=True)
    partial = tmp_path / ".out.partial"
    assert sorted(events[:2]) == [str(partial), str(partial / "result")]
    assert events[2:] == [str(tmp_path), str(tmp_path / ".out.old")]


def test_a_crash_between_the_two_moves_costs_no_earlier_output(tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    moves: list[Path] = []
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if moves:
            os._exit(9)
        moves.append(path)
        return rename(path, target)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(Path, "rename", killed)
        fill(out, "new", force=True)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists()
    with pytest.raises(InputError, match="exists already"):
        fill(out, "newer")
    assert contents(out) == {"result": "old"}
    fill(out, "newer", force=True)
    assert contents(out) == {"result": "newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_command_works_in_a_folder_that_another_is_about_to_move(tmp_path: Path, monkeypatch: Any) -> None:
    out, rename, refused = tmp_path / "out", Path.rename, []

    def moving(path: Path, target: Path) -> Path:
        code = f"from pathlib import Path; from cbpt_guard.files import staged\nwith staged(Path({str(out)!r})): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        refused.append("another command is writing" in other.stderr)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", moving)
    fill(out, "mine")
    assert refused == [True]
    assert contents(out) == {"result": "mine"}


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: Any) -> None:
    """Its holder ends between our opening the file and our locking it: what we lock then has no name any more."""
    out, lock, real = tmp_path / "out", tmp_path / ".out.lock", fcntl.flock
    tries = []

    def late(handle: int, how: int) -> None:
        tries.append(handle)
        if len(tries) == 1:
            lock.unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with staged(out) as folder:
        assert lock.exists()
        (folder / "result").write_text("x")
    assert len(tries) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_in_the_place_of_the_unfinished_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    partial_path(tmp_path / "out").symlink_to(tmp_path / "folder")
    fill(tmp_path / "out")
    assert contents(tmp_path / "folder") == {"precious": "x"}
    assert contents(tmp_path / "out") == {"result": "new"}


def test_a_file_in_the_way_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="is a file, not a folder"):
        fill(tmp_path / "out", force=True)
    with pytest.raises(InputError, match="out is a file, not a folder; pass another"):
        fill(tmp_path / "out" / "below" / "deep")
    assert (tmp_path / "out").read_text() == "precious"


def test_what_is_no_earlier_output_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check_output(out, True, ("run.json",))  # an empty folder costs nothing
    (out / "photo.jpg").write_text("precious")
    with (
        pytest.raises(InputError, match=r"out holds no run\.json.*is not replaced"),
        staged(out, force=True, ours=("photo.jpg", "run.json")),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "run.json").touch()
    with staged(out, force=True, ours=("photo.jpg", "run.json")) as folder:
        (folder / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]


@pytest.mark.parametrize("name", [".", "..", "below/..", "/"])
def test_an_output_needs_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no name for a new folder"):
        check_output(tmp_path / name if name != "." else Path(name), force=True)


def test_what_lies_in_an_output_is_known_through_links(tmp_path: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out/data")
    (tmp_path / "circle").symlink_to("circle")
    assert holds(tmp_path / "out", tmp_path / "link")
    assert holds(tmp_path / "link", tmp_path / "out" / "data" / "1.png")
    assert not holds(tmp_path / "out", tmp_path / "outer")
    assert not holds(tmp_path / "out", tmp_path / "circle")
    assert not holds(tmp_path / "circle", tmp_path / "out")


def test_looking_at_an_output_makes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "deep" / "out", force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"x = " + b"9" * 5000, b"x = " + b"[" * 5000, b"x = 1\ry = 2", b"x = '\xff'", b"x"]
)
def test_what_is_no_toml_is_refused_whatever_the_parser_says(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan .*plan\.toml: this is no TOML: "):
        read_toml(path, "plan")


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "naïve été")
    write_text(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "second", "what failed changed nothing"
