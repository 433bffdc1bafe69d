"""Removal and retention curves: the behaviour after taking out (or keeping only) more and more documents.

A method is as good as the documents at the top of its ranking are causes: without them the behaviour should go away
faster than without as many random ones, and without those at the bottom it should grow. Baselines (BM25, representation
similarity, length, random order) are methods like any other here. Documents are ranked by their mean score over the
queries that were traced, towards the behaviour's goal; measure it on other queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rootward.core.errors import InputError
from rootward.core.progress import Progress, silent
from rootward.core.records import SCHEMA_VERSION, Interval, Model
from rootward.core.scores import Scores, parse_count
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification.arms import random_rows, top_rows
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job
from rootward.verification.retrain import Results, run_jobs
from rootward.verification.stats import interval, paired_interval
from rootward.verification.subsets import by_name, check_seeds

COUNTS = ("5%", "10%", "20%", "40%")
RANDOM = "random control"
End = Literal["top", "bottom", "random"]
Mode = Literal["drop", "keep"]


class Point(Model):
    """The behaviour's mean over queries, by seed, with ``documents`` dropped (or kept); its change, paired by seed."""

    documents: int
    values: list[float]
    effect: Interval


class Curve(Model):
    """One end of one ranking.

    ``area`` is the mean change over the share of documents removed, from 0 to the largest share: the area under the
    curve (trapezoids through the points and the full set) over its width. ``beyond_random`` is that area minus the
    random control's; both are paired by seed. Negative: removal lowers the measurement.
    """

    method: str
    end: End
    points: list[Point]
    area: Interval
    beyond_random: Interval | None


class Curves(Model):
    """All curves of one behaviour; the random control of equal size is among them.

    Intervals are t intervals over ``seeds``; with one seed there is none (``n`` is 1). ``total`` counts the usable
    documents, ``full`` is the mean measurement after training on all of them, by seed, ``seconds`` what all trainings
    took.
    """

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    unit: str
    goal: Literal["raise", "lower"]
    mode: Mode
    total: int
    seeds: list[int]
    full: list[float]
    curves: list[Curve]
    seconds: float = 0.0

    def of(self, method: str, end: End = "top") -> Curve:
        """One curve by name; `InputError` lists those there are."""
        for curve in self.curves:
            if (curve.method, curve.end) == (method, end):
                return curve
        names = ", ".join(f"{curve.method} ({curve.end})" for curve in self.curves)
        raise InputError(f"expected one of {names}, got {method} ({end})")


