"""Images, class names and settings of strangers: an answer or an error of our tree, and nothing printed raw."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import image_fuzz
import numpy as np
import pytest
from commands import ENVIRONMENT, cli
from figures import Figures
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from memory import rise
from PIL import Image
from tiny import LABELS, tiny_manifest

from cbpt_guard import GuardedClassifier
from cbpt_guard.bundle import Suspect, write_manifest
from cbpt_guard.classifier import Prediction
from cbpt_guard.cli.show import one_line
from cbpt_guard.errors import BundleError, CbptGuardError, ImageError, InputError
from cbpt_guard.images import ImageLimits
from cbpt_guard.listing import list_images
from cbpt_guard.manifest import Manifest, parse_manifest

pytestmark = pytest.mark.trust
SCRIPT = Path(image_fuzz.__file__)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
NASTY = (
    "\x1b[2J\x1b]0;owned\x07",
    "a\nverdict: GUARDED",
    "b\rerror: x",
    '=HYPERLINK("http://evil","x")',
    "@SUM(1+1)|cmd",
    "\u202egnp.exe\u202c",
    "\x9b31m",
    "c\u2028d\u2029e",
    "[bold red]f[/] `g` <script>alert(1)</script> | h \\ ![x](http://evil/x.png)",
    "naïve été 猫 🐈",
)
NAMES = st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
RAW = set("\x1b\x07\x08\r\x9b\x00\u202e\u2028\u2029")


def assert_tame(*texts: str) -> None:
    """Nothing in what was printed could steer a terminal or pass for a line of its own."""
    for text in texts:
        assert not RAW & set(text), sorted(RAW & set(text))
        assert all(char.isprintable() or char in "\n\t" for char in text)
        assert not any(line.startswith(("verdict: GUARDED", "error: x")) for line in text.splitlines())


def test_fuzzed_images_give_an_answer_or_an_error_of_ours(
    served_bundle: Path, tmp_path: Path, amount: Callable[[int, int], int], figures: Figures
) -> None:
    """Half of them with warnings as errors; in a process of its own, so that the peak is theirs alone."""
    count = amount(1500, 20_000)
    command = [sys.executable, SCRIPT, served_bundle, tmp_path, count, 0]
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    counts = json.loads(run.stdout)
    assert counts["images"] == counts["predictions"] + counts["errors"] == count
    assert min(counts["predictions"], counts["errors"]) > count / 20
    assert not (tmp_path / "canary").exists()
    # two decoders, each with 80 million pixels of up to 4 bytes
    assert counts["rise"] < 2 * 80_000_000 * 4 / 2**20 + 100
    figures.add("images", "fuzzed images", counts["images"])
    figures.add("images", "of them answered", counts["predictions"])
    figures.add("images", "of them refused by an error of our tree", counts["errors"])
    figures.add("images", "anything else", 0)
    figures.add("images", "rise of the peak memory with the default limits, MiB", counts["rise"])


def test_a_bomb_costs_what_the_limits_allow(tiny_bundle: Path, tmp_path: Path, figures: Figures) -> None:
    """Limits are arguments: with a million pixels the same bombs cost next to nothing."""
    guard = GuardedClassifier.load(tiny_bundle, limits=ImageLimits(max_pixels=1_000_000, max_bytes=1 << 20))
    small = image_fuzz.seeds()["PNG"]
    bombs = [*image_fuzz.specials(tmp_path), small + bytes(1 << 20), image_fuzz.png_claim(1_001, 1_000)]
    failed: list[str | None] = []
    risen = round(rise(lambda: failed.extend(answer.error for answer in guard.predict(bombs))))
    assert failed[-1] == "an image of 1001 x 1000 is over the limit of 1,000,000 pixels"
    assert failed[-2] == "the file is over the limit of 1,048,576 bytes"
    assert risen < 64
    figures.add("images", "the same for bombs with a limit of 1,000,000 pixels, MiB", risen)


def test_an_array_that_repeats_a_few_bytes_is_not_copied_out(tiny_bundle: Path) -> None:
    guard = GuardedClassifier.load(tiny_bundle)
    claim = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (100_000, 100_000, 3))
    with pytest.raises(ImageError, match="over the limit of 80,000,000 pixels"):
        guard.predict(claim)


KINDS = st.sampled_from([np.uint8, np.int8, np.float32, np.float64, np.bool_, np.int64, np.complex64])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=9) | st.just((8, 8, 3))
PICTURES = arrays.arrays(np.uint8, st.tuples(st.integers(0, 40), st.integers(0, 40), st.just(3)))
ARRAYS = st.one_of(PICTURES, KINDS.flatmap(lambda kind: arrays.arrays(kind, SHAPES)))


@pytest.fixture(scope="module")
def guard(pristine_bundle: Path) -> GuardedClassifier:
    return GuardedClassifier.load(pristine_bundle)


def test_arrays_of_any_kind_and_shape(
    guard: GuardedClassifier, amount: Callable[[int, int], int], figures: Figures
) -> None:
    examples = amount(150, 5000)

    @given(ARRAYS)
    @example(np.full((8, 8, 3), np.nan))
    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None)
    def check(array: np.ndarray) -> None:
        (listed,) = guard.predict([array])
        assert isinstance(listed, Prediction)
        if listed.error is None:
            assert guard.predict(array) == listed
            return
        with pytest.raises(CbptGuardError) as caught:
            guard.predict(array)
        assert str(caught.value) == listed.error

    check()
    figures.add("images", "arrays drawn by hypothesis", examples)


def relabelled(folder: Path, labels: list[str]) -> Path:
    """The tiny bundle under other class names, its manifest made anew."""
    (folder / "labels.json").write_text(json.dumps(labels))
    manifest = tiny_manifest()
    suspect = Suspect(label=labels[0], index=0, threshold=manifest.rule.suspects[0].threshold)
    rule = manifest.rule.model_copy(update={"suspects": (suspect,)})
    write_manifest(folder, manifest.model_copy(update={"rule": rule}))
    return folder


def test_class_names_reach_no_terminal_raw(
    tiny_bundle: Path, tmp_path: Path, amount: Callable[[int, int], int], figures: Figures
) -> None:
    """predict, inspect, verify and evaluate of a bundle whose classes are called whatever hypothesis thinks of."""
    tmp_path.joinpath("red.png").write_bytes(image_fuzz._file(Image.new("RGB", (40, 40), "red"), "PNG"))
    listing, examples = tmp_path / "list.csv", amount(12, 400)
    listing.write_text("path,label\nred.png,red\nred.png,green\n")

    @given(st.lists(NAMES, min_size=len(LABELS), max_size=len(LABELS), unique=True))
    @example(list(NASTY[:5]))
    @example(list(NASTY[5:]))
    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None)
    def check(labels: list[str]) -> None:
        bundle = relabelled(tiny_bundle, labels)
        for arguments in (
            ("predict", bundle, tmp_path / "red.png"),
            ("predict", bundle, tmp_path / "red.png", "--json"),
            ("inspect", bundle),
            ("inspect", bundle, "--json"),
            ("verify", bundle),
            ("evaluate", bundle, "--data", listing),
        ):
            found = cli(*arguments)
            assert found.exit_code in (0, 2), found.stderr
            assert_tame(found.stdout, found.stderr)
        first = cli("predict", bundle, tmp_path / "red.png").stdout
        assert first.count("\n") == 1

    check()
    figures.add("images", "sets of class names through the commands", examples)


def test_what_a_check_says_reaches_no_terminal_raw(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No check of today quotes a bundle's own words; one of tomorrow might."""
    from cbpt_guard import export

    report = export.VerifyReport("sha256:0", tuple(export.Check(name, name) for name in NASTY))
    monkeypatch.setattr(export, "verify", lambda *_, **__: report)
    found = cli("verify", tiny_bundle)
    assert found.exit_code == 0
    assert_tame(found.stdout)


