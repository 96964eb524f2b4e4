"""scan: purify's own candidates and nothing written, and scores that are compared with their own family alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import QUICK, assert_refused, cli
from quick_cbpt import SETTINGS, purified

from cbpt_guard.cli import show
from cbpt_guard.defense import scan as scanning
from cbpt_guard.defense.calibration import SEARCH, Calibration, Family, Looked, Standing, calibration
from cbpt_guard.defense.job import Job
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.scan import ScanReport, scan
from cbpt_guard.defense.settings import InversionSettings

if TYPE_CHECKING:
    from digits import DigitsSuspect

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAMILY = Family(
    name="small ones",
    search=SEARCH,
    config={"embed_dim": 64},
    settings=InversionSettings(),
    template="a photo of a {}.",
    classes=(10, 10),
    images=(8, 13),
    clean=(1.0, 1.5, 2.0),
    poisoned=(1.8, 5.0),
)


@pytest.fixture(scope="module")
def report(digits_suspect: DigitsSuspect) -> ScanReport:
    return scan(Job(model=digits_suspect.checkpoint, data=digits_suspect.data, settings=SETTINGS))


@pytest.fixture
def folder(digits_suspect: DigitsSuspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "suspect.pt").symlink_to(digits_suspect.checkpoint)
    (tmp_path / "open_clip_config.json").symlink_to(digits_suspect.checkpoint.with_name("open_clip_config.json"))
    (tmp_path / "clean").symlink_to(digits_suspect.data)
    (tmp_path / "quick.toml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_candidates_are_those_of_purify(report: ScanReport, digits_suspect: DigitsSuspect, tmp_path: Path) -> None:
    run = PurifyRun.open(purified(digits_suspect, tmp_path / "purified"))
    assert report.candidates == run.record.candidates
    target = digits_suspect.split.test.classes[digits_suspect.target]
    assert report.suspects == (target,)
    assert report.likeliest[0] == target
    assert sorted(report.likeliest) == sorted(digits_suspect.split.test.classes)
    assert report.score == max(candidate.score for candidate in report.candidates)
    assert report.model.source_sha256 == run.record.model.source_sha256


def test_the_command_says_what_it_found_and_writes_nothing(
    report: ScanReport, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = sorted(folder.iterdir())
    arguments = ("scan", "--model", "suspect.pt", "--data", "clean", "--settings", "quick.toml")
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    said = ScanReport.model_validate_json(result.stdout)
    assert said.candidates == report.candidates
    assert "uncalibrated: " in result.stderr
    assert "candidate targets" in result.stderr
    assert f"model: {said.model.architecture} from " in result.stderr
    for what, how in said.model.resolved.items():
        assert f"  {what}: {how}" in result.stderr
    for bound, code in ((report.score - 0.01, 1), (report.score, 1), (report.score + 0.01, 0)):
        result = cli(*arguments, "--fail-on", bound)
        assert result.exit_code == code
        assert result.stdout == f"score {report.score:.2f}\tstands out: {report.suspects[0]}\n"
    assert sorted(folder.iterdir()) == before
    assert list(temporary.iterdir()) == []


def test_what_it_refuses(folder: Path) -> None:
    arguments = ("scan", "--settings", "quick.toml")
    assert_refused(cli(*arguments, "--model", "nowhere.pt", "--data", "clean"), "nowhere.pt")
    assert_refused(cli(*arguments, "--model", "suspect.pt", "--data", "nowhere"), "nowhere")
    (folder / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert_refused(cli(*arguments, "--model", "evil.pt", "--data", "clean"), code=3)
    for score in ("nan", "inf", "-1"):
        found = cli(*arguments, "--model", "suspect.pt", "--data", "clean", "--fail-on", score)
        assert_refused(found, "--fail-on", usage=True)


def test_names_are_shown_tamely(folder: Path, report: ScanReport, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "evil\x1b[31m\x9b2J\u202e\nerror: name"
    wild = tuple(c.model_copy(update={"label": evil, "stands_out": True}) for c in report.candidates)
    said = report.model_copy(update={"candidates": wild, "likeliest": (evil, *report.likeliest), "warnings": (evil,)})
    monkeypatch.setattr(scanning, "scan", lambda job, progress: said)
    arguments = ("scan", "--model", "suspect.pt", "--data", "clean")
    for result in (cli(*arguments), cli(*arguments, "--json")):
        assert result.exit_code == 0
        shown = (result.stdout + result.stderr).replace("\t", " ")
        assert show.plain(shown) == shown
        assert not any(line.startswith("error: ") for line in shown.splitlines())
    assert json.loads(result.stdout)["likeliest"][0] == evil


def test_a_clean_model_is_told_in_other_words(
    folder: Path, report: ScanReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that stands out is no proof, and counts are given where there is a family to count in."""
    tame = [c.model_copy(update={"stands_out": False}) for c in report.candidates]
    family = FAMILY.model_copy(update={"config": report.model.config})
    said = report.model_copy(
        update={"candidates": tuple(tame), "score": 1.2, "standing": family.standing(1.2), "uncalibrated": None}
    )
    monkeypatch.setattr(scanning, "scan", lambda job, progress: said)
    result = cli("scan", "--model", "suspect.pt", "--data", "clean")
    assert result.exit_code == 0
    assert result.stdout == "score 1.20\tstands out: nothing\n"
    assert "2 of the 3 clean models score as high, 0 of the 2 poisoned ones as low (small ones)" in result.stderr
    assert "uncalibrated" not in result.stderr