def curve_jobs(
    subject: Subject,
    scores: Mapping[str, Scores],
    *,
    goal: Literal["raise", "lower"],
    counts: Sequence[int | str] = COUNTS,
    mode: Mode = "drop",
    bottom: bool = True,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[Job]:
    """The trainings of `removal_curves`, for `cost.estimate`. Raises what it would raise before the first training."""
    check_seeds(subject, seeds)
    usable = subject.encoded.rows
    sizes = _sizes(counts, len(usable))
    if not scores or RANDOM in scores:
        raise InputError(f"scores: expected at least one method, none named {RANDOM!r}")
    jobs = [Job("full", usable, seed) for seed in seeds]
    for size in sizes:
        for seed in seeds:
            drawn = random_rows(usable, size, seed)
            jobs.append(Job(_name(RANDOM, "random", size), _left(usable, drawn, mode), seed))
    for method, table in scores.items():
        values = _by_row(table, subject, goal)
        for end in _ends(bottom):
            signed = values if end == "top" else -values
            for size in sizes:
                rows = _left(usable, top_rows(signed, usable, size), mode)
                jobs += [Job(_name(method, end, size), rows, seed) for seed in seeds]
    return jobs


def removal_curves(
    subject: Subject,
    scores: Mapping[str, Scores] | Scores,
    behaviour: Behaviour,
    *,
    counts: Sequence[int | str] = COUNTS,
    mode: Mode = "drop",
    bottom: bool = True,
    seeds: Sequence[int] = (0, 1, 2),
    cache: Path,
    workers: int | None = None,
    progress: Progress = silent,
) -> Curves:
    """Train without (or on only) the top documents of each method, the bottom ones, and as many random ones.

    Args:
        subject: what is trained; its own model is not touched.
        scores: methods and baselines by name.
        behaviour: what is measured, on queries that were not used for the scores.
        counts: numbers of documents, or shares of the usable ones such as "5%".
        mode: "drop" them, or "keep" them alone.
        bottom: also the other end of each ranking.
        seeds: of the recipe; the random control is drawn anew for each.
        cache: folder of finished trainings.
        workers: processes (`run_jobs`).
        progress: told of finished trainings.

    Raises:
        InputError: counts that leave nothing, a document without a score, bad seeds.
        RootwardError: a training failed; those that were finished stay.
    """
    named = by_name(scores)
    jobs = curve_jobs(subject, named, goal=behaviour.goal, counts=counts, mode=mode, bottom=bottom, seeds=seeds)
    results = run_jobs(subject, jobs, Evaluation(behaviour, None, 0), workers=workers, cache=cache, progress=progress)
    total = len(subject.encoded)
    sizes, full = _sizes(counts, total), [results["full", seed].measured.mean for seed in seeds]
    gone = [size / total if mode == "drop" else 1 - size / total for size in sizes]

    def curve(method: str, end: End) -> tuple[list[Point], NDArray[np.float64]]:
        values = [_values(results, _name(method, end, size), seeds) for size in sizes]
        points = [
            Point(documents=size, values=found, effect=paired_interval(full, found))
            for size, found in zip(sizes, values, strict=True)
        ]
        return points, _areas(gone, np.array(values) - np.array(full))

    points, control = curve(RANDOM, "random")
    curves = [Curve(method=RANDOM, end="random", points=points, area=interval(control), beyond_random=None)]
    for method in named:
        for end in _ends(bottom):
            points, areas = curve(method, end)
            beyond = interval(areas - control)
            curves.append(Curve(method=method, end=end, points=points, area=interval(areas), beyond_random=beyond))
    return Curves(
        seconds=round(sum(result.seconds for result in results.values()), 3),
        behaviour=behaviour.name,
        unit=behaviour.unit,
        goal=behaviour.goal,
        mode=mode,
        total=total,
        seeds=list(seeds),
        full=full,
        curves=curves,
    )


def _areas(gone: Sequence[float], effects: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean effect over the share removed, ``[seed]``, of effects ``[point, seed]``; at share 0 it is 0."""
    order = np.argsort(gone)
    x = np.concatenate([[0.0], np.asarray(gone)[order]])
    y = np.concatenate([np.zeros((1, effects.shape[1])), effects[order]])
    return np.trapezoid(y, x, axis=0) / x[-1]


def _sizes(counts: Sequence[int | str], total: int) -> list[int]:
    sizes = sorted({parse_count(count, total) for count in counts})
    if not sizes or not 0 < sizes[0] <= sizes[-1] < total:
        raise InputError(f"counts: expected numbers from 1 to {total - 1} of {total} documents, got {list(counts)}")
    return sizes


def _by_row(scores: Scores, subject: Subject, goal: str) -> NDArray[np.float64]:
    """Mean score by row of the documents, positive = makes more of the behaviour; `InputError` if one has none."""
    values = np.zeros(len(subject.documents))
    mean = scores.aligned(subject.encoded.ids).astype(np.float64).mean(0)
    values[list(subject.encoded.rows)] = -mean if goal == "lower" else mean
    return values


def _left(usable: Sequence[int], chosen: Sequence[int], mode: Mode) -> tuple[int, ...]:
    if mode == "keep":
        return tuple(chosen)
    out = set(chosen)
    return tuple(row for row in usable if row not in out)


def _ends(bottom: bool) -> tuple[End, ...]:
    return ("top", "bottom") if bottom else ("top",)


def _name(method: str, end: End, size: int) -> str:
    return f"{method}, {end} {size}"


def _values(results: Results, name: str, seeds: Sequence[int]) -> list[float]:
    return [results[name, seed].measured.mean for seed in seeds]
