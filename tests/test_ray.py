"""The page's Ray Data example, run on a local Ray over 2,000 images: the same answers as a plain loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import SIZE

from cbpt_guard import GuardedClassifier

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'cbpt-guard[ray]'")
PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
IMAGES = 2000


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of this machine alone, quiet, in the test's folder, with as many processors as the example asks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def write_images(folder: Path) -> dict[str, bytes]:
    """Flat pictures of random colours, and one file that is none."""
    folder.mkdir()
    colours = np.random.default_rng(0).integers(1, 256, (IMAGES, 3), dtype=np.uint8)
    for number, colour in enumerate(colours):
        Image.fromarray(np.broadcast_to(colour, (SIZE, SIZE + number % 5, 3)).copy()).save(folder / f"{number:04d}.png")
    (folder / "0007.png").write_bytes(b"no image")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def example() -> str:
    (section,) = re.findall(r"^## Offline.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(section)


@pytest.mark.usefixtures("local")
def test_ray_answers_as_a_plain_loop(pristine_bundle: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    (tmp_path / "bundle").symlink_to(pristine_bundle)
    exec(compile(example(), PAGE.name, "exec"), {"__name__": "__main__"})
    rows = ray.data.read_parquet(str(tmp_path / "answers")).take_all()
    guard = GuardedClassifier.load(pristine_bundle, threads=1)
    expected = dict(zip(files, guard.predict(list(files.values())), strict=True))
    assert len(rows) == IMAGES
    for row in rows:
        answer = expected.pop(Path(row["path"]).name)
        assert (row["label"], row["triggered"], row["error"]) == (
            answer.label or "",
            answer.triggered,
            answer.error or "",
        )
        assert row["score"] == pytest.approx(answer.score or 0.0, abs=1e-6)
    assert not expected
    assert sum(bool(row["error"]) for row in rows) == 1
    assert sum(row["triggered"] for row in rows) > 0
