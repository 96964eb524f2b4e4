"""Lines of evidence: appended whole, read back, and made into the table and the picture that the documents show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import assert_refused, blocking, cli, python
from lines import line

from cbpt_guard.bench.lines import Line, Shares, append_record, appending, read_lines, read_together
from cbpt_guard.bench.plot import plot
from cbpt_guard.bench.suite import PLANTINGS, READS, lines_in
from cbpt_guard.bench.table import COLUMNS, rows, table, wins
from cbpt_guard.errors import InputError, SetupError

OURS = [line(defense="cbpt", seed=seed, ca=0.50, asr=asr, pa=0.40) for seed, asr in enumerate((0.00, 0.01, 0.02))]
RIVAL = line(defense="probe", ca=0.48, asr=0.30, pa=0.41)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    with appending(path) as append:
        append([line(), *OURS])
        append([RIVAL])
    return path


def cells(text: str, defense: str) -> list[str]:
    """The cells of the one row of a defence."""
    found = [row.strip("| ").split(" | ") for row in text.splitlines() if f"| {defense} |" in row]
    return next(row for row in found if len(row) > 5)


# lines


def test_lines_come_back_as_they_were(file: Path) -> None:
    assert read_lines(file) == [line(), *OURS, RIVAL]
    assert len(file.read_text().splitlines()) == 5
    assert read_lines(file.with_name("none.jsonl")) == []


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_torn_last_line_is_left_out_and_cut_off(file: Path, kept: int) -> None:
    whole, last = file.read_bytes(), (line(seed=9).model_dump_json() + "\n").encode()
    file.write_bytes(whole + last[:kept])
    assert read_lines(file) == [line(), *OURS, RIVAL]
    with appending(file) as append:
        append([line(seed=9)])
    assert file.read_bytes() == whole + last


def test_a_line_that_was_measured_again_stands_once(file: Path) -> None:
    with appending(file) as append:
        append([line(asr=0.8)])
    assert read_lines(file) == [*OURS, RIVAL, line(asr=0.8)]


def test_two_commands_cannot_append_at_once(file: Path) -> None:
    with appending(file), pytest.raises(SetupError, match="another command appends"), appending(file):
        pass


_FULL_DISK = """
import resource, sys
from pathlib import Path
from lines import line
from cbpt_guard.bench.lines import appending
from cbpt_guard.errors import SetupError
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with appending(Path(sys.argv[1])) as append:
    try:
        append([line(seed=seed) for seed in range(9)])
    except SetupError as error:
        print(error)