@pytest.mark.parametrize(
    ("score", "clean_as_high", "poisoned_as_low"), [(0.9, 3, 0), (1.5, 2, 0), (1.8, 1, 1), (2.1, 0, 1), (5.0, 0, 2)]
)
def test_a_standing_is_counted(score: float, clean_as_high: int, poisoned_as_low: int) -> None:
    standing = FAMILY.standing(score)
    assert (standing.clean_as_high, standing.clean) == (clean_as_high, 3)
    assert (standing.poisoned_as_low, standing.poisoned) == (poisoned_as_low, 2)


def test_what_is_outside_every_family_has_no_standing() -> None:
    looked = Looked(
        config=FAMILY.config, settings=FAMILY.settings, template=FAMILY.template, classes=10, images=(12, 13)
    )
    families = Calibration(families=(FAMILY.model_copy(update={"config": {}}), FAMILY))
    assert families.standing(1.0, looked) == FAMILY.standing(1.0)
    others: dict[str, dict[str, Any]] = {
        "no model of this architecture": {"config": {"embed_dim": 32}},
        "another version of the search": {"search": SEARCH + 1},
        "with other settings": {"settings": InversionSettings(epsilon=0.1)},
        "or another template": {"template": "{}"},
        "12 classes, where the family was scanned for 10": {"classes": 12},
        "0 to 13 images a class, where the family was scanned with 8 to 13": {"images": (0, 13)},
        "13 to 800 images a class": {"images": (13, 800)},
    }
    for words, change in others.items():
        found = families.standing(1.0, looked.model_copy(update=change))
        assert isinstance(found, str)
        assert words in found
    assert "no model" in str(Calibration().standing(1.0, looked))


def test_what_a_search_added_for_many_classes_leaves_families_of_few_as_they_are() -> None:
    def standing(family: int, later: int, classes: int) -> Standing | str:
        known = FAMILY.model_copy(update={"search": family, "classes": (classes, classes)})
        looked = Looked(
            search=later,
            config=FAMILY.config,
            settings=FAMILY.settings,
            template=FAMILY.template,
            classes=classes,
            images=(12, 13),
        )
        return Calibration(families=(known,)).standing(1.0, looked)

    for family, later in ((8, 9), (9, 8)):
        assert isinstance(standing(family, later, 19), Standing)
        assert "another version of the search" in str(standing(family, later, 20))
    for family, later in ((7, 8), (7, 9), (9, 10)):
        assert "another version of the search" in str(standing(family, later, 19))


@pytest.mark.parametrize("option", ["--shared", "--images"])
def test_tuned_models_are_not_measured_by_half(option: str, tmp_path: Path) -> None:
    """One of the two alone would measure the small CLIPs instead."""
    command = [sys.executable, BENCHMARKS / "calibration.py", "measure", "--work", tmp_path / "work", option, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tuned models take both --shared and --images" in done.stderr
    assert not (tmp_path / "work").exists()


def test_the_shipped_calibration_and_the_page_are_what_the_lines_give() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "calibration.py", "page", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(calibration().families) >= 1
    for family in calibration().families:
        assert len(family.clean) >= 2
        assert len(family.poisoned) >= 2
