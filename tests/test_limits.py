"""CBPT beside the oracle and the clean model, by lines whose every share is known."""

from __future__ import annotations

import pytest
from lines import line

from cbpt_guard.bench.limits import limits, recalls
from cbpt_guard.bench.lines import Line


def measured(pa: float, share: float, clean_share: float = 0.03) -> list[Line]:
    """CBPT over two seeds, the oracle, and the clean model under the same trigger and another's."""
    return [
        line(defense="cbpt", pa=pa - 0.01, max_share=share),
        line(defense="cbpt", pa=pa + 0.01, max_share=share, seed=1),
        line(defense="oracle", pa=0.4, max_share=0.02),
        line(defense="oracle", pa=0.4, max_share=0.02, seed=1),
        line(attack="none", took=None, pa=0.3, max_share=clean_share),
        line(attack="none", took=None, implant="sig", pa=0.9, max_share=0.9),
        line(attack="none", took=None, defense="probe", pa=0.9, max_share=0.9),
    ]


@pytest.mark.parametrize(
    ("lines", "row"),
    [
        (measured(0.27, 0.03), "| badnet | 27.0 | 40.0 | 30.0 | 3.0 | 3.0 | 2.0 | 3.0 |"),
        (measured(0.26, 0.031), "| badnet | **26.0** | 40.0 | 30.0 | **3.1** | 3.0 | 2.0 | 3.0 |"),
        (measured(0.28, 0.05, 0.06), "| badnet | 28.0 | 40.0 | 30.0 | 5.0 | 3.0 | 2.0 | 6.0 |"),
    ],
    ids=["at both limits", "beyond them", "the clean model lumps more"],
)
def test_what_lies_beyond_both_limits_is_marked(lines: list[Line], row: str) -> None:
    assert limits(lines).splitlines()[2:] == [row]


@pytest.mark.parametrize("lacking", ["oracle", "none"])
def test_an_attack_without_one_of_its_limits_is_left_out(lacking: str) -> None:
    lines = [found for found in measured(0.3, 0.03) if found.defense != lacking]
    assert "No attack" in limits(lines)
    beside = limits([*measured(0.3, 0.03), *(one.model_copy(update={"implant": "wanet"}) for one in lines)])
    assert beside.endswith("Not measured beside the clean model yet: wanet.") is (lacking == "none")


def test_the_targets_recall_beside_the_oracles() -> None:
    """By the seeds that both have, and the run that loses most beside the mean."""
    lines = [
        line(defense="cbpt", target_recall=0.4),
        line(defense="cbpt", target_recall=0.3, seed=1),
        line(defense="cbpt", target_recall=0.0, seed=2),
        line(defense="oracle", target_recall=0.1),
        line(defense="oracle", target_recall=0.3, seed=1),
    ]
    assert recalls(lines).splitlines()[2:] == ["| badnet | 40.0 | 35.0 | -10.0 | 20.0 |"]
    assert recalls(lines[:3]) == "Not measured yet."
