"""Hostile and malformed checkpoints: nothing of them runs, each is refused as what it is, and each costs little."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import malformed
import pytest
import safetensors.torch
import small_clips
import torch
from commands import ENVIRONMENT, SCRIPT, assert_refused, cli, python
from figures import Figures
from hostile import Canary, Case, saved, system, write_corpus
from PIL import Image

from cbpt_guard.defense.untrusted import checkpoint, sandbox
from cbpt_guard.defense.untrusted.checkpoint import read_checkpoint
from cbpt_guard.defense.untrusted.sandbox import Limits
from cbpt_guard.errors import CbptGuardError, CheckpointError, InputError, UnsafeError

pytestmark = pytest.mark.trust

REFUSED = {"unsafe": "hostile", "malformed": "malformed", None: "loads"}
EXIT = {"hostile": UnsafeError.exit_code, "malformed": CheckpointError.exit_code}
HERE = Path(__file__).parent


class Corpus(NamedTuple):
    """The written cases, and the names of canaries that connected."""

    items: list[tuple[Case, Path, Canary]]
    connected: set[str]

    @property
    def files(self) -> list[tuple[Case, Path, Canary]]:
        """Those that a reader opens: neither special paths nor folders, and not the one that takes ages."""
        return [item for item in self.items if item[1].is_file() and item[0].name != malformed.SLOW]

    def sang(self) -> set[str]:
        """Names of the cases whose canary has fired."""
        return {
            case.name for case, _, canary in self.items if canary.file.exists() or canary.file.name in self.connected
        }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    server, connected = socket.create_server(("127.0.0.1", 0)), set[str]()

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connected.add(connection.recv(100).decode())

    threading.Thread(target=listen, daemon=True).start()
    items = write_corpus(tmp_path_factory.mktemp("corpus"), server.getsockname()[1])
    yield Corpus(items, connected)
    server.shutdown(socket.SHUT_RDWR)
    server.close()


JUDGE = """
import json, resource, sys
from pathlib import Path
from cbpt_guard.defense.untrusted import reader
from cbpt_guard.defense.untrusted.sandbox import confine
confine(1 << 30, 900)
for path in sys.stdin.read().splitlines():
    report = reader.report_on(Path(path))
    (Path(path).parent / reader.OUTPUT).unlink(missing_ok=True)
    print(json.dumps([report.get("refused"), report.get("message", "")]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


class Judged(NamedTuple):
    """What the confined reader answered for each file, and its peak in MiB."""

    answers: dict[str, tuple[str, str]]
    peak: int


@pytest.fixture(scope="module")
def judged(corpus: Corpus) -> Judged:
    """All files in one confined process: seconds instead of minutes."""
    files = corpus.files
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JUDGE],
        input="\n".join(str(path) for _, path, _ in files),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *lines, peak = run.stdout.splitlines()
    reports = [json.loads(line) for line in lines]
    pairs = zip(files, reports, strict=True)
    return Judged({case.name: (REFUSED[kind], text) for (case, _, _), (kind, text) in pairs}, int(peak))


def test_every_file_is_refused_as_what_it_is_and_no_canary_sings(
    corpus: Corpus, judged: Judged, figures: Figures
) -> None:
    expected = {case.name: case.expected for case, _, _ in corpus.files}
    wrong = {name: (judged.answers[name], want) for name, want in expected.items() if judged.answers[name][0] != want}
    assert wrong == {}
    assert corpus.sang() == set()
    assert all(text.isprintable() for _, text in judged.answers.values())
    counts = [case.expected for case, _, _ in corpus.items]
    assert len(corpus.items) == len({case.name for case, _, _ in corpus.items}) >= 60
    figures.add("checkpoints", "files in the corpus", len(counts))
    figures.add("checkpoints", "of them hostile, refused with exit code 3", counts.count("hostile"))
    figures.add("checkpoints", "of them malformed, refused with exit code 2", counts.count("malformed"))
    figures.add("checkpoints", "of them harmless oddities that load", counts.count("loads"))
    figures.add("checkpoints", "canaries that fired", len(corpus.sang()))
    figures.add("checkpoints", "peak of the process that read them all, MiB", judged.peak)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "data" / name / "1.png")
    return tmp_path / "data"


