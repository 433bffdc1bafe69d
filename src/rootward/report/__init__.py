"""A run folder becomes one HTML file that opens from disk with the network off.

    from rootward.report import build, headline

    page = build(Path("runs/yes-man"))          # runs/yes-man/report.html
    sentences = headline(record, trace, verdict)  # the same story as plain text

The room reads files only: no model, no torch, no other room than `rootward.core.records`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from rootward.report.page import build
from rootward.report.summary import headline

__all__ = ["build", "headline"]


class _Verb(ModuleType):
    """``rw.report(folder)`` writes the page: the room and the public verb share a name, whichever came first."""

    def __call__(self, folder: str | Path, out: str | Path | None = None) -> Path:
        return build(Path(folder), None if out is None else Path(out))


sys.modules[__name__].__class__ = _Verb
