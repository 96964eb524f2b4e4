"""Measure the road on the shared models: purify, export, and count through the bundle; write what README says of it.

    python benchmarks/road.py measure --shared ../shared --work WORK [--final]   appends lines to road.jsonl
    python benchmarks/road.py table        rewrites the table in README.md and the times by stage in docs/method.md

Without `--final` it counts on the clean images that were not drawn as shots, for development. With it each line is a
read of the test images, which docs/evidence.md counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from command import append, machine, parsers, plainly, ran, read, timed
from pages import rewrite
from timing import Watch

from cbpt_guard import GuardedClassifier, __version__, metrics
from cbpt_guard.defense.data import Listing, list_images, load_images
from cbpt_guard.defense.settings import InversionSettings
from cbpt_guard.defense.triggers import load_trigger

HERE = Path(__file__).parent
LINES, README, METHOD = HERE / "road.jsonl", HERE.parent / "README.md", HERE.parent / "docs" / "method.md"
SHOTS, SEED = 16, 0
MODELS = {"suspect-badnet": "suspect.pt", "mobilenet-clip": "."}


def main() -> None:
    """Parse the command and run it."""
    parser, _, measuring = parsers(__doc__)
    measuring.add_argument("--final", action="store_true", help="read the test images; the line says so")
    measuring.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    args = parser.parse_args()
    if args.command == "table":
        write_table()
        return
    for model in args.models:
        line = measure(model, args.shared, args.work, "test" if args.final else "clean")
        append(LINES, line)
        print(json.dumps(line))


def measure(model: str, shared: Path, work: Path, split: str) -> dict[str, Any]:
    """Purify and export one model by the commands a user types, then count on one split through the bundle."""
    pictures = {name: unpacked(shared, name, work) for name in {"clean", split}}
    folder = work / model
    folder.mkdir(parents=True, exist_ok=True)
    suspect = shared / "models" / model / MODELS[model]
    purify = ["purify", "--model", str(suspect), "--data", str(pictures["clean"]), "--out", str(folder / "purified")]
    watch = Watch()
    took = ran(*purify, "--shots", str(SHOTS), "--seed", str(SEED), "--force")
    others = watch.others()
    out = ["--run", str(folder / "purified"), "--out", str(folder / "bundle"), "--force", "--allow-unguarded"]
    export_seconds = timed("export", "--onnx", *out)
    record = json.loads((folder / "purified" / "run.json").read_text(encoding="utf-8"))
    return {
        "model": model,
        "split": split,
        "shots": SHOTS,
        "seed": SEED,
        "verdict": record["verdict"]["name"],
        "search": record["search"],
        "candidates": record["candidates"],
        **count(folder / "bundle", shared, counted(pictures[split], split)),
        "purify_seconds": round(took.seconds, 1),
        "cpu_seconds": round(took.cpu_seconds, 1),
        "others_cores": round(others, 2),
        "export_seconds": round(export_seconds, 1),
        "peak_mb": took.peak_mb,
        "stages": record["seconds"],
        "cbpt_guard": __version__,
        "versions": record["versions"],
        "machine": machine(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def count(bundle: Path, shared: Path, listing: Listing) -> dict[str, Any]:
    """CA, ASR, PA and the target's clean recall, undefended and guarded, all through the exported bundle."""
    planted = load_trigger(shared / "models" / "suspect-badnet")
    guard = GuardedClassifier.load(bundle)
    data = load_images(listing, guard.manifest.preprocess)
    labels, images = data.labels.numpy(), data.images.numpy()
    target = list(guard.classes_).index(planted.target)
    if list(guard.classes_) != list(data.classes):
        raise SystemExit("the bundle's classes are not those of the images")
    clean, attacked = _answers(guard, images), _answers(guard, planted.trigger.apply(images))
    own = labels == target
    found: dict[str, Any] = {"target": planted.target, "images": len(labels), "target_images": int(own.sum())}
    for name in ("undefended", "guarded"):
        found[name] = {
            "ca": metrics.clean_accuracy(clean[name], labels),
            "asr": metrics.attack_success_rate(attacked[name], labels, target),
            "pa": metrics.poisoned_accuracy(attacked[name], labels, target),
            "max_share": metrics.largest_share(attacked[name]),
            "target_hits": int((clean[name][own] == target).sum()),
        }
    found["flag_clean"] = float(clean["triggered"].mean())
    found["flag_triggered"] = float(attacked["triggered"].mean())
    return found


