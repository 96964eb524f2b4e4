"""purify as a command, on a small CLIP that really is poisoned: what it refuses, writes, prints and answers."""

from __future__ import annotations

import csv
import fcntl
import functools
import json
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from commands import QUICK, assert_refused, cli, write_earlier
from PIL import Image
from safetensors.torch import load_file
from started import without_rights

from cbpt_guard.cli import show
from cbpt_guard.defense import purify as purifying
from cbpt_guard.defense import suspect, workshop
from cbpt_guard.defense.anchored import anchored_rows
from cbpt_guard.defense.architecture import resolve_model
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.data import list_images, load_triggered
from cbpt_guard.defense.edits import edits
from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.head import GuardedHead, Head, TriggerTest
from cbpt_guard.defense.job import Job
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import TEMPLATE, AnchorSettings, Settings
from cbpt_guard.defense.stage2 import guard
from cbpt_guard.defense.suspect import ModelFlags
from cbpt_guard.defense.verdict import Attacked, measure
from cbpt_guard.errors import InputError

if TYPE_CHECKING:
    from digits import DigitsSuspect

FILES = {
    "model.safetensors",
    "samples.npz",
    "prompts.safetensors",
    "heads.safetensors",
    "triggers.safetensors",
    "beside.safetensors",
    "run.json",
    "metrics.json",
    "pictures",
}
Change = Callable[[Path], list[object]]


