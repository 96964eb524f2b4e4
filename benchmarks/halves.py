"""Would half of the attacks choose the settings that stand? The test's and the anchored rows', counted on the others.

    python benchmarks/halves.py measure --plan benchmarks/plan.toml --root ../shared --root IMAGES --work WORK
        fits both to the triggers of each run of `cbpt` that `bench run` left in WORK, once for each setting, and
        appends a line to halves.jsonl; a run that has one is passed over
    python benchmarks/halves.py table        rewrites what docs/evidence.md says of it

Stage 1 is taken as it is. Counted on development images that the run did not draw, those of the targets all; no test
image is read. The attacks are halved by their names, every other one, so that nobody picks.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from command import append, implant_parsers, plainly, read, stamp
from pages import rewrite
from runs import PlantedRun, planted_runs, undrawn
from torch import Tensor

from cbpt_guard.bench.table import joined
from cbpt_guard.defense.anchored import anchored_rows
from cbpt_guard.defense.clip import FrozenClip
from cbpt_guard.defense.data import load_images, split
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import TriggerBank, encode
from cbpt_guard.defense.head import GuardedHead, Head, TriggerTest
from cbpt_guard.defense.settings import AnchorSettings, RuleSettings, Settings
from cbpt_guard.defense.tuning import FeatureSet
from cbpt_guard.errors import CheckError
from cbpt_guard.metrics import count

HERE = Path(__file__).parent
LINES, PAGE = HERE / "halves.jsonl", HERE.parent / "docs" / "evidence.md"
EACH = 8
"""Images of each class but the targets'."""
APART = 0.01
"""Of a share: L-BFGS stops short of the minimum and many answers are near ties, so a run is met nearly, not exactly."""
Lines = list[dict[str, Any]]


class Setting(NamedTuple):
    """What is chosen: the threshold's place in standard deviations, and what anchored rows are taught and how far."""

    clean_deviations: float
    label_weight: float
    temperature: float
    strength: float

    @property
    def anchor(self) -> AnchorSettings:
        """Of the rows."""
        return AnchorSettings(label_weight=self.label_weight, temperature=self.temperature, strength=self.strength)


_ANCHOR = AnchorSettings()
STANDING = Setting(RuleSettings().clean_deviations, _ANCHOR.label_weight, _ANCHOR.temperature, _ANCHOR.strength)
ROWS = (
    (0.15, 3.0, 100.0),
    (0.0, 3.0, 100.0),
    (0.5, 3.0, 100.0),
    (1.0, 3.0, 100.0),
    (0.15, 1.0, 100.0),
    (0.15, 10.0, 100.0),
    (0.15, 3.0, 10.0),
    (0.15, 3.0, 1000.0),
    (1.0, 3.0, 10.0),
)
"""Each setting of the rows to both sides, and labels alone with the strength that suits these."""
GRID = tuple(Setting(far, *rows) for far, rows in itertools.product((2.0, 1.0, 1.5, 2.5, 3.0), ROWS))
"""The standing one first: of equals the first is chosen."""


class Fitting(NamedTuple):
    """What a run was fitted to: features of its shots, those beside the bank by their target, and the bank."""

    data: FeatureSet
    beside: list[tuple[int, Tensor]]
    bank: TriggerBank
    suspects: list[int]
    original: Head


class Counted(NamedTuple):
    """Images that the run never saw: features (N, E), labels (N,), and features under each planted trigger."""

    clean: Tensor
    labels: Tensor
    planted: list[tuple[int, Tensor]]


def main() -> None:
    """Parse the command and run it."""
    parser, _, measuring = implant_parsers(__doc__)
    measuring.add_argument("--only", metavar="NAME", help="one implant")
    args = parser.parse_args()
    if args.command == "measure":
        done = {(line["run"], line["suspect_sha256"]) for line in read(LINES)}
        for one in planted_runs(args.plan, args.root, args.work, args.only):
            if (one.run.record.created, one.run.record.model.source_sha256) in done:
                continue
            line = measured(one)
            append(LINES, line)
            print(json.dumps(line | {"shares": line["shares"][:1]}), flush=True)
    else:
        rewrite(PAGE, {"halves": told(read(LINES))})


def measured(one: PlantedRun) -> dict[str, Any]:
    """What each setting leaves, in the order of `GRID`, in [0, 1]: ASR of the worst trigger, mean PA, mean recall.

    Raises:
        CheckError: what is fitted here by the standing setting leaves more or less than the run itself.
    """
    clip, head = one.clip(), one.run.head()
    seen, fitting = counted(one, clip), fitted_to(one, clip, head)
    tests = {far: fitted_test(fitting, far) for far in {setting.clean_deviations for setting in GRID}}
    rows = {setting[1:]: anchored(fitting, setting.anchor) for setting in GRID if setting[0] == GRID[0][0]}
    heads = [GuardedHead(fitting.original, rows[s[1:]], tests[s[0]], head.classes) for s in GRID]
    left = [shares(guarded, fitting.original, seen) for guarded in (*heads, head)]
    apart = max(abs(left[0][name] - left[-1][name]) for name in left[0])
    if apart > APART:
        raise CheckError(f"{one.run.path} leaves {left[-1]}, and what is fitted here by its setting {left[0]}")
    return {
        "implant": one.implant,
        "seed": one.run.record.seed,
        "search": one.run.record.search,
        "run": one.run.record.created,
        "undefended": shares(None, fitting.original, seen),
        "grid": [list(setting) for setting in GRID],
        "shares": left[:-1],
        "suspect_sha256": one.run.record.model.source_sha256,
        **stamp(),
    }


