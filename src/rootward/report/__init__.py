"""A run folder becomes one HTML file that opens from disk with the network off.

    from rootward.report import build, headline

    page = build(Path("runs/yes-man"))          # runs/yes-man/report.html
    sentences = headline(record, trace, verdict)  # the same story as plain text

The room reads files only: no model, no torch, no other room than `rootward.core.records`.
"""

from __future__ import annotations

from rootward.report.page import build
from rootward.report.summary import headline

__all__ = ["build", "headline"]
