"""Retraining on random subsets of the documents: the ground truth of the linear datamodeling score, and its price.

A benchmark draws its subsets and trains them once; every method and every metric on subsets then shares the result::

    subsets = draw_subsets(subject, count=128)
    estimate_subsets(subject, subsets, behaviour, cache=cache).seconds         # before anything is trained
    truth = retrain_subsets(subject, subsets, behaviour, seeds=(0, 1), cache=cache)
    lds(scores, truth)

Finished trainings are kept by key in ``cache`` (`run_jobs`), so a second call trains nothing, and asking for more
subsets or seeds trains only those that are new: the first 64 of 128 subsets are those of a draw of 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from rootward.core.errors import InputError, NumericalError
from rootward.core.hashing import digest_json
from rootward.core.progress import Progress, silent
from rootward.core.records import SCHEMA_VERSION, Model
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.plan import order
from rootward.subject.subject import Subject
from rootward.verification.cost import Estimate, estimate
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job
from rootward.verification.retrain import by_command, run_jobs
from rootward.verification.words import command_notes

COUNT = 64
SHARE = 0.5


@dataclass(frozen=True)
class Subsets:
    """Random subsets of a subject's usable documents, all of one size.

    ``masks[s, n]`` says whether subset s holds ``document_ids[n]``, which stands in row ``rows[n]`` of the documents.
    """

    document_ids: tuple[str, ...]
    rows: tuple[int, ...]
    masks: NDArray[np.bool_]
    share: float
    draw: int

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """One job for each subset and training seed."""
        rows = np.asarray(self.rows)
        kept = [tuple(int(row) for row in rows[mask]) for mask in self.masks]
        return [Job(f"subset {s}", stay, seed) for s, stay in enumerate(kept) for seed in seeds]


class Retrained(Model):
    """What was measured after training on each subset.

    ``values[s][k][q]`` is the measurement of ``queries[q]`` after training on subset s with ``seeds[k]``;
    ``kept[s]`` has a 1 for each of ``document_ids`` that the subset holds and a 0 for each other. Duplicates have an
    entry each. `measured` and `masks` give both as arrays.
    """

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    unit: str
    queries: list[str]
    document_ids: list[str]
    seeds: list[int]
    share: float
    kept: list[str]
    values: list[list[list[float]]]
    seconds: float = 0.0

    @model_validator(mode="after")
    def _whole(self) -> Retrained:
        n = len(self.document_ids)
        if any(len(bits) != n or set(bits) - {"0", "1"} for bits in self.kept):
            raise InputError(f"Retrained: expected a 0 or 1 for each of {n} documents in every subset")
        if len({bits.count("1") for bits in self.kept}) > 1:
            raise InputError("Retrained: expected subsets of one size: a sum of scores depends on the size otherwise")
        expected = (len(self.kept), len(self.seeds), len(self.queries))
        measured = self.measured
        if 0 in expected or measured.shape != expected:
            raise InputError(f"Retrained: expected values [subset, seed, query] = {expected}, got {measured.shape}")
        if not np.isfinite(measured).all():
            raise NumericalError("Retrained: a measured value is not finite")
        return self

    @property
    def measured(self) -> NDArray[np.float64]:
        """``[subset, seed, query]``."""
        try:
            return np.array(self.values, dtype=np.float64)
        except ValueError as error:
            raise InputError(f"Retrained: values of uneven lengths: {error}") from error

    @property
    def masks(self) -> NDArray[np.bool_]:
        """``[subset, n]``."""
        return np.array([np.frombuffer(bits.encode(), dtype=np.uint8) == ord("1") for bits in self.kept])

    @property
    def key(self) -> str:
        """Hash of all but the time it took: results that share it were compared with the same truth."""
        return digest_json(self.model_dump(mode="json", exclude={"seconds"}))[:32]

    def select(self, *, subsets: Sequence[int] | None = None, queries: Sequence[int] | None = None) -> Retrained:
        """Some of the subsets and queries, by number, in the order given."""
        chosen = _numbers(subsets, len(self.kept), "subsets")
        asked = _numbers(queries, len(self.queries), "queries")
        return Retrained(
            behaviour=self.behaviour,
            unit=self.unit,
            queries=[self.queries[q] for q in asked],
            document_ids=self.document_ids,
            seeds=self.seeds,
            share=self.share,
            kept=[self.kept[s] for s in chosen],
            values=[[[seed[q] for q in asked] for seed in self.values[s]] for s in chosen],
        )


def _numbers(chosen: Sequence[int] | None, total: int, what: str) -> list[int]:
    if chosen is None:
        return list(range(total))
    numbers = [int(number) for number in chosen]
    if not numbers or len(set(numbers)) != len(numbers) or not all(0 <= number < total for number in numbers):
        raise InputError(f"{what}: expected different numbers from 0 to {total - 1}, got {numbers[:5]}")
    return numbers


def draw_subsets(subject: Subject, count: int = COUNT, *, share: float = SHARE, draw: int = 0) -> Subsets:
    """``count`` subsets with ``share`` of the usable documents each, every set as likely.

    They depend on the documents' ids, on ``draw`` and on the subset's number; not on the order of the documents, nor on
    how many subsets are drawn. Raises `InputError` where so many different subsets do not exist.
    """
    ids = subject.encoded.ids
    size = round(share * len(ids)) if 0 < share < 1 else 0
    if not 0 < size < len(ids):
        raise InputError(
            f"share: expected a number between 0 and 1 that keeps and leaves out at least one of {len(ids)} usable "
            f"documents, got {share}"
        )
    if draw < 0:
        raise InputError(f"draw: expected 0 or more, got {draw}")
    if not 2 <= count <= math.comb(len(ids), size):
        raise InputError(
            f"count: expected 2 to {math.comb(len(ids), size)} subsets of {size} of {len(ids)} documents, got {count}"
        )
    masks = np.zeros((count, len(ids)), dtype=bool)
    for number in range(count):
        # a negative seed, which no recipe can have: what is kept has nothing to do with the order of training
        masks[number, order(-1 - draw, number, ids)[:size]] = True
    return Subsets(ids, subject.encoded.rows, masks, share, draw)


def estimate_subsets(
    subject: Subject,
    subsets: Subsets,
    behaviour: Behaviour,
    *,
    seeds: Sequence[int] = (0,),
    cache: Path | None = None,
    workers: int | None = None,
) -> Estimate:
    """What `retrain_subsets` with the same arguments would cost, from a few timed steps; nothing is kept."""
    jobs = _checked(subject, subsets, seeds)
    return estimate(subject, jobs, Evaluation(behaviour, None, 0), cache=cache, workers=workers)


def retrain_subsets(
    subject: Subject,
    subsets: Subsets,
    behaviour: Behaviour,
    *,
    seeds: Sequence[int] = (0,),
    cache: Path,
    workers: int | None = None,
    progress: Progress = silent,
) -> Retrained:
    """Train on every subset with every seed, each at most once, and measure the behaviour.

    Args:
        subject: what is trained; its own model is not touched.
        subsets: of `draw_subsets`, for this subject.
        behaviour: what is measured, query by query.
        seeds: of the recipe. Two or more tell how much of the differences is the seed's (`noise_ceiling`).
        cache: folder of finished trainings.
        workers: processes (`run_jobs`).
        progress: told of finished trainings.

    Raises:
        InputError: subsets of other documents; no or repeated seeds; several for a command that takes none.
        RootwardError: a training failed; those that were finished stay.
    """
    jobs = _checked(subject, subsets, seeds)
    evaluation = Evaluation(behaviour, None, 0)
    results = run_jobs(subject, jobs, evaluation, workers=workers, cache=cache, progress=progress)
    return Retrained(
        behaviour=behaviour.name,
        unit=behaviour.unit,
        queries=[query.name for query in behaviour.queries],
        document_ids=list(subsets.document_ids),
        seeds=list(seeds),
        share=subsets.share,
        kept=["".join("1" if bit else "0" for bit in mask) for mask in subsets.masks],
        values=[
            [results[f"subset {s}", seed].measured.values for seed in seeds] for s in range(len(subsets.masks))
        ],
        seconds=round(sum(result.seconds for result in results.values()), 3),
    )  # fmt: skip


def _checked(subject: Subject, subsets: Subsets, seeds: Sequence[int]) -> list[Job]:
    if (subsets.document_ids, subsets.rows) != (subject.encoded.ids, subject.encoded.rows):
        raise InputError(f"subsets: they were drawn from other documents than those of {subject.name}; draw them again")
    check_seeds(subject, seeds)
    return subsets.jobs(seeds)


def check_seeds(subject: Subject, seeds: Sequence[int]) -> None:
    """`InputError` without a seed, for one given twice, or for several where the owner's command takes none."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds: expected at least one and none twice, got {list(seeds)}")
    if by_command(subject) and len(seeds) > 1 and command_notes(subject):
        raise InputError(f"seeds: expected one, got {len(seeds)}. {command_notes(subject)[0]}")