def counted(one: PlantedRun, clip: FrozenClip) -> Counted:
    """Images that were not drawn, clean and under what was planted."""
    targets = [pair.target for pair in one.planted]
    data = load_images(undrawn(one.everything, one.drawn, EACH, targets), clip.preprocess)
    planted = [
        (one.everything.classes.index(pair.target), torch.from_numpy(pair.trigger.apply(data.images.numpy())))
        for pair in one.planted
    ]
    return Counted(encode(clip, data.images), data.labels, [(t, encode(clip, images)) for t, images in planted])


def fitted_to(one: PlantedRun, clip: FrozenClip, head: GuardedHead) -> Fitting:
    """The shots that the run tuned on, under its bank and the edits beside it."""
    shots, settings = load_images(one.drawn, clip.preprocess), Settings.model_validate(one.run.record.settings)
    kept, _ = split(shots.labels, settings.tuning.held_out, one.run.record.seed)
    images, bank = shots.images[kept], one.run.bank()
    under = torch.stack([encode(clip, images, trigger) for trigger in bank])
    beside = [(edit.target, encode(clip, images, edit)) for edit in one.run.beside()]
    suspects = [suspect.index for suspect in one.run.record.suspects]
    return Fitting(FeatureSet(encode(clip, images), under, shots.labels[kept]), beside, bank, suspects, head.original)


def fitted_test(to: Fitting, deviations: float) -> TriggerTest:
    """As `purify` fits it, but for where the threshold lies."""
    rule = RuleSettings(clean_deviations=deviations)
    return fit_test(to.data, to.bank, to.suspects, to.original, {}, rule, to.beside)


def anchored(to: Fitting, settings: AnchorSettings) -> Head:
    """As `purify` anchors rows, but for the settings."""
    found = torch.cat([to.data.triggered, *(under[None] for _, under in to.beside)])
    rows = anchored_rows(to.original, FeatureSet(to.data.clean, found, to.data.labels), settings)
    return Head(rows, to.original.scale, to.original.bias)


def shares(guarded: GuardedHead | None, original: Head, seen: Counted) -> dict[str, float]:
    """ASR of the worst planted trigger, mean PA and mean recall of the targets, of a head or of the zero-shot one."""
    answers = (original if guarded is None else guarded).answers
    clean, labels = answers(seen.clean).numpy(), seen.labels.numpy()
    counts = [count(clean, answers(under).numpy(), labels, target) for target, under in seen.planted]
    told = {
        "asr": max(one.asr for one in counts),
        "pa": mean(one.pa for one in counts),
        "recall": mean(one.target_recall for one in counts),
    }
    return {name: round(share, 4) for name, share in told.items()}


class Result(NamedTuple):
    """Of some attacks, in [0, 1]: ASR in the mean and of the worst, mean PA, mean recall less the undefended."""

    asr: float
    worst: float
    pa: float
    recall: float

    @property
    def gain(self) -> float:
        """What is chosen by: a point more of PA or of recall is worth a point less of ASR."""
        return self.pa + self.recall - self.asr


def result(by_attack: Sequence[Lines], setting: Setting) -> Result:
    """What a setting leaves, each attack the mean of its lines."""

    def of(name: str) -> list[float]:
        return [mean(line["shares"][_place(line, setting)][name] for line in own) for own in by_attack]

    before = [mean(line["undefended"]["recall"] for line in own) for own in by_attack]
    recall = mean(after - was for after, was in zip(of("recall"), before, strict=True))
    return Result(mean(of("asr")), max(of("asr")), mean(of("pa")), recall)


def chosen(by_attack: Sequence[Lines]) -> Setting:
    """The setting that gains most on some attacks."""
    return max(GRID, key=lambda setting: result(by_attack, setting).gain)


def told(measured: Lines) -> str:
    """Markdown: for each half what it chooses, and what this and the standing setting leave on the other half."""
    last = {(line["implant"], line["seed"]): line for line in measured}
    names = sorted({implant for implant, _ in last})
    if len(names) < 2:
        return "Not measured yet."
    halves = {"first": _lines(names[::2], last), "second": _lines(names[1::2], last)}
    head = ("counted on", "settings chosen on", *Setting._fields, "ASR, mean", "ASR, worst", "PA", "recall")
    rows = [*_rows("first", "second", halves), *_rows("second", "first", halves)]
    about = f"First: {', '.join(names[::2])}; second: {', '.join(names[1::2])}."
    return "\n".join([joined(head), joined(["---"] * len(head)), *(joined(row) for row in rows), "", about])


def _rows(own: str, other: str, halves: Mapping[str, Sequence[Lines]]) -> Iterator[list[str]]:
    ways = ((other, chosen(halves[other])), ("as they stand", STANDING), (own, chosen(halves[own])))
    for by, setting in ways:
        left = result(halves[own], setting)
        yield [own, by, *(f"{value:g}" for value in setting), *(f"{100 * share:.1f}" for share in left)]


def _lines(names: Sequence[str], last: Mapping[tuple[str, int], dict[str, Any]]) -> list[Lines]:
    return [[line for (implant, _), line in last.items() if implant == name] for name in names]


def _place(line: dict[str, Any], setting: Setting) -> int:
    place: int = line["grid"].index(list(setting))
    return place


if __name__ == "__main__":
    plainly(main)
