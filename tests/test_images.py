"""Preprocessing is open_clip's to the bit, and a hostile image costs little."""

from __future__ import annotations

import importlib
import io
import os
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import rise
from PIL import Image

from cbpt_guard.errors import ImageError
from cbpt_guard.images import DEFAULT_LIMITS, ImageLimits, Preprocess, load_image, prepare

MODES = ["RGB", "RGBA", "P", "P+alpha", "L", "LA", "1", "I;16", "CMYK"]


def preprocess(size: int = 48, resize_mode: Any = "shortest", interpolation: Any = "bicubic") -> Preprocess:
    return Preprocess(size=size, resize_mode=resize_mode, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1))


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise over a gradient: every pixel differs, so that an offset by one shows."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 200, (height, width, 4), dtype=np.uint8)
    noise += np.linspace(0, 55, width, dtype=np.uint8)[None, :, None]
    rgba = Image.fromarray(noise)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode == "P+alpha":
        palette = rgba.convert("RGB").quantize(16)
        palette.info["transparency"] = 3
        return palette
    if mode == "P":
        return rgba.convert("RGB").quantize(64)
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode) if mode != "LA" else rgba.convert("LA")


def through_file(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def reference() -> Callable[[Image.Image, Preprocess], np.ndarray]:
    """open_clip's evaluation transform, times 255."""
    pytest.importorskip("torch")
    importlib.import_module("cbpt_guard.defense.openclip")  # first: it makes torchvision importable
    from open_clip.transform import PreprocessCfg, image_transform_v2

    def transform(image: Image.Image, settings: Preprocess) -> np.ndarray:
        cfg = PreprocessCfg(
            size=settings.size,
            mean=settings.mean,
            std=settings.std,
            interpolation=settings.interpolation,
            resize_mode=settings.resize_mode,
        )
        pixels = image_transform_v2(cfg, is_train=False)(image).numpy() * 255
        assert np.abs(pixels - pixels.round()).max() < 1e-3
        return pixels.round().astype(np.uint8).transpose(1, 2, 0)

    return transform


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", MODES)
def test_bit_exact_with_open_clip(mode: str, interpolation: str, resize_mode: str, reference: Any) -> None:
    generator = np.random.default_rng(len(mode))
    for seed in range(12):
        width, height = (int(n) for n in generator.integers(20, 140, 2))
        size = int(generator.choice([32, 33, 48, 64]))
        settings_ = preprocess(size, resize_mode, interpolation)
        image = picture(mode, width, height, seed)
        assert np.array_equal(prepare(image, settings_), reference(image.copy(), settings_)), (
            width,
            height,
            size,
        )


FILES = {
    "jpeg rotated by EXIF": ("JPEG", "RGB"),
    "grey jpeg": ("JPEG", "L"),
    "cmyk jpeg": ("JPEG", "CMYK"),
    "png palette with transparency": ("PNG", "P+alpha"),
    "png 16 bit": ("PNG", "I;16"),
    "png 1 bit": ("PNG", "1"),
    "png grey with alpha": ("PNG", "LA"),
    "webp with alpha": ("WEBP", "RGBA"),
    "gif": ("GIF", "P"),
    "bmp": ("BMP", "RGB"),
    "tiff rotated by EXIF": ("TIFF", "RGB"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_read_as_open_clip_reads_them(kind: str, reference: Any, tmp_path: Path) -> None:
    fmt, mode = FILES[kind]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees, which open_clip ignores
    options = {"exif": exif} if "EXIF" in kind else {}
    data = through_file(picture(mode, 101, 67, 5), fmt, **options)
    expected = reference(Image.open(io.BytesIO(data)), preprocess())
    path = tmp_path / "image"
    path.write_bytes(data)
    for source in (data, path, str(path), Image.open(path)):
        assert np.array_equal(prepare(load_image(source), preprocess()), expected)


def test_the_comparison_can_fail(reference: Any) -> None:
    """Converting first and flooring the crop are the two usual mistakes; both show on these images."""
    palette, wide = picture("P", 101, 67, 1), picture("RGB", 104, 66, 1)
    assert not np.array_equal(prepare(palette.convert("RGB"), preprocess()), reference(palette, preprocess()))
    width = int(48 * 104 / 66)
    left = (width - 48) // 2
    floored = np.asarray(wide.resize((width, 48), Image.Resampling.BICUBIC).crop((left, 0, left + 48, 48)))
    assert not np.array_equal(floored, reference(wide, preprocess()))


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 31, 48]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_size_gives_a_square(width: int, height: int, size: int) -> None:
    pixels = prepare(picture("RGB", width, height, 0), preprocess(size))
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_a_prepared_array_passes_unchanged(resize_mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert np.array_equal(prepare(load_image(pixels), preprocess(48, resize_mode)), pixels)
    assert np.array_equal(prepare(load_image(pixels[:, ::-1]), preprocess(48, resize_mode)), pixels[:, ::-1])


def test_an_animation_answers_with_its_first_frame() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    for fmt in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if fmt == "WEBP" else {}
        data = through_file(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
        assert (prepare(load_image(data), preprocess(16)) == (255, 0, 0)).all(), fmt


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "BMP", "TIFF"])
def test_one_lazily_opened_image_may_be_used_by_many_threads(fmt: str) -> None:
    """Without a lock, most of these reads fail or give other pixels."""
    data = through_file(picture("RGB", 600, 400, 2), fmt)
    expected = np.asarray(load_image(data))
    for _ in range(3):
        image = Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _, image=image: np.array(load_image(image)), range(8)))
        assert all(np.array_equal(result, expected) for result in results)