"""


def test_a_full_disk_is_told_and_what_it_tore_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    done = python(_FULL_DISK, path, cwd=Path(__file__).parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"writing {path} failed: File too large\n"
    assert path.stat().st_size == 2000
    assert 0 < len(read_lines(path)) < 9


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}", "line 6 is no line of evidence"), ("null", "line 6"), ('{"ca": 1, "more": 2}', "line 6"), ("{", "JSON")],
)
def test_what_is_no_line_is_refused_by_its_number(file: Path, text: str, words: str) -> None:
    file.write_bytes(file.read_bytes() + text.encode() + b"\n")
    with pytest.raises(InputError, match=words):
        read_lines(file)


def test_a_share_that_is_no_number_is_no_line() -> None:
    with pytest.raises(ValueError, match="finite"):
        line(asr=float("nan"))


def test_a_record_is_logged_once_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    path, first, other = tmp_path / "log.jsonl", {"sha": "1"}, {"sha": "2"}
    for record in (first, first, other):
        append_record(path, record)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"sha": "3')
    append_record(path, first)
    assert path.read_bytes() == whole
    assert [json.loads(text) for text in whole.splitlines()] == [first, other]
    with pytest.raises(SetupError, match="cannot be written"):
        append_record(tmp_path, first)


def test_a_cell_that_two_files_hold_is_refused(file: Path) -> None:
    """Averaged, the two would pass for two seeds."""
    other = file.with_name("other.jsonl")
    with appending(other) as append:
        append([line(seed=7)])
    assert read_together([file, other]) == [*read_lines(file), line(seed=7)]
    elsewhere = RIVAL.model_copy(update={"dataset": "letters"})
    with appending(other) as append:
        append([elsewhere])
    assert read_together([file, other])[-1] == elsewhere, "an implant of the same name, of another data set"
    with appending(other) as append:
        append([RIVAL.model_copy(update={"asr": 0.4})])
    with pytest.raises(InputError, match=r"other\.jsonl and .*lines\.jsonl both hold .*probe"):
        read_together([file, other])


def test_the_logs_beside_lines_are_passed_over(file: Path) -> None:
    logs = [file.with_name(name) for name in (READS, PLANTINGS)]
    for log in logs:
        append_record(log, {"when": "now"})
    shown, plain = cli("bench", "table", file, *logs), cli("bench", "table", file)
    assert shown.stdout == plain.stdout != ""
    assert lines_in(file.parent) == read_lines(file)


# the table


def test_a_row_tells_that_the_defence_warned() -> None:
    warned = line(defense="cbpt", verdict="guarded", warnings=("near chance",))
    assert cells(table([warned, line(defense="cbpt", verdict="guarded", seed=1)]), "cbpt")[-1] == "guarded (it warned)"
    assert cells(table([line(defense="cbpt", verdict="guarded")]), "cbpt")[-1] == "guarded"


def test_a_row_is_the_mean_and_the_spread_over_seeds() -> None:
    text = table([line(), *OURS, RIVAL])
    ours = cells(text, "cbpt")
    assert ours[:9] == [
        "badnet",
        "three",
        "cbpt",
        "3",
        "50.0 ± 0.0",
        "1.0 ± 1.0",
        "40.0 ± 0.0",
        "90.0 ± 0.0",
        "40.0 ± 0.0",
    ]
    assert cells(text, "none")[3:7] == ["1", "50.0", "90.0", "10.0"]
    assert "on `clean` images (300 of digits)" in text


def test_the_table_does_not_depend_on_the_order_of_seeds_and_files() -> None:
    assert table([line(), *OURS, RIVAL]) == table([line(), *OURS[::-1], RIVAL])
    assert cells(table([line(), RIVAL, *OURS]), "cbpt") == cells(table([line(), *OURS, RIVAL]), "cbpt")


def test_a_cell_that_a_rival_wins_is_marked_and_named() -> None:
    lines = [line(), *OURS, RIVAL]
    text = table(lines)
    assert cells(text, "probe")[4:7] == ["48.0", "30.0", "**41.0**"]
    assert "- badnet, 16 shots, probe: PA 41.0 against 40.0" in text
    found = rows(lines)
    assert [wins(found, row) for row in found] == [[], [], ["PA"]]
    better = rows([*OURS, line(defense="probe", seed=2, ca=0.6, asr=0.0, pa=0.5, max_share=0.8, target_recall=0.5)])
    assert wins(better, list(better)[1]) == list(COLUMNS)


@pytest.mark.parametrize(("seed", "won"), [(0, []), (2, ["ASR"]), (3, [])])
def test_a_rival_is_held_against_the_seeds_that_both_have(seed: int, won: list[str]) -> None:
    """CBPT's ASR is 0, 1 and 2 % by seed: a rival's single 1 % is no tie with their mean."""
    found = rows([*OURS, line(defense="probe", seed=seed, asr=0.01, pa=0.3)])
    assert wins(found, list(found)[1]) == won


@pytest.mark.parametrize(
    "other",
    [
        line(defense="probe", seed=1, ca=0.5, asr=0.0096, pa=0.4),  # no difference that is shown
        line(defense="oracle", asr=0.0),
        line(defense="probe", asr=0.0, pa=0.9, attack="none", took=None),
        line(defense="probe", asr=0.0, pa=0.9, shots=4),
    ],
    ids=["a tie", "the ceiling", "the control", "other shots"],
)
def test_what_cannot_be_compared_wins_nothing(other: Line) -> None:
    text = table([*OURS, other])
    assert "**9" not in text
    rival = other.defense == "probe" and (other.attack, other.shots) == ("badnet", 16)
    assert ("CBPT loses no cell." if rival else "No defence here can be compared with CBPT.") in text


@pytest.mark.parametrize("name", ["cbpt-prompts", "ensemble", "none"])
def test_a_cell_that_no_rival_wins_is_marked_too(name: str) -> None:
    text = table([*OURS, line(defense=name, seed=2, asr=0.0)])
    assert cells(text, name)[5] == "**0.0**"
    assert f"- badnet, 16 shots, {name}: ASR 0.0 against 2.0" in text


def test_the_control_stands_in_a_table_of_its_own() -> None:
    control = line(attack="none", took=None, ca=0.52, asr=0.002)
    text = table([line(), control])
    first, second = text.split("**digits, 16 shots a class: the clean model under the same triggers**")
    assert cells(first, "none")[5] == "90.0"
    assert cells(second, "none")[5] == "0.2"
    assert "**digits, 16 shots a class**" not in table([control])


def test_what_is_lost_on_the_clean_model_is_marked_and_counted() -> None:
    clean = [
        line(attack="none", took=None, implant=name, defense=defense, ca=ca, pa=pa)
        for name in ("badnet", "sig")
        for defense, ca, pa in (("cbpt", 0.5, 0.4), ("coop", 0.52, 0.4 if name == "sig" else 0.41), ("probe", 0.4, 0.4))
    ]
    text = table([*OURS, *clean])
    second = text.split("the clean model under the same triggers**")[1]
    assert cells(second, "coop")[4:7] == ["**52.0**", "90.0", "**41.0**"]
    assert "- clean model of digits, 16 shots, coop: CA under 2 triggers, PA under 1 trigger\n" in text
    assert "16 shots, probe" not in text
    assert "- badnet, 16 shots, coop" not in text, "they are counted, not named one by one"


def test_an_attack_that_did_not_take_is_said_to_be_none() -> None:
    assert cells(table([line(took=False)]), "none")[0] == "badnet (did not take: not counted)"


def test_of_several_pairs_the_worst_is_shown_beside_the_mean() -> None:
    pair = {**dict(line().undefended), "trigger": "a", "target": "one"}
    several = line(asr=0.3, asr_worst=0.5, pairs=(pair, pair))
    assert cells(table([several]), "none")[5] == "30.0 (worst pair 50.0)"


def test_the_sanity_sentence_counts_what_holds() -> None:
    same = Shares(**(dict(line().undefended) | {"asr": 0.01}))
    sha = "0" * 64
    off = line(attack="off", asr=0.01, undefended=same, suspect_sha256=sha)
    text = table([line(suspect_sha256=sha), off])
    assert "false-positive rate in 1 of 1 lines" in text
    assert "undefended shares exactly in 2 of 2 lines." in text
    assert "Sanity: the defence that touches nothing" in table([line(suspect_sha256=sha)]), "nothing was switched off"
    assert "Sanity: no line is there to tell it by." in table([line(defense="coop")])
    moved = line(seed=1, ca=0.51, suspect_sha256=sha)
    older = line(attack="off", seed=1, asr=0.02, undefended=same)
    text = table([line(suspect_sha256=sha), moved, off, older])
    assert "false-positive rate in 1 of 2 lines" in text
    assert "undefended shares exactly in 2 of 3 lines (1 older ones name no checkpoint" in text


def test_implants_that_were_planted_again_are_told_with_their_spread() -> None:
    again = Shares(**(dict(line().undefended) | {"ca": 0.512, "asr": 0.93}))
    several = (line().undefended, again)
    one, two = line(split="test"), line(split="test", defense="oracle", undefended=again)
    other = line(split="test", implant="sig", attack="sig")
    assert "planted again" not in table([one, other])
    unattacked = [line(split="test", attack=name, undefended=shares) for name in ("off", "none") for shares in several]
    text = table([one, two, other, *unattacked])
    assert "1 of 2 attacks have lines with differing undefended shares" in text
    assert "The undefended CA differs by up to 1.2 points there, the ASR by up to 3.0." in text
    assert "another planting" not in text, "CBPT is not among them"
    assert "the same planting" not in text
    met = [line(split="test", defense=name, undefended=one) for name in ("cbpt", "coop") for one in several[:1]]
    other = line(split="test", defense="probe", seed=0, undefended=again)
    assert "another planting" not in table(met)
    apart = line(split="test", defense="cbpt", seed=1, undefended=again)  # alone with its seed
    assert "With each of 1 seeds CBPT and every defence beside it met the same planting, by" in table([*met, apart])
    text = table([*met, line(split="test", defense="cbpt", seed=1), line(split="test", defense="coop", seed=1), other])
    assert "In 1 of 2 seeds CBPT met another planting than a defence beside it: badnet 0." in text
    elsewhere = line(seed=1, undefended=again)
    assert "planted again" not in table([line(), elsewhere]), "other shots leave other images to count"


def test_the_cost_is_told_per_defence() -> None:
    text = table([*OURS, line(defense="cbpt", seed=3, seconds=100, cpu_seconds=200, peak_mb=900)])
    assert "| cbpt | - | 16 | 4 | 2 | 2 | 200 | 900 |" in text


def test_a_run_with_other_shots_costs_apart() -> None:
    text = table([*OURS, line(defense="cbpt", shots=50, seconds=100, cpu_seconds=200)])
    assert "| cbpt | - | 16 | 3 | 2 | 2 | 2 | 700 |" in text
    assert "| cbpt | - | 50 | 1 | 100 | 200 | 200 | 700 |" in text


def test_cbpt_costs_apart_by_its_search() -> None:
    text = table([line(defense="cbpt", seed=3, search=7, seconds=100, cpu_seconds=200), *OURS, RIVAL])
    cost = [row for row in text.partition("**Cost**")[2].splitlines() if row.startswith("| ")][1:]
    assert cost == [
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| cbpt | - | 16 | 3 | 2 | 2 | 2 | 700 |",
        "| cbpt | 7 | 16 | 1 | 100 | 200 | 200 | 700 |",
        "| probe | - | 16 | 1 | 2 | 2 | 2 | 700 |",
    ]


def test_what_the_control_took_counts_once_though_many_lines_tell_it() -> None:
    control = [line(attack="none", implant=name, took=None, cpu_seconds=10.0) for name in "abc"]
    cost = table([line(cpu_seconds=2.0), line(implant="other", cpu_seconds=3.0), *control]).partition("**Cost**")[2]
    assert "| none | - | 16 | 2 | 2 | 2 | 3 | 700 |" in cost
    assert "| none, clean model | - | 16 | 1 | 2 | 10 | 10 | 700 |" in cost


def test_development_and_test_images_are_never_averaged() -> None:
    text = table([line(ca=0.4), line(ca=0.6, split="test")])
    assert "16 shots a class, `clean` images**" in text
    assert "16 shots a class, `test` images**" in text
    assert "| 40.0 |" in text
    assert "| 60.0 |" in text


def test_without_lines_nothing_is_claimed() -> None:
    assert table([]) == "No line has been measured yet."


def test_bench_table_prints_the_table_of_all_files(file: Path, tmp_path: Path) -> None:
    with appending(tmp_path / "more.jsonl") as append:
        append([line(defense="coop")])
    result = cli("bench", "table", file, tmp_path / "more.jsonl")
    assert (result.exit_code, result.stdout) == (0, table([line(), *OURS, RIVAL, line(defense="coop")]) + "\n")
    assert_refused(cli("bench", "table", tmp_path / "none.jsonl"), "none.jsonl does not exist", "bench run")


def test_a_table_needs_neither_torch_nor_matplotlib(file: Path, tmp_path: Path) -> None:
    code = f"{blocking('torch', 'matplotlib', 'onnxruntime')}\nfrom cbpt_guard.cli import main\nmain()"
    result = python(code, "bench", "table", file, cwd=tmp_path)
    assert (result.returncode, "± 1.0" in result.stdout) == (0, True), result.stderr


# the picture


def test_the_picture_has_the_same_bytes_each_time_and_every_defence(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = plot(read_lines(file), tmp_path / "a.svg").read_bytes()
    assert plot(read_lines(file), tmp_path / "b.svg").read_bytes() == first
    shown = ("none", "cbpt", "probe", "digits, clean images, 16 shots a class")
    assert all(f">{name}</text>".encode() in first for name in shown)
    moved = plot([line(), *OURS, RIVAL.model_copy(update={"asr": 0.6})], tmp_path / "c.svg").read_bytes()
    assert moved != first


def test_a_defence_has_one_marker_and_colour_in_all_panels(tmp_path: Path) -> None:
    """In the second panel there are fewer, so that numbers of its own would give one the other's."""
    pytest.importorskip("matplotlib")
    elsewhere = [one.model_copy(update={"dataset": "letters"}) for one in (*OURS, RIVAL)]
    plot([line(), *OURS, RIVAL, *elsewhere], tmp_path / "a.svg")
    points = re.findall(r'<use xlink:href="#(\w+)"[^>]*style="fill: (#\w+)', (tmp_path / "a.svg").read_text())
    shapes = {colour: {shape for shape, other in points if other == colour} for _, colour in points}
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c")
    assert set(shapes) == set(colours), "of none, cbpt and probe"
    first, second = (tmp_path / "a.svg").read_text().split('<g id="axes_2">')
    assert [colour in second for colour in colours] == [False, True, True]
    assert all(colour in first for colour in colours)


