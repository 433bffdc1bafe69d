"""Content hashes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootward.core.hashing import difference, digest, digest_json, document_id

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
CONTENTS = st.dictionaries(st.text(), LEAVES | st.lists(LEAVES, max_size=3), max_size=5)


@given(CONTENTS, st.randoms())
def test_document_id_does_not_depend_on_the_order_of_keys(content: dict[str, object], order: random.Random):
    items = list(content.items())
    order.shuffle(items)
    assert document_id(dict(items)) == document_id(content)
    assert document_id({"outer": dict(items)}) == document_id({"outer": content})


@given(st.text(), st.text())
def test_document_id_is_that_of_the_content(a: str, b: str):
    assert (document_id({"text": a}) == document_id({"text": b})) == (a == b)
    assert document_id({"text": a}) != document_id({"prompt": a})


def test_ids_are_what_they_were():
    # Results on disk are joined by these: a change here makes every old run unreadable.
    assert digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert document_id({"text": "hello"}) == digest('{"text":"hello"}')[:16]


def test_lone_surrogates_have_an_id_and_nan_has_none():
    assert document_id({"text": "\ud800"}) != document_id({"text": "\ud801"})
    with pytest.raises(ValueError, match="JSON"):
        digest_json({"x": float("nan")})


def test_difference_names_keys_that_differ_and_only_those():
    assert difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) == ""
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": "x"}) == "  b: 2 -> 3\n  c: None -> 'x'"
