"""What pydantic found wrong, in words for a user: where, what is asked for, and what stands there."""

from __future__ import annotations

from pydantic import ValidationError

_LONGEST = 60  # characters of a value that are shown


def problems(error: ValidationError, root: str = "its start", most: int = 5) -> str:
    """The first `most` problems on one line; `root` names the place of one that concerns the whole.

    Values come from files of strangers: they are shown as printable ASCII, cut.
    """
    lines = []
    for item in error.errors(include_url=False)[:most]:
        where = ".".join(map(str, item["loc"])) or root
        told = isinstance(item["input"], bool | int | float | str) and item["type"] != "json_invalid"
        found = f" (found {ascii(item['input'])[:_LONGEST]})" if told else ""
        lines.append(f"{where}: {item['msg']}{found}")
    return "; ".join(lines)
