"""Talking to people and programs: tables on stdout, progress and messages on stderr, or exactly one JSON document.

Training text is untrusted: whatever comes from a document passes through `clean` before it is shown, and no text is
ever read as markup.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
LOG_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""


def clean(text: str, *, lines: bool = False) -> str:
    """Text with control, format and direction characters as escapes; newlines become spaces unless ``lines``."""
    result: list[str] = []
    for character in text:
        if character == "\n" and lines:
            result.append(character)
        elif character in "\n\r\t":
            result.append(" ")
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            result.append(f"\\u{ord(character):04x}" if ord(character) > 255 else f"\\x{ord(character):02x}")
        else:
            result.append(character)
    return "".join(result)


def snippet(text: str, width: int) -> str:
    """One clean line of at most ``width`` characters."""
    line = " ".join(clean(text[: 4 * width]).split())
    return line if len(line) <= width and len(text) <= 4 * width else line[: width - 1] + "…"


def shown(path: Path) -> str:
    """A path as short as it can be said from here, with odd characters shown as escapes."""
    here = Path.cwd()
    return clean(str(path.relative_to(here) if path.is_relative_to(here) and path != here else path))


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Talk:
    """One command's output: how much, to whom, and in which form."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.as_json, self.quiet, self.debug = as_json, quiet, debug
        self._bars: Any = None
        self._task: tuple[str, Any] | None = None
        self._started: dict[str, float] = {}
        self._last = time.monotonic()

    def note(self, text: str) -> None:
        """A line for people, on stderr."""
        if not self.quiet:
            self.stop()
            sys.stderr.write(clean(text, lines=True) + "\n")
            sys.stderr.flush()

    def say(self, text: str = "") -> None:
        """A line of the result, on stdout; not in JSON mode."""
        if not self.as_json:
            self.stop()
            sys.stdout.write(clean(text, lines=True) + "\n")

    def table(self, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        """Columns are (heading, "left" or "right"); those on the left wrap where the line is too narrow."""
        if self.as_json:
            return
        self.stop()
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left", pad_edge=False)
        for heading, side in columns:
            if side == "right":
                grid.add_column(heading, justify="right", no_wrap=True)
            else:
                grid.add_column(heading, overflow="fold")
        for row in rows:
            grid.add_row(*(Text(clean(str(cell))) for cell in row))
        self._console().print(grid)

    def result(self, command: str, values: Mapping[str, Any]) -> None:
        """The command's answer as the one JSON document, in JSON mode."""
        if self.as_json:
            self.document({"command": command, **values})

    def document(self, values: Mapping[str, Any]) -> None:
        """Write one JSON document to stdout."""
        document = {"schema_version": SCHEMA_VERSION, **values}
        sys.stdout.write(json.dumps(document, indent=1, allow_nan=False, default=str) + "\n")
        sys.stdout.flush()

    def progress(self, task: str, done: int, total: int, /) -> None:
        """Draw a bar with the time left on a terminal; elsewhere a line every half minute at most."""
        if self.quiet:
            return
        now = time.monotonic()
        start = self._started.setdefault(task, now)
        if self._draws():
            self._draw(task, done, total)
        elif now - self._last >= LOG_EVERY:
            self._last = now
            left = duration((now - start) / done * (total - done)) if done else "unknown"
            sys.stderr.write(f"{clean(task)}: {done} of {total}, {left} left\n")
            sys.stderr.flush()
        if done >= total:
            self._started.pop(task, None)

    def stop(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._task = None, None

    def _draws(self) -> bool:
        return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "") and not self.as_json

    def _draw(self, task: str, done: int, total: int) -> None:
        if self._bars is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(),
            )  # fmt: skip
            self._bars = Progress(*columns, console=self._console(stderr=True), transient=True)
            self._bars.start()
        if self._task is None or self._task[0] != task:
            if self._task is not None:
                self._bars.remove_task(self._task[1])
            self._task = (task, self._bars.add_task(clean(task), total=total))
        self._bars.update(self._task[1], completed=done, total=total)

    def _console(self, *, stderr: bool = False) -> Any:
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        # rich itself honours NO_COLOR, FORCE_COLOR and TERM=dumb; a pipe gets lines wide enough for a snippet
        width = None if stream.isatty() or "COLUMNS" in os.environ else 120
        return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False, emoji=False, markup=False)