REFUSED: dict[str, tuple[Any, str]] = {
    "a tuple": ((1, 2), "type tuple"),
    "None": (None, "type NoneType"),
    "floats": (np.zeros((8, 8, 3)), r"float64 \(8, 8, 3\)"),
    "grey array": (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\)"),
    "a batch": (np.zeros((2, 8, 8, 3), np.uint8), "several images are passed as a list"),
    "empty array": (np.zeros((0, 8, 3), np.uint8), "empty image"),
    "empty bytes": (b"", "0 bytes that are no image"),
    "text": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of JPEG"),
    "url": ("https://example.org/cat.jpg", "nothing is ever fetched"),
    "no file": ("nowhere/cat.jpg", "No such file"),
    "a folder": (".", "not a regular file"),
    "a device": ("/dev/zero", "not a regular file"),
    "a nul in the path": ("cat\0.jpg", "null byte"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_was_found(name: str) -> None:
    source, message = REFUSED[name]
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_other_formats_are_refused_even_when_pillow_reads_them(tmp_path: Path) -> None:
    image = picture("RGB", 30, 30, 0)
    data = through_file(image, "PPM")
    with pytest.raises(ImageError, match="no image of JPEG"):
        load_image(data)
    with pytest.raises(ImageError, match="format PPM"):
        load_image(Image.open(io.BytesIO(data)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_raise_only_image_errors(data: st.DataObject) -> None:
    fmt, mode = data.draw(st.sampled_from(sorted(set(FILES.values()))))
    content = bytearray(through_file(picture(mode, 37, 23, 1), fmt))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = prepare(load_image(bytes(content)), preprocess())
        except ImageError:
            return
    assert pixels.shape == (48, 48, 3)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


COSTLY: dict[str, tuple[Callable[[], Any], str, str]] = {
    "elongated, high": (lambda: Image.new("L", (1, 60000)), "shortest", "too elongated"),
    "elongated, wide": (lambda: Image.new("L", (60000, 1)), "shortest", "too elongated"),
    "squash of a very high one": (lambda: Image.new("L", (2, 10_000_000)), "squash", "too elongated"),
    "over Pillow's warning": (lambda: bomb(12_000, 9_000), "shortest", "80,000,000 pixels"),
    "over Pillow's error": (lambda: bomb(60_000, 60_000), "shortest", "too many pixels"),
    "too many bytes": (lambda: bytes(64 * 1024**2 + 1), "shortest", "67,108,864 bytes"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_image_is_refused_cheaply(name: str) -> None:
    make, resize_mode, message = COSTLY[name]
    source, limit_before = make(), Image.MAX_IMAGE_PIXELS

    def refused() -> None:
        started = time.perf_counter()
        with pytest.raises(ImageError, match=message):
            prepare(load_image(source), preprocess(224, resize_mode))
        assert time.perf_counter() - started < 1

    assert rise(refused) < 64
    assert limit_before == Image.MAX_IMAGE_PIXELS


DEAREST: dict[str, tuple[str, str, dict[str, Any]]] = {
    "WebP": ("RGB", "WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "JPEG": ("RGB", "JPEG", {}),
    "PNG with alpha": ("RGBA", "PNG", {"compress_level": 1}),
    "TIFF": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
}


DECODING = """
import sys
sys.path.insert(0, sys.argv[1])
from memory import rise
from cbpt_guard.images import Preprocess, load_image, prepare
wanted = Preprocess(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
decode = lambda path: prepare(load_image(path), wanted)
decode(sys.argv[2])  # codecs are loaded once
print(rise(lambda: decode(sys.argv[3])))
"""


@pytest.mark.parametrize("name", DEAREST)
def test_no_format_takes_more_than_docs_security_says_a_pixel(name: str, tmp_path: Path) -> None:
    """16 bytes, which WebP needs; whoever sizes a container goes by it. In a process that has no memory to reuse."""
    mode, fmt, options = DEAREST[name]
    for file, side in (("small", 300), ("large", 3000)):
        (tmp_path / file).write_bytes(through_file(Image.new(mode, (side, side), "gray"), fmt, **options))
    done = python(DECODING, Path(__file__).parent, tmp_path / "small", tmp_path / "large", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 3 < float(done.stdout) * 2**20 / 3000**2 < 17


def test_a_large_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 2**36)
    with pytest.raises(ImageError, match="1,000 bytes"):
        load_image(path, ImageLimits(max_bytes=1000))


def test_limits_are_settings() -> None:
    image = picture("RGB", 30, 20, 0)
    with pytest.raises(ImageError, match="30 x 20 is over the limit of 599 pixels"):
        load_image(image, ImageLimits(max_pixels=599))
    assert load_image(image, ImageLimits(max_pixels=600)) is image
    with pytest.raises(ImageError, match="too elongated"):
        prepare(image, preprocess(48), ImageLimits(max_resized_pixels=48 * 71))
    assert prepare(image, preprocess(48), ImageLimits(max_resized_pixels=48 * 72)).shape == (48, 48, 3)
    assert DEFAULT_LIMITS.max_pixels < Image.MAX_IMAGE_PIXELS  # type: ignore[operator]
