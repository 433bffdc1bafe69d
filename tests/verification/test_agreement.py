"""Agreement of methods: the same as scipy's, joined by id."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rootward.core.errors import InputError
from rootward.core.records import read_model, write_model
from rootward.core.scores import Scores
from rootward.verification.agreement import Agreement, agree

IDS = tuple(f"d{n:02}" for n in range(50))


def table(seed: int, queries: int = 3) -> Scores:
    values = np.random.default_rng(seed).normal(size=(queries, 50)).astype(np.float32)
    return Scores(values, tuple(f"q{q}" for q in range(queries)), IDS, f"m{seed}", "1")


def test_every_pair_has_the_numbers_of_scipy(tmp_path: Path) -> None:
    a, noise = table(0), table(1)
    b = replace(a, values=np.round(a.values + noise.values, 1))  # with ties
    found = agree({"a": a, "b": b, "noise": noise}, top=5)
    ranks = [stats.spearmanr(x, y).statistic for x, y in zip(a.values, b.values, strict=True)]
    assert found.spearman[0][1].value == pytest.approx(np.mean(ranks))
    taus = [stats.kendalltau(x, y).statistic for x, y in zip(a.values, b.values, strict=True)]
    assert found.kendall[0][1].value == pytest.approx(np.mean(taus))
    common = [
        len({*np.argsort(-x, kind="stable")[:5]} & {*np.argsort(-y, kind="stable")[:5]}) / 5
        for x, y in zip(a.values, b.values, strict=True)
    ]
    assert found.overlap[0][1].value == pytest.approx(np.mean(common))
    assert found.chance == 0.1
    assert found.spearman[0][2].low < 0 < found.spearman[0][2].high
    for matrix in (found.spearman, found.kendall, found.overlap):
        assert [matrix[n][n].value for n in range(3)] == pytest.approx([1, 1, 1])
        assert matrix[1][0] == matrix[0][1]
    write_model(tmp_path / "agreement.json", found)
    assert read_model(Agreement, tmp_path / "agreement.json") == found


def test_random_rankings_overlap_by_chance() -> None:
    found = agree({"a": table(0, 200), "b": table(1, 200)}, top=10)
    assert found.overlap[0][1].low < found.chance < found.overlap[0][1].high
    assert found.kendall[0][1].low < 0 < found.kendall[0][1].high


def test_methods_are_joined_by_id_and_query_name() -> None:
    a, order = table(0), np.random.default_rng(3).permutation(50)
    turned = Scores(a.values[::-1][:, order], a.queries[::-1], tuple(IDS[n] for n in order), "turned", "1")
    found = agree({"a": a, "turned": turned}, top=5)
    values = [found.spearman[0][1].value, found.kendall[0][1].value, found.overlap[0][1].value]
    assert values == pytest.approx([1, 1, 1])
    one = Scores(a.values[:1], ("mean",), IDS, "one", "1")
    assert agree({"one": one, "a": a}).queries == list(a.queries)
    assert agree({"one": one, "again": one}).spearman[0][1].n == 1


def test_the_top_follows_the_goal_and_a_flat_ranking_agrees_with_nothing() -> None:
    a, b = replace(table(0), goal="lower"), replace(table(1), goal="lower")
    turned = [replace(one, values=-one.values, goal="raise") for one in (a, b)]
    assert agree({"a": a, "b": b}, top=7) == agree(dict(zip("ab", turned, strict=True)), top=7)
    flat = replace(a, values=np.full_like(a.values, 0.1))
    found = agree({"a": a, "flat": flat})
    assert (found.spearman[0][1].value, found.kendall[0][1].value) == (0, 0)


def test_what_cannot_be_compared_is_refused() -> None:
    a = table(0)
    with pytest.raises(InputError, match="at least two methods"):
        agree({"a": a})
    with pytest.raises(InputError, match="b: its scores are of other documents"):
        agree({"a": a, "b": Scores(a.values[:, 1:], a.queries, IDS[1:], "b", "1")})
    with pytest.raises(InputError, match="its goal is 'lower'"):
        agree({"a": a, "b": replace(a, goal="lower")})
    with pytest.raises(InputError, match="top: expected 1 to 49"):
        agree({"a": a, "b": a}, top=50)
    with pytest.raises(InputError, match="no scores for"):
        agree({"a": a, "b": Scores(a.values[:2], ("x", "y"), IDS, "b", "1")})
