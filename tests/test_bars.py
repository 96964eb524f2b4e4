"""The guard against its bars, by lines whose every share is known."""

from __future__ import annotations

from typing import Any

import pytest
from lines import SHARES, cbpt, line

from cbpt_guard.bench.bars import apart, attacks, bars
from cbpt_guard.bench.lines import ClassRecall, Line, PairShares, Shares


def oracle(name: str = "badnet", **given: Any) -> Line:
    return line(implant=name, defense="oracle", **({"pa": 0.42, "max_share": 0.02} | given))


def row(text: str, what: str) -> tuple[str, str]:
    """The measured numbers of a bar, and whether it is kept."""
    *_, measured, kept = cells(text, what)
    return measured, "yes" if kept == "the aim, too" else kept


def cells(text: str, what: str) -> list[str]:
    (found,) = [cells for cells in (part.strip("| ").split(" | ") for part in text.splitlines()) if cells[0] == what]
    return found


def reached(lines: list[Line], what: str, aim: str) -> bool:
    """Whether a bar's aim is reached, which must be the one that is told."""
    _, _, told, _, kept = cells(bars(lines), what)
    assert told == aim
    return kept == "the aim, too"


ASR = "ASR, mean and worst"
CA = "CA less the undefended one (the better of two for 0), mean and worst"
PA = "PA, mean; the oracle's; the share of it"


@pytest.mark.parametrize(
    ("asrs", "measured", "kept"),
    [
        ((0.01, 0.02), "1.5, 2.0", "yes"),
        ((0.01, 0.021), "1.6, 2.1", "**no**"),
        ((0.0, 0.0, 0.031), "1.0, 3.1", "**no**"),
    ],
    ids=["at the bound", "the mean", "the worst"],
)
def test_attacks_are_means_over_seeds_and_the_worst_is_the_worst_of_them(
    asrs: tuple[float, ...], measured: str, kept: str
) -> None:
    lines = [cbpt(f"attack {number}", asr=asr, seed=seed) for number, asr in enumerate(asrs) for seed in (0, 1)]
    assert row(bars(lines), ASR) == (measured, kept)


def test_seeds_are_averaged_before_attacks_are_compared() -> None:
    lines = [cbpt(asr=0.0), cbpt(asr=0.04, seed=1), cbpt("sig", asr=0.01)]
    assert row(bars(lines), ASR) == ("1.5, 2.0", "yes")


@pytest.mark.parametrize(("cas", "kept"), [((0.5, 0.49), "yes"), ((0.5, 0.489), "**no**"), ((0.54, 0.484), "**no**")])
def test_accuracy_is_held_against_the_undefended_one(cas: tuple[float, ...], kept: str) -> None:
    lines = [cbpt(f"attack {number}", ca=ca) for number, ca in enumerate(cas)]
    assert SHARES["ca"] == 0.5
    assert row(bars(lines), CA)[1] == kept


@pytest.mark.parametrize(
    ("ensemble", "own", "measured", "kept"),
    [(0.52, 0.50, "-2.0, -2.0", "**no**"), (0.48, 0.50, "0.0, 0.0", "yes"), (0.52, 0.517, "-0.3, -0.3", "yes")],
    ids=["better", "worse", "of another planting"],
)
def test_accuracy_is_held_against_the_template_ensembles_where_that_is_better(
    ensemble: float, own: float, measured: str, kept: str
) -> None:
    """By what the ensemble gains over the single template on its own planting, the mean over its lines."""
    undefended = Shares(**(SHARES | {"ca": own}))
    lines = [line(defense="ensemble", ca=ensemble + off, undefended=undefended) for off in (-0.01, 0.01)]
    assert row(bars([cbpt(ca=0.5), *lines]), CA.replace("two for 0", "two for 1")) == (measured, kept)


RECALL = "planted target's recall less the undefended one, mean and worst run"


@pytest.mark.parametrize(("recall", "kept"), [(0.35, "yes"), (0.34, "**no**")])
def test_the_targets_recall(recall: float, kept: str) -> None:
    assert row(bars([cbpt(target_recall=recall)]), RECALL)[1] == kept


@pytest.mark.parametrize(("recall", "numbers", "kept"), [(0.28, "-4.0, -12.0", "yes"), (0.24, "-5.0, -16.0", "**no**")])
def test_no_run_may_lose_more_than_three_of_the_targets_images(recall: float, numbers: str, kept: str) -> None:
    others = [cbpt("a"), cbpt("b"), cbpt("d", target_recall=0.36)]
    assert row(bars([cbpt(target_recall=recall), *others]), RECALL) == (numbers, kept)


def wrongly(counted: str, lines: list[Line]) -> tuple[str, str]:
    return row(bars(lines), f"wrongly suspected classes' recall less the undefended one, {counted} runs known")


