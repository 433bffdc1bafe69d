"""Rootward: from what a language model does back to the training data that makes it do so, and proof by retraining."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rootward import report
    from rootward.api import attribute, compare, trace, verify
    from rootward.capture.several import attribute_many
    from rootward.core.errors import RootwardError
    from rootward.core.scores import Scores
    from rootward.interventions.data import Drop, Keep, Reweight
    from rootward.subject.behaviour import Behaviour
    from rootward.subject.subject import Subject

__version__ = "0.1.0"
__all__ = [
    "Behaviour",
    "Drop",
    "Keep",
    "Reweight",
    "RootwardError",
    "Scores",
    "Subject",
    "attribute",
    "attribute_many",
    "compare",
    "report",
    "trace",
    "verify",
]
_WHERE = {
    "Behaviour": "rootward.subject.behaviour",
    "Drop": "rootward.interventions.data",
    "Keep": "rootward.interventions.data",
    "Reweight": "rootward.interventions.data",
    "RootwardError": "rootward.core.errors",
    "Scores": "rootward.core.scores",
    "Subject": "rootward.subject.subject",
    "attribute": "rootward.api",
    "attribute_many": "rootward.capture.several",
    "compare": "rootward.api",
    "trace": "rootward.api",
    "verify": "rootward.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: ``import rootward`` alone loads neither torch nor transformers."""
    if name == "report":
        return importlib.import_module("rootward.report")  # the room itself is callable
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'rootward' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported yet or not."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
