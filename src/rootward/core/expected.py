"""What an option takes and what was wrong with one, in words; and the known names that are spelt most like another."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

LONGEST = 80
"""Characters of a value that an error repeats."""
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
_WORDS: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> str:
    """``; did you mean ...?`` with the known names spelt most alike, the nearest first, or nothing.

    ``cutoff`` is the least likeness, 0 to 1, of a name that is named (`difflib`).
    """
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(name.lower(), name)
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(names), count, cutoff)
    return f"; did you mean {_either([repr(names[name]) for name in found])}?" if found else ""


def shown(value: object) -> str:
    """A value as Python writes it, cut to `LONGEST` characters."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def expected(field: FieldInfo) -> str:
    """What an option takes: ``a number of at least 0 or 'recipe'``."""
    return _either(_alternatives(field.annotation, field.metadata))


def problems(kind: type[BaseModel], error: ValidationError, given: Mapping[str, object]) -> str:
    """What is wrong with the values ``given`` to a config, once per option; all names where one of them is unknown."""
    found: dict[str, str] = {}
    unknown = False
    for problem in error.errors(include_url=False):
        place = str(problem["loc"][0]) if problem["loc"] else ""
        value = shown(given.get(place, problem["input"]))
        if problem["type"] in ("value_error", "assertion_error"):  # a validator of the config's own
            said = str(problem.get("ctx", {}).get("error", problem["msg"]))
            found.setdefault(place or said, f"{place}: {said}, got {value}" if place else said)
        elif place in kind.model_fields:
            found.setdefault(place, f"{place}: expected {expected(kind.model_fields[place])}, got {value}")
        else:
            unknown = True
            found.setdefault(place, f"{place}: unknown option{nearest(place, kind.model_fields)}")
    listed = f" (options: {', '.join(kind.model_fields) or 'none'})" if unknown else ""
    return "; ".join(found.values()) + listed


def _either(texts: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _alternatives(annotation: Any, metadata: Iterable[Any]) -> list[str]:
    """Each kind of value that an annotation allows, with the bounds that numbers have."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _alternatives(inner[0], [*metadata, *inner[1:]])
    if origin in (typing.Union, types.UnionType):
        return [text for one in inner for text in _alternatives(one, metadata)]
    if origin is Literal:
        return [repr(value) for value in inner]
    if annotation is types.NoneType:
        return ["None"]
    text = _WORDS.get(annotation, str(getattr(annotation, "__name__", annotation)))
    if annotation in (int, float):
        bounds = [
            f"{words} {getattr(one, name):g}"
            for one in metadata
            for name, words in _BOUNDS.items()
            if hasattr(one, name)
        ]
        text = " ".join([text, " and ".join(bounds)]) if bounds else text
    return [text]
