"""A tokenizer of a few words in Hugging Face's form, written by hand: the published ones need a download."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from pathlib import Path

_PAD, _UNKNOWN = "<pad>", "<unk>"


def write_tokenizer(folder: Path, classes: Sequence[str], template: str) -> Path:
    """Letters, digits, words of the template and the class names; `folder` is what `--tokenizer` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted(
        {*re.findall(r"\w+", " ".join([template, *classes]).lower()), *string.ascii_lowercase, *string.digits}
    )
    vocabulary = {word: number for number, word in enumerate([_PAD, _UNKNOWN, *words])}
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": vocabulary[name], "content": name, **special} for name in (_PAD, _UNKNOWN)],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": _UNKNOWN},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": _PAD, "unk_token": _UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return folder