@pytest.fixture(scope="module", autouse=True)
def one_reading() -> Any:
    """The suspect is read safely once for these tests: each reading starts a process that imports torch.

    For these alone: in other modules a path that was read before would no longer be read at all.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suspect, "read_checkpoint", functools.cache(suspect.read_checkpoint))
        yield


@pytest.fixture(scope="session")
def attacked(digits_suspect: DigitsSuspect, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Observed attack images: test digits that carry the trigger."""
    folder = tmp_path_factory.mktemp("attacked")
    test = digits_suspect.split.test
    others = test.images[test.labels != digits_suspect.target][:8].numpy()
    for number, image in enumerate(digits_suspect.trigger.apply(others)):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def folder(digits_suspect: DigitsSuspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in a folder of their own with links to model and data, and quick settings."""
    (tmp_path / "suspect").symlink_to(digits_suspect.folder)
    (tmp_path / "clean").symlink_to(digits_suspect.data)
    (tmp_path / "quick.toml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def guarded(
    digits_suspect: DigitsSuspect, attacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """One guarded run: its folder, its JSON and what stderr said; no test changes it."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "quick.toml").write_text(QUICK)
    result = cli(
        *("purify", "--model", digits_suspect.checkpoint, "--data", digits_suspect.data, "--out", folder / "purified"),
        *("--settings", folder / "quick.toml", "--triggered", attacked, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    return folder / "purified", json.loads(result.stdout), result.stderr


def purify(*arguments: object, data: object = "clean", model: object = "suspect/suspect.pt") -> Any:
    return cli("purify", "--model", model, "--data", data, "--settings", "quick.toml", *arguments)


def own_data(folder: Path) -> Path:
    """A copy of the clean images for one test to break."""
    return Path(shutil.copytree(folder / "clean", folder / "own"))


def heads(run: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "heads.safetensors")


# what is written and printed


def test_a_guarded_run_is_whole_and_answers_0(guarded: tuple[Path, dict[str, Any], str]) -> None:
    path, said, _ = guarded
    assert {item.name for item in path.iterdir()} == FILES
    page = (Path(__file__).parents[1] / "docs" / "purify.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"`{name}" not in page] == []
    assert [item.name for item in path.parent.iterdir() if item.name.startswith(".")] == []
    assert {item.suffix for item in (path / "pictures").iterdir()} == {".png"}
    run = PurifyRun.open(path)
    assert said == {"run": run.record.model_dump(mode="json"), "metrics": run.metrics.model_dump(mode="json")}
    assert run.record.verdict.name == "guarded"
    assert Settings.model_validate(said["run"]["settings"]).tuning.epochs == 4
    fresh = [item["against"] for item in said["metrics"]["triggers"] if item["origin"] == "fresh"]
    assert sorted(set(fresh)) == ["guarded", "original"]


def test_people_read_tables_and_the_verdict_on_stderr(guarded: tuple[Path, dict[str, Any], str]) -> None:
    stderr = guarded[2]
    for text in (
        "candidate targets",
        "fresh masked (guarded model) -> ",
        "fresh masked (original model) -> ",
        "ASR before",
        "PA prompts",
        "clean recall",
        "verdict: GUARDED",
        "pictures",
    ):
        assert text in stderr
    assert "architecture: open_clip_config.json beside the file" in stderr
    assert "Traceback" not in stderr


def test_observed_attack_images_name_the_target(
    guarded: tuple[Path, dict[str, Any], str], digits_suspect: DigitsSuspect
) -> None:
    said = guarded[1]
    target = digits_suspect.split.test.classes[digits_suspect.target]
    assert target in [item["label"] for item in said["run"]["suspects"]]
    observed = [item for item in said["metrics"]["triggers"] if item["origin"] == "observed"]
    assert [item["target"] for item in observed] == [target]
    assert observed[0]["asr_before"] == 1.0
    assert observed[0]["asr_after"] <= 0.05
    assert said["run"]["data"]["triggered_images"] == 8


def test_a_run_where_nothing_stands_out_is_kept_and_answers_1(folder: Path) -> None:
    strict = QUICK.replace("stands_out = 2.0", "stands_out = 1000.0")
    (folder / "quick.toml").write_text(strict)
    result = purify()
    assert (result.exit_code, result.stdout) == (1, "purified\n")
    assert "verdict: UNVERIFIED" in result.stderr
    assert "no class stands out: the default rule changes no answer" in result.stderr
    assert {item.name for item in Path("purified").iterdir()} == FILES
    assert_refused(cli("export"), "purified is unverified", "--allow-unguarded", code=1)
    assert not Path("bundle").exists()


def test_a_run_that_breaks_a_bound_is_not_guarded(folder: Path, guarded: tuple[Path, dict[str, Any], str]) -> None:
    """The bounds are settings; none can be kept by a rule that answers with untuned prompts."""
    weak = "[tuning]\nepochs = 1\nlearning_rate = 1e-12\n[rule]\nname = 'prompts'\n[verdict]\nfound_asr = 0.0\n"
    (folder / "quick.toml").write_text(QUICK.partition("[tuning]")[0] + weak)
    result = purify("--reuse", guarded[0])
    assert result.exit_code == 1, result.stderr
    assert "verdict: NOT GUARDED" in result.stderr
    assert "still succeeds on" in result.stderr


def test_the_rule_is_stored_and_built_into_the_graph(
    folder: Path, guarded: tuple[Path, dict[str, Any], str], digits_suspect: DigitsSuspect
) -> None:
    (folder / "quick.toml").write_text(QUICK + "[rule]\nname = 'prompts'\n")
    purify("--reuse", guarded[0])
    assert json.loads(Path("purified/run.json").read_text())["rule"] == "prompts"
    assert cli("export", "--allow-unguarded").exit_code == 0
    assert json.loads(cli("inspect", "bundle", "--json").stdout)["rule"]["name"] == "prompts"

    from cbpt_guard import GuardedClassifier

    outputs = GuardedClassifier.load("bundle").run(digits_suspect.split.test.images[:32].numpy())
    head = PurifyRun.open("purified").head()
    wanted = head.guarded.logits(torch.from_numpy(outputs.embedding))
    assert np.abs(outputs.logits - wanted.numpy()).max() < 1e-3
    assert np.abs(outputs.logits - outputs.logits_original).max() > 1e-2


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    shown = purify("--dry-run")
    assert shown.exit_code == 0
    for text in ("model: ", "data: 200 images of 10 classes", "would write: purified", "minutes", "MB"):
        assert text in shown.stdout
    planned = json.loads(purify("--dry-run", "--json", "--out", "else/where").stdout)
    assert planned["images"] == 200
    assert planned["memory_mb"] > 0
    assert planned["seconds"]["stage 1: inversion"] > 0
    assert sorted(folder.rglob("*")) == before


# classes, reuse, CSV


@pytest.mark.parametrize("name", ["triggers.safetensors", "beside.safetensors"])
def test_a_run_with_damaged_triggers_is_not_gone_on_with(
    folder: Path, guarded: tuple[Path, dict[str, Any], str], name: str
) -> None:
    """Of few classes no edit is used, but that is no reason to pass over a damaged file."""
    shutil.copytree(guarded[0], folder / "earlier")
    (folder / "earlier" / name).write_bytes(b"cut off")
    result = purify("--reuse", "earlier")
    assert result.exit_code == 2
    assert f"{name} is no trigger bank" in result.stderr
    assert not (folder / "purified").exists()


def test_a_new_class_list_needs_no_new_inversion(
    folder: Path, guarded: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in ("invert_toward", "invert_agnostic", "scan_targets"):
        real = getattr(workshop, name)
        monkeypatch.setattr(
            workshop,
            name,
            lambda *given, _real=real, _name=name, **how: (made.append((_name, how)), _real(*given, **how))[1],
        )
    (folder / "names.txt").write_text("nine\tthe digit nine\nten\n\nnaïve été\n")
    result = purify("--classes", "names.txt", "--reuse", guarded[0], "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    fresh = [name for name, how in made if how.get("budget") is None or name != "invert_toward"]
    assert fresh == []  # what was inverted attacks the finished guard, within the found trigger's budget
    misled = [how["against"] for _, how in made]
    assert sum(isinstance(one, GuardedHead) and one.rule == "switch" for one in misled) == len(misled) / 2 > 0
    planned = json.loads(purify("--reuse", guarded[0], "--dry-run", "--json", "--out", "other").stdout)
    assert planned["seconds"]["stage 1: inversion"] == 0
    names = [item["label"] for item in said["metrics"]["classes"]]
    folders = sorted(path.name for path in Path("clean").iterdir())
    assert names == [*("the digit nine" if name == "nine" else name for name in folders), "ten", "naïve été"]
    assert [item["label"] for item in said["run"]["suspects"]] == ["the digit nine"]
    assert said["run"]["data"]["without_images"] == ["ten", "naïve été"]
    assert "keep their original rows: ten, naïve été" in result.stderr
    tensors = heads("purified")
    assert torch.equal(tensors["guarded_rows"][10:], tensors["original_rows"][10:])
    assert not torch.equal(tensors["guarded_rows"][:10], tensors["original_rows"][:10])
    assert torch.allclose(tensors["original_rows"][:3], heads(guarded[0])["original_rows"][:3], atol=1e-6)


def test_a_csv_equals_the_folder(folder: Path, guarded: tuple[Path, dict[str, Any], str]) -> None:
    with Path("images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "path"])
        for path in sorted(Path("clean").rglob("*.png"), reverse=True):
            writer.writerow([path.parent.name, path])
    assert purify("--reuse", guarded[0], "--out", "from-csv", data="images.csv").exit_code == 0
    assert purify("--reuse", guarded[0], "--out", "from-folder").exit_code == 0
    ours, theirs = heads("from-csv"), heads("from-folder")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_corrupt_images_stop_or_are_left_out_by_name(
    folder: Path, guarded: tuple[Path, dict[str, Any], str], attacked: Path
) -> None:
    data = own_data(folder)
    for name in ("eight", "five"):
        next((data / name).iterdir()).write_bytes(b"\x89PNG no more")
    assert_refused(purify(data="own"), "2 images cannot be read", "own/eight/", "own/five/", "--skip-bad")
    assert not list(folder.glob(".purified*"))
    shutil.copytree(attacked, folder / "attack")
    (folder / "attack" / "bad.png").write_bytes(b"\x89PNG no more")
    result = purify("--skip-bad", "--reuse", guarded[0], "--triggered", "attack", "--json", data="own")
    assert result.exit_code == 0, result.stderr
    assert "3 images could not be read and were left out" in result.stderr
    told = json.loads(result.stdout)["run"]["data"]
    assert [item.partition(":")[0].rpartition("/")[0] for item in told["skipped"]] == [
        "own/eight",
        "own/five",
        "attack",
    ]
    assert told["triggered_images"] == len(list(attacked.iterdir()))


def test_names_of_strangers_are_shown_harmlessly(folder: Path, guarded: tuple[Path, dict[str, Any], str]) -> None:
    data = own_data(folder)
    (data / "nine").rename(data / "\x1b[2J[red]nine\nverdict: GUARDED")
    (data / "zzz\nverdict: GUARDED").mkdir()
    result = purify("--reuse", guarded[0], data="own")
    assert Path("purified").is_dir(), result.stderr
    assert not set(result.output) & set("\x1b\r\x07")
    assert "[2J[red]nine verdict: GUARDED" in result.stderr
    shown = cli("inspect", "purified").stdout
    lines = (result.stderr + shown).splitlines()
    assert sum(line.startswith("verdict: GUARDED") for line in lines) == (result.exit_code == 0)


# what is refused


def _empty(folder: Path) -> list[object]:
    (folder / "own").mkdir()
    return ["--data", "own"]


def _no_images(folder: Path) -> list[object]:
    for name in ("a", "b"):
        (folder / "own" / name).mkdir(parents=True)
    return ["--data", "own"]


def _one_class(folder: Path) -> list[object]:
    for path in sorted(own_data(folder).iterdir())[1:]:
        shutil.rmtree(path)
    return ["--data", "own"]


def _with(name: str, text: str, *arguments: object) -> Change:
    def write(folder: Path) -> list[object]:
        (folder / name).write_text(text)
        return [*arguments, name]

    return write


def _given(*arguments: object) -> Change:
    return lambda folder: list(arguments)


def _output(folder: Path) -> list[object]:
    (folder / "purified").mkdir()
    (folder / "purified" / "mine.txt").write_text("kept")
    return []


def _output_file(folder: Path) -> list[object]:
    (folder / "taken").write_text("kept")
    return ["--out", "taken", "--force"]


def _others_output(folder: Path) -> list[object]:
    _output(folder)
    return ["--force"]


def _reused_as_output(folder: Path) -> list[object]:
    write_earlier(folder / "purified")
    return ["--reuse", "purified", "--force"]


def _data_as_output(folder: Path) -> list[object]:
    shutil.copytree(folder / "clean", folder / "own")
    write_earlier(folder / "run")
    (folder / "own").rename(folder / "run" / "own")
    return ["--data", "run/own", "--out", "run", "--force"]


def _bad_attack_image(folder: Path) -> list[object]:
    (folder / "attack").mkdir()
    (folder / "attack" / "bad.png").write_text("no image")
    return ["--triggered", "attack"]


def _truncated(folder: Path) -> list[object]:
    whole = (folder / "suspect" / "suspect.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    return ["--model", "half.pt"]


def _emptied(folder: Path) -> list[object]:
    (folder / "half.pt").touch()
    return ["--model", "half.pt"]


def _shuffled(folder: Path) -> list[object]:
    """Every class holds images of all of them."""
    for number, path in enumerate(sorted((folder / "clean").rglob("*.png"))):
        target = folder / "own" / f"{number % 10}" / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    names = sorted(path.name for path in (folder / "clean").iterdir())
    for number, name in enumerate(names):
        (folder / "own" / str(number)).rename(folder / "own" / name)
    return ["--data", "own"]


def _clean_attack_images(folder: Path) -> list[object]:
    (folder / "attack").mkdir()
    shutil.copy(next((folder / "clean" / "one").iterdir()), folder / "attack")
    return ["--triggered", "attack"]


REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing model": (_given("--model", "nowhere.pt"), ("nowhere.pt", "no such file")),
    "model folder without weights": (_given("--model", "clean"), ("clean holds no weights file",)),
    "truncated checkpoint": (_truncated, ("half.pt",)),
    "empty checkpoint": (_emptied, ("half.pt", "empty")),
    "text as a checkpoint": (_with("model.pt", "no weights", "--model"), ("model.pt",)),
    "missing data": (_given("--data", "nowhere"), ("nowhere does not exist", "class folders", "CSV")),
    "empty folder": (_empty, ("own holds no class folders", "<class name>/<image>")),
    "no images": (_no_images, ("own holds class folders but no image",)),
    "one class": (_one_class, ("one class ('eight')", "two or more")),
    "bad csv": (_with("x.csv", "file,class\na,b\n", "--data"), ("x.csv needs the columns path and label",)),
    "csv of nothing": (_with("x.csv", "path,label\na.png,a\nb.png,b\n", "--data"), ("2 images cannot be read",)),
    "duplicate class": (_with("n.txt", "one\ttwo\n", "--classes"), ("'two' stands twice", "--classes")),
    "added twice": (_with("n.txt", "ten\nten\n", "--classes"), ("'ten' stands twice",)),
    "unknown class": (_with("n.txt", "dog\thound\n", "--classes"), ("renames 'dog'", "no such class", "'eight'")),
    "missing class file": (_given("--classes", "nowhere.txt"), ("nowhere.txt cannot be read",)),
    "unknown setting": (_with("s.toml", "[tuning]\nepoch = 3\n", "--settings"), ("s.toml", "tuning.epoch")),
    "impossible setting": (_with("s.toml", "[tuning]\nepochs = 0\n", "--settings"), ("tuning.epochs", "1")),
    "no toml": (_with("s.toml", "[tuning", "--settings"), ("s.toml: this is no TOML",)),
    "missing settings": (_given("--settings", "nowhere.toml"), ("nowhere.toml cannot be read",)),
    "template without a name": (_given("--template", "a photo"), ("'a photo' needs exactly one {}",)),
    "template without context": (_given("--template", "{}"), ("no word before the class name", "a photo of a {}")),
    "long class name": (_with("n.txt", "one\t" + "one " * 80, "--classes"), ("does not fit into the model's 16",)),
    "unknown device": (_given("--device", "abacus"), ("the device 'abacus' is not available",)),
    "unknown architecture": (_given("--arch", "ViT-Z-1"), ("ViT-Z-1",)),
    "missing run to reuse": (_given("--reuse", "nowhere"), ("nowhere is no run directory",)),
    "missing attack images": (_given("--triggered", "nowhere"), ("nowhere is no folder",)),
    "one attack image": (_clean_attack_images, ("1 observed attack images share no answer",)),
    "existing output": (_output, ("purified exists already", "--force", "--out")),
    "another's folder as output": (_others_output, ("purified holds no run.json", "not replaced", "--out")),
    "an output that is reused": (_reused_as_output, ("purified holds `--reuse` purified", "--out")),
    "an output around the images": (_data_as_output, ("run holds `--data` run/own", "--out")),
    "no name as output": (_given("--out", ".", "--force"), (". is no name for a new folder",)),
    "a bad attack image": (_bad_attack_image, ("1 image cannot be read", "attack/bad.png", "--skip-bad")),
    "a file as output": (_output_file, ("taken is a file",)),
    "a file above the output": (_given("--out", "quick.toml/purified"), ("quick.toml is a file",)),
    "chance level": (_shuffled, ("chance is 10.0 %", "--classes", "--template", "--preprocess", "--tokenizer")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(case: str, folder: Path) -> None:
    change, words = REFUSED[case]
    arguments = change(folder)
    before = sorted(folder.rglob("*"))
    assert_refused(purify(*arguments), *words)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "case",
    [
        "missing data",
        "unknown class",
        "chance level",
        "unknown setting",
        "existing output",
        "another's folder as output",
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(case: str, folder: Path) -> None:
    change, words = REFUSED[case]
    assert_refused(purify(*change(folder), "--dry-run"), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(folder: Path) -> None:
    assert_refused(purify("--device", "cuda"), "the device 'cuda' is not available")


@pytest.mark.parametrize(("option", "value"), [("--shots", 0), ("--seed", -1), ("--threads", 0)])
def test_impossible_numbers_are_usage_errors(option: str, value: int, folder: Path) -> None:
    assert_refused(purify(option, value), option, usage=True)


class _Hostile:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("owned", "w")


def test_a_hostile_checkpoint_answers_3_and_runs_nothing(folder: Path) -> None:
    torch.save({"state_dict": _Hostile()}, "hostile.pt", pickle_module=pickle)
    assert_refused(purify(model="hostile.pt"), "hostile.pt", "io.open", code=3)
    assert not Path("owned").exists()
    assert not list(folder.glob(".purified*"))


# what the verdict rests on


def test_a_run_says_which_search_found_its_candidates(folder: Path, guarded: tuple[Path, dict[str, Any], str]) -> None:
    """Its own, or that of the run whose triggers it took: here one from before searches were numbered."""
    assert guarded[1]["run"]["search"] == SEARCH
    earlier = Path(shutil.copytree(guarded[0], folder / "earlier"))
    record = json.loads((earlier / "run.json").read_text(encoding="utf-8"))
    del record["search"]
    (earlier / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert json.loads(purify("--reuse", "earlier", "--json").stdout)["run"]["search"] is None


def test_one_image_a_class_leaves_nothing_to_judge_by(folder: Path, guarded: tuple[Path, dict[str, Any], str]) -> None:
    result = purify("--reuse", guarded[0], "--shots", 1, "--json")
    said = json.loads(result.stdout)
    assert set(said["run"]["data"]["shots"].values()) == {1}
    assert (said["metrics"]["held_out"], said["metrics"]["images"]) == (False, 10)
    assert result.exit_code == 1
    assert said["run"]["verdict"]["name"] != "guarded"


def test_a_guard_that_loses_the_zero_shot_accuracy_is_told_so(
    folder: Path, guarded: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbpt_guard.defense.purify.least_accuracy", lambda *_: 1.01)
    result = purify("--reuse", guarded[0], "--json")
    assert result.exit_code == 1
    verdict = json.loads(result.stdout)["run"]["verdict"]
    assert verdict["name"] == "not guarded"
    assert verdict["reasons"] == ["the zero-shot accuracy on held-out images was not kept"]


def test_observed_images_are_judged_on_the_half_that_was_not_fitted_and_so_are_fresh_waves_and_edits(
    folder: Path,
    guarded: tuple[Path, dict[str, Any], str],
    attacked: Path,
    digits_suspect: DigitsSuspect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, size = digits_suspect.target, digits_suspect.clip.image_size
    heard = FoundTrigger("wave", target, torch.zeros(3, size, size), None)
    seen: dict[str, Any] = {}

    def fitting(*arguments: Any) -> Any:
        seen["fitted"] = arguments[4]
        return fit_test(*arguments)

    def guarding(*arguments: Any, **named: Any) -> Any:
        seen["answered by"] = named["observed"]
        return guard(*arguments, **named)

    def measuring(*arguments: Any, **named: Any) -> Any:
        seen["judged"] = arguments[3]
        return measure(*arguments, **named)

    monkeypatch.setattr(purifying, "fit_test", fitting)
    monkeypatch.setattr(purifying, "guard", guarding)
    monkeypatch.setattr(purifying, "measure", measuring)
    monkeypatch.setattr(workshop.Workshop, "fresh_waves", lambda *_: [heard])
    tried = FoundTrigger("kernel", target, torch.eye(3)[..., None, None], None)
    monkeypatch.setattr(workshop.Workshop, "fresh_edits", lambda *_: [tried])
    assert purify("--reuse", guarded[0], "--triggered", attacked).exit_code in (0, 1)
    features = encode(digits_suspect.clip, load_triggered(attacked, digits_suspect.clip.preprocess).images)
    assert torch.allclose(seen["fitted"][target], features[::2], atol=1e-5)
    assert torch.equal(seen["answered by"][target], seen["fitted"][target])
    (observed,) = [one for one in seen["judged"] if one.origin == "observed"]
    assert torch.allclose(observed.features, features[1::2], atol=1e-5)
    assert {one.family for one in seen["judged"] if one.origin == "fresh"} == {"masked", "wave", "kernel"}


def test_edits_beside_the_bank_lower_the_threshold_move_the_rows_and_are_judged(
    folder: Path,
    guarded: tuple[Path, dict[str, Any], str],
    digits_suspect: DigitsSuspect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No direction is fitted to them."""
    target, size = digits_suspect.target, digits_suspect.clip.image_size
    edit = replace(edits(size)["upside down"], target=target)
    seen: dict[str, Any] = {}

    def fitting(*arguments: Any) -> Any:
        seen["fitted"], seen["beside"] = arguments[0], arguments[6]
        return fit_test(*arguments)

    monkeypatch.setattr(purifying, "fit_test", fitting)
    monkeypatch.setattr(
        purifying, "measure", lambda *given, **how: seen.update(judged=given[3]) or measure(*given, **how)
    )
    monkeypatch.setattr(PurifyRun, "beside", lambda _: TriggerBank((edit,)))
    monkeypatch.setattr("cbpt_guard.defense.reuse.MANY", 10)
    assert purify("--reuse", guarded[0]).exit_code in (0, 1)
    monkeypatch.undo()
    (told, under), run = seen["beside"][0], PurifyRun.open(folder / "purified")
    assert len(seen["beside"]) == 1
    assert (told, under.shape) == (target, seen["fitted"].clean.shape)
    assert len(seen["fitted"].triggered) == len(run.bank())
    (judged,) = [one for one in seen["judged"] if one.family == "warp"]
    samples, labels = run.samples()
    assert (judged.origin, judged.target) == ("beside", target)
    assert torch.allclose(judged.features, encode(digits_suspect.clip, torch.from_numpy(samples), edit), atol=1e-5)
    assert judged.labels.tolist() == labels.tolist()
    (kept,) = run.beside()
    assert torch.equal(kept.pattern, edit.pattern)
    without = PurifyRun.open(guarded[0])
    assert run.head().test.thresholds[target] <= without.head().test.thresholds[target]
    data, head = seen["fitted"], run.head()
    original = Head(without.head().original.rows, head.original.scale, head.original.bias)
    rows = anchored_rows(original, replace(data, triggered=torch.cat([data.triggered, under[None]])), AnchorSettings())
    assert torch.allclose(head.guarded.rows, rows, atol=1e-5)
    assert not torch.allclose(without.head().guarded.rows, rows, atol=1e-3)
    flagged = [one.features for one in seen["judged"] if one.origin == "found"]
    least = min(float(run.head().answer(features).triggered.float().mean()) for features in flagged)
    assert run.metrics.flagged_found == pytest.approx(least), "of the bank"
    (run.path / "beside.safetensors").unlink()
    earlier = replace(run, record=run.record.model_copy(update={"search": 8}))
    assert len(earlier.beside()) == 0
    with pytest.raises(InputError, match=r"beside\.safetensors"):
        run.beside()


def test_toward_a_class_that_higher_patterns_told_such_a_one_is_made_anew(
    folder: Path, guarded: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks may hardly lead there, and would show nothing."""
    monkeypatch.setattr(Findings, "raised", Findings.suspects)
    judged: list[Attacked] = []
    monkeypatch.setattr(purifying, "measure", lambda *given, **how: judged.extend(given[3]) or measure(*given, **how))
    assert purify("--reuse", guarded[0]).exit_code in (0, 1)
    fresh = [(one.family, one.against) for one in judged if one.origin == "fresh"]
    assert sorted(fresh) == [
        (family, against) for family in ("additive", "masked") for against in ("guarded", "original")
    ]


def test_a_suspected_class_without_a_test_is_named(
    folder: Path,
    guarded: tuple[Path, dict[str, Any], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no suspect of the bundle, for nothing guards against it: whoever reads the run must see why."""
    monkeypatch.setattr(purifying, "fit_test", lambda data, *_: TriggerTest.none(10, data.clean.shape[1]))
    result = purify("--reuse", guarded[0], "--json")
    assert result.exit_code == 1
    run = json.loads(result.stdout)["run"]
    (warning,) = run["warnings"]
    assert "no test could be fitted for the suspected 'nine'" in warning
    assert warning in result.stderr
    assert (run["verdict"]["name"], run["suspects"]) == ("not guarded", [])


def test_what_only_accuracy_can_tell_is_judged_on_the_clean_images(
    digits_suspect: DigitsSuspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = suspect.read_checkpoint(digits_suspect.checkpoint)
    spec, listing = resolve_model(read), list_images(digits_suspect.data)
    found = suspect._accuracy(read, spec, listing, TEMPLATE, "cpu")
    assert found.images == sum(map(len, listing.files))
    assert found.value > 0.8
    turned = replace(listing, files=listing.files[1:] + listing.files[:1])
    assert suspect._accuracy(read, spec, turned, TEMPLATE, "cpu").value < 0.1
    monkeypatch.setattr(suspect, "_JUDGED_IMAGES", 4)
    assert suspect._accuracy(read, spec, listing, TEMPLATE, "cpu").images == 4, "fewer than there are classes"


# what reaches the recipe


@pytest.mark.parametrize("command", ["purify", "scan"])
def test_every_option_reaches_the_job(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []

    def stop(job: Job, *_: object, **__: object) -> None:
        asked.append(job)
        raise InputError("far enough")

    monkeypatch.setattr("cbpt_guard.defense.purify.purify_job", stop)
    monkeypatch.setattr("cbpt_guard.defense.scan.scan", stop)
    values: dict[str, object] = {
        "model": "m.pt", "data": "d", "classes": "c.tsv", "template": "x {}", "shots": 3, "seed": 4, "device": "meta",
        "arch": "a", "preprocess": "p", "tokenizer": "t", "settings": "quick.toml", "threads": 1,
    }  # fmt: skip
    switches = ["--skip-bad", "--no-quickgelu"]
    wanted = Job(
        model=Path("m.pt"), data=Path("d"), classes=Path("c.tsv"), template="x {}", shots=3, seed=4, device="meta",
        settings=Settings.read(Path("quick.toml")), skip_bad=True, flags=ModelFlags("a", False, "p", Path("t")),
    )  # fmt: skip
    if command == "purify":
        values |= {"triggered": "seen", "reuse": "earlier"}
        wanted = replace(wanted, triggered=Path("seen"), reuse=Path("earlier"))
    pairs = [word for name, value in values.items() for word in (f"--{name}", value)]
    assert_refused(cli(command, *pairs, *switches), "far enough")
    assert asked == [wanted]


def test_another_models_run_is_not_reused(folder: Path, tiny_run: Path) -> None:
    assert_refused(purify("--reuse", tiny_run), "made from another checkpoint")


def test_an_unfinished_run_is_no_run(folder: Path) -> None:
    journal = folder / ".purified.partial" / "journal"
    journal.mkdir(parents=True)
    (journal / "key.json").write_text("{}")
    for result in (
        cli("export", "--run", ".purified.partial"),
        purify("--reuse", ".purified.partial"),
        cli("inspect", ".purified.partial"),
    ):
        assert_refused(result, ".purified.partial")


def test_one_output_has_one_writer(folder: Path) -> None:
    part = folder / ".purified.partial" / "part"
    part.parent.mkdir()
    part.write_text("of the other command")
    with (folder / ".purified.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert_refused(purify(), "another command is writing", "--out")
        assert part.read_text() == "of the other command"


def test_a_refused_start_does_not_cost_an_interrupted_run(folder: Path) -> None:
    part = folder / ".purified.partial" / "journal" / "features.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"hours of work")
    assert_refused(purify("--template", "no place for a name"), "{}")
    assert part.read_bytes() == b"hours of work"


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o500)
    asked = ("purify", "--model", "suspect/suspect.pt", "--data", "clean", "--out", "closed/purified")
    assert_refused(without_rights(*asked, cwd=folder), "closed cannot be written", "permissions")


def test_a_full_disk_costs_nothing_that_was_found(
    folder: Path, guarded: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights do not fit; once there is room, `--resume` only has to write."""
    (folder / "purified").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        result = purify("--reuse", guarded[0], "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(result, "writing purified failed", "File too large")
    assert list((folder / "purified").iterdir()) == []
    assert_refused(cli("export", "--run", ".purified.partial"), "no finished run")
    assert_refused(purify("--reuse", guarded[0], "--force", "--resume", "--seed", 1), "begun with another", "seed")
    monkeypatch.setattr(workshop, "invert_toward", None)
    assert purify("--reuse", guarded[0], "--force", "--resume").exit_code == 0
    assert {item.name for item in Path("purified").iterdir()} == FILES


def test_a_terminal_sees_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cbpt_guard.defense.progress import Step

    def shown() -> str:
        with show.live() as progress:
            progress(Step("agnostic \x1b[2J[red] trigger", 1, 2, loss=0.5, asr=0.25))
            progress(Step("agnostic \x1b[2J[red] trigger", 2, 2, loss=0.25, asr=0.5))
            progress(Step("given up", 1, 80))
            progress(Step("given up", 20, 20))
        return capsys.readouterr().err

    assert shown() == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    text = shown()
    assert "[2J[red] trigger" in text
    assert "2/2" in text
    assert "20/20" in text
    assert "ASR 50.0 %" in text
    assert "\x1b[2J" not in text
