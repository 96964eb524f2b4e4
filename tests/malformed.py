"""The rest of the corpus: files that are damaged, forged or odd, and harmless ones that must load."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import small_clips
import torch
from hostile import TENSORS, Canary, Case, archive, saved, torch_zip

TEXTS: dict[str, bytes] = {
    "plain text": b"checkpoint\nof words, not of weights\n",
    "one word a line": b"cat\ndog\nbird\nNorth\nRoad\nobject\nitem\n",
    "a list of class names": b"coral\nwater lily\nold house\nbee\nRose\n",
    "text in brackets": b"(obviously) no weights here\n",
    "text that marks and calls": b"(in short\nno weights\nR.\n",
    "text of single letters": b"I\no\ni\nc\nR\n.\n",
    "a README": b"# Model\n\nDownload the weights from https://example.org/model.pt\n",
    "HTML of a login page": b"<!DOCTYPE html><html><body>401</body></html>\n",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "JSON": b'{"state_dict": {}}\n',
    "YAML": b"---\nmodel: x\n",
    "zeros": bytes(1000),
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "an HDF5 head": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "random bytes": random.Random(0).randbytes(5000),
    "one byte": b"\x80",
    "empty": b"",
}


def _storage(kind: str, key: str, numel: int) -> bytes:
    return b"((X\x07\x00\x00\x00storagectorch\n%s\nX\x01\x00\x00\x00%sX\x03\x00\x00\x00cpu\x8a\x08%stQ" % (
        kind.encode(),
        key.encode(),
        struct.pack("<q", numel),
    )


def _forged(
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    numel: int = 4,
    data: bytes = bytes(16),
    head: bytes = b"}",
    tail: bytes = b"",
) -> bytes:
    """A torch archive with one float tensor `w` whose numbers may lie; `head` makes the dict, `tail` changes it."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    place = b"\x8a\x08" + struct.pack("<q", offset)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + _storage("FloatStorage", "0", numel) + place
    tensor += numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    pickled = b"\x80\x02" + head + b"X\x01\x00\x00\x00w" + tensor + b"s" + tail + b"."
    return bytes(archive(torch_zip(pickled, **{"data/0": data})))


def _safetensors(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02}.")
        with file.open("x/data/0", "w", force_zip64=True) as entry:
            for _ in range(200):
                entry.write(bytes(1 << 20))
    return buffer.getvalue()


