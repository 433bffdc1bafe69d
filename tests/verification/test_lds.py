"""The linear datamodeling score: about 1 for exact influence, about 0 for noise, the truth's own limits beside it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rootward.core.errors import InputError, NumericalError
from rootward.core.records import read_model, write_model
from rootward.core.scores import Scores
from rootward.subject.subject import Subject
from rootward.verification.lds import LDS, lds, margin, noise_ceiling, tune
from rootward.verification.subsets import Retrained
from tests.verification import convex

FAST: dict[str, Any] = {"resamples": 200, "permutations": 50}


def made(
    generator: np.random.Generator, subsets: int = 80, noise: float = 0.0, seeds: int = 1, queries: int = 4, n: int = 30
) -> tuple[Scores, Retrained]:
    """Measurements that are exactly the sum of scores, plus noise of each seed; no training."""
    table = generator.normal(size=(queries, n)).astype(np.float32)
    masks = np.array([generator.permutation(n) < n // 2 for _ in range(subsets)])
    sums = masks @ table.T.astype(np.float64)
    values = sums[:, None] + noise * generator.normal(size=(subsets, seeds, queries))
    names, ids = [f"q{q}" for q in range(queries)], [f"d{d}" for d in range(n)]
    truth = Retrained(
        behaviour="b", unit="nats", queries=names, document_ids=ids, seeds=list(range(seeds)), share=0.5,
        kept=["".join("01"[int(bit)] for bit in mask) for mask in masks], values=values.tolist(),
    )  # fmt: skip
    return Scores(table, tuple(names), tuple(ids), "exact", "1"), truth


def test_exact_influence_predicts_retraining_and_noise_does_not(line: Subject, line_truth: Retrained) -> None:
    exact = lds(convex.influence(line), line_truth, **FAST)
    assert exact.score.value > 0.95
    assert exact.score.low > 0.9
    assert exact.score.low <= exact.score.value <= exact.score.high
    assert exact.null.low < 0 < exact.null.high < exact.score.low
    assert exact.spread is not None and exact.spread < 0.05
    noise = lds(convex.noise(line), line_truth, **FAST)
    assert noise.score.low < 0 < noise.score.high
    wrong = lds(convex.influence(line, sign=-1.0), line_truth, **FAST)
    assert wrong.score.value == pytest.approx(-exact.score.value)
    assert (exact.subsets, exact.seeds, exact.few, exact.unranked, exact.ceiling) == (128, 1, False, 0, None)


def test_it_is_the_mean_over_queries_of_the_rank_correlation_with_the_sum(line_truth: Retrained, line: Subject) -> None:
    scores = convex.influence(line)
    found = lds(scores, line_truth, **FAST)
    for q in range(convex.QUERIES):
        sums = [
            sum(float(scores.values[q, n]) for n in range(convex.N) if line_truth.kept[s][n] == "1")
            for s in range(len(line_truth.kept))
        ]
        naive = stats.spearmanr(sums, line_truth.measured[:, :, q].mean(1)).statistic
        assert found.per_query[q] == pytest.approx(naive, abs=1e-9)
    assert found.score.value == pytest.approx(np.mean(found.per_query))


def test_the_order_of_documents_and_queries_changes_nothing(line: Subject, line_truth: Retrained) -> None:
    scores = convex.influence(line)
    order = np.random.default_rng(0).permutation(convex.N)
    ids = tuple(scores.document_ids[n] for n in order)
    turned = Scores(scores.values[::-1][:, order], scores.queries[::-1], ids, scores.method, "1")
    assert lds(turned, line_truth, **FAST) == lds(scores, line_truth, **FAST)
    more = Scores(
        np.hstack([scores.values, scores.values[:, :1]]), scores.queries, (*scores.document_ids, "x"), "m", "1"
    )
    assert lds(more, line_truth, **FAST).per_query == lds(scores, line_truth, **FAST).per_query


def test_copies_of_a_document_count_each() -> None:
    scores, truth = made(np.random.default_rng(0))
    ids = ["d1" if name == "d0" else name for name in truth.document_ids]
    table = scores.values.copy()
    table[:, 0] = table[:, 1]
    values = (truth.masks @ table.T.astype(np.float64))[:, None]
    twins = Retrained(**{**truth.model_dump(), "document_ids": ids, "values": values.tolist()})
    assert lds(Scores(table, scores.queries, tuple(ids), "m", "1"), twins, **FAST).score.value == pytest.approx(1)
    assert lds(scores, truth, **FAST).score.value == pytest.approx(1)


def test_the_average_over_seeds_is_compared_and_the_ceiling_is_what_perfect_scores_reach() -> None:
    generator = np.random.default_rng(0)
    scores, truth = made(generator, subsets=600, noise=2.7, seeds=4, queries=6)  # sums have variance 30/4 = 2.7²
    found = lds(scores, truth, **FAST)
    assert found.ceiling is not None
    assert found.ceiling.between_seeds.value == pytest.approx(0.5, abs=0.06)
    assert found.ceiling.reliability.value == pytest.approx(0.8, abs=0.04)
    assert found.ceiling.ceiling.value == pytest.approx(found.score.value, abs=0.02)
    single = [lds(scores, Retrained(**{**truth.model_dump(), "seeds": [0], "values": truth.measured[:, :1].tolist()}))]
    assert single[0].score.value < found.score.value - 0.1
    noise = Retrained(**{**truth.model_dump(), "values": generator.normal(size=(600, 4, 6)).tolist()})
    nothing = noise_ceiling(noise, resamples=100)
    assert nothing is not None and nothing.between_seeds.low < 0 < nothing.between_seeds.high


def test_a_constant_ranking_counts_as_nothing(line: Subject, line_truth: Retrained) -> None:
    flat = convex.scored(line, np.full((convex.QUERIES, convex.N), 0.1), "flat")
    found = lds(flat, line_truth, **FAST)
    assert (found.score.value, found.unranked) == (0.0, 5)
    half = flat.values.copy()
    half[0] = convex.influence(line).values[0]
    found = lds(replace(flat, values=half), line_truth, **FAST)
    assert found.unranked == 4
    assert found.score.value == pytest.approx(found.per_query[0] / 5)


def test_a_margin_is_taken_on_the_same_resamples(line: Subject, line_truth: Retrained) -> None:
    exact, values = lds(convex.influence(line), line_truth, **FAST), convex.influence(line).values
    blurred = values + 0.3 * values.std() * np.random.default_rng(0).normal(size=values.shape)
    near = lds(convex.scored(line, blurred, "near"), line_truth, **FAST)
    found = margin(exact, near)
    assert found.value == pytest.approx(exact.score.value - near.score.value)
    assert 0 < found.low < found.value < found.high
    apart = (exact.score.high - exact.score.low) + (near.score.high - near.score.low)
    assert found.high - found.low < apart  # paired
    assert margin(exact, exact).model_dump() == {"value": 0, "low": 0, "high": 0, "n": 128}
    with pytest.raises(InputError, match="different retrainings"):
        margin(exact, lds(convex.influence(line), line_truth.select(queries=[0]), **FAST))
    with pytest.raises(InputError, match="same seed and number"):
        margin(exact, lds(convex.influence(line), line_truth, seed=1, **FAST))


def test_a_setting_is_chosen_on_one_part_and_reported_on_another(line: Subject, line_truth: Retrained) -> None:
    values, generator = convex.influence(line).values, np.random.default_rng(0)
    settings = {
        str(blur): convex.scored(line, values + blur * generator.normal(size=values.shape), f"blur {blur}")
        for blur in (5.0, 0.0, 1.0)
    }
    found = tune(settings, line_truth, resamples=50)
    assert (found.chosen, found.at_edge) == ("0.0", False)
    assert [point.setting for point in found.curve] == ["5.0", "0.0", "1.0"]
    assert (len(found.tuning_queries), len(found.tuning_subsets)) == (2, 64)
    rest = line_truth.select(
        queries=[q for q in range(5) if q not in found.tuning_queries],
        subsets=[s for s in range(128) if s not in found.tuning_subsets],
    )
    assert found.report == lds(settings["0.0"], rest, resamples=50)
    assert found.curve[1].reported == found.report.score


def test_the_choice_does_not_look_at_the_part_that_is_reported() -> None:
    generator = np.random.default_rng(0)
    scores, truth = made(generator, subsets=130)
    other = replace(scores, values=-scores.values)
    asked, chosen = [0, 1], list(range(65))
    values = truth.measured.copy()
    values[65:] *= -1  # on the reported subsets the other setting is right
    turned = Retrained(**{**truth.model_dump(), "values": values.tolist()})
    found = tune({"a": scores, "b": other}, turned, queries=asked, subsets=chosen, resamples=20)
    assert found.chosen == "a"
    assert found.report.score.value == pytest.approx(-1)
    assert found.curve[1].reported.value == pytest.approx(1)
    with pytest.raises(InputError, match="leave some to report"):
        tune({"a": scores, "b": other}, turned, queries=range(4))
    with pytest.raises(InputError, match="at least two settings"):
        tune({"a": scores}, turned)


def test_too_few_subsets_are_refused_or_marked(line: Subject, line_truth: Retrained) -> None:
    few = line_truth.select(subsets=range(59))
    with pytest.raises(InputError, match="at least 60 subsets, got 59"):
        lds(convex.influence(line), few)
    assert lds(convex.influence(line), few, allow_few=True, **FAST).few
    with pytest.raises(InputError, match="at least 3"):
        lds(convex.influence(line), line_truth.select(subsets=[0, 1]), allow_few=True)
    with pytest.raises(InputError, match="at least 60"):
        tune({"a": convex.influence(line), "b": convex.noise(line)}, line_truth.select(subsets=range(64)))


def test_bad_scores_get_the_named_error(line: Subject, line_truth: Retrained) -> None:
    scores = convex.influence(line)
    with pytest.raises(InputError, match="no score for 1 documents"):
        lds(Scores(scores.values[:, 1:], scores.queries, scores.document_ids[1:], "m", "1"), line_truth)
    values = scores.values.copy()
    values[0, 0] = np.nan
    with pytest.raises(NumericalError, match="not finite"):
        lds(replace(scores, values=values), line_truth)
    with pytest.raises(InputError, match="at least 1 resample"):
        lds(scores, line_truth, resamples=0)


def test_a_result_can_be_saved(line: Subject, line_truth: Retrained, tmp_path: Any) -> None:
    found = lds(convex.influence(line), line_truth, **FAST)
    write_model(tmp_path / "lds.json", found)
    assert read_model(LDS, tmp_path / "lds.json") == found
