"""Peak memory of stage 2 alone with all of open_clip's 1,000 ImageNet class names, against the first 200.

    python benchmarks/stage2_memory.py measure --model ../shared/models/mobilenet-clip
        appends a line to stage2_memory.jsonl
    python benchmarks/stage2_memory.py table        rewrites what docs/method.md says of it

As many images under as many triggers in both, their features drawn: what is measured does not depend on their values.
Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from command import append, plainly, read, stamp
from pages import rewrite

HERE = Path(__file__).parent
LINES, METHOD = HERE / "stage2_memory.jsonl", HERE.parent / "docs" / "method.md"
IMAGES, TRIGGERS, EPOCHS = 3200, 4, 3
FEW, MANY, MOST = 200, 1000, 1.2


def main() -> None:
    """Parse the command and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure").add_argument("--model", type=Path, required=True)
    one = commands.add_parser("one", help="what `measure` runs twice: prints the peak in MiB")
    one.add_argument("--model", type=Path, required=True)
    one.add_argument("--classes", type=int, required=True)
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "one":
        print(peak_mb(args.model, args.classes))
    elif args.command == "measure":
        line = measure(args.model)
        append(LINES, line)
        print(json.dumps(line))
    else:
        rewrite(METHOD, {"memory": told(lines())})


def measure(model: Path) -> dict[str, Any]:
    """The peaks with few and with many classes, and their ratio."""
    command = [sys.executable, __file__, "one", "--model", str(model), "--classes"]
    few, many = (
        float(subprocess.run([*command, str(count)], stdout=subprocess.PIPE, text=True, check=True).stdout)
        for count in (FEW, MANY)
    )
    return {
        "model": model.name,
        "ratio": round(many / few, 3),
        "few_mb": round(few),
        "many_mb": round(many),
        **stamp(),
    }


def lines() -> list[dict[str, Any]]:
    """What was measured so far."""
    return read(LINES)


def told(measured: list[dict[str, Any]]) -> str:
    """A sentence: what the last line says."""
    if not measured:
        return "Not measured yet."
    last = measured[-1]
    kept = "which it keeps" if last["ratio"] <= MOST else "which it does **not** keep"
    sizes = f"at most {last['many_mb']} MiB with {MANY} classes and {last['few_mb']} with {FEW}"
    on = f"{last['model']} and {IMAGES} images under {TRIGGERS} triggers"
    return (
        f"A process that does stage 2 alone, on {on}, holds {sizes}, torch and the model included: {last['ratio']:.2f} "
        f"times as much; it may be {MOST} times, {kept} ({last['machine']})."
    )


def peak_mb(model: Path, classes: int) -> float:
    """The highest resident memory of this process, in MiB, after stage 2."""
    import torch
    import torch.nn.functional as F

    from cbpt_guard.cli.machine import prepare_torch
    from cbpt_guard.defense.data import Listing
    from cbpt_guard.defense.found import FoundTrigger, TriggerBank
    from cbpt_guard.defense.head import GuardedHead, TriggerTest
    from cbpt_guard.defense.progress import silent
    from cbpt_guard.defense.prompts import ClassPrompts
    from cbpt_guard.defense.settings import Settings, TuningSettings
    from cbpt_guard.defense.stage2 import guard
    from cbpt_guard.defense.suspect import ModelFlags, open_suspect, zero_shot_head
    from cbpt_guard.defense.tuning import FeatureSet

    prepare_torch(None)
    from open_clip import IMAGENET_CLASSNAMES  # importable only after `openclip` has prepared for it

    names = tuple(IMAGENET_CLASSNAMES[:classes])
    template = "a photo of a {}."
    clip = open_suspect(model, ModelFlags(), Listing(names, tuple(() for _ in names)), template, "cpu").clip
    original = zero_shot_head(clip, names, template)
    width, draws = original.rows.shape[1], torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(1 + TRIGGERS, IMAGES, width, generator=draws), dim=2)
    data = FeatureSet(features[0], features[1:], torch.arange(IMAGES) % classes)
    bank = TriggerBank(tuple(FoundTrigger("additive", 0, torch.zeros(3, 1, 1), None) for _ in range(TRIGGERS)))
    untuned = GuardedHead(original, original, TriggerTest.none(classes, width), names)
    prompts = ClassPrompts(clip, list(names), template, data.labels.unique())
    kept, held = torch.arange(IMAGES).split([IMAGES * 4 // 5, IMAGES // 5])
    settings = Settings(tuning=TuningSettings(epochs=EPOCHS))
    guard(prompts, untuned, data.part(kept), data.part(held), bank, settings, 0, silent)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    plainly(main)
