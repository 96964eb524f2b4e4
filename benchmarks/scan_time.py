"""Wall time of `scan` where the target shows at once, and where nothing stands out and masks are compared.

    python benchmarks/scan_time.py measure --shared ../shared --work WORK   appends two lines to scan_time.jsonl
    python benchmarks/scan_time.py table        rewrites what docs/scan.md says of it

Both are the command from its start to its end, on the shared suspect and on the clean model that it was made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from command import append, parsers, plainly, ran, read, stamp
from pages import rewrite
from road import MODELS, SEED, SHOTS, unpacked
from timing import Watch

from cbpt_guard.defense.calibration import SEARCH

HERE = Path(__file__).parent
LINES, PAGE = HERE / "scan_time.jsonl", HERE.parent / "docs" / "scan.md"
MOST_MINUTES = {"suspect-badnet": 3, "mobilenet-clip": 12}
"""Minutes that we hold a scan to: where the target shows at once, and in the longer way."""


def main() -> None:
    """Parse the command and run it."""
    parser, _, _ = parsers(__doc__)
    args = parser.parse_args()
    if args.command == "measure":
        for model in MOST_MINUTES:
            line = measure(model, args.shared, args.work)
            append(LINES, line)
            print(json.dumps(line))
    else:
        rewrite(PAGE, {"time": told(lines())})


def measure(model: str, shared: Path, work: Path) -> dict[str, Any]:
    """One scan of a shared model with the shots that `purify` gets."""
    work.mkdir(parents=True, exist_ok=True)
    data, suspect, watch = unpacked(shared, "clean", work), shared / "models" / model / MODELS[model], Watch()
    took = ran("scan", "--model", suspect, "--data", data, "--shots", str(SHOTS), "--seed", str(SEED))
    return {
        "model": model,
        "seconds": round(took.seconds, 1),
        "cpu_seconds": round(took.cpu_seconds, 1),
        "peak_mb": took.peak_mb,
        "search": SEARCH,
        "others_cores": round(watch.others(), 2),
        **stamp(),
    }


def lines() -> list[dict[str, Any]]:
    """What was measured so far."""
    return read(LINES)


def told(measured: list[dict[str, Any]]) -> str:
    """Markdown: what lines of each model by its last search say, and whether their median is within what it may be."""
    last = {line["model"]: line for line in measured}
    alike = [[one for one in measured if _version(one) == _version(line)] for line in last.values()]
    return "\n".join(f"- {_told(group)}" for group in alike) or "Not measured yet."


def _version(line: dict[str, Any]) -> tuple[str, int | None]:
    return line["model"], line.get("search")


def _told(alike: list[dict[str, Any]]) -> str:
    line, times = alike[-1], [one["seconds"] / 60 for one in alike]
    minutes, most = median(times), MOST_MINUTES[line["model"]]
    kept = "within" if minutes <= most else "**not within**"
    several = ""
    if len(times) > 1:
        each, inside = ", ".join(f"{one:.2f}" for one in times), sum(one <= most for one in times)
        several = f" (median of {each}, {inside} of {len(times)} within)"
    return (
        f"{line['model']}: {minutes:.1f} min{several}, {kept} the {most} that it is held to, "
        f"{max(one['peak_mb'] for one in alike)} MiB "
        f"(search {line.get('search', 'not said')}; {line['machine']}; "
        f"other processes took {line['others_cores']:.1f} cores)"
    )


if __name__ == "__main__":
    plainly(main)
