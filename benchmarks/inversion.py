"""What stage 1 found against what was planted: how near each family comes, and where the search ranks the target.

    python benchmarks/inversion.py measure --plan benchmarks/plan.toml --root ../shared --root IMAGES --work WORK
        looks at the runs of `cbpt` that `bench run` left in WORK, and appends lines to inversion.jsonl
    python benchmarks/inversion.py table        rewrites what docs/method.md says of it

Counted on images that the run did not draw. `cosine` is that of the mean feature under the found trigger and under the
planted one; `clean` is that of the mean clean feature and the latter: what no trigger at all would have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from command import append, implant_parsers, plainly, read, stamp
from pages import rewrite

from cbpt_guard.bench.table import joined
from cbpt_guard.metrics import attack_success_rate

if TYPE_CHECKING:  # the table alone needs no torch
    from runs import PlantedRun
    from torch import Tensor

HERE = Path(__file__).parent
LINES, METHOD = HERE / "inversion.jsonl", HERE.parent / "docs" / "method.md"
IMAGES = 512
Lines = list[dict[str, Any]]


def main() -> None:
    """Parse the command and run it."""
    parser, _, _ = implant_parsers(__doc__)
    args = parser.parse_args()
    if args.command == "measure":
        for line in measure(args.plan, args.root, args.work):
            append(LINES, line)
            print(json.dumps(line), flush=True)
    else:
        rewrite(METHOD, {"inversion": told(lines())})


def measure(plan_file: Path, roots: list[Path], work: Path) -> Iterator[dict[str, Any]]:
    """A line for each planted target of each run that lies in the work folder."""
    from runs import planted_runs  # here, as torch: the table alone needs neither

    for one in planted_runs(plan_file, roots, work):
        yield from compared(one)


def compared(one: PlantedRun) -> Lines:
    """A line for each planted target, with all that was found toward it."""
    import torch
    from runs import undrawn

    from cbpt_guard.defense.data import load_images
    from cbpt_guard.defense.found import encode

    run, clip = one.run, one.clip()
    listing = undrawn(one.everything, one.drawn, max(1, IMAGES // len(one.everything.classes)))
    data, head = load_images(listing, clip.preprocess), run.head().original
    untouched = encode(clip, data.images)
    ranks = [candidate.label for candidate in run.record.candidates]
    found: Lines = []
    for pair in one.planted:
        target = one.everything.classes.index(pair.target)
        true = encode(clip, torch.from_numpy(pair.trigger.apply(data.images.numpy())))
        toward = [trigger for trigger in run.bank() if trigger.target == target]
        under = [(trigger.family, encode(clip, data.images, trigger)) for trigger in toward]
        found.append(
            {
                "implant": one.implant,
                "seed": run.record.seed,
                "target": pair.target,
                "search": run.record.search,
                "rank": ranks.index(pair.target) + 1 if pair.target in ranks else None,
                "stands_out": any(seen.label == pair.target and seen.stands_out for seen in run.record.candidates),
                "clean": cosine(untouched, true),
                "found": [
                    {
                        "family": family,
                        "asr": round(attack_success_rate(head.answers(f).numpy(), data.labels.numpy(), target), 4),
                        "cosine": cosine(f, true),
                    }
                    for family, f in under
                ],
                "suspect_sha256": run.record.model.source_sha256,
                **stamp(),
            }
        )
    return found


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the mean features, given features (N, E) under two triggers."""
    import torch.nn.functional as F

    return round(float(F.cosine_similarity(one.mean(0), other.mean(0), dim=0)), 4)


def lines() -> Lines:
    """What was measured so far."""
    return read(LINES)


def told(measured: Lines) -> str:
    """Markdown: a row for each implant and target, a column for each family, after the version of the search.

    Of several found triggers of a family the nearest counts, of several lines of a seed the last; the mean over seeds.
    """
    if not measured:
        return "Not measured yet."
    last = {(line["implant"], line["target"], line["seed"]): line for line in measured}
    families = list(dict.fromkeys(one["family"] for line in last.values() for one in line["found"]))
    head = ("implant", "target", "search", "its rank", "stands out", "clean", *families)
    rows = [[line for key, line in last.items() if key[:2] == row] for row in dict.fromkeys(key[:2] for key in last)]
    return "\n".join([joined(head), joined(["---"] * len(head)), *(joined(_cells(own, families)) for own in rows)])


def _cells(own: Lines, families: list[str]) -> Iterator[str]:
    yield from (own[0]["implant"], own[0]["target"])
    yield ", ".join(dict.fromkeys(str(line.get("search") or "-") for line in own))
    yield ", ".join(dict.fromkeys(str(line["rank"] or "-") for line in own))
    yield "yes" if all(line["stands_out"] for line in own) else "no"
    yield f"{mean(line['clean'] for line in own):.3f}"
    for family in families:
        found = [[one for one in line["found"] if one["family"] == family] for line in own]
        best = [max(several, key=lambda one: float(one["cosine"])) for several in found if several]
        told = (
            f"{mean(one['cosine'] for one in best):.3f} ({100 * mean(one['asr'] for one in best):.0f})" if best else "-"
        )
        yield told


if __name__ == "__main__":
    plainly(main)
