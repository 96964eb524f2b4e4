"""Generated parts of a page: what stands between `<!-- name -->` and `<!-- /name -->` comes from a command."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def rewrite(page: Path, generated: Mapping[str, str]) -> None:
    """Write each named part anew, and nothing else of the page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), generated), encoding="utf-8")


def filled(document: str, generated: Mapping[str, str]) -> str:
    """The document with each named part between its marks replaced."""
    for name, text in generated.items():
        start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = document.partition(start)
        _, found, after = rest.partition(stop)
        if not found:
            sys.exit(f"the page lacks the marks of {name!r}")
        document = f"{before}{start}\n{text}\n{stop}{after}"
    return document