def test_names_in_a_csv_reach_no_terminal_raw(
    tiny_bundle: Path, tmp_path: Path, amount: Callable[[int, int], int]
) -> None:
    """evaluate on labels, and on file names, that are formulas and terminal codes: errors that name them tamely."""

    @given(st.lists(NAMES, min_size=2, max_size=4, unique=True), st.booleans())
    @example(list(NASTY[:4]), True)
    @example(list(NASTY), False)
    @settings(max_examples=amount(20, 500), deadline=None, suppress_health_check=QUIET, database=None)
    def check(names: list[str], as_labels: bool) -> None:
        with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label"])
            if as_labels:
                rows.writerows([f"{number}.png", name] for number, name in enumerate(names))
            else:
                rows.writerows([name, LABELS[number % 2]] for number, name in enumerate(names))
        found = cli("evaluate", tiny_bundle, "--data", tmp_path / "list.csv")
        assert found.exit_code == 2
        assert_tame(found.stdout, found.stderr)

    check()


def test_purify_export_and_the_card_show_class_names_tamely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run under nasty names: its tables, its bundle, its model card, and what `inspect` says of both."""
    import small_runs

    from cbpt_guard.cli.purify import show_run
    from cbpt_guard.defense.run import PurifyRun
    from cbpt_guard.export import export

    monkeypatch.setattr(small_runs, "CLASSES", NASTY[:5])
    run = small_runs.write_run(tmp_path / "purified", verdict="not guarded")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["verdict"]["reasons"] = [f"ASR of {name}" for name in NASTY]
    record["warnings"] = list(NASTY)
    record["data"]["without_images"] = list(NASTY[:2])
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    show_run(PurifyRun.open(run))
    assert_tame(capsys.readouterr().err)
    bundle = export(run, tmp_path / "bundle", allow_unguarded=True)
    for arguments in (("inspect", run), ("inspect", bundle), ("inspect", run, "--json"), ("verify", bundle)):
        found = cli(*arguments)
        assert found.exit_code == 0, found.stderr
        assert_tame(found.stdout, found.stderr)
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert_tame(card)
    for markup in ("<script>", "![x](", "[bold red]", "http://evil/x.png)"):
        assert markup not in card
    assert all(name not in (bundle / "sbom.cdx.json").read_text(encoding="utf-8") for name in NASTY[:2])


@given(st.lists(NAMES, min_size=1, max_size=3))
@example(list(NASTY))
@settings(max_examples=100, deadline=None)
def test_tables_of_evidence_show_class_names_tamely(names: list[str]) -> None:
    """A target is a class, whose name comes from a folder; a line's other texts are as little trusted."""
    pytest.importorskip("torch")
    from lines import line

    from cbpt_guard.bench.summary import summary
    from cbpt_guard.bench.table import table

    lines = [line(target=name, verdict=name, seed=seed) for seed, name in enumerate(names)]
    own = [line(implant=names[0], target=names[0]), line(dataset=names[0], defense=names[0])]
    for text in (table(lines), table(own[:1]), summary(lines), summary(own)):
        assert_tame(text)
        rows = [row for row in text.splitlines() if row.startswith("|")]
        assert all(re.search(r"(?<!\\)[<`\[]", row) is None for row in rows)
    (head, _, *body) = [row for row in table(lines).splitlines() if row.startswith("| ") and "Machine" not in row][:3]
    assert len(re.findall(r"(?<!\\)\|", body[0])) == head.count("|")


