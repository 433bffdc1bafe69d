"""What a removal test will cost, from a few timed training steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rootward.core.records import Model
from rootward.subject.plan import Recipe
from rootward.subject.training import train
from rootward.verification.jobs import Keys
from rootward.verification.removal import Test, prepare
from rootward.verification.retrain import by_command, default_workers, start_hash

START_SECONDS = 5.0
"""Starting a worker process: mostly the import of torch and transformers."""


class Plan(Model):
    """Arms, models to measure in all and still to do, processes, and expected seconds (None for an owner's command)."""

    arms: int
    jobs: int
    pending: int
    workers: int
    seconds_per_job: float | None
    seconds: float | None


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
    """What `verify` with the same arguments would do, without doing it.

    Loads the start model, times ``steps`` training steps (the first is not counted) and one evaluation. Jobs that are
    finished in ``cache`` cost nothing. Raises what `verify` would raise before its first training.
    """
    test = prepare(subject, scores, intervention, probes, **options)
    recipe = None if by_command(subject) else subject.recipe
    count = 1 if recipe is None else max(1, default_workers(subject, recipe) if workers is None else workers)
    base_hash = start_hash(subject, recipe)
    make = Keys(subject, test.evaluation, base_hash, recipe)
    keys = {make.of(job): job for job in test.jobs}
    todo = [job for key, job in keys.items() if cache is None or not (Path(cache) / "jobs" / f"{key}.json").exists()]
    if recipe is None or not todo:
        seconds = 0.0 if not todo else None
        return Plan(
            arms=len(test.arms), jobs=len(keys), pending=len(todo), workers=count, seconds_per_job=None, seconds=seconds
        )
    step, fixed = _timed(test, recipe, steps)
    usable = set(subject.encoded.rows)
    costs = [fixed + step * recipe.steps(len(usable.intersection(job.rows))) * job.train for job in todo]
    in_memory = subject.base is None or workers == 0
    count = 1 if in_memory else min(count, len(todo))
    seconds = sum(costs) / count + (0.0 if in_memory else START_SECONDS)
    each = sum(costs) / len(costs)
    return Plan(
        arms=len(test.arms), jobs=len(keys), pending=len(todo), workers=count, seconds_per_job=each, seconds=seconds
    )


def _timed(test: Test, recipe: Recipe, steps: int) -> tuple[float, float]:
    """Seconds of one training step, and of loading and evaluating."""
    subject, times = test.subject, list[float]()
    began = time.perf_counter()
    model = subject.start_model(recipe.seed)
    loading = time.perf_counter() - began

    def enough() -> bool:
        times.append(time.perf_counter())
        return len(times) > steps

    train(model, subject.encoded, subject.objective, recipe, should_stop=enough)
    step = (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else time.perf_counter() - times[0]
    began = time.perf_counter()
    test.evaluation.measure(model, subject.objective, threads=recipe.threads)
    return step, loading + time.perf_counter() - began
