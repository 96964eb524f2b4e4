"""The document says what the lines say, to the byte; and a cell measured again is held against them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lines import cbpt, line

from cbpt_guard.bench.lines import CONTROL
from cbpt_guard.bench.plan import Plan
from cbpt_guard.bench.settings import TRUE_TRIGGER
from cbpt_guard.bench.summary import summary
from cbpt_guard.defense.calibration import SEARCH

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
measured = pytest.mark.skipif(not any(BENCHMARKS.glob("evidence/*.jsonl")), reason="no evidence has been measured yet")


@pytest.fixture(scope="module")
def commands() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import evidence
        import recheck

        yield evidence, recheck
    finally:
        sys.path.remove(str(BENCHMARKS))


@measured
@pytest.mark.parametrize("script", ["evidence.py", "ablations.py"])
def test_documents_and_picture_are_what_the_committed_lines_give(script: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_table_of_ablations_has_the_methods_first_and_what_was_not_measured_is_left_out(
    commands: tuple[ModuleType, ModuleType],
) -> None:
    import ablations  # beside `commands`

    name = "cbpt_guard.bench.ablations:masked_only"
    lines = [
        line(defense=name, implant="sig", asr=0.5, pa=0.25, ca=0.5, max_share=0.8),
        line(defense=name, implant="badnet", asr=0.0, pa=0.3, ca=0.6, max_share=0.4),
        line(defense="cbpt", implant="sig", asr=0.1, pa=0.2, ca=0.7, search=4),
    ]
    rows = ablations.table(lines).splitlines()
    assert rows[2] == "| what | CA | largest share, worst | badnet: ASR | badnet: PA | sig: ASR | sig: PA |"
    assert rows[4] == "| CBPT as it is: the switch, anchored rows | 70.0 (of 1) | 90.0 | - | - | 10.0 | 20.0 |"
    assert rows[5] == "| of the found triggers only the masked one | 55.0 | 80.0 | 0.0 | 30.0 | 50.0 | 25.0 |"
    assert rows[6:] == ["", "Version of the search that found the triggers: sig 4, not recorded; badnet not recorded."]
    assert ablations.table([]) == "No variant has been measured yet."
    unsearched = line(defense="clean-prompts", implant="badnet")
    assert ablations.searches([lines[2], unsearched]) == "Version of the search that found the triggers: sig 4."


def test_ablations_are_held_against_the_run_whose_triggers_they_have(
    commands: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that was measured again with another search found other triggers: differences are then the search's."""
    import ablations  # beside `commands`

    own = [
        line(defense="cbpt", implant="sig", search=4, asr=0.1),
        line(defense="cbpt_guard.bench.ablations:masked_only", implant="sig", search=4),
        line(defense=TRUE_TRIGGER, implant="wanet"),
    ]
    methods = [
        line(defense="cbpt", implant="sig", search=5, asr=0.2),
        line(defense="clean-prompts", implant="sig"),
        line(defense="clean-prompts", implant="sig", seed=1),
        line(defense="clean-prompts", implant="badnet"),
        line(defense="clean-prompts", implant="wanet"),
        line(defense="clean-prompts", implant="wanet", attack="none"),
    ]
    monkeypatch.setattr(ablations, "lines_in", lambda folder: own)
    monkeypatch.setattr(ablations, "committed", lambda: methods)
    assert ablations.measured() == [methods[1], methods[4], *own]


def test_both_rules_stand_side_by_side_and_no_test_image_is_among_them(
    commands: tuple[ModuleType, ModuleType],
) -> None:
    import ablations  # beside `commands`

    rules = [
        line(defense=defense, implant=implant, split="clean", images=images, asr=asr, ca=0.5, pa=0.2, max_share=0.3)
        for defense, asr in (("cbpt-prompts", 0.7), ("none", 1.0), ("cbpt", 0.01))
        for implant, images in (("wanet", 6800), ("two", 6700))
    ]
    rows = ablations.both_rules([*rules, line(defense="none", attack="off", split="clean")]).splitlines()
    assert rows[0] == "In %, on 6700 to 6800 images."
    assert rows[4].startswith("| wanet | the suspect | 50.0 | 100.0 | 20.0 | 30.0 |")
    assert rows[6].startswith("| wanet | the paper's rule | 50.0 | 70.0 |")
    assert rows[8].startswith("| two | the switch | 50.0 | 1.0 |")
    assert len(rows) == 10
    assert "In %, on 6800 images." in ablations.both_rules(rules[::2])
    with pytest.raises(SystemExit, match="without --final"):
        ablations.both_rules([*rules, line(defense="cbpt", implant="wanet", split="test")])
    assert ablations.both_rules([]).startswith("Neither rule")