def _compressed() -> bytes:
    """Only the numbers are: torch would map the compressed bytes themselves as numbers, and say nothing."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"w": torch.arange(64)}))) as source,
        zipfile.ZipFile(buffer, "w") as target,
    ):
        for name in source.namelist():
            how = zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED
            target.writestr(name, source.read(name), how)
        target.writestr("archive/padding", bytes(5000))
    return buffer.getvalue()


def _deep(depth: int) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00w" + b"]" * depth + b"a" * (depth - 1) + b"s."


def _endless() -> bytes:
    """Tuples in tuples: the hash, asked for by a dict key, takes 2 ** 60 steps."""
    doubling = b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60))
    head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    return head + b"\x80\x02)q\x00" + doubling + b"}h\x00K\x01s.\x80\x02]."


SLOW = "time: a hash that takes ages"
"""The one case that only a limit ends; it is tried with a small one."""


def _cyclic() -> dict[str, Any]:
    content: dict[str, Any] = {**TENSORS}
    content["itself"] = content
    content["list"] = [content]
    return content


def _quantized() -> object:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


BROKEN: dict[str, Callable[[], bytes]] = {
    "zip: truncated": lambda: saved({"w": torch.arange(64.0)})[:-40],
    "zip: the start alone": lambda: saved({"w": torch.arange(64.0)})[:300],
    "zip: bomb": _bomb,
    "zip: harmless, compressed": _compressed,
    "zip: no data.pkl": lambda: bytes(archive({"x/version": b"3\n"})),
    "zip: names that climb": lambda: bytes(archive({"../../../tmp/evil": b"x", "/etc/passwd": b"x"})),
    "zip: a storage is missing": lambda: _forged((4,), (1,)).replace(b"x/data/0", b"x/data/9"),
    "zip: big-endian": lambda: bytes(archive({**torch_zip(b"\x80\x02}."), "x/byteorder": b"big"})),
    "legacy: truncated": lambda: saved({"w": torch.arange(64.0)}, _use_new_zipfile_serialization=False)[:-40],
    "legacy: wrong magic number": lambda: pickle.dumps(7, protocol=2) * 5,
    "shape: 10 GB from 16 bytes": lambda: _forged((5, 500_000_000), (0, 0)),
    "shape: 2 ** 62 elements": lambda: _forged((2**31, 2**31), (0, 0)),
    "shape: overflows": lambda: _forged((2**62, 2**62), (1, 1)),
    "shape: negative": lambda: _forged((-1,), (1,)),
    "stride: beyond the storage": lambda: _forged((4,), (1000,)),
    "stride: negative": lambda: _forged((4,), (-1,)),
    "stride: overflows": lambda: _forged((2, 2), (2**62, 2**62)),
    "offset: beyond the storage": lambda: _forged((4,), (1,), offset=100),
    "offset: negative": lambda: _forged((4,), (1,), offset=-4),
    "storage: claims 2 ** 60 elements": lambda: _forged((4,), (1,), numel=2**60),
    "storage: claims a negative size": lambda: _forged((4,), (1,), numel=-1),
    "storage: shorter than it claims": lambda: _forged((4,), (1,), data=b""),
    "pickle: protocol 5, which torch itself does not read": lambda: saved(TENSORS, pickle_protocol=5),
    "kind: sparse": lambda: saved({"w": torch.eye(2).to_sparse()}),
    "kind: quantized": lambda: saved({"w": _quantized()}),
    "kind: meta": lambda: saved({"w": torch.empty(2, device="meta")}),
    "kind: complex": lambda: saved({"w": torch.ones(2, dtype=torch.complex64)}),
    "values: NaN": lambda: saved({"w": torch.tensor([float("nan")])}),
    "values: infinite as float32": lambda: saved({"w": torch.tensor([1e300], dtype=torch.float64)}),
    "keys: a number": lambda: saved({3: torch.ones(1)}),
    "keys: a tuple": lambda: saved({("a", "b"): torch.ones(1)}),
    "keys: terminal codes": lambda: saved({"\x1b[2J": torch.ones(1)}),
    "keys: a line": lambda: saved({"a\nerror: b": torch.ones(1)}),
    "keys: a thousand letters": lambda: saved({"w" * 1000: torch.ones(1)}),
    "content: a list": lambda: saved([torch.ones(1)]),
    "content: a tensor": lambda: saved(torch.ones(1)),
    "content: no tensor": lambda: saved({"epoch": 3}),
    "content: two state dicts": lambda: saved({"state_dict": TENSORS, "model": TENSORS}),
    "content: lists 100,000 deep": lambda: bytes(archive(torch_zip(_deep(100_000)))),
    "safetensors: header longer than the file": lambda: _safetensors({"w": _entry([4], 0, 16)}, length=10**6),
    "safetensors: header of 2 ** 63": lambda: _safetensors({"w": _entry([4], 0, 16)}, length=2**63),
    "safetensors: shape against bytes": lambda: _safetensors({"w": _entry([4000], 0, 16)}),
    "safetensors: shape overflows": lambda: _safetensors({"w": _entry([2**33, 2**33], 0, 16)}),
    "safetensors: offsets beyond the file": lambda: _safetensors({"w": _entry([400], 0, 1600)}),
    "safetensors: overlapping": lambda: _safetensors({"a": _entry([4], 0, 16), "b": _entry([4], 0, 16)}),
    "safetensors: a hole": lambda: _safetensors({"a": _entry([1], 0, 4), "b": _entry([1], 12, 16)}),
    "safetensors: unknown type": lambda: _safetensors({"w": _entry([4], 0, 16, "F33")}),
    "safetensors: deep JSON": lambda: _safetensors(b'{"a":' * 50_000),
    "safetensors: bytes behind the end": lambda: _safetensors({"w": _entry([4], 0, 16)}, bytes(99)),
    "safetensors: not UTF-8": lambda: _safetensors(b'{"\xff\xfe": 1}'),
    SLOW: _endless,
}


def _linked(path: Path, target: str | Path) -> None:
    path.symlink_to(target)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's own path may have 107 bytes only
        os.close(here)


def _folder(path: Path, config: object, raw: bytes | None = None) -> None:
    path.mkdir()
    (path / "model.pt").write_bytes(saved(small_clips.weights(small_clips.VIT)))
    (path / "open_clip_config.json").write_bytes(json.dumps(config).encode() if raw is None else raw)


def _pipe_as_config(path: Path) -> None:
    _folder(path, {})
    (path / "open_clip_config.json").unlink()
    os.mkfifo(path / "open_clip_config.json")


def _model(**changes: Any) -> dict[str, Any]:
    """A config that fits the weights, but for these changes."""
    parts = {name: value for name, value in changes.items() if name not in ("text_cfg", "vision_cfg")}
    towers = {name: small_clips.VIT[name] | changes.get(name, {}) for name in ("text_cfg", "vision_cfg")}
    return {"model_cfg": small_clips.VIT | towers | parts, "preprocess_cfg": small_clips.PREPROCESS_CFG}


PATHS: dict[str, Callable[[Path], object]] = {
    "path: a pipe": os.mkfifo,
    "path: a socket": _socket,
    "path: a link to /dev/zero": lambda path: _linked(path, "/dev/zero"),
    "path: a link to /dev/stdin": lambda path: _linked(path, "/dev/stdin"),
    "path: a link to nowhere": lambda path: _linked(path, "nowhere"),
    "path: a link to itself": lambda path: _linked(path, path.name),
    "path: an empty folder": Path.mkdir,
    "config: a pipe": _pipe_as_config,
    "config: no JSON": lambda path: _folder(path, None, b"{"),
    "config: deep JSON": lambda path: _folder(path, None, b"[" * 60_000),
    "config: not UTF-8": lambda path: _folder(path, None, b'{"\xff": 1}'),
    "config: a list": lambda path: _folder(path, [1]),
    "config: text tower by hf_model_name": lambda path: _folder(path, _model(text_cfg={"hf_model_name": "evil/x"})),
    "config: timm tower on a hub": lambda path: _folder(
        path, _model(vision_cfg={"timm_model_name": "hf-hub:evil/x", "timm_model_pretrained": True})
    ),
    "config: timm tower by URL": lambda path: _folder(
        path, _model(vision_cfg={"timm_model_name": "https://example.org/x"})
    ),
    "config: timm tower of a folder": lambda path: _folder(
        path, _model(vision_cfg={"timm_model_name": "local-dir:/x"})
    ),
    "config: a timm tower with weights": lambda path: _folder(
        path, _model(vision_cfg={"timm_model_name": "resnet18", "timm_model_pretrained": True})
    ),
    "config: remote tokenizer": lambda path: _folder(path, _model(text_cfg={"hf_tokenizer_name": "evil/x"})),
    "config: vocabulary from a path": lambda path: _folder(
        path, _model(text_cfg={"tokenizer_kwargs": {"bpe_path": "/x"}})
    ),
    "config: a tokenizer that downloads": lambda path: _folder(
        path, _model(text_cfg={"tokenizer_kwargs": {"reduction_mask": "syntax"}})
    ),
    "config: tokenizer options as a text": lambda path: _folder(path, _model(text_cfg={"tokenizer_kwargs": "abc"})),
    "config: no context length": lambda path: _folder(path, _model(text_cfg={"context_length": None})),
    "config: a patch of two sides": lambda path: _folder(path, _model(vision_cfg={"patch_size": [16, 16]})),
    "config: a width of parts": lambda path: _folder(path, _model(text_cfg={"width": {"a": 1}})),
    "config: a hook": lambda path: _folder(path, _model(text_cfg={"__reduce__": ["os.system", "x"]}, hook="os.system")),
    "config: auto_map": lambda path: _folder(path, _model(auto_map={"AutoModel": "evil--modeling.Evil"})),
    "config: a trillion layers": lambda path: _folder(path, _model(vision_cfg={"layers": 10**12})),
    "config: NaN": lambda path: _folder(path, _model(embed_dim=float("nan"))),
}


def _forged_items() -> bytes:
    """A state dict whose attribute `items` is a number."""
    return _forged((4,), (1,), head=b"ccollections\nOrderedDict\n)R", tail=b"}X\x05\x00\x00\x00itemsK\x01sb")


def _script() -> bytes:
    """A TorchScript archive whose own code would act if it were compiled and run."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(buffer) as source:
        entries = {item.filename: source.read(item) for item in source.infolist()}
    code = next(name for name in entries if name.endswith("__torch__.py") or "/code/" in name)
    entries[code] = b"import os\nos.system('false')\n"
    return bytes(archive(entries))


