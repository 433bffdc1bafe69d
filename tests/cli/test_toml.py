from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootward.cli.toml import dumps

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = st.one_of(
    TEXT, st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False), st.booleans(),
    st.lists(st.one_of(TEXT, st.integers(-9, 9)), max_size=3),
)  # fmt: skip
VALUES = st.recursive(PLAIN, lambda inner: st.dictionaries(TEXT, inner, max_size=4), max_leaves=10)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
@settings(max_examples=150)
def test_what_is_written_is_read_back(values: dict[str, Any]):
    assert tomllib.loads(dumps(values)) == values


def test_special_values_and_none():
    text = dumps(
        {"a": None, "b": math.inf, "c": -math.inf, "d": math.nan, "t": {"x": None}, "l": [{"k": 1}], "f": 1e300}
    )
    found = tomllib.loads(text)
    assert "a" not in found
    assert found["b"] == math.inf
    assert found["c"] == -math.inf
    assert math.isnan(found["d"])
    assert found["t"] == {}
    assert found["l"] == [{"k": 1}]
    assert found["f"] == 1e300


def test_another_type_is_refused():
    with pytest.raises(TypeError, match="set"):
        dumps({"a": {1}, "b": set()})