@given(NAMES)
@settings(max_examples=300, deadline=None)
def test_escaping_leaves_nothing_active(name: str) -> None:
    pytest.importorskip("torch")
    from cbpt_guard.export.card import escaped

    assert one_line(name).isprintable()
    shown = escaped(name)
    assert shown == "" or shown.isprintable()
    assert "<" not in shown.replace("\\<", "")
    assert "[" not in shown.replace("\\[", "")


TOML = st.one_of(
    st.text(max_size=200),
    st.sampled_from(
        ["a = " + "[" * 5000, "a = " + "1" * 5000, "[a]\n" * 2, "a = nan", "\ufeffa=1", "[inversion]\nbatch = 1e400"]
    ),
    st.tuples(
        st.sampled_from(["inversion", "tuning", "rule", "verdict", "x"]),
        st.sampled_from(["batch", "epochs", "name", "found_asr", "learning_rate", "candidates", "y"]),
        st.one_of(
            st.integers(-(10**30), 10**30).map(str),
            st.floats().map(str),
            st.booleans().map(lambda value: str(value).lower()),
            st.text(st.characters(codec="utf-8"), max_size=10).map(json.dumps),
            st.sampled_from(["[]", "{}", "nan", "inf", "-inf", "1979-05-27", "[[1]]"]),
        ),
    ).map(lambda parts: f"[{parts[0]}]\n{parts[1]} = {parts[2]}\n"),
)