def by_name(scores: Scores | Mapping[str, Scores]) -> dict[str, Scores]:
    """Methods by name: one alone under its own. Raises `InputError` where there is none."""
    found = {scores.method: scores} if isinstance(scores, Scores) else dict(scores)
    if not found:
        raise InputError("scores: expected at least one method, got none")
    return found


class Named(Protocol):
    """A result of one method."""

    @property
    def method(self) -> str:
        """Its name."""
        ...


Found = TypeVar("Found", bound=Named)


def pick(results: Sequence[Found], method: str) -> Found:
    """The result of one method; `InputError` lists those there are."""
    for found in results:
        if found.method == method:
            return found
    raise InputError(f"expected one of {', '.join(found.method for found in results)}, got {method}")


def joined(scores: Scores, queries: Sequence[str], document_ids: Sequence[str]) -> NDArray[np.float64]:
    """The scores of these queries and documents, ``[q, n]``: joined by name and by id, never by place.

    Scores of one query with another name (those of a baseline that has one ranking for all, or of the mean over
    queries) stand for every query. Raises `InputError` for a query or document without a score.
    """
    table = scores.aligned(document_ids).astype(np.float64)
    names = tuple(queries)
    if scores.queries == names:
        return table
    if len(scores.queries) == 1 and scores.queries[0] not in names:
        return np.repeat(table, len(names), axis=0)
    place = {name: q for q, name in enumerate(scores.queries)}
    if len(place) < len(scores.queries) or len(set(names)) < len(names):
        raise InputError(f"{scores.method}: queries with the same name, in another order or number than were measured")
    missing = [name for name in names if name not in place]
    if missing:
        raise InputError(f"{scores.method}: no scores for {len(missing)} measured queries, first {missing[0]!r}")
    return table[[place[name] for name in names]]
