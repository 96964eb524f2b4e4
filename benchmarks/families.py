"""Take open_clip's families the whole road on photographs, and write docs/models.md from what was measured.

    python benchmarks/families.py measure --shared ../shared --work WORK [--families NAME ...] [--size small|full]
    python benchmarks/families.py table

Each family is purified in a few steps, exported and served: 200 further photographs, none of them square, are what the
manifest states its parity on. The towers are drawn from a seed, for published weights need a download; the classes are
four kinds of light, which such towers can tell. `measure` appends lines to families.jsonl.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple, cast

import numpy as np
import onnxruntime
import torch
from command import append, machine, parsers, plainly, read
from pages import rewrite
from PIL import Image
from timing import own_seconds
from torch import nn

from cbpt_guard import GuardedClassifier, __version__
from cbpt_guard.bench.families import FAMILIES, Family, few_steps, preprocess_of, write_model
from cbpt_guard.defense import openclip
from cbpt_guard.defense.clip import TextTower
from cbpt_guard.defense.data import list_images, load_images
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.run import SAMPLES
from cbpt_guard.errors import InputError
from cbpt_guard.export import export
from cbpt_guard.export.graph import check_size

HERE = Path(__file__).parent
LINES, PAGE = HERE / "families.jsonl", HERE.parent / "docs" / "models.md"
PACK, CLASSES = "clothing-128", ("cold and dark", "cold and light", "warm and dark", "warm and light")
PURIFIED, COMPARED = 8, 50  # photographs of each class
ANSWERED = 8  # in one run, when the speed of an answer is taken
Line = dict[str, Any]


def main() -> None:
    """Parse the command and run it."""
    parser, _, measuring = parsers(__doc__)
    names = tuple(family.architecture for family in FAMILIES)
    measuring.add_argument("--families", nargs="+", choices=names, default=names)
    measuring.add_argument("--size", choices=("small", "full"), default="full")
    args = parser.parse_args()
    if args.command == "measure":
        for family in (family for family in FAMILIES if family.architecture in args.families):
            line = measure(family, args.size, photographs(args.shared, args.work / PACK), args.work / args.size)
            print(json.dumps(line), flush=True)
            append(LINES, line)
    else:
        write_page()


class Photographs(NamedTuple):
    """Class folders: what a family is purified on, and what its ONNX file is compared with torch on."""

    purified: Path
    compared: Path


def photographs(shared: Path, work: Path) -> Photographs:
    """Real photographs by how warm and how light they are, each cut so that none is square."""
    found = Photographs(work / "purified", work / "compared")
    if found.compared.is_dir():
        return found
    images = run_path(str(shared / "tools" / "packs.py"))["load"](shared / "data" / f"{PACK}.npz", "train")[0]
    means = images.mean(axis=(1, 2))
    warm, light = means[:, 0] - means[:, 2], means.mean(axis=1)
    kinds = 2 * (warm > np.median(warm)) + (light > np.median(light))
    for number, name in enumerate(CLASSES):
        for place, row in enumerate(np.flatnonzero(kinds == number)[: PURIFIED + COMPARED]):
            folder = (found.purified if place < PURIFIED else found.compared) / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cut(images[row], place)).save(folder / f"{place:03d}.png")
    return found


def cut(image: np.ndarray, place: int) -> np.ndarray:
    """Lower or narrower than it was, by an amount that depends on its place."""
    side = len(image) - 8 - 5 * (place % 8)
    return image[:side] if place % 2 else image[:, :side]


def measure(family: Family, size: str, pictures: Photographs, work: Path) -> Line:
    """One family the whole road; its line."""
    folder = work / family.architecture
    shutil.rmtree(folder, ignore_errors=True)
    config = family.config if size == "full" else family.small
    preprocess = preprocess_of(family, config)
    made = write_model(folder / "model", family, config, load_images(list_images(pictures.purified, None), preprocess))
    run, purified = on_processor(
        lambda: purify(
            made.checkpoint, pictures.purified, out=folder / "purified", settings=few_steps(), flags=made.flags
        )
    )
    further = load_images(list_images(pictures.compared, None), preprocess)
    np.savez(run.path / SAMPLES, images=further.images.numpy(), labels=further.labels.numpy())
    bundle, exported = on_processor(lambda: export(run, folder / "bundle", allow_unguarded=True))
    guard = GuardedClassifier.load(bundle)
    variant = guard.manifest.variants["fp32"]
    if variant.parity is None:
        raise InputError(f"{bundle} states no parity")
    return {
        "architecture": family.architecture,
        "size": size,
        "pixels": preprocess.size,
        "image_parameters": parameters(config),
        "text": "causal" if TextTower(openclip.build(config)).causal else "full length",
        "tokenizer": "open_clip's" if made.flags.tokenizer is None else "--tokenizer",
        "preprocess": family.preprocess,
        "clean_accuracy": round(variant.gate.clean_accuracy_original, 4),
        "images": variant.parity.images,
        "max_logit_difference": variant.parity.max_logit_difference,
        "bound": variant.parity.bound,
        "purify_s": round(purified, 1),
        "export_s": round(exported, 1),
        "answer_ms": round(answer_ms(guard, list(further.images[:ANSWERED].numpy())), 2),
        "cbpt_guard": __version__,
        "open_clip": openclip.VERSION,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": machine(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parameters(config: openclip.ModelConfig) -> int:
    """Of the image tower."""
    return sum(value.numel() for value in cast(nn.Module, openclip.build(config).visual).parameters())


def answer_ms(guard: GuardedClassifier, images: list[np.ndarray]) -> float:
    """Milliseconds of processor time for each image of a batch, the median of seven."""
    guard.predict(images)
    seconds = []
    for _ in range(7):
        started = time.process_time()
        guard.predict(images)
        seconds.append(time.process_time() - started)
    return 1000 * float(np.median(seconds)) / len(images)


def on_processor(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds of processor time: neighbours on the machine change little there."""
    started = own_seconds()
    return work(), own_seconds() - started