def _answers(guard: GuardedClassifier, images: np.ndarray) -> dict[str, np.ndarray]:
    outputs = [guard.run(part) for part in np.array_split(images, max(1, len(images) // 64))]
    return {
        "guarded": np.concatenate([part.logits for part in outputs]).argmax(1),
        "undefended": np.concatenate([part.logits_original for part in outputs]).argmax(1),
        "triggered": np.concatenate([part.triggered for part in outputs]),
    }


def unpacked(shared: Path, split: str, work: Path) -> Path:
    """Class folders of one split of the shared images."""
    folder = work / "tiny-imagenet" / split
    if not folder.is_dir():
        pack = shared / "data" / "tiny-imagenet-64.npz"
        subprocess.run([sys.executable, shared / "tools" / "packs.py", "unpack", pack, split, folder], check=True)
    return folder


def counted(pictures: Path, split: str) -> Listing:
    """The images to count on: for `clean`, those that were not drawn as shots."""
    everything = list_images(pictures)
    if split != "clean":
        return everything
    drawn = {path for files in everything.drawn(SHOTS, SEED).files for path in files}
    rest = tuple(tuple(path for path in files if path not in drawn) for files in everything.files)
    return Listing(everything.classes, rest)


def write_table() -> None:
    """Rewrite both tables from the last `test` line of each model, or say that there is none."""
    lines = read(LINES)
    last = {line["model"]: line for line in lines if line["split"] == "test"}
    if not last:
        raise SystemExit(f"{LINES.name} holds no line of the test split")
    rewrite(README, {"measured": table(list(last.values()))})
    rewrite(METHOD, {"stages": stages(list(last.values()), lines)})


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one row per model and classifier; shares in %."""
    kept = ("largest share, triggered", "target's clean recall")
    names = ("model", "classifier", "CA", "ASR", "PA", *kept, "best score", "verdict")
    rows = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for line in lines:
        for name in ("undefended", "guarded"):
            cell = line[name]
            numbers = " | ".join(f"{100 * cell[key]:.1f}" for key in ("ca", "asr", "pa", "max_share"))
            hits = f"{cell['target_hits']} of {line['target_images']}"
            score = f"{max(one['score'] for one in line['candidates']):.1f}"
            judged = f"{score} | {line['verdict']}" if name == "guarded" else " | "
            rows.append(f"| {line['model']} | {name} | {numbers} | {hits} | {judged} |")
    first = lines[0]
    search = ", ".join(dict.fromkeys(str(line.get("search") or "not said") for line in lines))
    cost = ", ".join(f"{line['model']} {line['purify_seconds'] / 60:.1f} min" for line in lines)
    peak = max(line["peak_mb"] for line in lines)
    rows += [
        "",
        f"In %, on {first['images']} `{first['split']}` images of Tiny-ImageNet (200 classes), a MobileNetV2 CLIP,",
        f"{first['shots']} shots a class, one seed, the target not told, through the bundle. The trigger is BadNet",
        f"toward {first['target']!r}; the clean model is the control. A class stands out from a score of",
        f"{InversionSettings().stands_out:g} (docs/method.md). purify took: {cost},",
        f"{peak} MiB at most ({first['machine']}); version of the search: {search}.",
        "Printed by `python benchmarks/road.py table` from `benchmarks/road.jsonl`.",
    ]
    return "\n".join(rows)


def stages(lines: list[dict[str, Any]], ever: list[dict[str, Any]]) -> str:
    """Markdown, one row per stage: seconds of each model's purify; `ever` are all lines, for how far they vary."""
    rows = [["seconds", *(line["model"] for line in lines)], ["---"] * (len(lines) + 1)]
    rows += [[stage, *(f"{line['stages'][stage]:.0f}" for line in lines)] for stage in lines[0]["stages"]]
    rows.append(["start to end", *(f"{line['purify_seconds']:.0f}" for line in lines)])
    text = [f"| {' | '.join(row)} |" for row in rows]
    others = ", ".join(f"{line['others_cores']:.1f}" for line in lines if "others_cores" in line) or "unknown"
    text += [
        "",
        f"{lines[0]['machine']}; cores that other processes took: {others}. Machines of that kind differ: over",
    ]
    took = {
        what: [line[field] for line in ever if line["model"] == lines[0]["model"]]
        for what, field in (("export", "export_seconds"), ("purify", "purify_seconds"))
    }
    spreads = " and ".join(f"one {what} {min(some):.0f} to {max(some):.0f} s" for what, some in took.items())
    text.append(f"all lines of `benchmarks/road.jsonl`, which are of several versions too, {lines[0]['model']} took")
    text.append(f"{spreads}.")
    return "\n".join(text)


if __name__ == "__main__":
    plainly(main)