def test_parts_are_filled_between_their_marks(commands: tuple[ModuleType, ModuleType]) -> None:
    evidence, _ = commands
    document = "a <!-- one -->\nold\n<!-- /one --> b <!-- two --><!-- /two --> c"
    filled = evidence.filled(document, {"one": "1", "two": "2"})
    assert filled == "a <!-- one -->\n1\n<!-- /one --> b <!-- two -->\n2\n<!-- /two --> c"
    assert evidence.filled(filled, {"one": "1", "two": "2"}) == filled
    with pytest.raises(SystemExit, match="'three'"):
        evidence.filled(document, {"three": "3"})


def test_a_summary_is_the_mean_over_attacks_of_the_means_over_seeds() -> None:
    lines = [
        line(defense="cbpt", implant="a", seed=0, asr=0.00, ca=0.50, max_share=0.1),
        line(defense="cbpt", implant="a", seed=1, asr=0.02, ca=0.52, max_share=0.3),
        line(defense="cbpt", implant="b", seed=0, asr=0.05, ca=0.60, max_share=0.1),
        line(defense="cbpt", implant="weak", seed=0, asr=1.0, took=False),
        line(defense="cbpt", implant="a", attack="off", seed=0, asr=1.0),
        line(defense="cbpt", implant="a", attack=CONTROL, seed=0, asr=1.0, ca=0.7, took=None),
    ]
    assert "| cbpt | 2 | 55.5 | 3.0 | 5.0 | 10.0 | 20.0 | 40.0 | 70.0 |" in summary(lines)
    assert summary([]) == "No attack has been measured yet."


def test_a_run_that_was_replaced_is_told_with_its_draw_and_whom_it_suspected_wrongly(
    commands: tuple[ModuleType, ModuleType],
) -> None:
    evidence, _ = commands
    wrong = {"name": "two", "recall": 0.5, "undefended": 0.58}
    runs = [
        cbpt("four", search=4, asr_worst=0.98, target="three", suspects=[wrong | {"name": "three"}]),
        cbpt("sig", search=7, asr_worst=0.995, seed=1, verdict="unverified", suspects=[wrong]),
    ]
    first, second = evidence.superseded(runs)
    assert first == "- *four*, search 4: *guarded*, ASR of the worst trigger 98.0 %"
    told = "- *sig*, seed 1, search 7: *unverified*, ASR of the worst trigger 99.5 %"
    assert second == f"{told}; 'two' suspected wrongly, its recall -8.0 points"


