"""A call with the wrong kind of thing says what was expected, what came and what to do, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rootward as rw
from rootward.core.errors import InputError
from tests.verification import convex


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    return {"subject": convex.subject(), "behaviour": rw.Behaviour.loss("x", [{"x": [0.0] * convex.WIDTH, "y": [0.0]}])}


def several(verb: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    return lambda **given: verb(**given, run=folder / "run")


@pytest.mark.parametrize("verb", ["attribute", "trace", "compare"])
@pytest.mark.parametrize("path", ["q.jsonl", Path("q.jsonl")])
def test_a_path_in_place_of_a_subject_or_a_behaviour(
    asked: dict[str, Any], tmp_path: Path, verb: str, path: str | Path
):
    call = rw.attribute if verb == "attribute" else several(getattr(rw, verb), tmp_path)
    with pytest.raises(InputError, match=r"behaviour: expected a Behaviour, got .*rw\.Behaviour\.load\('q\.jsonl'\)"):
        call(**{**asked, "behaviour": path})
    with pytest.raises(InputError, match=r"subject: expected a Subject, got .*rw\.Subject\.load\('q\.jsonl', doc"):
        call(**{**asked, "subject": path})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": None}, "method: expected one name, such as 'ekfac', got None"),
        ({"method": ["bm25", "ekfac"]}, "got ['bm25', 'ekfac']; rw.trace and rw.compare take several"),
        ({"options": [("damping", 1)]}, "options: expected a mapping such as {'damping': 0.1}, got [('damping', 1)]"),
    ],
)
def test_attribute_refuses_other_kinds(asked: dict[str, Any], given: dict[str, Any], message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        rw.attribute(**asked, **given)


@pytest.mark.parametrize("verb", ["trace", "compare"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "ekfac"}, "methods: expected a list of names, got the text 'ekfac'; write ['ekfac']"),
        ({"methods": 3}, "methods: expected a list of names, got 3"),
        ({"methods": ["random", None]}, "method: expected one name, such as 'ekfac', got None"),
        ({"options": [("damping", 1)]}, "options: expected a mapping such as {'ekfac': {'damping': 0.1}}, got [("),
        ({"options": {"random": 3}}, "options['random']: expected a mapping such as {'damping': 0.1}, got 3"),
    ],
)
def test_trace_and_compare_refuse_other_kinds(
    asked: dict[str, Any], tmp_path: Path, verb: str, given: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=re.escape(message)):
        several(getattr(rw, verb), tmp_path)(**asked, **given)
    assert not list(tmp_path.iterdir())
