"""The key of an unfinished run: whatever changes what a run computes must keep `--resume` from going on with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from small_runs import CLASSES

from cbpt_guard.defense import job
from cbpt_guard.defense.data import LabelledImages
from cbpt_guard.defense.head import Head
from cbpt_guard.defense.job import Job, Prepared, _open_reused
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.settings import Settings, TuningSettings
from cbpt_guard.defense.suspect import Suspect
from cbpt_guard.errors import InputError


def reread(prepared: Prepared, **changes: Any) -> Prepared:
    record = prepared.suspect.record.model_copy(update=changes)
    return replace(prepared, suspect=cast(Suspect, SimpleNamespace(record=record)))


def images(prepared: Prepared, **changes: Any) -> Prepared:
    return replace(prepared, data=replace(prepared.data, **changes))


def asked(prepared: Prepared, **changes: Any) -> Prepared:
    return replace(prepared, job=replace(prepared.job, **changes))


@pytest.fixture
def prepared(tiny_run: Path) -> Prepared:
    data = LabelledImages(torch.zeros(4, 2, 2, 3, dtype=torch.uint8), torch.arange(4), CLASSES, ())
    suspect = cast(Suspect, SimpleNamespace(record=PurifyRun.open(tiny_run).record.model))
    return Prepared(Job(Path("model.pt"), Path("data")), suspect, Head(torch.eye(5), 10.0), data, data, None)


CHANGES = {
    "another checkpoint": lambda p: reread(p, source_sha256="1" * 64),
    "another preprocessing": lambda p: reread(
        p, preprocess=p.suspect.record.preprocess.model_copy(update={"size": 64})
    ),
    "another activation": lambda p: reread(p, quickgelu=True),
    "another architecture": lambda p: reread(p, config={}),
    "another tokenizer": lambda p: reread(p, tokenizer="words"),
    "another image": lambda p: images(p, images=p.data.images + 1),
    "another label": lambda p: images(p, labels=p.data.labels.flip(0)),
    "another class": lambda p: images(p, classes=(*CLASSES[:-1], "else")),
    "another attack image": lambda p: replace(p, observed=replace(p.data, images=p.data.images + 1)),
    "no attack image": lambda p: replace(p, observed=None),
    "another template": lambda p: asked(p, template="{}"),
    "other settings": lambda p: asked(p, settings=Settings(tuning=TuningSettings(epochs=1))),
    "another seed": lambda p: asked(p, seed=1),
    "another device": lambda p: asked(p, device="cuda"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_unfinished_run_of_other_inputs_is_not_gone_on_with(prepared: Prepared, change: str, tmp_path: Path) -> None:
    Journal(tmp_path, prepared.key())
    Journal(tmp_path, prepared.key())
    with pytest.raises(InputError, match="begun with another"):
        Journal(tmp_path, CHANGES[change](prepared).key())


@pytest.mark.parametrize(
    ("change", "named"),
    [("another preprocessing", "preprocess"), ("another activation", "quickgelu"), ("another architecture", "config")],
)
def test_triggers_of_a_model_that_was_understood_otherwise_are_not_reused(
    prepared: Prepared, tiny_run: Path, change: str, named: str
) -> None:
    with pytest.raises(InputError, match=f"made with another {named}; run without `--reuse`"):
        _open_reused(tiny_run, CHANGES[change](prepared).suspect)
    with pytest.raises(InputError, match="made from another checkpoint"):
        _open_reused(tiny_run, CHANGES["another checkpoint"](prepared).suspect)
    assert _open_reused(tiny_run, CHANGES["another tokenizer"](prepared).suspect).path == tiny_run


@pytest.mark.parametrize("what", ["run", "recipe", "versions"])
def test_nor_is_one_of_other_triggers_or_tools(
    prepared: Prepared, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    Journal(tmp_path, prepared.key())
    if what == "run":
        prepared = replace(prepared, reused=PurifyRun.open(tiny_run))
    elif what == "recipe":
        monkeypatch.setattr(job, "_RECIPE", 0)
    else:
        monkeypatch.setattr(job, "version", lambda name: "0")
    with pytest.raises(InputError, match="begun with another"):
        Journal(tmp_path, prepared.key())


def test_what_changes_nothing_keeps_the_key(prepared: Prepared) -> None:
    """Where files lie, and how they were named."""
    moved = reread(asked(prepared, model=Path("x"), data=Path("y"), skip_bad=True), source="elsewhere.pt")
    assert moved.key() == prepared.key()
