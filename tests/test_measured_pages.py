"""What commands wrote into the pages is what the committed lines give, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cbpt_guard.bench.families import FAMILIES
from cbpt_guard.defense import openclip

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
METHOD = BENCHMARKS.parent / "docs" / "method.md"


@pytest.fixture(scope="module")
def commands() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import families
        import runtime

        yield runtime, families
    finally:
        sys.path.remove(str(BENCHMARKS))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def between(page: Path, name: str) -> str:
    return page.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_the_runtimes_table(commands: tuple[ModuleType, ModuleType]) -> None:
    runtime, _ = commands
    assert between(runtime.PAGE, "measured") == runtime.table(runtime.last(lines(runtime.LINES)))
    assert {line["row"] for line in lines(runtime.LINES)} == set(runtime.ROWS)


def test_every_family_stands_in_the_table_of_models(commands: tuple[ModuleType, ModuleType]) -> None:
    _, families = commands
    found = {(line["architecture"], line["size"]): line for line in lines(families.LINES)}
    assert between(families.PAGE, "measured") == families.measured(found)
    assert {name for name, _ in found} == {family.architecture for family in FAMILIES}
    for line in found.values():
        assert line["images"] >= 200
        assert line["max_logit_difference"] <= line["bound"]


def test_every_name_that_purify_refuses_stands_on_the_page(commands: tuple[ModuleType, ModuleType]) -> None:
    _, families = commands
    page = between(families.PAGE, "refused")
    for name in openclip.architecture_names():
        if openclip.refusal(openclip.named_config(name)) is not None:
            assert name in page


def test_the_roads_tables(commands: tuple[ModuleType, ModuleType]) -> None:
    import road  # beside `commands`

    measured = lines(road.LINES)
    last = list({line["model"]: line for line in measured if line["split"] == "test"}.values())
    assert [line["model"] for line in last] == list(road.MODELS)
    assert between(road.README, "measured") == road.table(last)
    assert between(road.METHOD, "stages") == road.stages(last, measured)
    unwatched = [{name: value for name, value in line.items() if name != "others_cores"} for line in last]
    assert "cores that other processes took: unknown" in road.stages(unwatched, measured)


def test_the_time_against_fine_tuning(commands: tuple[ModuleType, ModuleType]) -> None:
    import ft_time  # beside `commands`

    assert between(ft_time.METHOD, "ft") == ft_time.told(ft_time.lines(), lines(ft_time.ROAD))
    line: dict[str, Any] = {"model": "a", "purify_seconds": 60.4, "ft_seconds": 100.0, "ratio": 0.604, "epochs": 10}
    line |= {"search": 6}
    line |= {"machine": "2 cores", "others_cores": 0.04}
    stages = {"features": 10.0, ft_time.STAGE1: 40.0, "verdict": 5.0}
    road = [{"model": "a", "split": split, "stages": stages} for split in ("test", "clean")]
    road[1] = road[1] | {"stages": {ft_time.STAGE1: 1.0}}
    text = ft_time.told([line | {"ratio": 0.9}, line], [])
    told = "60 s of purify, 100 s for 10 epochs of FT, 0.60 times (search 6; 2 cores; other processes took 0.0 cores)"
    assert text == f"- a: {told}"
    half = "Half would be 50 s; by the stages above stage 1 takes 40 s, the other stages 15 s"
    assert ft_time.told([line], road) == f"- a: {told}. {half}"


def test_the_time_of_a_scan(commands: tuple[ModuleType, ModuleType]) -> None:
    import scan_time  # beside `commands`

    assert between(scan_time.PAGE, "time") == scan_time.told(scan_time.lines())
    line: dict[str, Any] = {
        "model": "suspect-badnet",
        "peak_mb": 900,
        "search": 6,
        "machine": "2 cores",
        "others_cores": 0.04,
    }
    fast, slow = (scan_time.told([line | {"seconds": seconds}]) for seconds in (180.0, 186.0))
    rest = "the 3 that it is held to, 900 MiB (search 6; 2 cores; other processes took 0.0 cores)"
    assert fast == f"- suspect-badnet: 3.0 min, within {rest}"
    assert slow == f"- suspect-badnet: 3.1 min, **not within** {rest}"
    several = [line | {"seconds": seconds} for seconds in (200.0, 170.0, 176.0)]
    older, other = line | {"seconds": 99.0, "search": 5}, line | {"seconds": 60.0, "model": "mobilenet-clip"}
    first, second = scan_time.told([older, *several, other]).splitlines()
    assert first == f"- suspect-badnet: 2.9 min (median of 3.33, 2.83, 2.93, 2 of 3 within), within {rest}"
    assert second.startswith("- mobilenet-clip: 1.0 min, within the 12")
    assert scan_time.told([]) == "Not measured yet."


def test_the_two_tests_for_triggered_images(commands: tuple[ModuleType, ModuleType]) -> None:
    import flag  # beside `commands`

    assert between(flag.METHOD, "flag") == flag.told(flag.lines())
    line = {"model": "a", "target_images": 9, "lost": [0, 1], "asr_margin": [0.5, 0.25], "asr_fisher": [0.125, 0.0]}
    told = flag.told([{}, line])
    assert told.splitlines()[2:4] == ["| 0 of 9 | 50.0 | 12.5 |", "| 1 of 9 | 25.0 | 0.0 |"]
    assert "On a alone, one run." in told
    assert flag.told([]) == "Not measured yet."


def test_the_memory_of_stage_2(commands: tuple[ModuleType, ModuleType]) -> None:
    import stage2_memory  # beside `commands`

    assert between(stage2_memory.METHOD, "memory") == stage2_memory.told(stage2_memory.lines())
    line: dict[str, Any] = {"model": "a", "few_mb": 1000, "many_mb": 1201, "machine": "2 cores"}
    assert "1.20 times as much; it may be 1.2 times, which it keeps" in stage2_memory.told([line | {"ratio": 1.2}])
    assert "which it does **not** keep" in stage2_memory.told([line | {"ratio": 1.201}])
    assert stage2_memory.told([]) == "Not measured yet."


@pytest.mark.parametrize(
    ("arguments", "worse"),
    [(("--version",), None), (("export", "--run", "nowhere"), 2), (("verify", str(Path(__file__).parent)), 1)],
)
def test_a_commands_own_time_and_memory_are_taken(
    commands: tuple[ModuleType, ModuleType], arguments: tuple[str, ...], worse: int | None
) -> None:
    import command  # beside `commands`

    held = np.ones(600 << 20, np.uint8)  # of this process, which the child's peak must not include
    if worse is None:
        took = command.ran(*arguments)
        assert 0 < took.cpu_seconds <= 2 * took.seconds * (os.cpu_count() or 1)
        assert 5 < took.peak_mb < 500
    else:
        with pytest.raises(SystemExit, match=f"{arguments[0]} ended with {worse}"):
            command.ran(*arguments)
    assert held.all()


def test_a_command_that_cannot_start_is_not_measured(
    commands: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import command  # beside `commands`

    alone = tmp_path / "python"  # no cbpt-guard beside it
    alone.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(alone))
    with pytest.raises(SystemExit, match="purify ended with 127"):
        command.ran("purify")


def test_what_was_found_against_what_was_planted(commands: tuple[ModuleType, ModuleType]) -> None:
    import inversion  # beside `commands`

    assert between(inversion.METHOD, "inversion") == inversion.told(inversion.lines())

    def found(seed: int, rank: int | None, *triggers: tuple[str, float, float]) -> dict[str, Any]:
        told = [{"family": family, "asr": asr, "cosine": cosine} for family, asr, cosine in triggers]
        about = {"implant": "a", "target": "cat", "seed": seed, "rank": rank, "stands_out": rank == 1, "clean": 0.1}
        return about | {"found": told}

    stale = found(0, None)
    one = found(0, 1, ("masked", 0.9, 0.9), ("wave", 1.0, 0.5), ("wave", 0.8, 0.7))
    other = found(1, 2, ("masked", 1.0, 0.8)) | {"search": 4}
    head, _, row = inversion.told([stale, one, other]).splitlines()
    assert head == "| implant | target | search | its rank | stands out | clean | masked | wave |"
    assert row == "| a | cat | -, 4 | 1, 2 | no | 0.100 | 0.850 (95) | 0.700 (80) |"
    assert inversion.told([]) == "Not measured yet."


def test_what_the_choices_of_inversion_do(commands: tuple[ModuleType, ModuleType]) -> None:
    import choices  # beside `commands`

    assert between(choices.METHOD, "choices") == choices.told(choices.read(choices.LINES))

    def line(implant: str, choice: Any, asr: float, rank: int) -> dict[str, Any]:
        return {"implant": implant, **choice._asdict(), "asr": asr, "rank": rank, "cosine": 0.5, "area": 0.04}

    usual, lower = choices.Choice(choices.AGNOSTIC), choices.Choice("additive", "epsilon", 8 / 255)
    masked = choices.Choice("masked")
    measured = [
        line("a", usual, 0.2, 9),
        line("a", usual, 0.75, 1),
        line("b", lower, 0.999, 1),
        line("b", masked, 1.0, 1),
    ]
    head, _, *rows = choices.told(measured).splitlines()
    assert head == "| trigger | setting | a | b |"
    assert rows[choices.CHOICES.index(usual)] == "| agnostic | as it is | 0.500 (75, 1) | - |"
    assert rows[choices.CHOICES.index(lower)] == "| additive | `epsilon` 8/255 | - | 0.500 (100) |"
    assert rows[choices.CHOICES.index(masked)] == "| masked | as it is | - | 0.500 (100, 4.0) |"
    assert all(choice.settings != usual.settings for choice in choices.CHOICES if choice.setting is not None)


def test_what_waves_tell_is_shown_where_they_tell(commands: tuple[ModuleType, ModuleType]) -> None:
    import telling  # beside `commands`

    assert between(METHOD, "telling") == telling.told(lines(telling.LINES))
    assert telling.told([]) == "Not measured yet."
    planted = {"label": "cat", "reached": 0.75, "twice": 0.99, "telling": True, "lead": 7.0, "odds": 3.0, "both": 17.2}
    natural = planted | {"label": "dog", "telling": False, "lead": 2.0, "odds": 0.0, "both": 0.0}
    line = {"model": "a", "seed": 1, "planted": [planted], "natural": natural, "bound": 3.5}
    _, _, first, second = telling.told([line | {"bound": 9.0}, line]).splitlines()
    assert first == "| a | 1 | cat (planted) | 0.75 | 0.99 | 7.0 | 3.5 | 3.0 | 17.2 |"
    assert second == "| a | 1 | dog (natural) | 0.75 | 0.99 | 2.0 | 3.5 | - | - |"


def test_the_table_of_what_edits_lead_to(commands: tuple[ModuleType, ModuleType]) -> None:
    import edits  # beside `commands`

    assert between(METHOD, "edits") == edits.told(lines(edits.LINES))
    assert edits.told([]) == "Not measured yet."
    planted = {"label": "cat", "edit": "grey", "reached": 0.9, "lead": 7.0, "odds": 9.0}
    line = {"model": "badnet", "seed": 2, "bound": 3.6, "planted": [planted], "natural": [{"label": "dog"}]}
    _, _, first, second = edits.told([line | {"bound": 9.0}, line]).splitlines()
    assert first == "| badnet | 2 | cat (planted) | grey | 0.90 | 7.0 | 3.6 | 9.0 |"
    assert second == "| badnet | 2 | dog (natural) | none | - | - | 3.6 | - |"
    (told,) = edits.told([line | {"planted": [], "natural": []}]).splitlines()[2:]
    assert told == "| badnet | 2 | none | none | - | - | 3.6 | - |"


def test_what_a_command_refuses_it_says_in_a_line(tmp_path: Path) -> None:
    plan = BENCHMARKS / "unseen.toml"
    arguments = ["measure", "--plan", plan, "--root", tmp_path, "--work", tmp_path / "work", "--only", "rotation"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "edits.py", *arguments], capture_output=True, text=True, check=False
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith(f"error: {tmp_path}")
    assert line.endswith("holds no trigger.json; `cbpt-guard bench run` plants it")


def test_every_command_that_the_tool_may_refuse_says_so_in_a_line() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in BENCHMARKS.glob("*.py")}
    ours = ("from cbpt_guard", "from command import")
    own = {name: text for name, text in scripts.items() if "__main__" in text and any(one in text for one in ours)}
    assert len(own) > 10
    ending = 'if __name__ == "__main__":\n    plainly(main)\n'
    assert [name for name, text in own.items() if not text.endswith(ending)] == []
