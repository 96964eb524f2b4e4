"""A process of its own that fuzzes images through `predict`: peaks are measured best where nothing else was.

    python tests/image_fuzz.py BUNDLE FOLDER COUNT SEED      prints one JSON object with what came back

Any exception outside the error tree ends it with a traceback, which the test sees.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cbpt_guard import GuardedClassifier
from cbpt_guard.classifier import Prediction
from cbpt_guard.errors import CbptGuardError

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
_LIST = 16


def _picture(mode: str, draw: np.random.Generator) -> Image.Image:
    noise = draw.integers(0, 256, (23, 37, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 2**16, (23, 37), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(draw.normal(size=(23, 37)).astype(np.float32))
    image = Image.fromarray(noise)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")


def _file(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """Good files of every format, mode and habit that mutations start from."""
    draw = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    frames = [_picture("RGB", draw) for _ in range(3)]
    found = {
        "JPEG": _file(frames[0], "JPEG"),
        "JPEG progressive": _file(frames[0], "JPEG", progressive=True),
        "JPEG with EXIF": _file(frames[0], "JPEG", exif=exif),
        "JPEG grey": _file(_picture("L", draw), "JPEG"),
        "JPEG CMYK": _file(_picture("CMYK", draw), "JPEG"),
        "PNG": _file(frames[0], "PNG"),
        "PNG with text": _file(frames[0], "PNG", exif=exif),
        "WEBP": _file(frames[0], "WEBP"),
        "WEBP lossless": _file(_picture("RGBA", draw), "WEBP", lossless=True),
        "BMP": _file(frames[0], "BMP"),
        "TIFF CMYK": _file(_picture("CMYK", draw), "TIFF"),
        "TIFF float": _file(_picture("F", draw), "TIFF"),
        "TIFF with EXIF": _file(frames[0], "TIFF", exif=exif),
    }
    for mode in ("RGBA", "P", "L", "LA", "1", "I;16"):
        found[f"PNG {mode}"] = _file(_picture(mode, draw), "PNG")
        found[f"TIFF {mode}"] = _file(_picture(mode, draw), "TIFF")
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        found[f"{form} animated"] = _file(frames[0], form, save_all=True, append_images=frames[1:])
    palette = frames[0].quantize(16)
    found["PNG P with alpha"] = _file(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"TIFF {packing}"] = _file(frames[0], "TIFF", compression=packing)
    return found


def png_claim(width: int, height: int, kind: int = 2) -> bytes:
    """A small PNG that claims to be large."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">II", width, height) + bytes([8, kind, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _broken_chunk() -> bytes:
    """A PNG whose pixels end in a chunk without a name: Pillow raises a SyntaxError in mid-decoding."""
    data = _file(Image.new("RGB", (300, 300), "red"), "PNG")
    place = data.index(b"IDAT") - 4
    length = struct.unpack(">I", data[place : place + 4])[0]
    return data[:place] + struct.pack(">I", length // 2) + data[place + 4 :]


def specials(folder: Path) -> list[Any]:
    """Bombs, odd shapes and things that are no images at all."""
    wrong = folder / "really-a.jpg"
    wrong.write_bytes(_file(Image.new("RGB", (30, 30), "red"), "PNG"))
    script = folder / "script.png"
    script.write_text("#!/bin/sh\ntouch canary\n", encoding="utf-8")
    flat = np.zeros((1, 1, 3), np.uint8)
    return [
        *(png_claim(*size) for size in ((60_000, 60_000), (8_900, 8_900), (2**31 - 1, 2**31 - 1), (0, 0), (1, 60_000))),
        *(_file(Image.new("L", size), "PNG") for size in ((1, 60_000), (60_000, 1), (1, 1), (2, 1))),
        _file(Image.new("RGB", (9_500, 9_500)), "PNG"),
        _file(Image.new("RGB", (1, 400_000)), "PNG"),  # under every limit but that of the resize
        _broken_chunk(),
        *(wrong, script, str(script), folder, "/dev/zero", "https://example.org/x.png", "file:///etc/passwd"),
        *("x\0.png", "\udcff.png", "a" * 5000, "", b"", b"\0" * 1000, b"GIF89a", b"RIFF\xff\xff\xff\xffWEBP"),
        *(np.full((8, 8, 3), np.nan), np.zeros((8, 8)), np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 4), np.uint8)),
        *(np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.array([[["a"] * 3]]), np.zeros(3, object)),
        np.broadcast_to(flat, (100_000, 100_000, 3)),  # 30 GB that are three bytes
        np.ones((8, 16, 3), np.uint8)[:, ::-2],
        *(Image.new(mode, (20, 20)) for mode in ("RGB", "CMYK", "LAB", "HSV", "F", "I", "I;16", "PA", "La", "1")),
        *(None, 3, 1.5, object(), ("x",), {"path": "x"}, memoryview(b"x"), bytearray(b"x")),
    ]


def mutated(seed: bytes, draw: random.Random) -> bytes:
    """A file with bits flipped, bytes overwritten, cut, doubled or with a number replaced by an extreme one."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, len(data))) if draw.random() < 0.5 else draw.randrange(max(1, min(64, len(data))))
        kind = draw.randrange(6)
        if not data:
            break
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + 4] = draw.randbytes(4)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:place] = data[place : place + draw.randrange(200)]
        elif kind == 4:
            extreme = draw.choice((0, 1, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
            data[place : place + 4] = struct.pack(draw.choice("<>") + "I", extreme)
        else:
            del data[place : place + draw.randrange(20)]
    return bytes(data)


def answered(found: Any) -> str:
    """What came back, in a word; anything but a Prediction is a bug."""
    assert isinstance(found, Prediction), found
    assert (found.label is None) == (found.error is not None)
    return "predictions" if found.error is None else "errors"


def fuzz(guard: GuardedClassifier, folder: Path, count: int, seed: int) -> Counter[str]:
    """Every second batch as a list (nothing may be raised), the others one by one (only our own errors)."""
    draw, counts, starts = random.Random(seed), Counter[str](), seeds()
    names = sorted(starts)
    queue = [*specials(folder), *starts.values()]
    while counts["images"] < count:
        batch = [queue.pop() for _ in range(min(_LIST, len(queue)))] or [
            mutated(starts[name], draw) for name in draw.choices(names, k=min(_LIST, count - counts["images"]))
        ]
        for place, item in enumerate(batch):
            if isinstance(item, bytes) and draw.random() < 0.1:  # through a file, often with a wrong extension
                batch[place] = folder / f"image{draw.choice([*SUFFIXES.values(), '.txt', ''])}"
                batch[place].write_bytes(item)
        counts["images"] += len(batch)
        if draw.random() < 0.5:
            counts.update(map(answered, guard.predict(batch)))
            continue
        for item in batch:
            try:
                counts[answered(guard.predict(item))] += 1
            except CbptGuardError:
                counts["errors"] += 1
    return counts


def main() -> None:
    """Fuzz with the default limits and with warnings as errors in turn, and print the counts and the peak."""
    bundle, folder, count, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    guard = GuardedClassifier.load(bundle, threads=1)
    guard.predict(np.zeros((40, 40, 3), np.uint8) + np.uint8(9))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    warnings.simplefilter("ignore")
    counts = fuzz(guard, folder, count // 2, seed)
    warnings.simplefilter("error")
    counts += fuzz(guard, folder, count - count // 2, seed + 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**counts, "rise": (peak - before) // 1024}))


if __name__ == "__main__":
    main()
