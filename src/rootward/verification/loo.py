"""Leave one out: do a method's scores predict what training without a single document gives?

    predicted change of measurement q without document n = -scores[q, n] / N

The scale is that of scores whose curvature is the mean over the N usable documents: the weight of a document's loss in
that mean is 1/N, and leaving it out takes this weight away. (Koh and Liang 2017, arXiv 1703.04730, section 2, with the
sign turned: here a positive score raises the measurement.) Scores in other units have the right ranks and correlation
and the wrong ``slope``.

The effect of one document is small beside that of a seed, so every retraining is compared with the one on all
documents under the same seed; what is left of the noise is told by the ceiling. Methods and baselines (BM25,
representation similarity, length, random) are judged by the same retrainings.

Which documents are left out decides what the correlation is about. `sample_documents` draws them at random, so it is
about all documents, most of which do little; `spread_documents` has half of them from the ends of the rankings.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from rootward.core.errors import InputError, NumericalError
from rootward.core.hashing import digest_json
from rootward.core.progress import Progress, silent
from rootward.core.records import SCHEMA_VERSION, Interval, Model
from rootward.core.scores import Scores
from rootward.interventions.data import find_rows
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job
from rootward.verification.lds import PERMUTATIONS, Ceiling, ceiling_of
from rootward.verification.resampling import RESAMPLES, Floats, Rows, correlate, draws, percentiles, resampled
from rootward.verification.retrain import run_jobs
from rootward.verification.subsets import by_name, check_seeds, joined, pick

MIN_LEFT_OUT = 30
"""With fewer documents a correlation over them has an interval of 0.7 and more from end to end around 0."""


class LeftOut(Model):
    """What was measured without each of some documents.

    ``full[k][q]`` is the measurement after training on all ``total`` usable documents with ``seeds[k]``,
    ``without[n][k][q]`` without ``document_ids[n]`` (of copies: without the earliest).
    """

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    unit: str
    queries: list[str]
    document_ids: list[str]
    total: int
    seeds: list[int]
    full: list[list[float]]
    without: list[list[list[float]]]
    seconds: float = 0.0

    @model_validator(mode="after")
    def _whole(self) -> LeftOut:
        expected, changes = (len(self.document_ids), len(self.seeds), len(self.queries)), self.changes
        if 0 in expected or changes.shape != expected:
            raise InputError(f"LeftOut: expected values [n, seed, query] = {expected}, got {changes.shape}")
        if not np.isfinite(changes).all():
            raise NumericalError("LeftOut: a measured value is not finite")
        return self

    @property
    def changes(self) -> NDArray[np.float64]:
        """Measured change ``[n, seed, query]`` against training on all documents with the same seed."""
        try:
            return np.array(self.without, dtype=np.float64) - np.array(self.full, dtype=np.float64)
        except ValueError as error:
            raise InputError(f"LeftOut: values of uneven lengths: {error}") from error

    def select(self, queries: Sequence[int]) -> LeftOut:
        """Some of the queries, by number, in the order given."""
        return LeftOut(
            behaviour=self.behaviour,
            unit=self.unit,
            queries=[self.queries[q] for q in queries],
            document_ids=self.document_ids,
            total=self.total,
            seeds=self.seeds,
            full=[[seed[q] for q in queries] for seed in self.full],
            without=[[[seed[q] for q in queries] for seed in document] for document in self.without],
            seconds=self.seconds,
        )

    @property
    def key(self) -> str:
        """Hash of all but the time it took."""
        return digest_json(self.model_dump(mode="json", exclude={"seconds"}))[:32]


class Predicted(Model):
    """One method: agreement of predicted with measured changes, means over queries with 95 % bootstrap intervals.

    Documents and queries are both drawn with replacement (``n`` is the number of documents). ``slope`` is that of the
    measured on the predicted changes, through the origin and over all queries: 1 where the scale is right and the
    effects are small, above it where a fit leans on single documents (by 1 / (1 - leverage) in linear regression); None
    where every prediction is 0. ``null`` is the Spearman correlation of shuffled scores, with the central 95 %.
    ``per_query`` are Spearman correlations.
    """

    method: str
    spearman: Interval
    pearson: Interval
    slope: Interval | None
    null: Interval
    per_query: list[float]


class LOO(Model):
    """All methods against the same retrainings, ``truth`` (`LeftOut.key`)."""

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    methods: list[Predicted]
    ceiling: Ceiling | None
    documents: int
    seeds: int
    truth: str

    def of(self, method: str) -> Predicted:
        """One method by name; `InputError` lists those there are."""
        return pick(self.methods, method)


def sample_documents(subject: Subject, count: int, *, seed: int = 0) -> tuple[str, ...]:
    """Ids of ``count`` different usable documents, every set as likely; `InputError` if there are not so many."""
    ids = sorted(set(subject.encoded.ids))  # so that the file's order does not matter
    if not 1 <= count <= len(ids):
        raise InputError(f"count: expected 1 to {len(ids)} different documents, got {count}")
    return tuple(random.Random(f"rootward left out {seed} {len(ids)}").sample(ids, count))


def spread_documents(
    subject: Subject, rankings: Sequence[Floats], count: int, *, seed: int = 0
) -> tuple[tuple[str, ...], int]:
    """Documents to leave out that are not one method's choice: half at random, half from the ends of all rankings.

    Half of ``count``, rounded up, are those of `sample_documents`. The others are taken level by level: the highest
    and the lowest document of every ranking, then the second from either end, and so on; of a level that does not fit
    as many as do are drawn at random. Both ends, since with the tops alone a ranking that has nothing to do with the
    truth would not be expected at 0: the documents high in it are ordinary ones, those with large effects stand in its
    middle, and the correlation is below 0. With both ends, turning a ranking round changes nothing in the choice, so
    scores drawn at random are as often above 0 as below. Rankings that are alike fill one place where they agree.

    Args:
        subject: whose usable documents they are.
        rankings: one value a document of ``subject.encoded`` ``[n]`` for each method, in any unit; ties stand by id.
        count: 1 to the number of different documents.
        seed: of what is drawn.

    Returns:
        The ids, and how many of them, the first ones, were drawn at random without a look at the rankings.
    """
    ids = subject.encoded.ids
    if not rankings or any(np.shape(values) != (len(ids),) for values in rankings):
        raise InputError(f"rankings: expected at least one, of {len(ids)} values each")
    if not 1 <= count <= len(set(ids)):
        raise InputError(f"count: expected 1 to {len(set(ids))} different documents, got {count}")
    drawn = sample_documents(subject, (count + 1) // 2, seed=seed)
    names = np.asarray(ids)
    orders = [names[np.lexsort((names, values))].tolist() for values in rankings]
    taken = list(drawn)
    for level in range(len(ids)):
        ends = {order[place] for order in orders for place in (level, -1 - level)}
        found, room = sorted(ends.difference(taken)), count - len(taken)
        if len(found) > room:
            found = random.Random(f"rootward ends of rankings {seed} {level} {len(ids)}").sample(found, room)
        taken += found
        if len(taken) == count:
            break
    return tuple(taken), len(drawn)


def left_out_jobs(subject: Subject, document_ids: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All documents, then without each of these, for each seed; for `cost.estimate` and `leave_one_out`."""
    check_seeds(subject, seeds)
    if not document_ids or len(set(document_ids)) != len(document_ids):
        raise InputError(f"document_ids: expected at least one and none twice, got {len(document_ids)}")
    if len(subject.encoded) < 2:
        raise InputError("expected at least two usable documents: without the only one there is nothing to train on")
    usable = subject.documents.subset(subject.encoded.rows)
    everything = subject.encoded.rows
    gone = [everything[find_rows([name], usable, "document_ids")[0]] for name in document_ids]
    sets = [("full", everything)]
    sets += [(f"without {name}", tuple(r for r in everything if r != row)) for name, row in
             zip(document_ids, gone, strict=True)]  # fmt: skip
    return [Job(name, rows, seed) for name, rows in sets for seed in seeds]


