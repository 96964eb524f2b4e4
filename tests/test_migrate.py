"""Every block of docs/migrate.md runs as it stands; Hugging Face's finds a small model under a published name."""

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

from cbpt_guard.bench.words import write_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "migrate.md"
PAIRS = ("From open_clip", "From a Hugging Face pipeline", "From scikit-learn")


def blocks() -> dict[str, list[str]]:
    """The code of each section of the page."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in sections}


@pytest.fixture(scope="module")
def service(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A service's folder: a bundle, a CLIP in open_clip's and in Hugging Face's local form, and photographs."""
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
    if importlib.util.find_spec("transformers") is not None:
        write_hugging_face(folder / "openai" / "clip-vit-base-patch32")
    return folder


def write_hugging_face(folder: Path) -> None:
    """A small random CLIP in Hugging Face's form: `pipeline` takes a folder of a model's name for the model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    write_tokenizer(folder, ["apple", "banana", "dog"], "This is a photo of {}.")
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": words, "max_position_embeddings": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=32)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


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
    if "transformers" in code.co_names:
        pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cbpt-guard[tokenizer]'")
    monkeypatch.chdir(service)
    exec(code, {"__name__": "service"})
    printed = capsys.readouterr().out
    assert any(name in printed for name in CLASSES), printed
    if section == "Many images":
        assert len(printed.splitlines()) == 4 * len(CLASSES)
