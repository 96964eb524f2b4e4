"""Peak memory of stage 2 alone with all of open_clip's 1,000 ImageNet class names, against the first 200.

    python benchmarks/stage2_memory.py --model ../shared/models/mobilenet-clip

As many images under as many triggers in both, their features drawn: what is measured does not depend on their values.
Each runs in a process of its own; prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

IMAGES, TRIGGERS, EPOCHS = 3200, 4, 3


def main() -> None:
    """Parse the command; without `--classes` run both sizes and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--classes", type=int)
    args = parser.parse_args()
    if args.classes is not None:
        print(peak_mb(args.model, args.classes))
        return
    command = [sys.executable, __file__, "--model", str(args.model), "--classes"]
    peaks = {
        count: float(subprocess.run([*command, str(count)], capture_output=True, text=True, check=True).stdout)
        for count in (200, 1000)
    }
    print(json.dumps({"peak_mb": peaks, "ratio": round(peaks[1000] / peaks[200], 3)}))


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
    main()
