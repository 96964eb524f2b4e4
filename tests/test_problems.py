"""What a user reads where a file's values are wrong."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from cbpt_guard.problems import problems


class _Inner(BaseModel):
    share: int


class _Read(BaseModel):
    name: int
    inner: list[_Inner] = []


def said(text: str, most: int = 5) -> str:
    with pytest.raises(ValidationError) as caught:
        _Read.model_validate_json(text)
    return problems(caught.value, "JSON", most)


def test_it_says_where_what_is_asked_for_and_what_was_found() -> None:
    text = said('{"name": "a", "inner": [{"share": 1.5}]}')
    assert text.startswith("name: Input should be a valid integer")
    assert "(found 'a'); inner.0.share: " in text
    assert text.endswith("(found 1.5)")
    assert ";" not in said('{"name": "a", "inner": [{"share": 1.5}]}', most=1)


def test_what_is_missing_shows_no_value_and_the_whole_has_a_name() -> None:
    assert said("{}") == "name: Field required"
    assert said("{").startswith("JSON: Invalid JSON")
    assert "found" not in said("[]")


def test_a_strangers_value_is_cut_and_printable() -> None:
    text = said('{"name": "\\u001b[2J' + "x" * 1000 + '"}')
    assert text.isprintable()
    assert len(text) < 200
