"""The guard's verdicts against the truth, by lines whose every share is known."""

from __future__ import annotations

from lines import SHARES, cbpt, line

from cbpt_guard.bench.lines import ClassRecall, Shares
from cbpt_guard.bench.verdicts import verdicts
from cbpt_guard.defense.calibration import SEARCH


def test_verdicts_against_the_truth() -> None:
    lost = Shares(**(SHARES | {"ca": 0.53}))
    runs = [
        cbpt(),
        cbpt("sig", asr=0.05),
        cbpt("wanet", asr=0.051),
        cbpt("two", verdict="not guarded", asr=0.5),
        cbpt("filter", verdict="not guarded"),
        cbpt("blended", verdict="unverified", undefended=lost),
    ]
    text = verdicts(runs)
    assert "| guarded | 2 | 1 |" in text
    assert "| not guarded | 1 | 1 |" in text
    assert "| unverified | 0 | 1 |" in text
    assert "said once above an ASR of 5 % (wanet), and of 2 of 3 runs that succeeded" in text
    assert "said 0 times above an ASR of 5 %, and of 2 of 2 runs" in verdicts(runs[:2])
    assert "On the counted images" not in verdicts([cbpt(verdict="unverified")])
    assert "none of these 3 guarded runs flag more than 1 % of the clean ones, and none lose more than 5 points" in text
    broken = [cbpt("sig", flag_clean=0.011, verdict="not guarded"), cbpt("issba", flag_clean=0.011)]
    kept = [cbpt("two", flag_clean=0.01, target_recall=0.35), cbpt("issba", seed=1, target_recall=0.349)]
    assert "On the counted images 1 (issba) of these 3 guarded" in verdicts([*broken, *kept])
    assert "and 1 (issba) lose more than 5 points" in verdicts([*broken, *kept])
    other = [run.model_copy(update={"defense": "cbpt-prompts"}) for run in runs[:3]]
    assert "said once above an ASR of 5 % (wanet), and of 2 of 2 runs" in verdicts([*runs, *other], "cbpt-prompts")


def test_what_did_not_take_what_is_off_and_rivals_do_not_count() -> None:
    others = [cbpt("weak", took=False), cbpt("other", attack="off"), line(implant="sig", defense="probe")]
    assert "No run has been measured" in verdicts(others)
    assert verdicts([cbpt(), *others]).splitlines()[2] == "| guarded | 1 | 0 |"


def test_runs_of_todays_search_are_told_apart() -> None:
    runs = [
        cbpt(search=SEARCH),
        cbpt("sig", search=SEARCH, asr=0.06),
        cbpt("wanet", search=SEARCH, verdict="unverified"),
    ]
    older = [cbpt("two"), cbpt("filter", search=SEARCH - 1)]
    text = verdicts([*runs, *older])
    assert "said once above an ASR of 5 % (sig), and of 3 of 4 runs that succeeded." in text
    assert f"Of these 5 runs 3 are by version {SEARCH} of the search, today's" in text
    assert "there it was said once above that, and of 1 of 2 that succeeded." in text
    control = [cbpt(name, attack="none", took=None, suspects=(), search=SEARCH) for name in ("badnet", "sig")]
    assert "By today's search are 1 of these 2." in verdicts([*control, cbpt("weak", took=False, suspects=())])


def test_each_suspected_class_counts_where_recall_was_lost() -> None:
    """Of an implant with two targets the mean over both says little of the one that lost."""
    both = (ClassRecall(name="a", recall=0.70, undefended=0.76), ClassRecall(name="b", recall=0.5, undefended=0.5))
    assert "and 1 (two) lose more than 5 points of a suspected class's" in verdicts([cbpt("two", suspects=both)])


def test_suspicions_where_no_planted_trigger_works_are_counted_by_run() -> None:
    """The control's lines, one for each trigger, are of one run; triggers that are off are of a run counted before."""
    own = (ClassRecall(name="three", recall=0.0, undefended=0.4),)
    control = [cbpt(name, attack="none", took=None, verdict="unverified", suspects=()) for name in ("badnet", "sig")]
    weak = [cbpt("weak", took=False, suspects=own), cbpt("weak", attack="off", took=False, suspects=own)]
    older = [cbpt("old", took=False, verdict="unverified"), cbpt("older", took=False, verdict="not guarded")]
    text = verdicts([cbpt(suspects=own), *control, *weak, *older])
    what, named = "on clean models and on implants that did not take", "weak, guarded; older, not guarded"
    assert f"A class is suspected in 2 of 4 runs {what} ({named})." in text
    assert f"A class is suspected in none of 1 run {what}." in verdicts([cbpt(), *control])
    mixed = [control[0].model_copy(update={"suspects": own, "verdict": "guarded"}), control[1]]
    assert f"A class is suspected in 1 of 1 run {what} (clean digits, guarded)." in verdicts(mixed), "whichever is last"
    assert "did not take" not in verdicts([cbpt()])


def test_exactly_two_points_lost_are_no_failure_in_floating_point() -> None:
    undefended = Shares(**(SHARES | {"ca": 0.2}))
    assert 0.2 - 0.02 > 0.18
    assert "| guarded | 1 | 0 |" in verdicts([cbpt(ca=0.18, undefended=undefended)])
    assert "| guarded | 0 | 1 |" in verdicts([cbpt(ca=0.1798, undefended=undefended)])


def test_a_run_of_an_implant_whose_taking_nobody_told_has_a_verdict_and_the_control_none() -> None:
    assert "of 1 of 1 runs" in verdicts([cbpt(took=None), cbpt(attack="none", took=None)])