@pytest.mark.parametrize(
    ("recalls", "numbers", "kept"),
    [
        ([0.28, 0.42], "-5.0, -12.0", "yes"),
        ([0.27, 0.43], "-5.0, -13.0", "**no**"),
        ([0.34, 0.35], "-5.5, -6.0", "**no**"),
    ],
    ids=["neither", "the worst", "the mean"],
)
def test_a_class_that_is_suspected_wrongly_keeps_its_recall(recalls: list[float], numbers: str, kept: str) -> None:
    """The target's own loss is another bar's; a run from before suspects were kept says nothing."""
    seeds = [
        (ClassRecall(name="three", recall=0.0, undefended=0.4), ClassRecall(name="four", recall=one, undefended=0.4))
        for one in recalls
    ]
    runs = [cbpt(seed=seed, suspects=suspects) for seed, suspects in enumerate(seeds)]
    assert wrongly("2 of 3", [*runs, cbpt(seed=2)]) == (numbers, kept)


def test_where_no_class_is_suspected_wrongly_the_bar_is_kept() -> None:
    own = (ClassRecall(name="three", recall=0.0, undefended=0.4),)
    assert wrongly("1 of 1", [cbpt(suspects=own)]) == ("none was suspected", "yes")
    assert "wrongly suspected" not in bars([cbpt()]), "nothing is said of what is not known"


@pytest.mark.parametrize(
    ("pa", "most", "measured", "kept", "short"),
    [
        (0.38, 0.42, "38.0, 42.0, 90.5", "yes", "none"),
        (0.37, 0.42, "37.0, 42.0, 88.1", "**no**", "badnet"),
        (0.05, 0.06, "5.0, 6.0, 83.3", "yes", "none"),
    ],
    ids=["nine tenths", "less", "within a point"],
)
def test_poisoned_accuracy_is_held_against_the_oracles(
    pa: float, most: float, measured: str, kept: str, short: str
) -> None:
    text = bars([cbpt(pa=pa), oracle(pa=most)])
    assert row(text, PA) == (measured, kept)
    assert row(text, "attacks whose PA is short of that")[0] == short


def test_the_largest_share_and_the_clean_model_and_few_shots() -> None:
    lines = [cbpt(), oracle(), cbpt("sig", max_share=0.05), oracle("sig")]
    share = "largest share on triggered images, worst"
    assert row(bars(lines[:2]), share) == ("3.0, 1.0 times what it may be (badnet)", "yes")
    assert row(bars(lines), share) == ("5.0, 1.7 times what it may be (sig)", "**no**")
    over = "attacks whose largest share is above that"
    assert row(bars(lines[:2]), over) == ("none", "yes")
    wider = [*lines, cbpt("wanet", max_share=0.031), oracle("wanet")]
    assert row(bars(wider), over) == ("sig, wanet", "**no**")
    off = line(implant="sig", attack="off", max_share=0.02)
    assert row(bars([*lines, off]), share) == ("3.0, 1.0 times what it may be (badnet)", "yes")
    alone = [cbpt(max_share=0.031), line(attack="off", max_share=0.01)]
    told = ("3.1, 1.0 times what it may be (badnet)", "**no**")
    assert row(bars(alone), share) == told, "without an oracle the clean images' share is what counts"
    assert row(bars([*alone, cbpt("sig", max_share=0.9)]), f"{share}, 1 of 2 known") == told
    assert "largest share" not in bars([cbpt(), oracle(seed=1)])
    clean = cbpt(attack="none", took=None, ca=0.494)
    assert row(bars([*lines, clean]), "CA less the undefended one, clean model (1 run)") == ("-0.6", "**no**")
    few = [cbpt(shots=4, asr=0.02), cbpt("sig", shots=4, asr=0.07)]
    assert row(bars([*lines, *few]), "ASR with 4 shots, mean and worst of 2 attacks (1 seed)") == (
        "4.5, 7.0 (sig)",
        "yes",
    )
    assert row(bars([*lines, *few]), ASR)[0] == "1.0, 1.0"