def leave_one_out(
    subject: Subject,
    document_ids: Sequence[str],
    behaviour: Behaviour,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    cache: Path,
    workers: int | None = None,
    progress: Progress = silent,
) -> LeftOut:
    """Train on all documents and without each of these, with every seed, each at most once; then measure.

    Args:
        subject: what is trained; its own model is not touched.
        document_ids: chosen ones, or those of `sample_documents`.
        behaviour: what is measured, query by query.
        seeds: of the recipe; several tell the effect of a document from that of a seed.
        cache: folder of finished trainings.
        workers: processes (`run_jobs`).
        progress: told of finished trainings.

    Raises:
        InputError: an id that the usable documents do not have or that is listed twice, or bad seeds.
        RootwardError: a training failed; those that were finished stay.
    """
    jobs, evaluation = left_out_jobs(subject, document_ids, seeds), Evaluation(behaviour, None, 0)
    results = run_jobs(subject, jobs, evaluation, workers=workers, cache=cache, progress=progress)
    return LeftOut(
        behaviour=behaviour.name,
        unit=behaviour.unit,
        queries=[query.name for query in behaviour.queries],
        document_ids=list(document_ids),
        total=len(subject.encoded),
        seeds=list(seeds),
        full=[results["full", seed].measured.values for seed in seeds],
        without=[[results[f"without {name}", seed].measured.values for seed in seeds] for name in document_ids],
        seconds=round(sum(result.seconds for result in results.values()), 3),
    )


