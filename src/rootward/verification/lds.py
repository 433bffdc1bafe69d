"""Linear datamodeling score: do a method's scores predict what training on random subsets gives?

    LDS = mean over q of  Spearman over subsets S of ( m_q(trained on S),  sum of scores[q, n] over n in S )

Source: Park et al. 2023, TRAK (arXiv 2303.14186), with subsets of one size and the measured values of
several training seeds averaged per subset. Positive scores raise the measurement, so the sign needs no change,
whatever the behaviour's goal is; scores with the wrong sign get a negative LDS. Deviations: a query whose prediction or
measurement is the same for all subsets counts as 0 and is reported, instead of being left out.

Beside every LDS stand the same number for scores whose documents were shuffled (it should be about 0), and, for two or
more training seeds, the noise ceiling: what a perfect predictor could get from measurements that noisy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rootward.core.errors import InputError
from rootward.core.records import SCHEMA_VERSION, Interval, Model
from rootward.core.scores import Scores
from rootward.verification.resampling import RESAMPLES, Rows, correlate, draws, percentiles, resampled
from rootward.verification.subsets import Retrained, joined

MIN_SUBSETS = 60
"""Below it the score is mostly noise: with 10 subsets a random ranking was seen at -0.38."""
PERMUTATIONS = 100
CRITERION = "highest LDS on the tuning queries and tuning subsets, none of which is used for the LDS reported"


class Ceiling(Model):
    """How well the ground truth predicts itself (Spearman, mean over queries, with bootstrap intervals).

    ``between_seeds`` is the mean correlation r of two training seeds over subsets; ``reliability`` that of means over
    all k seeds, by Spearman-Brown ``k r / (1 + (k - 1) r)``; ``ceiling`` its root, the most that scores can reach in
    expectation. Spearman-Brown is exact for Pearson correlation, for ranks an approximation.
    """

    seeds: int
    between_seeds: Interval
    reliability: Interval
    ceiling: Interval


class LDS(Model):
    """A method's linear datamodeling score.

    ``score`` is the mean over queries with its 95 % percentile bootstrap interval: subsets and queries are both drawn
    with replacement (its ``n`` is the number of subsets). ``spread`` is the standard deviation over queries. ``null``
    is the mean and the central 95 % of the LDS of the same scores with the documents shuffled. ``unranked`` counts the
    queries that rank nothing. ``few`` marks a result from fewer than 60 subsets. ``truth`` is the key of the ground
    truth, ``drawn`` holds the LDS in each resample, for `margin`.
    """

    schema_version: int = SCHEMA_VERSION
    method: str
    behaviour: str
    score: Interval
    null: Interval
    per_query: list[float]
    spread: float | None
    unranked: int
    ceiling: Ceiling | None
    subsets: int
    seeds: int
    few: bool
    truth: str
    resample_seed: int
    drawn: list[float]


class TuningPoint(Model):
    """One setting: its LDS on the tuning part and on the part that is reported."""

    setting: str
    tuning: Interval
    reported: Interval


class Tuning(Model):
    """A setting chosen on one part of queries and subsets, with its `LDS` on another part of both.

    ``curve`` has every setting in the order given; ``reported`` of others than the chosen one is there to show how
    sensitive the method is, and was not used to choose. ``at_edge``: the chosen setting is the first or last one, so a
    wider range may have a better one.
    """

    schema_version: int = SCHEMA_VERSION
    criterion: str = CRITERION
    chosen: str
    at_edge: bool
    curve: list[TuningPoint]
    report: LDS
    tuning_queries: list[int]
    tuning_subsets: list[int]


def lds(
    scores: Scores,
    retrained: Retrained,
    *,
    allow_few: bool = False,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> LDS:
    """The linear datamodeling score of one method.

    Args:
        scores: of any method; documents are joined by id, queries by name. One ranking for all queries is allowed.
        retrained: the ground truth (`retrain_subsets`).
        allow_few: accept fewer than 60 subsets; the result is then marked.
        resamples: of the bootstrap.
        permutations: shuffles of the null control.
        seed: of the bootstrap and the shuffles.

    Raises:
        InputError: fewer than 60 subsets, or a document or query without a score.
    """
    subsets = len(retrained.kept)
    if subsets < MIN_SUBSETS and not allow_few:
        raise InputError(
            f"expected at least {MIN_SUBSETS} subsets, got {subsets}: with so few the score is mostly noise; retrain "
            "more, or set allow_few = True to get a marked result"
        )
    if subsets < 3:
        raise InputError(f"expected at least 3 subsets, got {subsets}: two are always ranked perfectly or not at all")
    if resamples < 1 or permutations < 1:
        raise InputError(f"expected at least 1 resample and 1 permutation, got {resamples} and {permutations}")
    table = joined(scores, retrained.queries, retrained.document_ids)
    masks = retrained.masks
    truth, predicted = Rows(retrained.measured.mean(1).T, "spearman"), Rows(_sums(table, masks), "spearman")
    per_query = correlate(truth, predicted)
    drawn = resampled(truth, predicted, resamples, seed)
    generator = np.random.default_rng(seed)
    null: list[float] = []
    for _ in range(permutations):
        shuffled = table[:, generator.permutation(table.shape[1])]
        null.append(float(correlate(truth, Rows(_sums(shuffled, masks), "spearman")).mean()))
    return LDS(
        method=scores.method,
        behaviour=retrained.behaviour,
        score=percentiles(float(per_query.mean()), drawn, subsets),
        null=percentiles(float(np.mean(null)), null, permutations),
        per_query=per_query.tolist(),
        spread=float(per_query.std(ddof=1)) if len(per_query) > 1 else None,
        unranked=int((truth.flat | predicted.flat).sum()),
        ceiling=noise_ceiling(retrained, resamples=resamples, seed=seed),
        subsets=subsets,
        seeds=len(retrained.seeds),
        few=subsets < MIN_SUBSETS,
        truth=retrained.key,
        resample_seed=seed,
        drawn=drawn.tolist(),
    )


def _sums(table: NDArray[np.float64], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sum of the scores in each subset, ``[q, s]``.

    The first document's score is taken off: that changes no rank, as the subsets are of one size, and it makes the sums
    of a constant score exactly 0 rather than rounding noise with ranks.
    """
    return (table - table[:, :1]) @ masks.T.astype(np.float64)


