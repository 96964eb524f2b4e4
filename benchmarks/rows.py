"""The rows of the runtime's table: each yields lines with a ratio, what it must be, and what stood behind it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import numpy as np
import onnx
import onnxruntime
import torch
from onnx.utils import Extractor
from PIL import Image
from safetensors.torch import load_file
from timing import in_turns, interleaved, processor_ms

from cbpt_guard import GuardedClassifier
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.images import Pixels, Preprocess, load_image, prepare

HERE = Path(__file__).parent
RESIDENT = "print(int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6)"
VIT, MOBILE = "ViT-B-32", "mobilenet-clip"
TIMELESS = ("memory", "settings_and_memory", "installed_size")  # neighbours change nothing there
Line = dict[str, Any]


class Work(NamedTuple):
    """Where bundles and runs lie, by model, and how many rounds to take."""

    folders: dict[str, Path]
    short: bool

    def bundle(self, model: str) -> Path:
        """The bundle of a model."""
        return self.folders[model] / "bundle"

    def rounds(self, long: int) -> int:
        """How many rounds to take."""
        return min(long, 3) if self.short else long


def made(name: str, shared: Path, work: Path) -> Path:
    """A run and a bundle of a model, exported once: a random ViT-B-32, or the shared MobileNetV2."""
    folder = work / name
    if not (folder / "bundle" / "manifest.json").is_file():
        precision = ("fp32", "int8")
        if name == MOBILE:
            source = shared / "models" / name
            config = json.loads((source / "open_clip_config.json").read_text(encoding="utf-8"))
            size = config["model_cfg"]["vision_cfg"]["image_size"]
            preprocess = Preprocess(size=size, **config["preprocess_cfg"])
            weights = {key: value.float() for key, value in load_file(next(source.glob("*.safetensors"))).items()}
            models.write_bundle(folder, name, config["model_cfg"], preprocess, weights, precision=precision)
        else:
            models.write_bundle(folder, name, precision=precision)
    return folder


def predict_over_session(work: Work) -> list[Line]:
    """`predict` over raw `session.run` on the same decoded batch."""
    lines = []
    for batch, must in ((1, 1.10), (32, 1.03)):
        guard, pixels = GuardedClassifier.load(work.bundle(VIT)), noise(VIT, batch, work)
        session, images = raw_session(work.bundle(VIT)), list(pixels)
        found = interleaved(
            lambda g=guard, i=images: g.predict(i),
            lambda s=session, p=pixels: s.run(None, {"image": p}),
            work.rounds(60 if batch == 1 else 40),
        )
        lines.append({"model": VIT, "batch": batch, "must": ["<=", must], **found})
    return lines


def guard_over_zero_shot(work: Work) -> list[Line]:
    """The guarded graph over the same graph cut down to its zero-shot head."""
    model = onnx.load(work.bundle(VIT) / "model.onnx")
    alone = Extractor(model).extract_model(["image"], ["logits_original"]).SerializeToString()
    guarded, bare = raw_session(work.bundle(VIT)), raw_session(alone)
    pixels = noise(VIT, 8, work)
    found = interleaved(
        lambda: guarded.run(None, {"image": pixels}), lambda: bare.run(None, {"image": pixels}), work.rounds(150)
    )
    return [{"model": VIT, "batch": 8, "must": ["<=", 1.01], **found}]


def many_jpegs(work: Work) -> list[Line]:
    """A list of JPEGs of mixed size, end to end, over the slower of decoding alone and the session alone."""
    lines, count = [], 64 if work.short else 256
    files = jpegs(count)
    for model in (VIT, MOBILE):
        guard, session = GuardedClassifier.load(work.bundle(model)), raw_session(work.bundle(model))
        preprocess = guard.manifest.preprocess
        pixels = np.stack([prepare(load_image(file), preprocess) for file in files])

        def decode(preprocess: Preprocess = preprocess) -> None:
            for file in files:
                prepare(load_image(file), preprocess)

        def run(session: Any = session, pixels: Pixels = pixels) -> None:
            for start in range(0, count, 32):
                session.run(None, {"image": pixels[start : start + 32]})

        parts = interleaved(run, decode, work.rounds(3))
        slower = run if parts["ratio"] > 1 else decode
        found = interleaved(lambda g=guard: g.predict(files), slower, work.rounds(5))
        # however they share the cores, the two cannot end before the processor time of both is used up
        needed = processor_ms(lambda g=guard, p=pixels: g.run(p)) + processor_ms(decode)
        least = needed / (os.cpu_count() or 1) / max(parts["ours_ms"], parts["theirs_ms"])
        sides = {"slower": slower.__name__, "session_ms": parts["ours_ms"], "decode_ms": parts["theirs_ms"]}
        lines.append({"model": model, "batch": count, "must": ["<=", 1.15], "least": round(least, 3), **sides, **found})
    return lines


def against_torch(work: Work) -> list[Line]:
    """open_clip eager in torch over `session.run`, same threads: above 1, the graph is faster."""
    return _against_torch(work, "fp32", {VIT: {1: 0.9, 32: 1.1}, MOBILE: {1: 0.9, 32: 1.1}})


def int8_against_torch(work: Work) -> list[Line]:
    """The same for the int8 graph; MobileNetV2 as found."""
    return _against_torch(work, "int8", {VIT: {1: 1.6, 32: 2.2}, MOBILE: {1: None, 32: None}})


def _against_torch(work: Work, precision: str, must: dict[str, dict[int, float | None]]) -> list[Line]:
    lines = []
    for model, batches in must.items():
        guard = GuardedClassifier.load(work.bundle(model), check=False)
        if precision not in guard.manifest.variants:
            continue
        guard = GuardedClassifier.load(work.bundle(model), precision=precision, threads=torch.get_num_threads())
        visual = PurifyRun.open(work.folders[model] / "purified").image_encoder().visual
        for batch, least in batches.items():
            pixels = noise(model, batch, work)
            floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).contiguous()

            def eager(visual: Any = visual, floats: torch.Tensor = floats) -> None:
                with torch.inference_mode():
                    visual(floats)

            rounds = work.rounds(40 if batch == 1 else 30)
            found = interleaved(eager, lambda g=guard, p=pixels: g.run(p), rounds)
            names = {"ours_ms": "torch_ms", "theirs_ms": "graph_ms"}
            found = {names.get(key, key): value for key, value in found.items()}
            must_be = None if least is None else [">=", least]
            lines.append({"model": model, "batch": batch, "precision": precision, "must": must_be, **found})
    return lines


def start_up(work: Work) -> list[Line]:
    """`import cbpt_guard` and load, over torch, open_clip and the model."""
    ours = (
        "import sys, time; t = time.perf_counter(); import cbpt_guard; "
        "cbpt_guard.GuardedClassifier.load(sys.argv[1]); print(time.perf_counter() - t)"
    )
    theirs = (  # open_clip takes transformers along where it finds it, and starts slower: an extra, so not counted
        "import sys, time; sys.modules['transformers'] = None; "
        "t = time.perf_counter(); import cbpt_guard.defense.openclip, open_clip, torch; "
        "open_clip.create_model('local-dir:' + sys.argv[2]).eval(); print(time.perf_counter() - t)"
    )
    lines = []
    for model, must in ((MOBILE, 0.2), (VIT, 0.5)):
        local = as_open_clip(work, model)
        found = in_turns(ours, theirs, (work.bundle(model), local), work.rounds(5), "s")
        lines.append({"model": model, "must": ["<=", must], **found})
    return lines


def memory(work: Work) -> list[Line]:
    """Memory of a process after load over one with the raw session, in MB."""
    ours = f"import sys, cbpt_guard; g = cbpt_guard.GuardedClassifier.load(sys.argv[1]); {RESIDENT}"
    theirs = (
        "import sys, numpy, PIL.Image, onnxruntime; p = ['CPUExecutionProvider']; "
        f"s = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx', providers=p); {RESIDENT}"
    )
    found = in_turns(ours, theirs, (work.bundle(VIT),), work.rounds(5), "mb")
    return [{"model": VIT, "must": ["<=", 1.1], **found}]


def settings_and_time(work: Work) -> list[Line]:
    """`predict` with a setting of `load` over `predict` with its default."""
    guard, lines = GuardedClassifier.load(work.bundle(VIT)), list[Line]()
    for batch, settings in ((1, {"spin": True}), (32, {"spin": True}), (32, {"threads": 1}), (32, {"arena": False})):
        other, images = GuardedClassifier.load(work.bundle(VIT), **settings), list(noise(VIT, batch, work))  # type: ignore[arg-type]
        found = interleaved(
            lambda g=other, i=images: g.predict(i),
            lambda g=guard, i=images: g.predict(i),
            work.rounds(40 if batch == 1 else 7),
        )
        lines.append({"model": VIT, "batch": batch, "setting": named(settings), "must": None, **found})
    return lines


def settings_and_memory(work: Work) -> list[Line]:
    """Memory after 32 images with a setting of `load` over that with its default, in MB."""
    code = (
        "import sys, numpy, cbpt_guard; g = cbpt_guard.GuardedClassifier.load(sys.argv[1], {settings}); "
        "s = g.manifest.preprocess.size; g.predict([numpy.zeros((s, s, 3), 'uint8')] * 32); " + RESIDENT
    )
    theirs, lines = code.format(settings=""), list[Line]()
    for settings in ({"arena": False}, {"batch_size": 8}):
        found = in_turns(code.format(settings=named(settings)), theirs, (work.bundle(VIT),), work.rounds(3), "mb")
        lines.append({"model": VIT, "batch": 32, "setting": named(settings), "must": None, **found})
    return lines


def named(settings: dict[str, Any]) -> str:
    """As `load` takes them."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def installed_size(work: Work) -> list[Line]:
    """What `pip install '.[cpu]'` brings, in MB, by itself."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, "-c", "constraints.txt", ".[cpu]"]
        with tempfile.TemporaryDirectory() as copy:
            source = Path(copy) / "source"
            ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", "*.egg-info", "build")
            shutil.copytree(HERE.parent, source, symlinks=True, ignore=ignored)
            subprocess.run(pip, cwd=source, check=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
    return [{"model": "", "must": ["<=", 250], "ratio": round(size, 1), "unit": "MB"}]


def ray_over_loop(work: Work) -> list[Line]:
    """Ray Data with one actor a core over `predict_stream` in a plain loop, with the start of its actors."""
    try:
        import ray
    except ImportError:
        return []
    count, bundle = 200 if work.short else 2000, str(work.bundle(MOBILE).resolve())
    files = jpegs(count)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")

    class Guard:
        def __init__(self) -> None:
            self.guard = GuardedClassifier.load(bundle, threads=1, decoders=1)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"label": np.array([answer.label for answer in self.guard.predict(list(batch["bytes"]))])}

    def distributed() -> None:
        images = ray.data.from_items([{"bytes": file} for file in files])
        images.map_batches(Guard, batch_size=64, concurrency=os.cpu_count(), num_cpus=1).take_all()

    guard = GuardedClassifier.load(bundle)
    found = interleaved(distributed, lambda: list(guard.predict_stream(iter(files))), work.rounds(3))
    ray.shutdown()
    return [{"model": MOBILE, "batch": count, "must": None, **found}]


ROWS: dict[str, Callable[[Work], list[Line]]] = {
    function.__name__: function
    for function in (
        predict_over_session,
        guard_over_zero_shot,
        many_jpegs,
        against_torch,
        int8_against_torch,
        start_up,
        memory,
        settings_and_time,
        settings_and_memory,
        installed_size,
        ray_over_loop,
    )
}


# What they share


def raw_session(model: Path | bytes) -> Any:
    """onnxruntime as anybody would call it."""
    source = model if isinstance(model, bytes) else model / "model.onnx"
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


def noise(model: str, batch: int, work: Work) -> Pixels:
    """Random prepared images, uint8 (batch, S, S, 3)."""
    size = GuardedClassifier.load(work.bundle(model), check=False).manifest.preprocess.size
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def jpegs(count: int) -> list[bytes]:
    """Smooth pictures of 200 to 900 pixels a side, as a camera's files."""
    generator, files = np.random.default_rng(0), []
    for _ in range(count):
        width, height = (int(side) for side in generator.integers(200, 900, 2))
        tiles = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def as_open_clip(work: Work, model: str) -> Path:
    """The same model in open_clip's local form."""
    folder, run = work.folders[model] / "open_clip", PurifyRun.open(work.folders[model] / "purified")
    if not folder.is_dir():
        folder.mkdir()
        preprocess = run.record.model.preprocess.model_dump(mode="json", exclude={"size"})
        settings = {"model_cfg": run.record.model.config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
        shutil.copy(run.path / "model.safetensors", folder / "open_clip_model.safetensors")
    return folder
