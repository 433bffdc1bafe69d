"""What a test by retraining will cost, from a few timed training steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rootward.core.records import Model
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.training import train
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job, Keys, work_of
from rootward.verification.pool import packed
from rootward.verification.removal import prepare
from rootward.verification.retrain import START_SECONDS, by_command, default_workers, start_hash, worth_processes

LEAST_SECONDS = 0.2
"""Steps are timed for at least as long: a few steps of a small model are over before the clock can tell."""


class Estimate(Model):
    """Models to measure in all and still to do, processes, and expected seconds (None for an owner's command)."""

    jobs: int
    pending: int
    workers: int
    seconds_per_job: float | None
    seconds: float | None


class Plan(Estimate):
    """The `Estimate` of a removal test, with the number of its arms."""

    arms: int


def plan(
    subject: Any,
    scores: Any,
    intervention: Any,
    probes: Any,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    steps: int = 4,
    **options: Any,
) -> Plan:
    """What `verify` with the same arguments would do, without doing it: `estimate` of its jobs.

    Raises what `verify` would raise before its first training.
    """
    test = prepare(subject, scores, intervention, probes, **options)
    found = estimate(subject, test.jobs, test.evaluation, cache=cache, workers=workers, steps=steps)
    return Plan(arms=len(test.arms), **found.model_dump())


def estimate(
    subject: Subject,
    jobs: Sequence[Job],
    evaluation: Evaluation,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    steps: int = 4,
) -> Estimate:
    """What `run_jobs` with the same arguments would do, without doing it.

    Loads the start model, times ``steps`` training steps or more (the first is not counted) and one evaluation. Jobs
    that are finished in ``cache`` cost nothing.
    """
    recipe = None if by_command(subject) else subject.recipe
    count = 1 if recipe is None else max(1, default_workers(subject, recipe) if workers is None else workers)
    base_hash = start_hash(subject, recipe)
    make = Keys(subject, evaluation, base_hash, recipe)
    keys = {make.of(job): job for job in jobs}
    todo = [job for key, job in keys.items() if cache is None or not (Path(cache) / "jobs" / f"{key}.json").exists()]
    if recipe is None or not todo:
        seconds = 0.0 if not todo else None
        return Estimate(jobs=len(keys), pending=len(todo), workers=count, seconds_per_job=None, seconds=seconds)
    step, fixed = _timed(subject, evaluation, recipe, steps)
    usable = set(subject.encoded.rows)
    costs = [fixed + step * recipe.steps(len(usable.intersection(job.rows))) * job.train for job in todo]
    total, count = sum(costs), min(count, len(todo))
    here = workers == 0 or packed(work_of(subject, evaluation, base_hash)) is None
    if subject.start_function is not None and workers is None:
        here = here or not worth_processes(total, count)
    count = 1 if here else count
    return Estimate(
        jobs=len(keys),
        pending=len(todo),
        workers=count,
        seconds_per_job=total / len(costs),
        seconds=total / count + (0.0 if here else START_SECONDS),
    )


def _timed(subject: Subject, evaluation: Evaluation, recipe: Recipe, steps: int) -> tuple[float, float]:
    """Seconds of one training step, and of loading and evaluating."""
    times = list[float]()
    began = time.perf_counter()
    model = subject.start_model(recipe.seed)
    loading = time.perf_counter() - began

    def enough() -> bool:
        times.append(time.perf_counter())
        return len(times) > steps and times[-1] - times[1] > LEAST_SECONDS

    train(model, subject.encoded, subject.objective, recipe, should_stop=enough)
    step = (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else time.perf_counter() - times[0]
    began = time.perf_counter()
    evaluation.measure(model, subject.objective, threads=recipe.threads)
    return step, loading + time.perf_counter() - began