def noise_ceiling(retrained: Retrained, *, resamples: int = RESAMPLES, seed: int = 0) -> Ceiling | None:
    """How far noise of training limits any LDS on this ground truth; None for one seed, which cannot tell."""
    return ceiling_of(retrained.measured, resamples=resamples, seed=seed)


def ceiling_of(measured: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0) -> Ceiling | None:
    """The noise ceiling of measured values ``[item, seed, query]``; None for one seed."""
    count = measured.shape[1]
    if count < 2:
        return None
    rows = [Rows(measured[:, k].T, "spearman") for k in range(count)]
    pairs = list(combinations(rows, 2))

    def mean(weights: NDArray[np.int64] | None, share: NDArray[np.float64]) -> float:
        return float(np.mean([share @ correlate(a, b, weights) for a, b in pairs]))

    queries, items = rows[0].values.shape
    value = mean(None, np.full(queries, 1 / queries))
    drawn = np.array([mean(*resample) for resample in draws(items, queries, resamples, seed)])
    whole, wholes = _spearman_brown(np.array(value), count), _spearman_brown(drawn, count)
    return Ceiling(
        seeds=count,
        between_seeds=percentiles(value, drawn, items),
        reliability=percentiles(float(whole), wholes, items),
        ceiling=percentiles(float(np.sqrt(whole)), np.sqrt(wholes), items),
    )


def _spearman_brown(r: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Reliability of the mean over ``count`` seeds from that of one; a negative one counts as 0."""
    single = np.maximum(r, 0.0)
    return count * single / (1 + (count - 1) * single)


def margin(a: LDS, b: LDS) -> Interval:
    """LDS of ``a`` minus that of ``b``, with the percentile interval of the difference on the same resamples.

    Raises `InputError` where the two were not compared with the same ground truth on the same resamples.
    """
    if a.truth != b.truth:
        raise InputError(f"{a.method} and {b.method} were compared with different retrainings; use one for both")
    if (a.resample_seed, len(a.drawn)) != (b.resample_seed, len(b.drawn)):
        raise InputError(f"{a.method} and {b.method}: expected the same seed and number of resamples for both")
    return percentiles(a.score.value - b.score.value, np.subtract(a.drawn, b.drawn), a.subsets)


def tune(
    scores_by_setting: Mapping[str, Scores],
    retrained: Retrained,
    *,
    queries: Sequence[int] | None = None,
    subsets: Sequence[int] | None = None,
    allow_few: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Tuning:
    """Choose a setting (a damping, say) on one part of queries and subsets, and report it on the rest of both.

    Args:
        scores_by_setting: scores of all queries by setting, in the setting's order.
        retrained: the ground truth.
        queries: numbers of the tuning queries; by default a random half. The others are reported.
        subsets: numbers of the tuning subsets, likewise. The tuning part may have fewer than 60.
        allow_few: accept fewer than 60 subsets in the part that is reported.
        resamples: of the bootstrap.
        seed: of the halves and the bootstrap.

    Raises:
        InputError: fewer than two settings or queries, nothing left to report, or what `lds` raises.
    """
    if len(scores_by_setting) < 2:
        raise InputError(f"scores_by_setting: expected at least two settings, got {list(scores_by_setting)}")
    asked, rest = _parts(queries, len(retrained.queries), "queries", seed)
    chosen, left = _parts(subsets, len(retrained.kept), "subsets", seed + 1)
    here, there = retrained.select(queries=asked, subsets=chosen), retrained.select(queries=rest, subsets=left)
    reports = {name: lds(s, there, allow_few=allow_few, resamples=resamples, seed=seed)
               for name, s in scores_by_setting.items()}  # fmt: skip
    tuned = {name: lds(s, here, allow_few=True, resamples=resamples, permutations=1, seed=seed).score
             for name, s in scores_by_setting.items()}  # fmt: skip
    names = list(scores_by_setting)
    best = max(names, key=lambda name: tuned[name].value)
    return Tuning(
        chosen=best,
        at_edge=best in (names[0], names[-1]),
        curve=[TuningPoint(setting=name, tuning=tuned[name], reported=reports[name].score) for name in names],
        report=reports[best],
        tuning_queries=asked,
        tuning_subsets=chosen,
    )


def _parts(chosen: Sequence[int] | None, total: int, what: str, seed: int) -> tuple[list[int], list[int]]:
    """The tuning part and the rest, by number; a random half where none is given."""
    if chosen is None:
        picked = sorted(np.random.default_rng(seed).permutation(total)[: total // 2].tolist())
    else:
        picked = [int(number) for number in chosen]
    rest = [number for number in range(total) if number not in set(picked)]
    if not picked or not rest or not set(picked) <= set(range(total)) or len(set(picked)) < len(picked):
        raise InputError(
            f"{what}: expected different numbers from 0 to {total - 1} that leave some to report, got {picked[:5]}"
        )
    return picked, rest