def test_settings_of_any_kind(tmp_path: Path, amount: Callable[[int, int], int], figures: Figures) -> None:
    """Frozen settings with finite numbers in bounds, or an InputError; never another exception."""
    pytest.importorskip("torch")
    from cbpt_guard.defense.settings import Settings

    examples, path = amount(200, 5000), tmp_path / "settings.toml"

    @given(TOML)
    @example("[inversion]\nbatch = 64\n")
    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None)
    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            found = Settings.read(path)
        except InputError:
            return
        assert tomllib.loads(text) is not None
        assert Settings.model_validate_json(found.model_dump_json()) == found

    check()
    figures.add("images", "settings files drawn by hypothesis", examples)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_manifests_of_any_kind(tiny_bundle: Path, amount: Callable[[int, int], int], figures: Figures) -> None:
    """A manifest with one field replaced by anything: a Manifest, or a BundleError."""
    whole: dict[str, Any] = json.loads((tiny_bundle / "manifest.json").read_text())
    examples = amount(200, 5000)

    @given(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=2), JSON, st.booleans())
    @settings(max_examples=examples, deadline=None, suppress_health_check=QUIET, database=None)
    def check(names: list[str], value: Any, added: bool) -> None:
        changed = {**whole, **dict.fromkeys(names, value)}
        if added:
            changed[names[0] + "\x1b"] = value
        data = json.dumps(changed).encode("utf-8", "surrogatepass")
        with suppress(BundleError):
            assert isinstance(parse_manifest(data), Manifest)

    for raw in (b"", b"[" * 100_000, b"1" * 5000, b"\xff", b'{"format": 1}', b'{"format": ' + b"9" * 5000 + b"}"):
        with pytest.raises(BundleError):
            parse_manifest(raw)
    check()
    figures.add("images", "manifests drawn by hypothesis", examples)


def test_folders_and_lists_of_strangers(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """A CSV or a class file of any bytes: a listing, or an InputError."""
    path = tmp_path / "list.csv"

    @given(st.binary(max_size=200), st.booleans())
    @example(b"path,label\n/dev/zero,a\n\x00,b\n", False)
    @example(b'path,label\n"' + b"x" * 200_000, False)
    @settings(max_examples=amount(150, 3000), deadline=None, suppress_health_check=QUIET, database=None)
    def check(data: bytes, head: bool) -> None:
        path.write_bytes(b"path,label\n" * head + data)
        try:
            assert len(list_images(path).classes) >= 2
        except InputError:
            return

    check()


def test_a_folder_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Linux takes any bytes for a name; JSON, the manifest and the tokenizer do not."""
    for name in (b"cat", b"\xff\xfe"):
        folder = Path(tmp_path / "data" / name.decode("utf-8", "surrogateescape"))
        folder.mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(folder / "1.png")
    with pytest.raises(InputError, match="is no UTF-8 text; rename its folder"):
        list_images(tmp_path / "data")


def test_an_image_whose_name_is_no_text_can_be_left_out(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from cbpt_guard.defense.data import load_images

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 30)).save(tmp_path / name / "1.png")
    (tmp_path / "cat" / b"\xff.png".decode("utf-8", "surrogateescape")).write_bytes(b"no image")
    read = load_images(list_images(tmp_path), tiny_manifest().preprocess, skip_bad=True)
    assert len(read.skipped) == 1
    assert read.skipped[0].encode()


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path) -> Any:
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)  # long forms leave thousands of small files otherwise