def test_on_the_clean_model_those_alone_are_compared_that_met_the_same_trigger() -> None:
    """Trained triggers are others each time they are made."""
    ours, theirs = (
        line(defense=name, attack="none", took=None, max_share=m) for name, m in (("cbpt", 0.3), ("par", 0.2))
    )
    found = rows([ours, theirs])
    (row,) = [row for row in found if row.defense == "par"]
    assert "largest share" in wins(found, row)
    other = theirs.model_copy(update={"undefended": theirs.undefended.model_copy(update={"max_share": 0.2})})
    assert not wins(rows([ours, other]), row)


def test_only_attacks_that_took_are_drawn_and_other_numbers_of_shots_apart(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = read_lines(file)
    first = plot(lines, tmp_path / "a.svg").read_bytes()
    weak = line(implant="weak", took=False, asr=0.0, defense="none")
    assert plot([*lines, weak], tmp_path / "b.svg").read_bytes() == first
    few = plot([*lines, line(defense="cbpt", shots=1, asr=0.7)], tmp_path / "c.svg").read_text()
    assert ">cbpt, 1 shot</text>" in few
    assert few.count(">cbpt</text>") == 1
    with pytest.raises(InputError, match="that took"):
        plot([weak], tmp_path / "d.svg")


def test_bench_plot_says_where_the_picture_is(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.svg"
    result = cli("bench", "plot", file, "--out", out)
    assert (result.exit_code, result.stdout, out.exists()) == (0, f"{out}\n", True)
    assert_refused(cli("bench", "plot", file, "--out", "picture.png"), "picture.png should end in .svg")


def test_a_picture_without_an_attack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no line of an attack"):
        plot([line(attack="none", took=None)], tmp_path / "a.svg")


def test_a_missing_matplotlib_names_its_pip_line(file: Path, tmp_path: Path) -> None:
    code = f"{blocking('matplotlib')}\nfrom cbpt_guard.cli import main\nmain()"
    result = python(code, "bench", "plot", file, cwd=tmp_path)
    assert_refused(result, "matplotlib", "pip install 'cbpt-guard[bench]'")
