"""A process of its own that serves from many threads, or loads and drops, and says what that did to it.

    python tests/load_run.py serve BUNDLE FOLDER --predictions N --threads T [--seconds S]
    python tests/load_run.py reload BUNDLE --times N

Prints one JSON object. `FOLDER` takes the images that are given by path.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cbpt_guard import GuardedClassifier, Prediction
from cbpt_guard.errors import ImageError

LIST = 8  # images in a list request
GOOD, BAD = 198, 2  # so that one input in a hundred is bad
SAMPLES = 200
_FORMS = ("JPEG", "PNG", "WEBP", "path", "array", "Pillow")


def main() -> None:
    """Parse the command and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("serve")
    one.add_argument("bundle", type=Path)
    one.add_argument("folder", type=Path)
    one.add_argument("--predictions", type=int, default=10**9)
    one.add_argument("--threads", type=int, default=8)
    one.add_argument("--seconds", type=float, default=float("inf"))
    other = commands.add_parser("reload")
    other.add_argument("bundle", type=Path)
    other.add_argument("--times", type=int, required=True)
    args = parser.parse_args()
    if args.command == "serve":
        found = serve(args.bundle, args.folder, args.predictions, args.threads, args.seconds)
    else:
        found = reload(args.bundle, args.times)
    print(json.dumps(found))


def sources(folder: Path) -> list[Any]:
    """Inputs of mixed sizes and forms, the last of them bad."""
    draw = np.random.default_rng(0)
    found: list[Any] = []
    for number in range(GOOD):
        height, width = (int(side) for side in draw.integers(8, 200, 2))
        image = Image.fromarray(draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
        found.append(_as(_FORMS[number % len(_FORMS)], image.resize((width, height)), folder / f"{number}.png"))
    truncated = found[0][: len(found[0]) // 2]
    return [*found, truncated, np.zeros((8, 8), dtype=np.float64)]


def _as(form: str, image: Image.Image, path: Path) -> Any:
    if form == "array":
        return np.asarray(image)
    if form == "Pillow":
        return image
    if form == "path":
        image.save(path)
        return path
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def answered(guard: GuardedClassifier, source: Any) -> Prediction:
    """The answer for one input; a refused one as a list gives it."""
    try:
        return guard.predict(source)
    except ImageError as error:
        return Prediction.failed(str(error), guard.digest)


def alike(one: Prediction, other: Prediction) -> bool:
    """The same answer: batches of another size may round the last digits of a score differently."""
    if one.error is not None or other.error is not None:
        return one.error == other.error
    assert one.score is not None
    assert other.score is not None
    return (one.label, one.changed, one.triggered) == (other.label, other.changed, other.triggered) and abs(
        one.score - other.score
    ) < 1e-5


def serve(bundle: Path, folder: Path, predictions: int, threads: int, seconds: float) -> dict[str, Any]:
    """Serve until so many predictions or seconds are through; half of the requests are lists."""
    guard, given = GuardedClassifier.load(bundle, threads=1), sources(folder)
    expected = [answered(guard, source) for source in given]
    tickets, end = count(), time.monotonic() + seconds
    differing, before, lock = [0], system_threads(), threading.Lock()
    files, most_threads = open_files(), [0]
    samples: list[tuple[int, float]] = []
    every = max(LIST, min(predictions, 50_000) // SAMPLES // LIST * LIST)

    def requests() -> Iterator[int]:
        """Starting points of requests, LIST inputs each, shared by all threads."""
        for ticket in tickets:
            if ticket * LIST >= predictions or time.monotonic() > end:
                return
            yield ticket

    def work(_: int) -> int:
        done = 0
        for ticket in requests():
            places = [(ticket * LIST + offset) * 7 % len(given) for offset in range(LIST)]
            if ticket % 2:
                found = guard.predict([given[place] for place in places])
            else:
                found = [answered(guard, given[place]) for place in places]
            wrong = sum(not alike(one, expected[place]) for one, place in zip(found, places, strict=True))
            done += len(found)
            if wrong or ticket * LIST % every == 0:
                with lock:
                    differing[0] += wrong
                    most_threads[0] = max(most_threads[0], system_threads())
                    samples.append((ticket * LIST, resident()))
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return {
        "predictions": done,
        "bad": sum(one.error is not None for one in expected) / len(expected),
        "differing": differing[0],
        "threads": threads,
        "threads of the process at most": most_threads[0],
        "threads left": threads_left(before),
        "files left": open_files() - files,
        **growth(samples),
    }


def reload(bundle: Path, times: int) -> dict[str, Any]:
    """Load, answer and drop again and again."""
    samples, files = [], []
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for number in range(times):
        GuardedClassifier.load(bundle, threads=1).predict(image)
        gc.collect()
        samples.append((number, resident()))
        files.append(open_files())
    return {"times": times, "files left": files[-1] - files[0], **growth(samples)}


def growth(samples: list[tuple[int, float]]) -> dict[str, float]:
    """By how much memory grew over the second half, in MiB: a straight line through it, and its end."""
    at, mib = np.array(sorted(samples), dtype=np.float64).T
    half = len(at) // 2
    slope = float(np.polyfit(at[half:], mib[half:], 1)[0])
    return {"MiB": round(float(mib[-1]), 1), "growth MiB": round(slope * (at[-1] - at[half]), 2)}


def open_files() -> int:
    """File handles of this process."""
    return len(os.listdir("/proc/self/fd"))


def system_threads() -> int:
    """Threads of this process as the system counts them: Python knows nothing of those of onnxruntime."""
    return len(os.listdir("/proc/self/task"))


def threads_left(before: int) -> int:
    """How many more there are than before; one that Python has joined needs a moment to leave the system's list."""
    end = time.monotonic() + 5
    while system_threads() > before and time.monotonic() < end:
        time.sleep(0.05)
    return system_threads() - before


def resident() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    main()