def write_page() -> None:
    """Rewrite the page's two tables: what was measured last, and what is refused."""
    lines = read(LINES)
    last = {(line["architecture"], line["size"]): line for line in lines}
    rewrite(PAGE, {"measured": measured(last), "refused": refused()})


def measured(last: dict[tuple[str, str], Line]) -> str:
    """Markdown, one row per family and size, in the order of `FAMILIES`."""
    rows = [
        "| architecture | size | image tower | pixels | text tower | tokenizer | preprocessing | images "
        "| worst logit difference (bound) | purify | export | an answer |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for size in ("full", "small"):
            line = last.get((family.architecture, size))
            if line is not None:
                rows.append(row(line))
    first = next(iter(last.values()))
    rows += [
        "",
        f"On {first['machine']}, open_clip {first['open_clip']}, torch {first['torch']}, onnxruntime "
        f"{first['onnxruntime']}. Times are processor time",
        f"of all cores together: a purification in a few steps on {len(CLASSES) * PURIFIED} photographs, its "
        f"export, and the answer for one image in a batch of {ANSWERED}.",
        "Printed by `python benchmarks/families.py table` from `benchmarks/families.jsonl`.",
    ]
    return "\n".join(rows)


def row(line: Line) -> str:
    """One line as a row of the table."""
    cells = [
        line["architecture"],
        "open_clip's" if line["size"] == "full" else "small",
        f"{line['image_parameters'] / 1e6:.3g} M",
        line["pixels"],
        line["text"],
        line["tokenizer"],
        line["preprocess"],
        line["images"],
        f"{line['max_logit_difference']:.1e} ({line['bound']:.0e})",
        f"{line['purify_s']:.0f} s",
        f"{line['export_s']:.0f} s",
        f"{line['answer_ms']:.3g} ms",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def refused() -> str:
    """Markdown: which of open_clip's names cannot run, by the reason that the commands give."""
    reasons: dict[str, list[str]] = {}
    for name in openclip.architecture_names():
        config = openclip.named_config(name)
        reason = openclip.refusal(config)
        if reason is None:
            try:
                check_size(cast(nn.Module, openclip.build(config).visual), name)
            except InputError:
                reason = "`export` refuses: no ONNX file holds more than 2 GB of weights"
        elif "CoCa" in reason:
            reason = "`purify` refuses: CoCa's captioning decoder"
        else:
            reason = "`purify` refuses: a Hugging Face text tower, which needs a download"
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    rows = ["| why | architectures |", "|---|---|"]
    rows += [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(reasons.items(), reverse=True)]
    others = len(openclip.architecture_names()) - sum(map(len, reasons.values()))
    return "\n".join(
        [*rows, "", f"The other {others} of open_clip {openclip.VERSION}'s names are taken by their config."]
    )


if __name__ == "__main__":
    plainly(main)
