"""A purified run becomes a bundle, and a bundle is verified: `export` needs torch, `verify` does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cbpt_guard.export.verify import Check, VerifyReport, verify

if TYPE_CHECKING:
    from cbpt_guard.export.write import export

__all__ = ["Check", "VerifyReport", "export", "verify"]


def __getattr__(name: str) -> Any:
    if name == "export":  # on demand: a machine that only verifies has no torch
        from cbpt_guard.export.write import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
