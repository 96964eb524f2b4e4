"""export, verify, inspect, predict and demo as commands: exit codes, messages, and what goes to which stream."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT, SCRIPT, assert_refused, blocking, cli, python, script
from PIL import Image
from small_runs import CLASSES, write_run
from started import without_rights

from cbpt_guard import GuardedClassifier, __version__
from cbpt_guard.bundle import open_bundle
from cbpt_guard.cli.show import refused
from cbpt_guard.errors import CheckError, UnsafeError

COMMANDS = ("scan", "purify", "export", "verify", "inspect", "predict", "evaluate", "demo")
EVIL = "\x1b[31mred\x1b[0m\r\n[bold]\x9b2J\u202e"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three pictures of the tiny bundle's colours."""
    paths = []
    for name, colour in (("red", (250, 5, 5)), ("green", (0, 200, 0)), ("blue", (0, 0, 255))):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (40, 32), colour).save(paths[-1])
    return paths


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk that is full soon: no file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# every command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_and_refuses_unknown_options(command: str) -> None:
    helped = cli(command, "--help")
    assert helped.exit_code == 0
    assert "Usage:" in helped.stdout
    assert_refused(cli(command, "--no-such-option"), "--no-such-option", usage=True)


def test_the_version_is_the_packages() -> None:
    assert cli("--version").stdout == f"{__version__}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    assert_refused(cli("purge"), "purge", usage=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_argument_is_a_usage_error(command: str) -> None:
    if command in ("export", "demo"):  # all their options have defaults
        assert_refused(cli(command, "--out"), "--out", usage=True)
    else:
        assert_refused(cli(command), "Missing", usage=True)


def test_a_bug_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("cbpt_guard.inspection.inspect", broken)
    result = cli("inspect", ".")
    assert result.exit_code == 70
    assert result.stdout == ""
    assert "Traceback" in result.stderr
    assert "bug of cbpt-guard (ZeroDivisionError)" in result.stderr


def test_a_module_that_no_extra_brings_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'cbpt_guard.nowhere'", name="cbpt_guard.nowhere")

    monkeypatch.setattr("cbpt_guard.inspection.inspect", broken)
    assert cli("inspect", ".").exit_code == 70


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["purify", "--model", "m.pt", "--data", "d"], "torch", "purify"),
        (["purify", "--model", "m.pt", "--data", "d"], "open_clip", "purify"),
        (["scan", "--model", "m.pt", "--data", "d"], "torch", "purify"),
        (["export"], "torch", "purify"),
        (["demo"], "torch", "purify"),
        (["verify", "BUNDLE"], "onnxruntime", "cpu"),
        (["verify", "BUNDLE", "--deep"], "onnx", "purify"),
        (["verify", "BUNDLE", "--deep", "--run", "."], "torch", "purify"),
        (["predict", "BUNDLE", "x.png"], "onnxruntime", "cpu"),
    ],
)
def test_a_missing_extra_names_its_pip_line(
    command: list[str], module: str, extra: str, tiny_bundle: Path, folder: Path
) -> None:
    given = [str(tiny_bundle) if word == "BUNDLE" else word for word in command]
    result = python(
        blocking(module) + "from cbpt_guard.cli import main\nsys.argv[0] = 'cbpt-guard'\nmain()", *given, cwd=folder
    )
    assert_refused(result, module, f"pip install 'cbpt-guard[{extra}]'")
    assert [path.name for path in folder.iterdir()] == ["bundle"]


# export


def test_export_writes_a_bundle_and_says_where(tiny_run: Path, folder: Path) -> None:
    result = cli("export", "--onnx", "--run", tiny_run)
    assert (result.exit_code, result.stdout) == (0, "bundle\n")
    assert 'GuardedClassifier.load("bundle")' in result.stderr
    assert [path.name for path in folder.iterdir()] == ["bundle"]
    assert open_bundle("bundle").labels == CLASSES


def test_export_keeps_what_is_there_until_it_can_replace_it(tiny_run: Path, exported: Path) -> None:
    shutil.copytree(exported, "bundle")
    before = open_bundle("bundle").digest
    assert_refused(cli("export", "--run", tiny_run), "bundle exists already", "--force", "--out")
    with no_file_above(4096):
        assert_refused(cli("export", "--run", tiny_run, "--force"), "writing bundle failed", "File too large")
    assert open_bundle("bundle").digest == before
    assert cli("export", "--run", tiny_run, "--force", "--opset", "19").exit_code == 0  # one that differs
    assert open_bundle("bundle").digest != before