def test_the_command_answers_with_the_exit_code(
    corpus: Corpus, pictures: Path, tmp_path: Path, amount: Callable[[int, int], int], figures: Figures
) -> None:
    """A few in the short form, all in the long one; special paths start no child and are tried in any case."""
    paths = [item for item in corpus.items if item[0].name.startswith("path")]
    others = [item for item in corpus.items if item[0].name.startswith("config")]
    others += [item for item in corpus.files if item[0].expected != "loads" and item not in paths]
    chosen = [*paths, *random.Random(0).sample(others, amount(4, len(others)))]
    for case, path, _ in chosen:
        found = cli("purify", "--model", path, "--data", pictures, "--out", tmp_path / "out", "--dry-run")
        assert_refused(found, code=EXIT[case.expected])
        assert "Traceback" not in found.stderr
        assert case.expected == "malformed" or "nothing was run" in found.stderr, case.name
    assert corpus.sang() == set()
    figures.add("checkpoints", "of them through the command, exit code seen", len(chosen))


def test_harmless_oddities_load_through_the_child(corpus: Corpus, amount: Callable[[int, int], int]) -> None:
    loading = [(case, path) for case, path, _ in corpus.items if case.expected == "loads"]
    for case, path in loading[-amount(1, len(loading)) :]:
        read = read_checkpoint(path)
        assert read.tensors, case.name
        assert all(value.isfinite().all() for value in read.tensors.values() if value.is_floating_point())


CARELESS = """
import pickle, sys, torch
for path in sys.stdin.read().splitlines():
    for load in (lambda: torch.load(path, weights_only=False), lambda: pickle.load(open(path, "rb"))):
        try:
            load()
        except BaseException:
            pass
"""


def test_the_canaries_can_sing(tmp_path: Path, figures: Figures) -> None:
    """Files that nothing runs prove nothing: a careless reader runs those that are marked so."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        items = [item for item in write_corpus(tmp_path, server.getsockname()[1]) if item[0].live]
        names = "\n".join(str(path) for _, path, _ in items)
        command = [sys.executable, "-W", "ignore", "-c", CARELESS]
        environment = ENVIRONMENT | {"PYTHONPATH": str(HERE)}
        subprocess.run(command, input=names, text=True, env=environment, timeout=120, check=False)
        connected = set()
        server.settimeout(0.2)
        try:
            while True:
                connection, _ = server.accept()
                with connection:
                    connected.add(connection.recv(100).decode())
        except TimeoutError:
            pass
    silent = [case.name for case, _, canary in items if not canary.file.exists() and canary.file.name not in connected]
    assert silent == []
    assert len(items) >= 50
    figures.add("checkpoints", "hostile files that a plain torch.load or pickle.load does run", len(items))


def test_picklescan_as_a_second_opinion(corpus: Corpus, judged: Judged, figures: Figures) -> None:
    """What picklescan calls dangerous we refuse as unsafe; where the two differ, the table says why."""
    scanner = pytest.importorskip("picklescan.scanner")
    rows, agreed = [], 0
    for case, path, _ in corpus.files:
        ours, message = judged.answers[case.name]
        theirs, why = _second_opinion(scanner, path, ours)
        assert theirs != "dangerous" or ours == "hostile", (case.name, message)
        agreed += not why
        if why:
            rows.append((case.name, ours, theirs, why))
    figures.add("checkpoints", "files on which picklescan and we agree", agreed)
    figures.add("checkpoints", "files on which picklescan says something else", len(rows))
    figures.table("checkpoints", "Where picklescan differs", ("file", "ours", "picklescan", "why"), rows)


def _second_opinion(scanner: Any, path: Path, ours: str) -> tuple[str, str]:
    """picklescan's word, and why it is another one than ours (empty where it is not)."""
    hostile = ours == "hostile"
    try:
        found = scanner.scan_file_path(str(path))
    except Exception as error:
        return "crashed", f"its parser raises {type(error).__name__}; ours goes on" if hostile else ""
    if found.issues_count:
        return "dangerous", "" if hostile else "it scans what is never read"
    if any(item.safety.value != "innocuous" for item in found.globals):
        why = "a name off its lists is suspicious only; here anything but tensors is refused" if hostile else ""
        return "suspicious", why or ("ours has a stand-in for that name" if ours == "loads" else "")
    if found.scan_err:
        return "error", "it stops at what its parser cannot read; torch or pickle do not" if hostile else ""
    return (
        "nothing",
        "it gives up early, or does not look there; here every entry is walked to its end" if hostile else "",
    )


