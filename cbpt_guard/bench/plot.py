"""CA against ASR as a picture: one point for each attack and defence, the same bytes from the same lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, mode
from typing import TYPE_CHECKING

from cbpt_guard.bench.lines import CONTROL, Line
from cbpt_guard.bench.table import Rows, counted_shots, rows
from cbpt_guard.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (8.0, 5.0)  # inches
_MARKERS = "oXsDv^<>PH*dp8h"
_COLOURS = 10


def plot(lines: Sequence[Line], out: Path) -> Path:
    """Write an SVG, a panel for each data set and split: clean accuracy against attack success, in %, means over seeds.

    Attacks that did not take are left out: whatever met them would look like a defence.

    Raises:
        InputError: there is nothing to draw, or `out` is no `.svg`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: that keeps global state

    if out.suffix != ".svg":
        raise InputError(f"the picture is an SVG; {out.name} should end in .svg")
    found = rows(line for line in lines if line.attack != CONTROL and line.took is not False)
    if not found:
        raise InputError("no line of an attack that took is there to draw; the control alone makes no picture")
    panels = list(dict.fromkeys((row.dataset, row.split) for row in found))
    numbers = {of: number for number, of in enumerate(dict.fromkeys((row.defense, row.shots) for row in found))}
    with rc_context({"svg.hashsalt": "cbpt-guard", "svg.fonttype": "none"}):
        figure = Figure(figsize=(_SIZE[0] * len(panels), _SIZE[1]), layout="constrained")
        for axes, (dataset, split) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            here = {row: group for row, group in found.items() if (row.dataset, row.split) == (dataset, split)}
            _panel(axes, f"{dataset}, {split} images", here, numbers)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out


def _panel(axes: Axes, title: str, found: Rows, numbers: Mapping[tuple[str, int], int]) -> None:
    """A marker for each defence, the same in all panels; other numbers of shots apart.

    The picture reads without colours, too, as long as there are no more of them than markers.
    """
    usual = mode(row.shots for row in found)
    for defense, shots in dict.fromkeys((row.defense, row.shots) for row in found):
        groups = [group for row, group in found.items() if (row.defense, row.shots) == (defense, shots)]
        across = [100 * mean(line.asr for line in group) for group in groups]
        up = [100 * mean(line.ca for line in group) for group in groups]
        label = defense if shots == usual else f"{defense}, {counted_shots(shots)}"
        number = numbers[defense, shots]
        marker, colour = _MARKERS[number % len(_MARKERS)], f"C{number % _COLOURS}"
        axes.scatter(across, up, label=label, marker=marker, color=colour, alpha=0.75)
    axes.set_xlim(-2, 102)
    title = f"{title}, {counted_shots(usual)} a class"
    axes.set(xlabel="ASR, %: lower is better", ylabel="CA, %: higher is better", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
