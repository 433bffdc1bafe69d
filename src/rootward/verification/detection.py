"""Detection of documents that are known: planted ones, or those with a wrong label.

How much higher do they rank than the others? For planted documents rank by the scores of the behaviour that they were
planted for; for wrong labels by self-influence (scores of each document for itself), beside the loss and other
baselines, which are scores like any other. Knowing the truth makes this cheap and exact; it does not show that the
documents are a cause, for which there are removal curves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from rootward.core.errors import InputError
from rootward.core.records import SCHEMA_VERSION, Interval, Model
from rootward.core.scores import Scores
from rootward.verification.resampling import percentiles
from rootward.verification.stats import auroc, average_precision, precision_at

PERMUTATIONS = 200


class Detection(Model):
    """How well one ranking finds the known documents.

    ``auroc`` has a bootstrap interval over documents; ``null`` is the mean and the central 95 % of the AUROC for
    shuffled truth. ``precision[k]`` is the share of known documents among the k highest; ``chance`` their share of all,
    which is what a random ranking gets for it and for the average precision.
    """

    schema_version: int = SCHEMA_VERSION
    method: str
    documents: int
    known: int
    chance: float
    auroc: Interval
    null: Interval
    average_precision: float
    precision: dict[int, float]


def detect(
    scores: Scores,
    known_ids: Collection[str],
    *,
    counts: Sequence[int] | None = None,
    resamples: int = 1000,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Detection:
    """How far up the known documents are in a ranking.

    Args:
        scores: documents are ranked by their mean over queries towards the goal, the highest first.
        known_ids: ids of the documents to be found; every copy of one counts as known.
        counts: of `precision`; by default the number of known documents.
        resamples: of the bootstrap.
        permutations: shuffles of the null control.
        seed: of both.

    Raises:
        InputError: ids that have no score, no or only known documents, counts beyond the number of documents.
    """
    if isinstance(known_ids, str):
        raise InputError("known_ids: expected a collection of ids, got a text")
    known, ids = set(known_ids), set(scores.document_ids)
    missing = sorted(known - ids)
    if missing:
        raise InputError(
            f"{scores.method}: no score for {len(missing)} of {len(known)} known ids, first {missing[0]!r}"
        )
    truth = np.array([name in known for name in scores.document_ids])
    values = scores.toward.astype(np.float64)
    found = auroc(values, truth, resamples=resamples, seed=seed)
    generator = np.random.default_rng(seed)
    null = [auroc(values, generator.permutation(truth), resamples=1).value for _ in range(permutations)]
    wanted = [int(truth.sum())] if counts is None else list(counts)
    return Detection(
        method=scores.method,
        documents=len(truth),
        known=int(truth.sum()),
        chance=float(truth.mean()),
        auroc=found,
        null=percentiles(float(np.mean(null)), null, permutations),
        average_precision=average_precision(values, truth),
        precision={count: precision_at(values, truth, count) for count in wanted},
    )