def test_a_claim_of_ten_gigabytes_costs_little(
    tmp_path: Path, amount: Callable[[int, int], int], figures: Figures
) -> None:
    """Expanded from four bytes, from a deflated entry, from a length field: refused below 1 GB."""
    claims = ("shape: 10 GB from 16 bytes", "storage: claims 2 ** 60 elements", "zip: bomb")
    code = """
import resource, sys
from pathlib import Path
from cbpt_guard.defense.untrusted.checkpoint import read_checkpoint
from cbpt_guard.errors import CheckpointError
for path in sys.argv[1:]:
    try:
        read_checkpoint(Path(path))
    except CheckpointError:
        continue
    raise SystemExit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""
    paths = []
    for number, name in enumerate(claims[: amount(1, 3)]):
        paths.append(tmp_path / f"{number}.pt")
        paths[-1].write_bytes(malformed.BROKEN[name]())
        assert paths[-1].stat().st_size < 1 << 20
    found = python(code, *paths, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 1000
    figures.add("checkpoints", "peak of the child at a claim of 10 GB, MiB", int(found.stdout))


def test_time_is_bounded(corpus: Corpus, figures: Figures) -> None:
    path = next(path for case, path, _ in corpus.items if case.name == malformed.SLOW)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="took longer than 2 s"):
        read_checkpoint(path, Limits(seconds=2))
    taken = time.monotonic() - start
    assert taken < 30
    figures.add("checkpoints", "seconds until an endless pickle ended, with a limit of 2", round(taken, 1))


def test_no_child_outlives_its_parent(
    pictures: Path, tmp_path: Path, amount: Callable[[int, int], int], figures: Figures
) -> None:
    """The command is killed at random moments while its child reads, or starts; the child is gone soon after."""
    model, draw, slowest = tmp_path / "endless.pt", random.Random(1), 0.0
    model.write_bytes(malformed.BROKEN[malformed.SLOW]())
    for number in range(kills := amount(1, 12)):
        scratch = tmp_path / f"scratch-{number}"
        scratch.mkdir()
        command = [SCRIPT, "purify", "--model", model, "--data", pictures, "--out", tmp_path / "out", "--dry-run"]
        parent = subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT | {"TMPDIR": str(scratch)}, stderr=subprocess.DEVNULL
        )
        while not any(number % 2 or _is_confined(process) for process in _mentioning(scratch)):
            assert parent.poll() is None
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 2))
        parent.kill()
        parent.wait()
        start = time.monotonic()
        while _mentioning(scratch):
            assert time.monotonic() - start < 20
            time.sleep(0.02)
        slowest = max(slowest, time.monotonic() - start)
    figures.add("checkpoints", "commands killed in mid-read", kills)
    figures.add("checkpoints", "children left, after at most seconds", f"0, after {slowest:.1f}")


def _is_confined(process: str) -> bool:
    """Whether a process has bound itself: from then on it reads."""
    try:
        return "NoNewPrivs:\t1" in (Path("/proc") / process / "status").read_text()
    except OSError:
        return False


def _mentioning(folder: Path) -> list[str]:
    """Processes whose command line names a folder: the reader's child names its private copy."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
    return found


