"""What a comparison advises: the best that beats random, what is cheaper and cannot be told from it; or nothing."""

from typing import Any

import pytest

from rootward.core.records import ComparedMethod, Cost, Interval
from rootward.verification.advice import advise


def near(value: float, half: float = 0.1) -> Interval:
    return Interval(value=value, low=value - half, high=value + half, n=64)


def one(name: str, value: float, behind: float | None, ratio: float | None = 1.0, **changes: Any) -> ComparedMethod:
    fields: dict[str, Any] = {
        "method": name, "label": name, "unit": "1", "baseline": name in ("bm25", "random"),
        "cost": Cost(seconds=ratio or 1.0, ratio=ratio), "lds": near(value), "null": near(0.0), "unranked": 0,
        "per_query": True, "beats_random": None if name == "random" else value > 0.2,
        "behind_best": None if behind is None else near(behind),
    }  # fmt: skip
    return ComparedMethod(**{**fields, **changes})


def test_the_best_is_taken_and_a_cheaper_one_within_its_margin_is_named():
    found = advise([one("ekfac", 0.5, None, 4.0), one("bm25", 0.45, 0.05, 0.01), one("random", 0.0, 0.5, 0.0)], 64, 1)
    assert (found.recommended, found.as_good) == ("ekfac", ["bm25"])
    assert found.summary == (
        "Take ekfac: LDS 0.50 [0.40, 0.60], for 4 times one plain pass over the documents; bm25 does as well "
        "(difference 0.05 [−0.05, 0.15]) and costs next to nothing."
    )


def test_one_beyond_the_margin_or_dearer_is_not_named():
    found = advise([one("ekfac", 0.5, None, 4.0), one("dear", 0.48, 0.02, 9.0), one("bm25", 0.3, 0.2, 0.01)], 64, 1)
    assert found.as_good == []
    assert "bm25" not in found.summary and "dear" not in found.summary


def test_one_that_may_be_chance_is_said_to_be_too_little_to_tell():
    weak = one("bm25", 0.15, 0.05, 0.01)
    found = advise([one("ekfac", 0.25, None, 4.0), weak], 64, 1)
    assert found.as_good == ["bm25"]
    assert "the retrainings are too few to tell it from bm25, which" in found.summary


def test_a_baseline_on_top_is_said_to_be_one():
    found = advise([one("bm25", 0.5, None, 0.02), one("ekfac", 0.4, 0.1, 4.0)], 64, 1)
    assert found.recommended == "bm25"
    assert found.summary == (
        "Take bm25: LDS 0.50 [0.40, 0.60], for next to nothing. It is a baseline, and no method does better."
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_nothing_is_recommended_where_nothing_beats_a_random_order(seeds: int):
    methods = [one("random", 0.3, None), one("ekfac", 0.1, 0.2), one("bm25", 0.0, 0.3)]
    found = advise(methods, 8, seeds)
    assert (found.recommended, found.as_good) == (None, [])
    assert found.summary.startswith(f"Cannot tell: with 8 subsets and {seeds} training seed")
    assert "that of ekfac, 0.10 [0.00, 0.20]" in found.summary


def test_large_costs_are_whole_numbers():
    found = advise([one("source", 0.5, None, 596.7), one("ekfac", 0.45, 0.05, 111.1)], 64, 1)
    assert "for 597 times one plain pass" in found.summary
    assert "costs 111 plain passes" in found.summary


def test_a_cost_without_a_ratio_is_said_in_seconds():
    found = advise([one("ekfac", 0.5, None, None), one("random", 0.0, 0.5, None)], 64, 1)
    assert "in 1 s" in found.summary


def test_of_few_subsets_nothing_is_to_be_taken_and_the_highest_is_named():
    methods = [one("ekfac", 0.5, None, 4.0), one("random", 0.0, 0.5, 0.0)]
    found = advise(methods, 12, 1, few=True)
    assert found.recommended == "ekfac"
    assert found.summary == (
        "Too few subsets to decide; highest so far: ekfac, LDS 0.50 [0.40, 0.60], for 4 times one plain pass over the "
        "documents."
    )
    assert advise(methods, 64, 1).summary.startswith("Take ekfac: ")
