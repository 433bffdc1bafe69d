"""Brittleness: how few documents have to go before an answer flips?

For each query its own top documents (those that push the measurement to the side of the threshold where it is) are
dropped, more and more of them, until the measurement, averaged over seeds, is on the other side. A contrast flips at 0:
from then on the other answer is the likelier one. The largest class of a classifier flips where the margin does: give
`Behaviour.scalar` with the logit of the class minus the highest other one.

The smallest number is found by bisection over a grid of counts, which takes about log2(grid) trainings per query
instead of one for each count. Bisection takes for granted that an answer that has flipped stays flipped as more go;
what is always true of the number reported is that it flips the answer and that the next smaller one of the grid does
not. As many random documents, dropped likewise, are the control. After the brittleness of predictions in Ilyas et al.
2022, Datamodels (arXiv 2202.00622), where the counts come from a datamodel and are checked by retraining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rootward.core.errors import InputError
from rootward.core.progress import Progress, silent
from rootward.core.records import SCHEMA_VERSION, Model
from rootward.core.scores import Scores, parse_count
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification.arms import random_rows, top_rows
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job
from rootward.verification.retrain import run_jobs
from rootward.verification.subsets import check_seeds, joined

GRID = ("1%", "2%", "5%", "10%", "20%", "40%")


class Flip(Model):
    """One query: its measurement on all documents, and what it took to flip it.

    ``documents`` is the smallest count of the grid that flips it, None if none does; ``after`` the measurement then (or
    without the largest count). ``random_after`` is the measurement without as many random documents, another draw for
    each seed, and ``random_flips`` whether that flips it too.
    """

    query: str
    before: float
    documents: int | None
    after: float
    random_after: float
    random_flips: bool


class Brittleness(Model):
    """All queries of one method. ``flipped`` and ``random_flipped`` are shares of the queries.

    ``median`` is the median count, those that did not flip counting as more than any: None if that is half or more.
    """

    schema_version: int = SCHEMA_VERSION
    method: str
    behaviour: str
    unit: str
    threshold: float
    grid: list[int]
    total: int
    seeds: list[int]
    flips: list[Flip]
    flipped: float
    random_flipped: float
    median: float | None


@dataclass(frozen=True)
class _Retraining:
    """What every training of this search shares."""

    subject: Subject
    evaluation: Evaluation
    seeds: tuple[int, ...]
    cache: Path
    workers: int | None
    progress: Progress

    def without(self, gone: dict[str, dict[int, tuple[int, ...]]]) -> dict[str, NDArray[np.float64]]:
        """Measurements ``[q]``, averaged over seeds, without the rows gone by name and seed."""
        usable = self.subject.encoded.rows
        jobs = [
            Job(name, tuple(row for row in usable if row not in set(out)), seed)
            for name, by_seed in gone.items()
            for seed, out in by_seed.items()
        ]
        results = run_jobs(
            self.subject, jobs, self.evaluation, workers=self.workers, cache=self.cache, progress=self.progress
        )
        return {
            name: np.array([results[name, seed].measured.values for seed in self.seeds], dtype=np.float64).mean(0)
            for name in gone
        }

    def alike(self, rows: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
        """The same rows under every seed."""
        return dict.fromkeys(self.seeds, rows)


def brittleness(
    subject: Subject,
    scores: Scores,
    behaviour: Behaviour,
    *,
    grid: Sequence[int | str] = GRID,
    threshold: float = 0.0,
    seeds: Sequence[int] = (0, 1, 2),
    cache: Path,
    workers: int | None = None,
    progress: Progress = silent,
) -> Brittleness:
    """The smallest number of top documents, of those in ``grid``, whose removal flips each query's answer.

    Args:
        subject: what is trained; its own model is not touched.
        scores: of the same queries, or one ranking for all.
        behaviour: what is measured.
        grid: numbers of documents, or shares of the usable ones.
        threshold: the value that a measurement has to cross.
        seeds: of the recipe; the measurement is averaged over them.
        cache: folder of finished trainings.
        workers: processes (`run_jobs`).
        progress: told of finished trainings, for each round of the search anew.

    Raises:
        InputError: counts that leave nothing, a query or document without a score, bad seeds.
        RootwardError: a training failed; those that were finished stay.
    """
    check_seeds(subject, seeds)
    usable = subject.encoded.rows
    counts = _counts(grid, len(usable))
    names = [query.name for query in behaviour.queries]
    values = np.zeros((len(names), len(subject.documents)))
    values[:, list(usable)] = joined(scores, names, subject.encoded.ids)
    work = _Retraining(subject, Evaluation(behaviour, None, 0), tuple(seeds), Path(cache), workers, progress)
    before = work.without({"full": work.alike(())})["full"]
    above = before > threshold
    signed = np.where(above[:, None], values, -values)

    def flips(q: int, value: float) -> bool:
        return bool((value > threshold) != above[q])

    found, after = _search(work, signed, counts, flips)
    sizes = [counts[min(place, len(counts) - 1)] for place in found]
    drawn = {f"random {size}": {seed: random_rows(usable, size, seed) for seed in seeds} for size in set(sizes)}
    control = work.without(drawn)
    result: list[Flip] = []
    for q, name in enumerate(names):
        beside = float(control[f"random {sizes[q]}"][q])
        result.append(
            Flip(
                query=name,
                before=float(before[q]),
                documents=counts[found[q]] if found[q] < len(counts) else None,
                after=after[q],
                random_after=beside,
                random_flips=flips(q, beside),
            )
        )
    median = float(np.median([np.inf if flip.documents is None else flip.documents for flip in result]))
    return Brittleness(
        method=scores.method,
        behaviour=behaviour.name,
        unit=behaviour.unit,
        threshold=threshold,
        grid=counts,
        total=len(usable),
        seeds=list(seeds),
        flips=result,
        flipped=float(np.mean([flip.documents is not None for flip in result])),
        random_flipped=float(np.mean([flip.random_flips for flip in result])),
        median=median if np.isfinite(median) else None,
    )


def _search(
    work: _Retraining, signed: NDArray[np.float64], counts: list[int], flips: Callable[[int, float], bool]
) -> tuple[list[int], list[float]]:
    """For each query, the place in ``counts`` of the smallest that flips it (their number: none), and the value then.

    All queries take their next step together, so that the trainings of a round can run side by side.
    """
    usable, last = work.subject.encoded.rows, len(counts) - 1
    low, high = [0] * len(signed), [last + 1] * len(signed)  # the place sought lies in low..high
    after = [0.0] * len(signed)
    asked = {q: last for q in range(len(signed))}
    while asked:
        gone = {
            f"query {q} without {counts[place]}": work.alike(top_rows(signed[q], usable, counts[place]))
            for q, place in asked.items()
        }
        measured = work.without(gone)
        for q, place in asked.items():
            value = float(measured[f"query {q} without {counts[place]}"][q])
            if flips(q, value):
                high[q], after[q] = place, value
            else:
                low[q] = place + 1
                if place == last:
                    after[q] = value
        asked = {q: (low[q] + high[q]) // 2 for q in range(len(signed)) if low[q] < high[q]}
    return high, after


def _counts(grid: Sequence[int | str], total: int) -> list[int]:
    counts = sorted({parse_count(count, total) for count in grid} - {0})
    if not counts or not 0 < counts[0] <= counts[-1] < total:
        raise InputError(f"grid: expected numbers from 1 to {total - 1} of {total} documents, got {list(grid)}")
    return counts
