"""Exact retraining of many variants of a subject, each at most once.

A finished job is a file ``<cache>/jobs/<key>.json``; the key is a hash of all that decides it (`Keys`). Whoever
calls again, after an end of any kind, gets finished jobs from there and runs the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rootward.core.errors import ArtefactError, InputError
from rootward.core.progress import Progress, silent
from rootward.core.records import read_model
from rootward.subject.loading import load_model, model_hash
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job, JobResult, Keys, Work, work_of
from rootward.verification.owner import perform_owner
from rootward.verification.pool import Task, packed, run_here, run_pool

Results = dict[tuple[str, int], JobResult]
"""Results by the job's name and seed."""
START_SECONDS = 5.0
"""Starting worker processes: mostly their import of torch and transformers."""


def run_jobs(
    subject: Subject,
    jobs: Sequence[Job],
    evaluation: Evaluation,
    *,
    workers: int | None = None,
    cache: Path,
    progress: Progress = silent,
) -> Results:
    """Carry out the jobs that have no result yet and return the results of all.

    A subject with a recipe and a start folder is trained in ``workers`` processes (default: cores // recipe.threads; on
    an accelerator one; 0: in this process). So is one with a start function, but by default only once two jobs, done in
    this process, have shown that the others take long enough to be worth starting processes. What only this process
    knows (a function that is a lambda, nested or of ``__main__``) is trained in this process; a subject with the
    owner's command, by that command, one after another. The results are the same bits in each case.

    Args:
        subject: what to retrain; its own model is not touched.
        jobs: names and seeds must be unique together. Two jobs with the same key run once.
        evaluation: what to measure after each training.
        workers: number of processes.
        cache: folder of the results; may be shared by any number of subjects and calls.
        progress: told of finished jobs.

    Raises:
        RootwardError: a job failed; the message names it. Results that were finished stay.
        KeyboardInterrupt: after Ctrl-C, with no process left behind.
    """
    names = [(job.name, job.seed) for job in jobs]
    if len(set(names)) != len(names):
        raise InputError(f"expected each name and seed once, got {len(names) - len(set(names))} more than once")
    if workers is not None and workers < 0:
        raise InputError(f"workers: expected 0 (in this process) or more, got {workers}")
    recipe = None if by_command(subject) else subject.recipe
    base_hash = start_hash(subject, recipe)
    folder = Path(cache) / "jobs"
    make = Keys(subject, evaluation, base_hash, recipe)
    keys = [make.of(job) for job in jobs]
    paths = {key: folder / f"{key}.json" for key in keys}
    pending: dict[str, Task] = {}
    for job, key in zip(jobs, keys, strict=True):
        if not paths[key].exists():
            pending.setdefault(key, (job, key, paths[key]))
    finished = len(paths) - len(pending)
    progress("retrain", finished, len(paths))

    def done(job: Job) -> None:
        nonlocal finished
        finished += 1
        progress("retrain", finished, len(paths))

    tasks = list(pending.values())
    if tasks and recipe is None:
        for job, key, path in tasks:
            perform_owner(subject, job, key, path, evaluation)
            done(job)
    elif tasks:
        work = work_of(subject, evaluation, base_hash)
        count = default_workers(subject, recipe) if workers is None else workers
        if work.start is not None and workers is None:
            tasks = _until_worth_it(work, tasks, count, done)
        payload = packed(work) if tasks and count > 0 else None
        if payload is None:
            run_here(work, tasks, done)
        else:
            run_pool(payload, tasks, count, done)
    return {name: _read(paths[key], key) for name, key in zip(names, keys, strict=True)}


def worth_processes(seconds: float, workers: int) -> bool:
    """Whether ``seconds`` of jobs in this process would take longer than with ``workers`` processes to be started."""
    return seconds * (1 - 1 / max(1, workers)) > START_SECONDS


def _until_worth_it(work: Work, tasks: list[Task], workers: int, done: Callable[[Job], None]) -> list[Task]:
    """Carry out jobs here until two are timed, or all where processes would not pay; the tasks that are left.

    Only the second is timed: the first pays for imports and the allocator.
    """
    run_here(work, tasks[:1], done)
    began = time.perf_counter()
    run_here(work, tasks[1:2], done)
    left = tasks[2:]
    if worth_processes((time.perf_counter() - began) * len(left), workers):
        return left
    run_here(work, left, done)
    return []


def by_command(subject: Subject) -> bool:
    """Whether the owner's command retrains the subject: it does wherever one is given."""
    return subject.retrain_command is not None


def default_workers(subject: Subject, recipe: Recipe | None) -> int:
    """Processes to train in: one on an accelerator, else as many as fit the cores with the recipe's threads."""
    if subject.device.type != "cpu":
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // (recipe.threads if recipe is not None else 1))


def start_hash(subject: Subject, recipe: Recipe | None) -> str:
    """Hash of the model that training begins from; "" where the owner's command knows it and we do not.

    Raises `ArtefactError` where it is not the model that the recorded training began from.
    """
    if recipe is None:
        if subject.base is None or not subject.base.is_dir():
            return ""
        return model_hash(load_model(subject.base, base=subject.adapter_base)[0])
    found = model_hash(subject.start_model(recipe.seed))
    record = subject.record
    if record is not None and record.base_hash != found:
        raise ArtefactError(
            f"{subject.name}: its training began from a model with the hash {record.base_hash[:12]}, and what is in "
            f"{subject.base} now has {found[:12]}; give the folder of the right one: start = ..."
        )
    return found


def _read(path: Path, key: str) -> JobResult:
    result = read_model(JobResult, path)
    if result.key != key:
        raise ArtefactError(f"{path}: holds the result of another job ({result.key}); remove the file")
    return result
