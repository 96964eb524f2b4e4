"""CA against ASR as a picture: one point for each attack and defence, the same bytes from the same lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from cbpt_guard.bench.lines import CONTROL, Line
from cbpt_guard.bench.table import Rows, rows
from cbpt_guard.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (8.0, 5.0)  # inches
_MARKERS = "oXsDv^<>PH*d"


def plot(lines: Sequence[Line], out: Path) -> Path:
    """Draw one panel for each data set: clean accuracy against attack success, in %, means over seeds; writes an SVG.

    Raises:
        InputError: there is nothing to draw, or `out` is no `.svg`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: that keeps global state

    if out.suffix != ".svg":
        raise InputError(f"the picture is an SVG; {out.name} should end in .svg")
    found = {row: group for row, group in rows(lines).items() if row.attack != CONTROL}
    if not found:
        raise InputError("no line of an attack is there to draw; the control alone makes no picture")
    datasets = list(dict.fromkeys(row.dataset for row in found))
    with rc_context({"svg.hashsalt": "cbpt-guard", "svg.fonttype": "none"}):
        figure = Figure(figsize=(_SIZE[0] * len(datasets), _SIZE[1]), layout="constrained")
        for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
            _panel(axes, dataset, {row: group for row, group in found.items() if row.dataset == dataset})
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out


def _panel(axes: Axes, dataset: str, found: Rows) -> None:
    """A marker for each defence, so that the picture reads without colours, too."""
    for number, defense in enumerate(dict.fromkeys(row.defense for row in found)):
        groups = [group for row, group in found.items() if row.defense == defense]
        across = [100 * mean(line.asr for line in group) for group in groups]
        up = [100 * mean(line.ca for line in group) for group in groups]
        axes.scatter(across, up, label=defense, marker=_MARKERS[number % len(_MARKERS)], alpha=0.75)
    axes.set_xlim(-2, 102)
    axes.set(xlabel="ASR, %: lower is better", ylabel="CA, %: higher is better", title=dataset)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
