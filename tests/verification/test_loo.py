"""Leave one out: exact influence predicts sign, order and size of the measured change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rootward.core.errors import InputError, NumericalError
from rootward.core.records import read_model, write_model
from rootward.core.scores import Scores
from rootward.subject.subject import Subject
from rootward.verification.loo import (
    LOO,
    LeftOut,
    leave_one_out,
    left_out_jobs,
    loo,
    sample_documents,
    spread_documents,
)
from tests.verification import convex

FAST: dict[str, Any] = {"resamples": 200, "permutations": 50}


@pytest.fixture(scope="module")
def truth(line: Subject, tmp_path_factory: pytest.TempPathFactory) -> LeftOut:
    ids = sample_documents(line, 16)
    return leave_one_out(line, ids, convex.behaviour(), seeds=(0,), cache=tmp_path_factory.mktemp("loo"))


def test_exact_influence_predicts_the_changes_and_their_size(line: Subject, truth: LeftOut) -> None:
    tables = {"influence": convex.influence(line), "wrong": convex.influence(line, -1.0), "noise": convex.noise(line)}
    judged = loo(tables, truth, **FAST)
    assert [one.method for one in judged.methods] == ["influence", "wrong", "noise"]
    found, wrong, noise = (judged.of(name) for name in tables)
    assert found.spearman.value > 0.98
    assert found.pearson.value > 0.98
    assert found.slope is not None
    assert found.slope.value == pytest.approx(1, abs=0.2)  # leave-one-out is larger by 1 / (1 - leverage)
    assert found.slope.low <= found.slope.value <= found.slope.high
    assert found.null.low < 0 < found.null.high < found.spearman.low
    assert wrong.spearman.value == pytest.approx(-found.spearman.value)
    assert wrong.slope is not None and wrong.slope.value == pytest.approx(-found.slope.value)
    assert noise.spearman.low < 0 < noise.spearman.high
    for name, table in tables.items():  # alone or beside others, the result is the same
        assert loo({name: table}, truth, **FAST).methods == [judged.of(name)]
    with pytest.raises(InputError, match="expected one of influence, wrong, noise, got nobody"):
        judged.of("nobody")


def test_the_measured_change_is_that_of_a_fit_without_the_document(line: Subject, truth: LeftOut) -> None:
    x, y, points = (part.astype(np.float64) for part in convex.data())
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    for n, name in enumerate(truth.document_ids[:5]):
        stay = np.arange(convex.N) != line.documents.ids.index(name)
        without = np.linalg.lstsq(x[stay], y[stay], rcond=None)[0]
        assert truth.changes[n, 0] == pytest.approx(points @ (without - best), abs=2e-3)


def test_the_numbers_are_those_of_scipy(line: Subject, truth: LeftOut) -> None:
    scores = convex.influence(line)
    found = loo(scores, truth, **FAST).of("influence")
    table = scores.aligned(truth.document_ids)
    naive = [stats.pearsonr(-table[q], truth.changes[:, 0, q]).statistic for q in range(convex.QUERIES)]
    assert found.pearson.value == pytest.approx(np.mean(naive), abs=1e-6)
    ranks = [stats.spearmanr(-table[q], truth.changes[:, 0, q]).statistic for q in range(convex.QUERIES)]
    assert found.per_query == pytest.approx(ranks, abs=1e-9)


def test_documents_are_joined_by_id(line: Subject, truth: LeftOut) -> None:
    scores, order = convex.influence(line), np.random.default_rng(0).permutation(convex.N)
    ids = tuple(scores.document_ids[n] for n in order)
    assert loo(replace(scores, values=scores.values[:, order], document_ids=ids), truth, **FAST) == loo(
        scores, truth, **FAST
    )


def test_half_are_drawn_at_random_and_half_stand_at_both_ends_of_every_ranking(line: Subject) -> None:
    generator, ids = np.random.default_rng(3), line.encoded.ids
    rankings = [generator.normal(size=convex.N) for _ in range(3)]
    chosen, drawn = spread_documents(line, rankings, 24, seed=5)
    assert (len(chosen), len(set(chosen)), drawn) == (24, 24, 12)
    assert chosen[:12] == sample_documents(line, 12, seed=5)
    ends = [np.argsort(values) for values in rankings]
    taken, rest, level = set(chosen[:12]), set(chosen[12:]), 0
    while len(found := {ids[order[place]] for order in ends for place in (level, -1 - level)} - taken) <= len(rest):
        assert found <= rest
        taken, rest, level = taken | found, rest - found, level + 1
    assert level >= 1 and rest and rest < found  # of the level that does not fit, some
    assert set(spread_documents(line, rankings, convex.N)[0]) == set(ids)
    for place in range(3):  # nothing of the choice depends on a ranking's direction, or on its unit
        turned = [-7 * values if n == place else values for n, values in enumerate(rankings)]
        assert spread_documents(line, turned, 24, seed=5) == (chosen, drawn)
    order = generator.permutation(convex.N)
    moved = Subject(line.model, [line.documents[int(n)] for n in order], line.objective)
    ties = [np.zeros(convex.N), *rankings]  # a ranking that ranks nothing
    assert spread_documents(moved, [values[order] for values in ties], 23) == spread_documents(line, ties, 23)
    with pytest.raises(InputError, match="of 40 values each"):
        spread_documents(line, [], 5)
    with pytest.raises(InputError, match="of 40 values each"):
        spread_documents(line, [rankings[0][:-1]], 5)
    with pytest.raises(InputError, match="1 to 40 different documents, got 41"):
        spread_documents(line, rankings, 41)


def test_a_random_ranking_is_at_zero_on_the_documents_chosen_and_with_tops_alone_it_is_not(line: Subject) -> None:
    generator, ids = np.random.default_rng(0), line.encoded.ids
    both, tops = [], []
    for seed in range(300):
        effect, chance = generator.normal(size=(2, convex.N))
        chosen = [ids.index(name) for name in spread_documents(line, [effect, chance], 20, seed=seed)[0]]
        both.append(stats.spearmanr(effect[chosen], chance[chosen]).statistic)
        drawn = {ids.index(name) for name in sample_documents(line, 10, seed=seed)}
        high = {int(n) for values in (effect, chance) for n in np.argsort(-values)[:5]}
        naive = sorted(drawn | high)
        tops.append(stats.spearmanr(effect[naive], chance[naive]).statistic)
    error = np.std(both, ddof=1) / 300**0.5
    assert abs(np.mean(both)) < 3 * error
    assert np.mean(tops) < -5 * error


def test_of_copies_the_earliest_goes(line: Subject) -> None:
    twice = Subject(line.model, [line.documents[0], line.documents[1], line.documents[1]], line.objective)
    jobs = left_out_jobs(twice, [line.documents.ids[1]], (0, 1))
    assert [(job.name.split()[0], job.rows, job.seed) for job in jobs] == [
        ("full", (0, 1, 2), 0), ("full", (0, 1, 2), 1), ("without", (0, 2), 0), ("without", (0, 2), 1),
    ]  # fmt: skip
    assert sorted(sample_documents(twice, 2)) == sorted(set(twice.documents.ids))


def test_changes_are_paired_by_seed_and_noise_shows_in_the_ceiling() -> None:
    generator = np.random.default_rng(0)
    effects, seeds = generator.normal(size=(300, 2)), 100 * generator.normal(size=(3, 1))
    ids, full = [f"d{n}" for n in range(300)], np.repeat(seeds, 2, 1)
    values = full[None] + effects[:, None] + generator.normal(size=(300, 3, 2))
    truth = LeftOut(
        behaviour="b", unit="1", queries=["a", "b"], document_ids=ids, total=300, seeds=[0, 1, 2],
        full=full.tolist(), without=values.tolist(),
    )  # fmt: skip
    scores = Scores((-300 * effects.T).astype(np.float32), ("a", "b"), tuple(ids), "exact", "1")
    judged = loo(scores, truth, **FAST)
    found = judged.of("exact")
    assert found.slope is not None and found.slope.low < 1 < found.slope.high
    assert judged.ceiling is not None
    assert judged.ceiling.between_seeds.value == pytest.approx(0.5, abs=0.08)
    assert found.spearman.value == pytest.approx(judged.ceiling.ceiling.value, abs=0.03)


def test_what_cannot_be_done_is_refused(line: Subject, truth: LeftOut, tmp_path: Path) -> None:
    ids, probes = line.documents.ids, convex.behaviour()
    with pytest.raises(InputError, match="not among"):
        leave_one_out(line, ["unknown"], probes, cache=tmp_path)
    with pytest.raises(InputError, match="none twice"):
        leave_one_out(line, [ids[0], ids[0]], probes, cache=tmp_path)
    with pytest.raises(InputError, match="seeds"):
        leave_one_out(line, ids[:2], probes, seeds=(), cache=tmp_path)
    with pytest.raises(InputError, match="the only one"):
        leave_one_out(Subject(line.model, [line.documents[0]], line.objective), ids[:1], probes, cache=tmp_path)
    with pytest.raises(InputError, match="1 to 40 different documents, got 41"):
        sample_documents(line, 41)
    fields = truth.model_dump()
    few = LeftOut(**{**fields, "document_ids": fields["document_ids"][:2], "without": fields["without"][:2]})
    with pytest.raises(InputError, match="at least 3 documents"):
        loo(convex.influence(line), few)
    with pytest.raises(InputError, match="at least one method"):
        loo({}, truth)
    with pytest.raises(InputError, match="expected values"):
        LeftOut(**{**fields, "document_ids": fields["document_ids"][:2]})
    with pytest.raises(NumericalError, match="not finite"):
        LeftOut(**{**fields, "full": [[float("nan")] * convex.QUERIES]})
    nothing = convex.scored(line, np.zeros((convex.QUERIES, convex.N)), "nothing")
    flat = loo(nothing, truth, **FAST).of("nothing")
    assert (flat.slope, flat.spearman.value, flat.pearson.value) == (None, 0, 0)


def test_a_result_can_be_saved(line: Subject, truth: LeftOut, tmp_path: Path) -> None:
    write_model(tmp_path / "truth.json", truth)
    assert read_model(LeftOut, tmp_path / "truth.json") == truth
    assert read_model(LeftOut, tmp_path / "truth.json").key == loo(convex.influence(line), truth, **FAST).truth
    found = loo(convex.influence(line), truth, **FAST)
    write_model(tmp_path / "loo.json", found)
    assert read_model(LOO, tmp_path / "loo.json") == found