def test_the_plantings_that_lines_name_are_told(commands: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    evidence, _ = commands
    report = {"trigger": "a | b", "target": "three", "images": 300, "ca_clean": 0.9, "ca_poisoned": 0.885, "asr": 0.9}
    records = [
        {"implant": name, "suspect_sha256": sha * 64, "took": sha != "3", "reports": [report]}
        for name, sha in (("one", "1"), ("two", "2"), ("one", "3"), ("one", "1"))
    ]
    (tmp_path / "log").write_text("".join(json.dumps(record) + "\n" for record in records))
    _, _, *told = evidence.plantings([tmp_path / "log", tmp_path / "none"], {"1" * 64, "3" * 64, None})
    assert told == [
        "| one | 11111111 | a \\| b | three | 90.0 | 88.5 | 90.0 | 300 | yes |",
        "| one | 33333333 | a \\| b | three | 90.0 | 88.5 | 90.0 | 300 | no |",
    ]
    assert list(evidence.plantings([tmp_path / "log"], {None})) == ["No line names a planting yet."]


def test_recipes_are_told_by_what_they_differ_in(commands: tuple[ModuleType, ModuleType]) -> None:
    """The last planting of each counts; a version that did not know a setting, or has it in words, is no error."""
    evidence, _ = commands

    def record(implant: str, poisoned: float, **recipe: Any) -> dict[str, Any]:
        report = {"ca_clean": 0.9, "ca_poisoned": poisoned, "images": 300, "asr": 1.0}
        told = {"implant": implant, "suspect_sha256": f"{implant} {poisoned}", "recipe": {"steps": 200} | recipe}
        return told | {"took": poisoned > 0.87, "reports": [report]}

    records = [
        record("one", 0.1, anchor=20.0, text="tuned"),
        record("two", 0.8, anchor=0.0, text="frozen", margin=None),
        record("one", 0.885, anchor=20.0, text="frozen"),
    ]
    counted = line(implant="two", ca=0.791, target_recall=0.25, images=6800, suspect_sha256="two 0.8")
    changes = ({"attack": "off"}, {"attack": "none"}, {"defense": "ensemble"}, {"suspect_sha256": "one 0.1"})
    others = [counted.model_copy(update={"ca": 0.1} | change) for change in changes]
    head, _, *told = evidence.recipes(records, [counted, *others])
    assert head.startswith("| implant | anchor | margin | CA, clean model |")
    assert told == [
        "| one | 20.0 | - | 90.0 | 88.5 | 100.0 | 300 | yes | - | - | - |",
        "| two | 0.0 | None | 90.0 | 80.0 | 100.0 | 300 | no | 79.1 | 25.0 | 6800 |",
    ]
    assert list(evidence.recipes([], [])) == ["None has been measured yet."]


def test_what_a_rival_chose_is_counted_by_run(commands: tuple[ModuleType, ModuleType]) -> None:
    """A control's lines, one for each trigger, are of one run; a line that says nothing counts nowhere."""
    evidence, _ = commands
    rates = ({"learning_rate": 0.032, "epoch": 7}, {"learning_rate": 0.128, "epoch": 7})
    coop = [line(defense="coop", seed=seed, chosen=rates[seed], suspect_sha256="1") for seed in (0, 1)]
    again = line(defense="coop", implant="sig", chosen=rates[0], suspect_sha256="1")
    oracle = [line(defense="oracle", seed=0, chosen={"strength": 100}), line(defense="oracle", seed=1, chosen=rates[0])]
    _, _, *told = evidence.chosen([*coop, again, *oracle, line(defense="probe"), line(defense="none", chosen={})])
    assert told == [
        "| coop | 2 | epoch | 7 (2) | 1 to 50 |",
        "| coop | 2 | learning rate | 0.032 (1), 0.128 (1) | 0.008, 0.032, 0.128 |",
        "| oracle | 2 | epoch | 7 (1) | 1 to 30 |",
        "| oracle | 2 | learning rate | 0.032 (1) | 0.003, 0.01 |",
        "| oracle | 2 | strength | 100 (1) | 1, 3, 10, 30, 100, 300, 1000 |",
    ]
    assert list(evidence.chosen([line()])) == ["No line says it yet."]


def test_the_page_says_what_of_the_plan_is_measured(commands: tuple[ModuleType, ModuleType]) -> None:
    evidence, _ = commands
    plan = Plan.read(evidence.PLAN)
    asked = [key for group in plan.groups() if group.unit == "triangles" for key in plan.keys(group, "test")]
    found = [line(**key._asdict(), settings=plan.settings(key)) for key in asked]
    ours = [one.defense.startswith("cbpt") for one in found]
    lines = [one.model_copy(update={"search": SEARCH if own else None}) for one, own in zip(found, ours, strict=True)]
    assert " Whole: triangles. Not yet: badnet, blended, " in evidence.progress(lines, evidence.PLAN)
    assert f" {len(asked)} are measured, {ours.count(False)} of them with today's search or without any. In part: " in (
        evidence.progress(found, evidence.PLAN)
    ), "lines that do not say their search are of an older one"
    stale = [lines[0].model_copy(update={"settings": "old"}), *lines[1:]]
    told = evidence.progress(stale, evidence.PLAN)
    assert f"are measured. In part: triangles ({len(asked) - 1} of {len(asked)}). Not yet: " in told
    assert f" {len(asked) - 1} are measured" in told


@pytest.mark.parametrize("given", [(), ("--final",)], ids=["without", "with"])
def test_a_recheck_reads_the_test_images_only_when_told_to(
    commands: tuple[ModuleType, ModuleType],
    given: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--work` exists, which is refused next: nothing is measured either way."""
    _, recheck = commands
    rest = ("--seed", "1", "--root", str(tmp_path), "--work", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["recheck.py", *rest, *given])
    with pytest.raises(SystemExit) as refused:
        recheck.main()
    told = capsys.readouterr().err or str(refused.value)
    assert ("exists; what an earlier run made must not be used" if given else "required: --final") in told


def test_a_seed_always_draws_the_same_rival_that_met_an_attack_that_took(
    commands: tuple[ModuleType, ModuleType],
) -> None:
    _, recheck = commands
    others = [line(defense=name) for name in ("none", "ensemble", "oracle", "cbpt", "cbpt-prompts")]
    lines = [*others, line(defense="coop"), line(defense="probe"), line(defense="ft", implant="weak", took=False)]
    draws = {recheck.drawn(lines, seed) for seed in range(20)}
    assert draws == {("badnet", "coop"), ("badnet", "probe")}
    assert recheck.drawn(lines, 3) == recheck.drawn(lines[::-1], 3)
    with pytest.raises(SystemExit, match="no rival"):
        recheck.drawn(others, 0)


def test_a_cell_is_compared_with_lines_of_the_implant_at_work_alone(commands: tuple[ModuleType, ModuleType]) -> None:
    """The same defence with the triggers off, or on the clean model, differs by so much that anything would agree."""
    _, recheck = commands
    wanted = [line(defense="coop", seed=seed) for seed in (0, 1)]
    others = [line(defense="coop", attack=attack) for attack in ("off", "none")]
    others += [line(defense="coop", shots=4), line(defense="probe"), line(defense="coop", implant="sig")]
    assert recheck.before([*others, *wanted], "badnet", "coop") == wanted


def test_both_rules_of_a_seed_come_from_one_run(commands: tuple[ModuleType, ModuleType]) -> None:
    """As docs/evidence.md says: what the run found, and so what it flags, is the same in both lines."""
    evidence, _ = commands
    lines = [*evidence.committed(), *evidence.committed(evidence.ADAPTIVE, [evidence.ADAPTIVE_PLAN])]
    found = {
        rule: {
            one.key._replace(defense="cbpt"): (one.undefended, one.flag_clean, one.flag_triggered, one.search)
            for one in lines
            if one.defense == rule
        }
        for rule in ("cbpt", "cbpt-prompts")
    }
    assert found["cbpt-prompts"]
    assert found["cbpt-prompts"].items() <= found["cbpt"].items()


def test_the_small_plan_plants_the_same_implant(commands: tuple[ModuleType, ModuleType]) -> None:
    _, recheck = commands
    plan = Plan.read(recheck.PLAN)
    small = recheck.small_plan(plan, "badnet", "coop")
    assert [(group.suspect, group.defense, group.seed) for group in small.groups()] == [
        ("badnet", "cbpt", 0),
        ("badnet", "coop", 0),
    ]
    assert small.implants["badnet"] == plan.implants["badnet"]


def agree(recheck: ModuleType, *arguments: Any) -> bool:
    found = recheck.compared(*arguments)
    assert [one.column for one in found] == ["ca", "asr", "pa"]
    return all(one.inside for one in found)


def test_agreement_is_judged_by_the_stated_spread(commands: tuple[ModuleType, ModuleType]) -> None:
    _, recheck = commands
    committed = [line(defense="cbpt", seed=seed, ca=ca) for seed, ca in enumerate((0.50, 0.52, 0.54))]
    still = dict.fromkeys(recheck.COMPARED.values(), 0.0)
    assert agree(recheck, "cbpt", committed, [line(defense="cbpt", ca=0.56), line(defense="coop", ca=0)], still)
    assert not agree(recheck, "cbpt", committed, [line(defense="cbpt", ca=0.75)], still)
    alone = [line(defense="cbpt", ca=0.52, images=10_000)]
    assert agree(recheck, "cbpt", alone, [line(defense="cbpt", ca=0.53, images=10_000)], still)
    assert not agree(recheck, "cbpt", alone, [line(defense="cbpt", ca=0.55, images=10_000)], still)
    assert agree(recheck, "cbpt", alone, [line(defense="cbpt", ca=0.55, images=10_000)], still | {"ca": 0.02})


def test_none_of_many_agrees_with_one_of_them_and_not_with_many(commands: tuple[ModuleType, ModuleType]) -> None:
    _, recheck = commands
    none, still = [line(defense="cbpt", asr=0.0, images=5000)], dict.fromkeys(recheck.COMPARED.values(), 0.0)
    assert agree(recheck, "cbpt", none, [line(defense="cbpt", asr=0.0002, images=5000)], still)
    much = [line(defense="cbpt", asr=0.01, images=5000)]
    assert not agree(recheck, "cbpt", none, much, still | {"ca": 0.1}), "plantings differ in ASR by what ASR shows"
    assert agree(recheck, "cbpt", none, much, still | {"asr": 0.1})


def test_plantings_differ_by_what_their_undefended_shares_do(commands: tuple[ModuleType, ModuleType]) -> None:
    _, recheck = commands
    shares = line().undefended
    cas = (("a", 0.50), ("a", 0.50), ("a", 0.52), ("b", 0.9))
    lines = [line(implant=name, undefended=shares.model_copy(update={"ca": ca})) for name, ca in cas]
    assert recheck.replanted(lines, "ca") == pytest.approx(0.02 / 2**0.5)
    assert recheck.replanted(lines, "asr") == 0


def test_a_recheck_is_told_as_it_came_out(commands: tuple[ModuleType, ModuleType]) -> None:
    evidence, recheck = commands
    kept = recheck.Compared("cbpt", "ca", 0.54, 0.55, 0.02)
    lost = recheck.Compared("coop", "asr", 0.5, 0.9, 0.1)
    assert str(lost) == "coop asr 50.0 (90.0 ± 10.0)"
    record = {
        "seed": 1,
        "implant": "badnet",
        "rival": "coop",
        "minutes": 12.3,
        "machine": "2 cores",
        "when": "2026-11-29T06:20:00",
    }
    told = evidence.rechecks(
        [record | {"compared": [kept._asdict()]}, record | {"compared": [kept._asdict(), lost._asdict()]}]
    )
    first, second = told.splitlines()[2:]
    assert first.startswith("| 2026-11-29 | 1 | badnet | coop | 12.3 | cbpt ca 54.0 (55.0 ± 2.0) | yes |")
    assert second.endswith("coop asr 50.0 (90.0 ± 10.0) | **no** |")
    assert evidence.rechecks([]) == "None yet."


@measured
@pytest.mark.parametrize("part", ["LINES PLAN SEEDS_PLAN", "ADAPTIVE ADAPTIVE_PLAN", "UNSEEN UNSEEN_PLAN"])
def test_the_committed_lines_belong_to_the_committed_plans(commands: tuple[ModuleType, ModuleType], part: str) -> None:
    evidence, _ = commands
    folder, *paths = (getattr(evidence, name) for name in part.split())
    plans = [(plan, set(evidence.asked_by(plan))) for plan in map(Plan.read, paths)]
    for found in evidence.committed(folder, paths):
        (plan,) = (plan for plan, keys in plans if found.key in keys)
        assert found.settings == plan.settings(found.key), found.key


def test_further_draws_are_of_the_attacks_that_took(commands: tuple[ModuleType, ModuleType]) -> None:
    evidence, _ = commands
    plan, further = Plan.read(evidence.PLAN), Plan.read(evidence.SEEDS_PLAN)
    assert further.implants.items() <= plan.implants.items()
    assert (further.template, further.datasets.items() <= plan.datasets.items()) == (plan.template, True)
    drawn = {
        implant: {key.seed for key in evidence.asked_by(plan) + evidence.asked_by(further) if key.implant == implant}
        for implant, about in plan.implants.items()
        if about.dataset == evidence.DEVELOPED_WITH
    }
    took = {found.implant for found in evidence.committed() if found.took}
    assert {implant: seeds for implant, seeds in drawn.items() if implant in took} == {
        implant: {0, 1, 2} for implant in drawn if implant in took
    }
    assert took >= further.implants.keys()


def test_adaptive_attackers_come_at_two_strengths(commands: tuple[ModuleType, ModuleType]) -> None:
    evidence, _ = commands
    recipes = {name: implant.recipe for name, implant in Plan.read(evidence.ADAPTIVE_PLAN).implants.items()}
    for term, kind in (("hide", "hidden"), ("cover", "covered")):
        assert 0 < recipes[f"{kind}-weak"][term] < recipes[f"{kind}-strong"][term]
        assert 0 < recipes["all-weak"][term] < recipes["all-strong"][term]
    for kind in ("modest", "all"):
        assert recipes[f"{kind}-weak"]["margin"] > recipes[f"{kind}-strong"]["margin"] > 0
