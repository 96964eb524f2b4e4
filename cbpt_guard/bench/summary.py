"""One row for each defence: what a reader looks at first, means over the attacks that took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from cbpt_guard.bench.lines import CONTROL, OFF, Line
from cbpt_guard.bench.table import counted_shots, joined, tame

_HEAD = (
    "defence",
    "attacks",
    "CA",
    "ASR, mean",
    "ASR, worst",
    "PA",
    "largest share, worst",
    "target's recall",
    "CA, clean model",
)


def summary(lines: Sequence[Line]) -> str:
    """Markdown, a table for each data set and number of shots.

    The mean over an attack's seeds comes first, then the mean over attacks; the worst attack is the worst of those
    means. A defence that was run on some attacks only is compared with CBPT on the same ones in the full table.
    """
    lines = tame(lines)
    counted = [line for line in lines if line.attack not in (OFF, CONTROL) and line.took is not False]
    settings = dict.fromkeys((line.dataset, line.shots) for line in counted)
    parts = []
    for dataset, shots in settings:
        here = [line for line in counted if (line.dataset, line.shots) == (dataset, shots)]
        clean = [line for line in lines if (line.dataset, line.shots, line.attack) == (dataset, shots, CONTROL)]
        rows = [joined(_HEAD), joined(["---"] * len(_HEAD)), *_rows(here, clean)]
        parts.append("\n".join([f"**{dataset}, {counted_shots(shots)} a class**, in %", "", *rows]))
    return "\n\n".join(parts) if parts else "No attack has been measured yet."


def _rows(counted: Sequence[Line], clean: Sequence[Line]) -> Iterator[str]:
    for defense in dict.fromkeys(line.defense for line in counted):
        own = [line for line in counted if line.defense == defense]
        attacks = list(dict.fromkeys(line.implant for line in own))

        def over(field: str, own: Sequence[Line] = own, attacks: Sequence[str] = attacks) -> list[float]:
            return [100 * mean(getattr(line, field) for line in own if line.implant == name) for name in attacks]

        control = [100 * line.ca for line in clean if line.defense == defense]
        cells = [f"{value:.1f}" for value in (mean(over("ca")), mean(over("asr")), max(over("asr_worst")))]
        cells += [f"{value:.1f}" for value in (mean(over("pa")), max(over("max_share")), mean(over("target_recall")))]
        yield joined((defense, str(len(attacks)), *cells, f"{mean(control):.1f}" if control else "-"))