def test_a_file_replaced_after_the_check_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, canary = tmp_path / "x.pt", Canary(tmp_path / "canary", 9)
    path.write_bytes(saved({"w": torch.ones(3)}))
    tame = hashlib.sha256(path.read_bytes()).hexdigest()
    confined = checkpoint.run_confined

    def replace_and_run(*arguments: Any) -> dict[str, Any]:
        path.write_bytes(saved({"w": torch.zeros(3), "x": system(canary)}))
        return confined(*arguments)

    monkeypatch.setattr(checkpoint, "run_confined", replace_and_run)
    read = read_checkpoint(path)
    assert torch.equal(read.tensors["w"], torch.ones(3))
    assert read.sha256 == tame
    assert not canary.file.exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(2).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.empty(1).to("meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
def test_no_tensor_but_a_dense_one_gets_past_the_last_check(value: torch.Tensor) -> None:
    """The scan refuses them by name already; what it might miss is refused as it is."""
    with pytest.raises(CheckpointError, match="save plain dense tensors"):
        checkpoint.reader.plain_tensors({"w": value})


def test_the_child_inherits_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given an environment of its own, no standard input, and a session of its own."""
    given: dict[str, Any] = {}

    def running(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        given.update(options)
        return subprocess.CompletedProcess(command, -signal.SIGKILL)

    path = tmp_path / "x.pt"
    path.write_bytes(saved({"w": torch.ones(1)}))
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    monkeypatch.setattr(sandbox.subprocess, "run", running)
    with pytest.raises(CheckpointError, match="SIGKILL"):
        read_checkpoint(path)
    assert given["env"].keys() <= {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR", "HOME", "OMP_NUM_THREADS"}
    assert (given["stdin"], given["start_new_session"]) == (subprocess.DEVNULL, True)


@pytest.mark.parametrize(
    "name", [name for name in malformed.PATHS if name.startswith("path: a ") and "link to n" not in name]
)
def test_special_paths_are_not_even_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a device may already act, and opening a pipe may wake who waits at its other end."""
    path, real = tmp_path / "x.pt", os.open
    malformed.PATHS[name](path)

    def opening(what: Any, *arguments: Any, **options: Any) -> int:
        assert Path(what) != path
        return real(what, *arguments, **options)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(InputError):
        checkpoint._private_copy(path, tmp_path / "copy.pt", 1 << 20)


def test_a_path_that_keeps_changing_gives_what_was_hashed(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """Two files, a pipe and a device take turns at the path while it is copied: never a hang, never a mixture."""
    contents = [b"a" * 3_000_000, b"b" * 5_000_000]
    digests = {hashlib.sha256(content).hexdigest() for content in contents}
    path, stop = tmp_path / "x.pt", threading.Event()

    def change() -> None:
        spare = tmp_path / "spare"
        while not stop.is_set():
            for content in contents:
                spare.write_bytes(content)
                spare.replace(path)
                time.sleep(0.005)
            os.mkfifo(spare)
            spare.replace(path)
            spare.symlink_to("/dev/zero")
            spare.replace(path)

    path.write_bytes(contents[0])
    changer = threading.Thread(target=change)
    changer.start()
    try:
        copied, refused, deadline = 0, 0, time.monotonic() + 240
        while copied < amount(20, 300) or not refused:
            assert time.monotonic() < deadline
            copy = tmp_path / f"copy-{copied}"
            try:
                digest, size = checkpoint._private_copy(path, copy, 1 << 24)
            except InputError:
                refused += 1
                continue
            copied += 1
            assert digest in digests
            assert digest == hashlib.sha256(copy.read_bytes()).hexdigest()
            assert size == copy.stat().st_size
            copy.unlink()
    finally:
        stop.set()
        changer.join()


FLIPS = """
import json, random, sys
from pathlib import Path
import safetensors.torch
from cbpt_guard.defense import layouts
from cbpt_guard.defense.untrusted import reader
from cbpt_guard.defense.untrusted.sandbox import confine
from cbpt_guard.errors import CbptGuardError
confine(1 << 30, 3000)
for source in map(Path, sys.argv[2:]):
    data, draw = source.read_bytes(), random.Random(source.name)
    edge = min(30_000, len(data))
    path, counts = source.with_name("flipped" + source.suffix), {"unsafe": 0, "malformed": 0, "loads": 0}
    for number in range(int(sys.argv[1])):
        forged = bytearray(data)
        places = draw.randrange(len(data)), draw.randrange(edge), len(data) - 1 - draw.randrange(edge)
        forged[places[number % 3]] ^= 1 << draw.randrange(8) if number % 2 else draw.randrange(1, 256)
        path.write_bytes(forged)
        report = reader.report_on(path)
        kind = report.get("refused", "loads")
        if kind == "loads":
            tensors = safetensors.torch.load_file(path.parent / reader.OUTPUT)
            assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point()), places
            try:
                layouts.to_open_clip(tensors)
            except CbptGuardError:
                kind = "malformed"
        counts[kind] += 1
    print(json.dumps(counts))
"""


def test_flipped_bytes_are_refused_or_harmless(
    tmp_path: Path, amount: Callable[[int, int], int], figures: Figures, request: pytest.FixtureRequest
) -> None:
    """A real checkpoint with one byte changed, half of them in one bit: two thirds near its ends, where structure is.

    The long form takes the poisoned digits CLIP, too.
    """
    model, tried = small_clips.model(small_clips.VIT), amount(120, 2000)
    content = {"state_dict": dict(model.state_dict()), "epoch": 3}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "bare.safetensors")
    images, ids = torch.zeros(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, (images, ids)), tmp_path / "TorchScript.pt")  # type: ignore[no-untyped-call]
    if amount(0, 1):
        shutil.copy(request.getfixturevalue("digits_suspect").checkpoint, tmp_path / "digits.pt")
    files = sorted(tmp_path.iterdir())
    command = [sys.executable, "-W", "ignore", "-c", FLIPS, str(tried), *map(str, files)]
    run = subprocess.run(command, text=True, capture_output=True, env=ENVIRONMENT, timeout=3000, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    for file, line in zip(files, run.stdout.splitlines(), strict=True):
        counts = json.loads(line)
        assert sum(counts.values()) == tried
        assert counts["malformed"] > 0
        assert counts["loads"] > 0
        told = f"{counts['malformed']} malformed, {counts['unsafe']} unsafe, {counts['loads']} loaded, all finite"
        figures.add("checkpoints", f"{tried:,} changes of a single byte in {file.name}", told)


def test_flipped_bytes_through_the_command_leave_no_traceback(
    pictures: Path, tmp_path: Path, amount: Callable[[int, int], int]
) -> None:
    path, draw = tmp_path / "x.pt", random.Random(2)
    content = saved({"state_dict": small_clips.weights(small_clips.VIT)})
    for _ in range(amount(1, 25)):
        forged = bytearray(content)
        forged[draw.randrange(30_000)] ^= draw.randrange(1, 256)
        path.write_bytes(forged)
        found = cli("purify", "--model", path, "--data", pictures, "--out", tmp_path / "out", "--dry-run")
        assert found.exit_code in (2, 3), found.stderr
        assert "Traceback" not in found.stderr


def test_a_text_file_is_malformed_and_not_unsafe(tmp_path: Path) -> None:
    """The letters of a text read as opcodes; only what an unpickler could get to counts."""
    for text in (__doc__, Path(__file__).read_text(encoding="utf-8"), "(object) item class road\n", "coral\nreef\n"):
        path = tmp_path / "x.pt"
        path.write_text(str(text), encoding="utf-8")
        with pytest.raises(CbptGuardError, match="neither a PyTorch checkpoint nor safetensors") as caught:
            checkpoint.reader.open_file(path)
        assert caught.value.exit_code == CheckpointError.exit_code