@pytest.mark.parametrize(
    ("command", "where", "kept"),
    [
        (["export"], "cbpt_guard.export.export", False),
        (["purify", "--model", "m.pt", "--data", "d"], "cbpt_guard.defense.purify.prepare", False),
        (["purify", "--model", "m.pt", "--data", "d", "--dry-run"], "cbpt_guard.defense.plan.prepare", False),
        (["purify", "--model", "m.pt", "--data", "d"], "cbpt_guard.defense.purify.Purification", True),
        (["bench", "implant", "--model", "m"], "cbpt_guard.defense.data.list_images", False),
    ],
)
def test_only_what_can_go_on_says_so(
    command: list[str], where: str, kept: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cbpt_guard.defense.purify.prepare", lambda *_: None)
    monkeypatch.setattr(where, interrupted)
    if command[:2] == ["bench", "implant"]:
        command = [*command, *("--attack", "badnet", "--target", "x", "--data", "d", "--out", "o")]
    result = cli(*command)
    assert result.exit_code == 130
    said = "interrupted; what was found so far is kept: the same command with `--resume` goes on\n"
    assert result.stderr == (said if kept else "interrupted\n")


def test_what_no_check_foresaw_about_a_file_is_one_line_of_why(folder: Path, tiny_bundle: Path) -> None:
    """A path of 300 characters here; folders without rights, a device that fails."""
    assert_refused(cli("inspect", "a" * 300), "a" * 300, "File name too long")
    assert_refused(cli("scan", "--model", "m.pt", "--data", "a" * 300), "File name too long")
    (folder / "closed").mkdir(mode=0)
    refused = without_rights("evaluate", tiny_bundle, "--data", "closed/deeper", cwd=folder)
    (folder / "closed").chmod(0o700)
    assert_refused(refused, "closed/deeper", "Permission denied")


def test_a_signal_that_a_library_wraps_is_still_what_ended_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter of torch turned Ctrl-C into an error of its own, and a user read of a bad architecture."""
    commands = importlib.import_module("cbpt_guard.cli.app")
    monkeypatch.setattr(commands, "_received", [])

    def exports(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise CheckError("this architecture cannot be exported") from error

    monkeypatch.setattr("cbpt_guard.export.export", exports)
    before = signal.signal(signal.SIGINT, commands._stop)
    try:
        result = cli("export")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("verdict", ["not guarded", "unverified"])
def test_export_refuses_a_run_that_is_not_guarded(verdict: Any, folder: Path) -> None:
    run = write_run(folder / "purified", verdict=verdict)
    assert_refused(cli("export"), f"purified is {verdict}", "ASR 40 % > 5 %", "--allow-unguarded", code=1)
    assert list(folder.iterdir()) == [run]


def test_export_of_an_unguarded_run_is_allowed_by_name_and_recorded(folder: Path) -> None:
    write_run(folder / "purified", verdict="not guarded")
    assert cli("export", "--allow-unguarded").exit_code == 0
    found = json.loads(cli("inspect", "bundle", "--json").stdout)
    assert (found["verdict"], found["allow_unguarded"]) == ("not guarded", True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ("no run directory", "cbpt-guard purify")),
        (".purified.partial", (".purified.partial", "no finished run")),
        ("bundle-like", ("no finished run",)),
    ],
)
def test_export_reads_finished_runs_only(name: str, words: tuple[str, ...], own_run: Path, folder: Path) -> None:
    if name == ".purified.partial":
        (own_run / "run.json").unlink()  # the file that is written last
        own_run.rename(name)
    elif name != "missing":
        Path(name).mkdir()
    assert_refused(cli("export", "--run", name), *words)
    assert not Path("bundle").exists()
    assert not Path(".bundle.partial").exists()


def test_export_refuses_an_impossible_opset(tiny_run: Path, folder: Path) -> None:
    assert_refused(cli("export", "--run", tiny_run, "--opset", 7), "opset 7", "18")
    assert list(folder.iterdir()) == []


# verify


def test_verify_prints_the_checks_and_the_digest(tiny_bundle: Path) -> None:
    digest = open_bundle(tiny_bundle).digest
    result = cli("verify", tiny_bundle, "--digest", digest)
    assert result.exit_code == 0
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        *("files", "schema", "golden fp32", "sha256")
    ]
    assert result.stdout.splitlines()[-1] == digest
    assert result.stderr == ""


def test_verify_as_json_is_json_alone(exported: Path, tiny_run: Path) -> None:
    result = cli("verify", exported, "--deep", "--run", tiny_run, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["digest"] == open_bundle(exported).digest
    assert [check["name"] for check in report["checks"]][-1] == "torch model.onnx"


def test_verify_answers_1_for_a_changed_bundle(tiny_bundle: Path) -> None:
    (tiny_bundle / "labels.json").write_text('["a", "b", "c", "d", "e"]')
    assert_refused(cli("verify", tiny_bundle), "labels.json", code=1)
    assert_refused(cli("verify", tiny_bundle, "--json"), "labels.json", code=1)


def test_verify_answers_1_for_another_bundle(tiny_bundle: Path) -> None:
    assert_refused(cli("verify", tiny_bundle, "--digest", "sha256:" + "0" * 64), "is another bundle", code=1)


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["missing"], ("missing",), 2),
        (["."], ("manifest.json",), 1),
        (["BUNDLE", "--digest", "12"], ("sha256:", "64 hexadecimal"), 2),
        (["BUNDLE", "--run", "missing"], ("`--run` is for the comparison with torch", "--deep"), 2),
        (["BUNDLE", "--deep", "--run", "missing"], ("missing is no run directory",), 2),
    ],
)
def test_verify_refuses_bad_input(arguments: list[str], words: tuple[str, ...], code: int, tiny_bundle: Path) -> None:
    given = [str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]
    Path("empty").mkdir()
    assert_refused(cli("verify", *("empty" if word == "." else word for word in given)), *words, code=code)


# inspect


@pytest.mark.parametrize(("kind", "name"), [("run", "tiny_run"), ("bundle", "pristine_bundle")])
def test_inspect_prints_a_run_or_a_bundle(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    found = cli("inspect", path, "--json")
    assert (found.exit_code, found.stderr) == (0, "")
    assert json.loads(found.stdout)["kind"] == kind
    shown = cli("inspect", path)
    assert shown.exit_code == 0
    assert f"kind: {kind}" in shown.stdout
    assert "verdict: guarded" in shown.stdout


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_inspect_refuses_what_is_neither(name: str) -> None:
    Path("empty").mkdir()
    Path("file").write_text("no folder")
    assert_refused(cli("inspect", name), name, "a run directory", "a bundle" if name != "empty" else "nor a bundle")


# predict


def test_predict_prints_a_line_an_image(tiny_bundle: Path, images: list[Path]) -> None:
    result = cli("predict", tiny_bundle, *images)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(path) for path in images]
    assert [row[1] for row in rows[1:]] == ["green", "blue"]
    assert rows[0][3:] == ["changed", "triggered"]


def test_predict_as_json_equals_the_library(tiny_bundle: Path, images: list[Path]) -> None:
    result = cli("predict", tiny_bundle, *images, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    guard = GuardedClassifier.load(tiny_bundle)
    answers = guard.predict(images)
    for line, path, answer in zip(result.stdout.splitlines(), images, answers, strict=True):
        assert json.loads(line) == {"path": str(path)} | answer.to_dict()


def test_predict_finishes_all_and_answers_1_if_one_failed(tiny_bundle: Path, images: list[Path]) -> None:
    images[0].write_bytes(b"no picture")
    for result in (cli("predict", tiny_bundle, *images), cli("predict", tiny_bundle, *images, "--json")):
        assert result.exit_code == 1
        assert "1 of 3 images failed" in result.stderr
        assert "Traceback" not in result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["error"] is None for answer in answers] == [False, True, True]
    assert cli("predict", tiny_bundle, "missing.png").exit_code == 1


def test_predict_abstains_below_a_score(tiny_bundle: Path, images: list[Path]) -> None:
    sure = cli("predict", tiny_bundle, images[1]).stdout.split("\t")
    unsure = cli("predict", tiny_bundle, images[1], "--abstain", 1).stdout.split("\t")
    assert (sure[1], unsure[1], unsure[2]) == ("green", "-", sure[2])


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["missing", "x.png"], ("missing",), 2),
        (["BUNDLE", "x.png", "--provider", "abacus"], ("abacus",), 2),
        (["BUNDLE", "x.png", "--provider", "cuda"], ("cuda",), 2),
        (["BUNDLE", "x.png", "--precision", "fp16"], ("fp16", "fp32"), 2),
        (["BUNDLE", "x.png", "--abstain", "2"], ("between 0 and 1",), 2),
        (["BUNDLE", "x.png", "--digest", "sha256:" + "0" * 64], ("is another bundle",), 1),
    ],
)
def test_predict_refuses_bad_input(arguments: list[str], words: tuple[str, ...], code: int, tiny_bundle: Path) -> None:
    given = [str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]
    assert_refused(cli("predict", *given), *words, code=code)


def test_predict_into_a_closed_pipe_is_quiet(tiny_bundle: Path, images: list[Path], folder: Path) -> None:
    command = [str(SCRIPT), "predict", str(tiny_bundle), *(str(images[0]) for _ in range(3000)), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# demo


def test_demo_answers_1_when_it_did_not_show_its_point(monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    from cbpt_guard.bench.demo import Counts, DemoReport

    report = DemoReport(
        target="nine",
        verdict="guarded",
        trigger="a patch",
        images=10,
        undefended=Counts(ca=0.9, asr=0.5, pa=0.5),
        guarded=Counts(ca=0.9, asr=0.2, pa=0.7),
        flagged_clean=0.0,
        flagged_triggered=0.5,
        bundle="demo/bundle",
        picture="demo/picture.png",
    )

    reports = [report]

    def made(*_: object, **__: object) -> DemoReport:
        shutil.copytree(tiny_run, "demo/purified")
        return reports[-1]

    monkeypatch.setattr("cbpt_guard.bench.demo.run_demo", made)
    result = cli("demo", "--json")
    assert result.exit_code == 1
    assert "the poison did not take: ASR 50.0%" in result.stderr
    assert "the guard did not hold: ASR 20.0%" in result.stderr
    assert DemoReport.model_validate_json(result.stdout) == report
    good = {"undefended": Counts(ca=0.9, asr=1, pa=0), "guarded": Counts(ca=0.9, asr=0, pa=1)}
    reports.append(report.model_copy(update=good))
    shutil.rmtree("demo")
    assert cli("demo").exit_code == 0


def test_demo_keeps_what_is_there_unless_forced(folder: Path) -> None:
    (folder / "demo").mkdir()
    result = cli("demo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: demo exists already; pass `--force`")
    (folder / "demo" / "mine.txt").write_text("precious")
    assert_refused(cli("demo", "--force"), "demo holds no report.json", "not replaced")
    assert [path.name for path in folder.rglob("*")] == ["demo", "mine.txt"]


def test_demo_whose_run_is_not_guarded_answers_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def unguarded(*_: object, **__: object) -> None:
        raise CheckError("purified is unverified (nothing stands out)")

    monkeypatch.setattr("cbpt_guard.bench.demo.run_demo", unguarded)
    result = cli("demo")
    assert result.exit_code == 1
    assert "purified is unverified" in result.stderr


# what strangers named


def test_no_name_reaches_the_terminal_raw(own_run: Path, tiny_bundle: Path, images: list[Path]) -> None:
    """Class names, reasons and file names may hold anything; what a terminal would obey is replaced."""
    from cbpt_guard.bundle import write_manifest
    from cbpt_guard.manifest import parse_manifest

    text = (own_run / "run.json").read_text()
    (own_run / "run.json").write_text(text.replace('"banana"', json.dumps(EVIL)))
    labels = ["red", EVIL, "blue", "yellow", "grey"]
    (tiny_bundle / "labels.json").write_text(json.dumps(labels))
    write_manifest(tiny_bundle, parse_manifest((tiny_bundle / "manifest.json").read_bytes()))
    evil = images[0].rename(images[0].with_name("\x1b]0;owned\x07\n.png"))
    for arguments in (
        ["inspect", own_run],
        ["inspect", own_run, "--json"],
        ["inspect", tiny_bundle],
        ["predict", tiny_bundle, evil, *images],
        ["predict", tiny_bundle, evil, "--json"],
        ["verify", tiny_bundle],
        ["inspect", "\x1b[2J"],
        ["export", "--run", "\x1b[2J"],
    ):
        result = cli(*arguments)
        assert not set(result.output) & set("\x1b\x07\x9b\r\u202e"), arguments
    answers = cli("predict", tiny_bundle, evil, images[1]).stdout
    assert len(answers.splitlines()) == 2
    assert "\N{REPLACEMENT CHARACTER}[31mred" in answers
    assert "[bold]" in cli("inspect", own_run).stdout  # markup is text, not a style


def test_nothing_heavy_is_imported_for_help(folder: Path) -> None:
    code = "import sys, cbpt_guard.cli.app\nprint({'torch', 'onnxruntime', 'sklearn', 'onnx'} & set(sys.modules))"
    result = python(code, cwd=folder)
    assert result.stdout == "set()\n"
    assert script("--version", cwd=folder).stdout == f"{__version__}\n"
    assert sys.executable.startswith(str(SCRIPT.parent))


def test_a_name_with_a_line_break_forges_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(UnsafeError("a\nerror: b")) == 3
    assert capsys.readouterr().err == "error: a\n  error: b\n"
