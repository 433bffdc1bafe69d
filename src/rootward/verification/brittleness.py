"""Brittleness: how few documents have to go before an answer flips?

For each query its own top documents (those that push the measurement to the side of the threshold where it is) are
dropped, more and more of them, until the measurement, averaged over seeds, is on the other side. A contrast flips at 0:
from then on the other answer is the likelier one. The largest class of a classifier flips where the margin does: give
`Behaviour.scalar` with the logit of the class minus the highest other one.

The smallest number is found by bisection over a grid of counts, which takes about log2(grid) trainings per query
instead of one for each count. Bisection takes for granted that an answer that has flipped stays flipped as more go;
what is always true of the number reported is that it flips the answer and that the next smaller one of the grid does
not. As many random documents, dropped likewise, are the control. Baselines (BM25, representation similarity, length)
are methods like any other here; all methods take their rounds together. After the brittleness of predictions in Ilyas
et al. 2022, Datamodels (arXiv 2202.00622), where the counts come from a datamodel and are checked by retraining.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from rootward.verification.subsets import by_name, check_seeds, joined, pick

Key = tuple[str, int]
"""A method and the number of a query."""
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


class Flips(Model):
    """All queries of one method. ``flipped`` and ``random_flipped`` are shares of the queries.

    ``median`` is the median count, those that did not flip counting as more than any: None if that is half or more.
    """

    method: str
    flips: list[Flip]
    flipped: float
    random_flipped: float
    median: float | None


class Brittleness(Model):
    """All methods; the random documents of a count are the same for all of them."""

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    unit: str
    threshold: float
    grid: list[int]
    total: int
    seeds: list[int]
    methods: list[Flips]

    def of(self, method: str) -> Flips:
        """One method by name; `InputError` lists those there are."""
        return pick(self.methods, method)


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
    scores: Scores | Mapping[str, Scores],
    behaviour: Behaviour,
    *,
    grid: Sequence[int | str] = GRID,
    threshold: float = 0.0,
    seeds: Sequence[int] = (0, 1, 2),
    cache: Path,
    workers: int | None = None,
    progress: Progress = silent,
) -> Brittleness:
    """Each method's smallest number of top documents, of those in ``grid``, whose removal flips each query's answer.

    Args:
        subject: what is trained; its own model is not touched.
        scores: methods and baselines by name; each of the same queries, or one ranking for all.
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
    usable, named = subject.encoded.rows, by_name(scores)
    counts = _counts(grid, len(usable))
    names = [query.name for query in behaviour.queries]
    tables: dict[str, NDArray[np.float64]] = {}
    for method, table in named.items():
        tables[method] = np.zeros((len(names), len(subject.documents)))
        tables[method][:, list(usable)] = joined(table, names, subject.encoded.ids)
    work = _Retraining(subject, Evaluation(behaviour, None, 0), tuple(seeds), Path(cache), workers, progress)
    before = work.without({"full": work.alike(())})["full"]
    above = before > threshold
    signed = {
        (method, q): table[q] if above[q] else -table[q] for method, table in tables.items() for q in range(len(names))
    }

    def flips(q: int, value: float) -> bool:
        return bool((value > threshold) != above[q])

    found, after = _search(work, signed, counts, flips)
    sizes = {key: counts[min(place, len(counts) - 1)] for key, place in found.items()}
    drawn = {
        f"random {size}": {seed: random_rows(usable, size, seed) for seed in seeds}
        for size in sorted(set(sizes.values()))
    }
    control = work.without(drawn)

    def flip(key: Key) -> Flip:
        beside = float(control[f"random {sizes[key]}"][key[1]])
        return Flip(
            query=names[key[1]],
            before=float(before[key[1]]),
            documents=counts[found[key]] if found[key] < len(counts) else None,
            after=after[key],
            random_after=beside,
            random_flips=flips(key[1], beside),
        )

    return Brittleness(
        behaviour=behaviour.name,
        unit=behaviour.unit,
        threshold=threshold,
        grid=counts,
        total=len(usable),
        seeds=list(seeds),
        methods=[_summed(method, [flip((method, q)) for q in range(len(names))]) for method in named],
    )


def _summed(method: str, flips: list[Flip]) -> Flips:
    median = float(np.median([np.inf if flip.documents is None else flip.documents for flip in flips]))
    return Flips(
        method=method,
        flips=flips,
        flipped=float(np.mean([flip.documents is not None for flip in flips])),
        random_flipped=float(np.mean([flip.random_flips for flip in flips])),
        median=median if np.isfinite(median) else None,
    )


def _search(
    work: _Retraining,
    signed: Mapping[Key, NDArray[np.float64]],
    counts: list[int],
    flips: Callable[[int, float], bool],
) -> tuple[dict[Key, int], dict[Key, float]]:
    """By method and query, the place in ``counts`` of the smallest that flips it (their number: none), and the value.

    All take their next step together, so that the trainings of a round can run side by side.
    """
    usable, last = work.subject.encoded.rows, len(counts) - 1
    low, high = dict.fromkeys(signed, 0), dict.fromkeys(signed, last + 1)  # the place sought lies in low..high
    after: dict[Key, float] = {}
    asked = dict.fromkeys(signed, last)
    while asked:
        gone = {
            f"{method}, query {q} without {counts[place]}": work.alike(
                top_rows(signed[method, q], usable, counts[place])
            )
            for (method, q), place in asked.items()
        }
        measured = work.without(gone)
        for key, place in asked.items():
            method, q = key
            value = float(measured[f"{method}, query {q} without {counts[place]}"][q])
            if flips(q, value):
                high[key], after[key] = place, value
            else:
                low[key] = place + 1
                if place == last:
                    after[key] = value
        asked = {key: (low[key] + high[key]) // 2 for key in signed if low[key] < high[key]}
    return high, after


def _counts(grid: Sequence[int | str], total: int) -> list[int]:
    counts = sorted({parse_count(count, total) for count in grid} - {0})
    if not counts or not 0 < counts[0] <= counts[-1] < total:
        raise InputError(f"grid: expected numbers from 1 to {total - 1} of {total} documents, got {list(grid)}")
    return counts