def _training() -> bytes:
    names = argparse.Namespace(lr=np.float32(1e-3), logs=Path("logs"), version=torch.__version__)
    return saved({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in TENSORS.items()}, "args": names})


LOADS: dict[str, Callable[[], bytes]] = {
    "loads: zip": lambda: saved(TENSORS),
    "loads: legacy": lambda: saved(TENSORS, _use_new_zipfile_serialization=False),
    "loads: safetensors": lambda: safetensors.torch.save(TENSORS),
    "loads: TorchScript with hostile source text": _script,
    "loads: a training checkpoint": _training,
    "loads: float16": lambda: saved({"w": torch.ones(3).half()}),
    "loads: bfloat16": lambda: saved({"w": torch.ones(3).bfloat16()}),
    "loads: float64": lambda: saved({"w": torch.ones(3).double()}),
    "loads: integers and bools": lambda: saved({"w": torch.ones(1), "i": torch.arange(3), "b": torch.tensor([True])}),
    "loads: tied": lambda: saved({"a": TENSORS["w"], "b": TENSORS["w"]}),
    "loads: views of one storage": lambda: saved({"a": TENSORS["w"][:4], "b": TENSORS["w"][2:]}),
    "loads: transposed": lambda: saved({"w": TENSORS["w"].view(2, 3).T}),
    "loads: a small expanded one": lambda: saved({"w": torch.ones(1).expand(8)}),
    "loads: parameters": lambda: saved({"w": torch.nn.Parameter(torch.ones(2))}),
    "loads: empty and scalar": lambda: saved({"w": torch.ones(0, 3), "s": torch.tensor(1.0)}),
    "loads: extra entries": lambda: saved({**TENSORS, "epoch": 3, "notes": ["x", {"y": 1.5}]}),
    "loads: an OrderedDict with forged items": _forged_items,
    "loads: cyclic": lambda: saved(_cyclic()),
}


def _write(build: Callable[[], bytes]) -> Callable[[Path, Canary], object]:
    return lambda path, _: path.write_bytes(build())


def other_cases() -> Iterator[Case]:
    """Everything that is malformed (exit code 2), and everything that loads."""
    for name, data in TEXTS.items():
        yield Case(name, "malformed", _write(lambda data=data: data))  # type: ignore[misc]
    for name, build in BROKEN.items():
        yield Case(name, "malformed", _write(build))
    for name, place in PATHS.items():
        suffix = "" if name.startswith("config") or "folder" in name else ".pt"
        yield Case(name, "malformed", lambda path, _, place=place: place(path), suffix)  # type: ignore[misc]
    for name, build in LOADS.items():
        yield Case(name, "loads", _write(build), ".safetensors" if "safetensors" in name else ".pt")
    yield Case("loads: through a link", "loads", lambda path, _: _link_to_saved(path))


def _link_to_saved(path: Path) -> None:
    target = path.with_suffix(".target")
    target.write_bytes(saved(TENSORS))
    path.symlink_to(target.name)
