"""Settings: read from TOML, checked by name, frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cbpt_guard.defense.settings import Settings
from cbpt_guard.errors import InputError


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_bytes(text.encode())
    return path


def test_what_a_file_does_not_name_keeps_its_default(tmp_path: Path) -> None:
    read = Settings.read(toml(tmp_path, '[tuning]\nepochs = 3\n[rule]\nname = "prompts"\n'))
    assert (read.tuning.epochs, read.rule.name) == (3, "prompts")
    assert read.inversion == Settings().inversion
    assert read.tuning == Settings().tuning.model_copy(update={"epochs": 3})
    assert Settings.read(toml(tmp_path, "")) == Settings()


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "purify.md").read_text(encoding="utf-8")
    (example,) = page.split("```toml\n")[1:]
    read = Settings.read(toml(tmp_path, example.partition("```")[0]))
    assert (read.inversion.stands_out, read.rule.clean_deviations, read.verdict.false_alarms) == (6.0, 2.5, 0.02)


def test_settings_survive_their_record() -> None:
    assert Settings.model_validate(Settings().model_dump(mode="json")) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tuning]\nepoch = 3", "tuning.epoch: Extra inputs"),
        ("[tunning]\nepochs = 3", "tunning: Extra inputs"),
        ("epochs = 3", "epochs: Extra inputs"),
        ("[tuning]\nepochs = 0", "tuning.epochs: .* greater than or equal to 1"),
        ("[tuning]\nepochs = 1.5", "tuning.epochs: .*integer"),
        ('[tuning]\nlearning_rate = "fast"', "tuning.learning_rate: .*number"),
        ("[tuning]\nlearning_rate = inf", "tuning.learning_rate: .*finite"),
        ("[tuning]\nlearning_rate = nan", "tuning.learning_rate: "),
        ("[tuning]\nheld_out = 1.0", "tuning.held_out: .* less than 1"),
        ("[inversion]\nepsilon = -0.1", "inversion.epsilon: .* greater than 0"),
        ('[rule]\nname = "swich"', "rule.name: .*'switch' or 'prompts'"),
        ("[verdict]\nfound_asr = 5", "verdict.found_asr: .* less than or equal to 1"),
        ("tuning = 3", "tuning: "),
        ("[inversion]\nstands_out = 1e200", r"inversion\.stands_out: .*1000000"),
    ],
)
def test_an_unknown_or_impossible_setting_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"settings\.toml: {message}"):
        Settings.read(toml(tmp_path, text))


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tuning\.epochs.*rule\.nme"):
        Settings.read(toml(tmp_path, "[tuning]\nepochs = 0\n[rule]\nnme = 1\n"))


@pytest.mark.parametrize("text", ["tuning", "[tuning\nepochs = 3", "a = 1\na = 2"])
def test_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"settings\.toml: this is no TOML"):
        Settings.read(toml(tmp_path, text))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Settings.read(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        Settings.read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="this is no TOML"):
        Settings.read(tmp_path / "binary")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().tuning.epochs = 5
