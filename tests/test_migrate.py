"""Every block of docs/migrate.md runs, but for Hugging Face's original, which must at least compile."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import small_clips
from PIL import Image
from small_runs import CLASSES

PAGE = Path(__file__).parents[1] / "docs" / "migrate.md"
PAIRS = ("From open_clip", "From a Hugging Face pipeline", "From scikit-learn")


def blocks() -> dict[str, list[str]]:
    """The code of each section of the page."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in sections}


@pytest.fixture(scope="module")
def service(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A service's folder: a bundle, a CLIP in open_clip's local form, and photographs."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "bundle").symlink_to(exported)
    clip = folder / "clip"
    clip.mkdir()
    config = small_clips.with_vocabulary(small_clips.VIT)
    settings = {"model_cfg": config, "preprocess_cfg": small_clips.PREPROCESS_CFG}
    (clip / "open_clip_config.json").write_text(json.dumps(settings))
    small_clips.save(small_clips.weights(config), clip / "open_clip_pytorch_model.bin")
    generator = np.random.default_rng(0)
    photographs = [folder / "image.jpg", folder / "other.png"]
    photographs += [folder / "images" / name / f"{number}.jpg" for name in CLASSES for number in range(4)]
    for path in photographs:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 55, 3), dtype=np.uint8)).save(path)
    return folder


def test_the_page_has_its_pairs() -> None:
    found = blocks()
    assert [name for name in found if len(found[name]) == 2] == list(PAIRS)
    assert {name: len(code) for name, code in found.items() if name not in PAIRS} == {"Many images": 1}


@pytest.mark.parametrize(
    ("section", "place"), [(name, place) for name, code in blocks().items() for place in range(len(code))]
)
def test_a_block_runs(
    section: str,
    place: int,
    service: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = compile(blocks()[section][place], f"{PAGE.name}: {section}", "exec")
    if "transformers" in code.co_names and importlib.util.find_spec("transformers") is None:
        return  # compiled; the page says so
    monkeypatch.chdir(service)
    exec(code, {"__name__": "service"})
    printed = capsys.readouterr().out
    assert any(name in printed for name in CLASSES), printed
    if section == "Many images":
        assert len(printed.splitlines()) == 4 * len(CLASSES)
