"""`Scores`: shape, sign, ranking and joining by id."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rootward.core.errors import InputError, NumericalError
from rootward.core.scores import Scores, parse_count


def scores(values: Any, ids: str, **more: Any) -> Scores:
    array = np.asarray(values, dtype=np.float32)
    return Scores(array, tuple(f"q{q}" for q in range(len(array))), tuple(ids), "test", "nats", **more)


def test_the_sign_is_part_of_the_type():
    assert "positive = training more on document n raises measurement q" in (Scores.__doc__ or "")


def test_values_must_have_a_row_per_query_and_a_column_per_document():
    with pytest.raises(InputError, match=r"\(1, 2\), got \(1, 3\)"):
        Scores(np.zeros((1, 3), np.float32), ("q",), ("a", "b"), "test", "nats")
    with pytest.raises(InputError, match=r"\[q, n\]"):
        Scores(np.zeros((0, 2), np.float32), (), ("a", "b"), "test", "nats")
    with pytest.raises(InputError, match=r"one row per document \(2\), got 1"):
        scores([[1, 2]], "ab", rows=(0,))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused_by_name(bad: float):
    with pytest.raises(NumericalError, match="document c for query 'q1'"):
        scores([[1, 2, 3], [1, 2, bad]], "abc")


def test_top_and_bottom_go_by_the_mean_over_queries():
    found = scores([[3, 0, 1, 4], [0, 1, 2, 0]], "abcd")
    assert found.mean.tolist() == [1.5, 0.5, 1.5, 2.0]
    assert found.top(1) == ("d",)
    assert found.top(3) == ("d", "a", "c")  # ties keep the documents' order
    assert found.bottom(1) == ("b",)
    assert found.top("50%") == ("d", "a")


def test_copies_are_listed_as_often_as_they_occur():
    assert scores([[5, 1, 5, 0]], "xaxb").top(3) == ("x", "x", "a")


@pytest.mark.parametrize(
    ("count", "expected"), [("5%", 5), ("0.5%", 0), ("12.6 %", 13), ("7", 7), (3, 3), (np.int64(4), 4)]
)
def test_counts(count: Any, expected: int):
    assert parse_count(count, 100) == expected


@pytest.mark.parametrize("count", ["five", "%", "nan%", "inf%", "", 0.05, True, None])
def test_other_counts_are_refused(count: Any):
    with pytest.raises(InputError, match="a number of documents or a share"):
        parse_count(count, 100)


@pytest.mark.parametrize("count", [0, -1, 4, 5, "1%", "100%"])
def test_nothing_and_everything_are_no_selection(count: Any):
    with pytest.raises(InputError, match="between 1 and 3 of 4"):
        scores([[1, 2, 3, 4]], "abcd").top(count)


def test_the_top_causes_the_behaviour_whichever_way_its_goal_lies():
    lower = scores([[-2, 1, -2, -5]], "abcd", goal="lower")
    assert lower.order().tolist() == [3, 0, 2, 1]  # ties keep the documents' order
    assert lower.top(1) == ("d",)
    assert lower.bottom(1) == ("b",)
    assert lower.toward.tolist() == [2, -1, 2, 5]
    assert lower.mean.tolist() == [-2, 1, -2, -5]  # the scores themselves keep their sign
    assert scores([[-2, 1, -2, -5]], "abcd").top(1) == ("b",)


def test_aligned_joins_by_id_and_refuses_documents_without_a_score():
    found = scores([[1, 2, 3], [4, 5, 6]], "abc")
    assert found.aligned(["c", "a", "c"]).tolist() == [[3, 1, 3], [6, 4, 6]]
    with pytest.raises(InputError, match="2 documents, first z"):
        found.aligned(["a", "z", "y"])
    assert scores([[1, 2, 1]], "aba").aligned(["a", "b"]).tolist() == [[1, 2]]
