"""The journal: finished parts come back bit for bit, and only to the job that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cbpt_guard.defense.draws import generator
from cbpt_guard.defense.found import FoundTrigger
from cbpt_guard.defense.journal import FOLDER, Journal, Scratch
from cbpt_guard.errors import InputError

KEY = {"seed": 0, "model": "abc", "settings": {"steps": 3}}


def never() -> Tensor:
    raise AssertionError("this part was there already")


def test_a_tensor_is_made_once_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = torch.randn(5, 3, generator=generator(0, "x")).T
    assert torch.equal(Journal(tmp_path, KEY).tensor("part", lambda: made), made)
    again = Journal(tmp_path, KEY).tensor("part", never)
    assert again.dtype == made.dtype
    assert torch.equal(again, made)


@pytest.mark.parametrize("family", ["masked", "additive"])
def test_a_trigger_is_made_once_and_comes_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    mask = torch.rand(1, 4, 4, generator=generator(0, "mask")) if family == "masked" else None
    made = FoundTrigger(family, 7, torch.rand(3, 4, 4, generator=generator(0, "paint")), mask)
    Journal(tmp_path, KEY).trigger("part, with a long name", lambda: made)
    again = Journal(tmp_path, KEY).trigger("part, with a long name", never)
    assert (again.family, again.target) == (family, 7)
    assert torch.equal(again.pattern, made.pattern)
    assert (again.mask is None) == (mask is None)
    assert mask is None or torch.equal(again.mask, mask)


def test_a_part_that_failed_is_made_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEY)

    def fail() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.tensor("part", fail)
    assert journal.tensor("part", lambda: torch.ones(1)).item() == 1


def test_a_part_that_a_full_disk_tore_is_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tearing(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cbpt_guard.defense.journal.save_file", tearing)
        with pytest.raises(OSError, match="No space"):
            Journal(tmp_path, KEY).tensor("part", lambda: torch.zeros(1))
    assert Journal(tmp_path, KEY).tensor("part", lambda: torch.ones(1)).item() == 1


def test_a_half_written_part_is_no_part(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEY)
    (tmp_path / FOLDER / "part.new").write_bytes(b"half")
    assert journal.tensor("part", lambda: torch.ones(1)).item() == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "another seed;"),
        ({"model": "xyz", "settings": {"steps": 4}}, "another model, settings;"),
        ({"new": True}, "another new;"),
    ],
)
def test_another_job_is_refused_with_what_differs(tmp_path: Path, change: dict[str, object], named: str) -> None:
    Journal(tmp_path, KEY).tensor("part", lambda: torch.ones(1))
    with pytest.raises(InputError, match=f"was begun with {named} start over without `--resume`"):
        Journal(tmp_path, {**KEY, **change})
    assert torch.equal(Journal(tmp_path, dict(reversed(KEY.items()))).tensor("part", never), torch.ones(1))


def test_parts_that_no_key_speaks_of_are_made_again(tmp_path: Path) -> None:
    """Whoever was stopped while the parts of a finished run were removed may have lost the key first."""
    Journal(tmp_path, KEY).tensor("part", lambda: torch.ones(1))
    (tmp_path / FOLDER / "key.json").unlink()
    assert Journal(tmp_path, KEY | {"seed": 1}).tensor("part", lambda: torch.zeros(1)).item() == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_key_is_refused(tmp_path: Path, content: bytes) -> None:
    Journal(tmp_path, KEY)
    (tmp_path / FOLDER / "key.json").write_bytes(content)
    with pytest.raises(InputError, match="start over without `--resume`"):
        Journal(tmp_path, KEY)


@pytest.mark.parametrize("keep", [0, 20, -1])
def test_a_damaged_part_is_refused(tmp_path: Path, keep: int) -> None:
    journal = Journal(tmp_path, KEY)
    journal.tensor("part", lambda: torch.ones(100))
    journal.trigger("found", lambda: FoundTrigger("additive", 0, torch.ones(3, 4, 4), None))
    for name in ("part", "found"):
        path = tmp_path / FOLDER / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"part\.safetensors is damaged"):
        journal.tensor("part", never)
    with pytest.raises(InputError, match=r"found\.safetensors"):
        journal.trigger("found", never)


def test_each_purpose_draws_for_itself() -> None:
    draws = {
        name: torch.rand(4, generator=generator(seed, name)).tolist() for seed, name in ((0, "a"), (0, "b"), (1, "a c"))
    }
    assert len({tuple(values) for values in draws.values()}) == 3
    assert torch.rand(4, generator=generator(0, "a")).tolist() == draws["a"]


def test_parts_in_memory_are_made_once_too() -> None:
    made, scratch = torch.ones(2), Scratch()
    assert scratch.tensor("part", lambda: made) is made
    assert scratch.tensor("part", never) is made
    trigger = FoundTrigger("additive", 1, torch.zeros(3, 4, 4), None)
    assert scratch.trigger("part", lambda: trigger) is trigger
    assert scratch.trigger("part", never) is trigger