def loo(
    scores: Scores | Mapping[str, Scores],
    left_out: LeftOut,
    *,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> LOO:
    """How well each method's ``-scores / N`` predicts the measured changes, averaged over seeds.

    Raises `InputError` for fewer than three documents, or a document or query without a score.
    """
    named = by_name(scores)
    documents = len(left_out.document_ids)
    if documents < 3:
        raise InputError(f"expected at least 3 documents to correlate, got {documents}; leave more out")
    if resamples < 1 or permutations < 1:
        raise InputError(f"expected at least 1 resample and 1 permutation, got {resamples} and {permutations}")
    predicted = {
        name: -joined(table, left_out.queries, left_out.document_ids) / left_out.total for name, table in named.items()
    }
    changes = left_out.changes
    measured = changes.mean(1).T
    return LOO(
        behaviour=left_out.behaviour,
        methods=[_judged(name, table, measured, resamples, permutations, seed) for name, table in predicted.items()],
        ceiling=ceiling_of(changes, resamples=resamples, seed=seed),
        documents=documents,
        seeds=len(left_out.seeds),
        truth=left_out.key,
    )


def _judged(
    method: str, predicted: Floats, measured: Floats, resamples: int, permutations: int, seed: int
) -> Predicted:
    """One method's predicted changes ``[q, n]`` against the measured ones."""
    documents = predicted.shape[1]
    truth, ranks = Rows(measured, "spearman"), Rows(predicted, "spearman")
    values, raw = Rows(measured, "pearson"), Rows(predicted, "pearson")
    per_query, linear = correlate(truth, ranks), correlate(values, raw)
    spearman = percentiles(float(per_query.mean()), resampled(truth, ranks, resamples, seed), documents)
    pearson = percentiles(float(linear.mean()), resampled(values, raw, resamples, seed), documents)
    generator = np.random.default_rng(seed)
    null = [
        float(correlate(truth, Rows(predicted[:, generator.permutation(documents)], "spearman")).mean())
        for _ in range(permutations)
    ]
    return Predicted(
        method=method,
        spearman=spearman,
        pearson=pearson,
        slope=_slope(predicted, measured, resamples, seed),
        null=percentiles(float(np.mean(null)), null, permutations),
        per_query=per_query.tolist(),
    )


def _slope(predicted: Floats, measured: Floats, resamples: int, seed: int) -> Interval | None:
    """``sum p m / sum p p`` over all queries and documents; None without a prediction that is not 0."""
    products, squares = predicted * measured, predicted * predicted
    if squares.sum() == 0:
        return None
    drawn: list[float] = []
    for weights, share in draws(predicted.shape[1], predicted.shape[0], resamples, seed):
        size = share @ squares @ weights
        drawn.append(float(share @ products @ weights / size) if size > 0 else 0.0)
    return percentiles(float(products.sum() / squares.sum()), drawn, predicted.shape[1])
