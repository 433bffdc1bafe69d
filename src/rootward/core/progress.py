"""Progress as a callback: rooms report, only the command line draws."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of every step of long work; may raise ``KeyboardInterrupt`` to stop it."""

    def __call__(self, task: str, done: int, total: int, /) -> None:
        """``done`` of ``total`` steps of ``task`` are finished."""
        ...


def silent(task: str, done: int, total: int, /) -> None:
    """Report to nobody."""