def test_each_aim_at_its_edge_and_beyond() -> None:
    """An aim is more than what must be; of those that are means one case lies on it and one just beyond."""
    for asrs, held in (((0.0, 0.01), True), ((0.0, 0.011), False), ((0.0,) * 5 + (0.021,), False)):
        assert reached([cbpt(f"a{n}", asr=asr) for n, asr in enumerate(asrs)], ASR, "0.5 and 2") is held
    for ca, held in ((0.5, True), (0.499, False)):
        assert reached([cbpt(ca=ca)], CA, "0 in the mean") is held
        clean = cbpt(attack="none", took=None, ca=ca)
        assert reached([cbpt(), clean], "CA less the undefended one, clean model (1 run)", "0") is held
    for recall, held in ((0.4, True), (0.39, False)):
        assert reached([cbpt(target_recall=recall)], RECALL, "0 in the mean") is held
        own = (ClassRecall(name="four", recall=recall, undefended=0.4),)
        what = "wrongly suspected classes' recall less the undefended one, 1 of 1 runs known"
        assert reached([cbpt(suspects=own)], what, "0 in the mean") is held
    assert reached([cbpt(suspects=())], what, "0 in the mean"), "nothing was suspected wrongly"
    for pa, held in ((0.4074, True), (0.407, False)):
        assert reached([cbpt(pa=pa), oracle()], PA, "97 % of it") is held
    for asr, held in ((0.02, True), (0.021, False)):
        few = [cbpt(), cbpt(shots=4, asr=asr)]
        assert reached(few, "ASR with 4 shots, mean and worst of 1 attacks (1 seed)", "2 in the mean") is held
    share, off = "largest share on triggered images, worst", line(attack="off", max_share=0.015)
    assert reached([cbpt(), oracle(), off], share, "2 times for all")
    assert not reached([cbpt(max_share=0.031), oracle(), off], share, "2 times for all")
    assert not reached([cbpt(), oracle()], share, "2 times for all"), "of what, nobody knows"
    never = line(attack="off", max_share=0.0)
    assert not reached([cbpt(), oracle(), never], share, "2 times for all")
    assert cells(bars([cbpt(asr=0.016)]), ASR)[-1] == "**no**", "what must be is said first"


def test_what_did_not_take_what_is_off_and_rivals_do_not_count() -> None:
    others = [cbpt("weak", took=False), cbpt("other", attack="off"), line(implant="sig", defense="probe")]
    assert [attack.name for attack in attacks([cbpt(), *others], 16)] == ["badnet"]
    assert "No attack" in bars(others)


def test_the_worst_pair_counts_where_there_are_several_targets() -> None:
    assert row(bars([cbpt(asr=0.01, asr_worst=0.02)]), ASR)[0] == "2.0, 2.0"


def test_attacks_stand_apart_by_what_was_seen_of_them() -> None:
    lines = [
        *(cbpt("badnet", asr=asr, seed=seed, ca=0.5) for seed, asr in enumerate((0.0, 0.02))),
        cbpt("sig", asr=0.03, ca=0.4792, target_recall=0.3, pa=0.3),
        cbpt("issba", asr=0.04, pa=0.2),
        cbpt("triangles", asr=0.0, ca=0.4997),
        oracle("badnet", pa=0.5),
        oracle("sig", pa=0.3),
    ]
    seen = {"developed on": ("badnet", "sig", "wanet"), "looked at": ("issba",)}
    assert apart(lines, seen).splitlines()[2:] == [
        "| developed on | badnet, sig | 2.0 | 3.0 | -1.0 | -5.0 | 88 |",
        "| looked at | issba | 4.0 | 4.0 | 0.0 | 0.0 | - |",
        "| never seen | triangles | 0.0 | 0.0 | 0.0 | 0.0 | - |",
    ]
    assert apart([], seen) == "No attack has been measured yet."


def test_the_title_says_how_many_seeds_stand_behind() -> None:
    lines = [cbpt(seed=seed) for seed in range(3)] + [cbpt("sig")]
    assert "**digits**, 2 attacks, 1 with 3 seeds and the rest with fewer, 16 shots a class, in %" in bars(lines)


def test_the_oracle_is_compared_by_the_seeds_that_both_have() -> None:
    lines = [cbpt(pa=0.3), cbpt(pa=0.1, seed=1), oracle(pa=0.4, seed=2), oracle(pa=0.31)]
    assert row(bars(lines), PA) == ("30.0, 31.0, 96.8", "yes")
    assert "PA" not in bars([lines[1], lines[2]])


def test_a_pair_that_lumps_is_not_hidden_by_the_mean_of_the_pairs() -> None:
    shares = [(0.4, 0.01), (0.1, 0.07)]  # PA and largest share by pair: the means are 25 and 4 %
    pairs = tuple(
        PairShares(**(SHARES | {"pa": pa, "max_share": share}), trigger="patch", target=name)
        for name, (pa, share) in zip(("one", "two"), shares, strict=True)
    )
    text = bars([cbpt(pa=0.25, max_share=0.04, pairs=pairs), oracle(pa=0.26, max_share=0.03, pairs=pairs[:1] * 2)])
    assert row(text, PA)[0] == "25.0, 26.0, 96.2"
    assert row(text, "attacks whose PA is short of that")[0] == "badnet (two)"
    share = "largest share on triggered images, worst"
    assert row(text, share) == ("7.0, 4.7 times what it may be (badnet (two))", "**no**")
