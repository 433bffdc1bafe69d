"""Cards and the registry: how a method is found by its name, its paper or a word of its title.

Methods live in ``rootward/methods/<question>/<file>.py``. They are found by scanning file names and imported on first
use, so adding one edits no list and a missing optional package disables one method alone. Other packages join through
the entry-point group ``rootward.methods`` (name ``theirpackage/method``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rootward.core.errors import DependencyError, InputError
from rootward.core.expected import nearest, problems, shown


@dataclass(frozen=True)
class Tuned:
    """The option of a method that a comparison of methods chooses, and the values that it chooses from."""

    option: str
    values: tuple[float, ...]


class MethodConfig(BaseModel):
    """Base of every method's config: frozen, unknown keys are errors, defaults are the paper's.

    ``TUNED`` says what a comparison of methods tunes; None: nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    TUNED: ClassVar[Tuned | None] = None


@dataclass(frozen=True)
class Card:
    """What a method is.

    ``needs`` are among "gradients", "activations", "text", "lengths", "nothing", and "training" where the documents'
    own training run is read: its recipe and start, or its checkpoints with the optimiser's state. ``presets`` are
    further names that stand for this method with some options set. ``several``: queries of several behaviours may share
    its passes, since its values come of their gradients alone.
    """

    key: str
    label: str
    question: str
    paper: str
    reference: str
    needs: tuple[str, ...]
    cost: str
    unit: str
    aliases: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    baseline: bool = False
    several: bool = False
    notes: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that it answers to."""
        return (self.key, *self.aliases, *self.presets)


@dataclass(frozen=True)
class Work:
    """What a method would go over: numbers of documents, their mean tokens, queries and attributed parameters.

    ``checkpoints`` are those that training kept, ``start`` is whether its start is known too, ``training`` its length
    in passes over the documents.
    """

    documents: int
    tokens: float
    queries: int
    parameters: int
    checkpoints: int
    start: bool
    training: float


@dataclass(frozen=True)
class Need:
    """What a method takes: forward+backward passes over the documents, bytes beside those that every method needs.

    ``at_most``: the passes are an upper bound, an iteration may end before.
    """

    passes: float
    at_most: bool = False
    memory_bytes: int = 0


@dataclass(frozen=True)
class Method:
    """A registered method: its card, its config class and the function ``run(inputs, config) -> Scores``.

    ``tokens(inputs, config, rows)``, where there is one, gives the token scores ``[t]`` of some documents, and
    ``needs(config, work)`` a `Need`.
    """

    card: Card
    config: type[MethodConfig]
    run: Callable[..., Any]
    tokens: Callable[..., Any] | None = None
    needs: Callable[[Any, Work], Need] | None = None

    def needed(self, config: MethodConfig, work: Work) -> Need:
        """What a run with this config takes, roughly.

        A method that does not say takes one pass where it reads gradients; where it looks at all checkpoints, one for
        each and for the start.
        """
        if self.needs is not None:
            return self.needs(config, work)
        if "gradients" not in self.card.needs:
            return Need(0)
        looks_at = getattr(config, "checkpoints", "all" if "training" in self.card.needs else "final")
        return Need(max(1, work.checkpoints + work.start) if looks_at == "all" else 1)

    def configure(self, options: Mapping[str, Any], name: str | None = None) -> MethodConfig:
        """Checked config; an `InputError` says what an option takes and what came, under the ``name`` asked for."""
        try:
            return self.config.model_validate(dict(options))
        except ValidationError as error:
            raise InputError(f"{name or self.card.key}: {problems(self.config, error, options)}") from error


_registered: dict[str, Method] = {}


def register(
    card: Card,
    config: type[MethodConfig],
    tokens: Callable[..., Any] | None = None,
    needs: Callable[[Any, Work], Need] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a method file's one function. A duplicate key or alias, or a card without a paper, is refused."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        stem = function.__module__.rsplit(".", 1)[-1]
        if function.__module__.startswith("rootward.methods.") and stem != card.key:
            raise InputError(f"card key {card.key!r} differs from its file name {stem!r}")
        if config.TUNED is not None and config.TUNED.option not in config.model_fields:
            raise InputError(
                f"card {card.key!r}: TUNED names {config.TUNED.option!r}, which is no option of its config"
            )
        if not card.paper or not card.reference:
            raise InputError(f"card {card.key!r} names no paper or reference")
        names = [name.lower() for name in card.names]
        if len(set(names)) != len(names):
            raise InputError(f"card {card.key!r} gives the same name twice: {', '.join(card.names)}")
        for other in _registered.values():
            shared = set(names) & {name.lower() for name in other.card.names}
            if shared and other.run.__module__ != function.__module__:
                raise InputError(f"method name {sorted(shared)[0]!r} is taken by {other.card.key}")
        _registered[card.key] = Method(card, config, function, tokens, needs)
        return function

    return add


@cache
def _modules() -> dict[str, str]:
    """Method key -> module, from file names and entry points; nothing is imported."""
    found: dict[str, str] = {}
    for path in sorted((Path(__file__).parents[1] / "methods").glob("*/*.py")):
        if not path.name.startswith("_"):
            found[path.stem] = f"rootward.methods.{path.parent.name}.{path.stem}"
    for entry in metadata.entry_points(group="rootward.methods"):
        if entry.name in found:
            raise InputError(f"entry point {entry.name!r} ({entry.value}): a method of that name is there already")
        found[entry.name] = entry.module
    return found


def load(key: str) -> Method:
    """Import one method by its key.

    Raises:
        InputError: no such key, or its module registers another. DependencyError: a package that it needs is missing.
    """
    if key not in _registered:
        if key not in _modules():
            raise _unknown(key, _modules())
        module = _modules()[key]
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = (error.name or "").split(".")[0]
            if package in ("", *module.split(".")[:1]):
                raise  # not a missing package: the method's own file is broken
            raise DependencyError(f"method {key} needs {package}: {error}; pip install {package}") from error
    if key not in _registered:
        raise InputError(f"method {key}: its module {_modules()[key]} registers no card with that key")
    return _registered[key]


def methods() -> list[Method]:
    """All methods that can be used here, by question and key; `missing` has the others."""
    absent = missing()
    found = [load(key) for key in _modules() if key not in absent]
    return sorted(found, key=lambda m: (m.card.question, m.card.baseline, m.card.key))


def missing() -> dict[str, str]:
    """Methods whose optional package is not installed: key -> the error with the install line."""
    found: dict[str, str] = {}
    for key in _modules():
        try:
            load(key)
        except DependencyError as error:
            found[key] = str(error)
    return found


def get(name: str) -> tuple[Method, dict[str, Any]]:
    """The method with this key, alias or preset, and the preset's options; the error has the nearest names."""
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        several = "; rw.trace and rw.compare take several" if isinstance(name, list | tuple) else ""
        raise InputError(
            f"method: expected one name, such as 'ekfac', got {shown(name)}{several}; see `rootward methods`"
        )
    if name in _modules():
        return load(name), {}
    for method in methods():
        if name.lower() in (method.card.key.lower(), *(alias.lower() for alias in method.card.aliases)):
            return method, {}
        for preset, options in method.card.presets.items():
            if name.lower() == preset.lower():
                return method, dict(options)
    absent = "".join(f"\nnot installed: {text}" for text in missing().values())
    raise _unknown(name, (other for m in methods() for other in m.card.names), absent)


def _unknown(name: str, known: Iterable[str], more: str = "") -> InputError:
    near = nearest(name, known, 3, 0.6)  # of so many names, some are a little like any word
    return InputError(f"method: expected a name from `rootward methods`, got {name!r}{near}{more}")


def find(words: str) -> list[Method]:
    """Methods whose key, alias, label, paper or reference holds every word given."""
    wanted = words.lower().split()

    def text(card: Card) -> str:
        return " ".join((card.key, card.label, card.paper, card.reference, *card.names)).lower()

    return [m for m in methods() if all(word in text(m.card) for word in wanted)]
