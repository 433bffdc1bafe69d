"""Template, style, script and data become one HTML file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from importlib import resources
from pathlib import Path

from rootward.core.records import write_text
from rootward.report.folder import Folder, read_folder
from rootward.report.payload import payload
from rootward.report.summary import badge, story

SCRIPTS = ("base.js", "chart.js", "select.js", "list.js", "document.js", "compare.js", "panels.js", "page.js")
"""Concatenated in this order inside one function, so that nothing is global."""
BADGES = {"verified by retraining": "verified", "measured by retraining": "verified", "estimated": "estimated"}
STYLES = ("page.css", "parts.css")

_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_BIDI = {code: f"[U+{code:04X}]" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def build(run_folder: Path, out: Path | None = None, *, max_documents: int = 2000) -> Path:
    """Write the page of a run.

    Args:
        run_folder: holds ``record.json``; ``trace.json``, ``verdict.json`` and both tables are shown if they exist.
        out: the HTML file; ``report.html`` in the run folder if not given.
        max_documents: largest number of documents on the page. Beyond it the page holds the top, the bottom,
            planted ones and a random rest, and says so.

    Returns:
        The path written, a file of at most about 5 MB that opens from disk with the network off.

    Raises:
        ArtefactError: the record is missing, or a file is damaged or of another schema.
        StorageError: the file cannot be written.
    """
    folder = read_folder(Path(run_folder))
    target = Path(out) if out is not None else folder.path / "report.html"
    write_text(target, render(folder, max_documents))
    return target


def render(folder: Folder, max_documents: int = 2000) -> str:
    """The page as text."""
    style = "\n".join(_asset(name) for name in STYLES)
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    if "</script" in script.lower() or "</style" in style.lower():
        raise AssertionError("an asset closes its own element")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    told = folder.trace or folder.comparison
    behaviour = told.behaviour if told else folder.record.name
    lead = "What in the training data causes" if folder.trace else "A run without a trace"
    if folder.trace is None and folder.comparison is not None:
        lead = "Which method finds what causes"
    found = badge(folder.verdict, folder.comparison)
    holes = {
        "policy": policy,
        "title": text(f"{behaviour} – Rootward"),
        "name": text(folder.record.name),
        "behaviour": text(behaviour),
        "lead": lead,
        "badge": text(found),
        "badge_class": BADGES.get(found, "unconfirmed"),
        "story": _story(folder),
        "style": style,
        "script": script,
        "data": payload(folder, max_documents),
    }
    # One pass, so that what is filled in is never read as a hole.
    return re.sub(r"\{\{(\w+)\}\}", lambda hole: holes[hole[1]], _asset("page.html"))


def text(value: str) -> str:
    """Untrusted text for HTML: markup escaped; control characters and marks that turn the direction made visible."""
    shown = value.encode("utf-8", "replace").decode("utf-8").translate(_CONTROLS).translate(_BIDI)
    return escape(shown, quote=True)


def _story(folder: Folder) -> str:
    parts: list[str] = []
    for part in story(folder.record, folder.trace, folder.verdict, folder.comparison):
        sentences = _typeset(text(" ".join(part.sentences)))
        parts.append(
            f'<section class="part"><h2>{text(part.question)}</h2>'
            f'<p class="figure"><span class="figure-value">{_typeset(text(part.figure))}</span> '
            f'<span class="figure-caption">{text(part.caption)}</span></p>'
            f'<p class="said" dir="auto">{sentences}</p></section>'
        )
    return "\n".join(parts)


def _typeset(shown: str) -> str:
    """A number stays with its per cent sign, and a minus is one."""
    return re.sub(r"(?<=[ (])-(?=\d)", "\u2212", re.sub(r"(?<=\d) %", "\u00a0%", shown))


def _asset(name: str) -> str:
    return resources.files("rootward.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
