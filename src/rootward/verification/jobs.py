"""One exact retraining: what it is, the key of its result, and how it is carried out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import Field
from torch import nn

from rootward.core.errors import ArtefactError, InputError
from rootward.core.hashing import digest, digest_json
from rootward.core.records import SCHEMA_VERSION, Model, versions, write_model
from rootward.subject.encode import Example
from rootward.subject.folders import start_model
from rootward.subject.loading import is_adapter
from rootward.subject.objectives import Objective
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.training import train
from rootward.verification.evaluation import Evaluation, Measured


@dataclass(frozen=True)
class Job:
    """Train on these rows of the subject's documents, with this seed.

    ``weights`` is the factor of a document's loss by its row in the subject's documents (1 for the others). Without
    ``train`` the start model is measured as it is.
    """

    name: str
    rows: tuple[int, ...]
    seed: int
    weights: Mapping[int, float] | None = None
    train: bool = True

    @property
    def label(self) -> str:
        """For people: the name and the seed."""
        return f"{self.name}, seed {self.seed}" if self.train else self.name


class JobResult(Model):
    """What one retraining gave; ``final_hash`` is the trained model's."""

    schema_version: int = SCHEMA_VERSION
    key: str
    name: str
    seed: int
    documents: int
    steps: int
    seconds: float
    final_hash: str | None = None
    measured: Measured
    versions: dict[str, str] = Field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Work:
    """All that a process needs for one subject's jobs. ``start`` gives its start model where no folder does."""

    recipe: Recipe
    objective: Objective
    examples: tuple[Example, ...]
    evaluation: Evaluation
    device: str
    base: Path | None
    adapter_base: str | None
    base_hash: str
    start: Callable[[], nn.Module] | None = None

    def start_model(self, seed: int) -> nn.Module:
        """A fresh model before training."""
        if self.start is not None:
            return self.start()
        if self.base is None:
            raise InputError("no start model is known, so nothing can be retrained here")
        recipe = self.recipe.with_seed(seed)
        return start_model(self.base, recipe, adapter_base=self.adapter_base, device=self.device)[0]


def work_of(subject: Subject, evaluation: Evaluation, base_hash: str) -> Work:
    """The work of a subject that Rootward can train itself; `InputError` where recipe or start are unknown."""
    if subject.recipe is None or not subject.can_retrain:
        raise InputError(
            f"{subject.name}: no recipe and start are known, so it cannot be retrained here; give "
            'retrain = "command {documents} {out} {seed}"'
        )
    adapter = subject.adapter_base if subject.base is not None and is_adapter(subject.base) else None
    return Work(
        recipe=subject.recipe,
        objective=subject.objective,
        examples=tuple(subject.encoded),
        evaluation=evaluation,
        device=str(subject.device),
        base=None if subject.base is None else subject.base.resolve(),
        adapter_base=None if adapter is None else str(adapter),
        base_hash=base_hash,
        start=subject.start_function,
    )


class Keys:
    """Keys of a subject's jobs: hashes of everything that decides a result; a finished job is recognised by its key.

    Args:
        subject: what is retrained.
        evaluation: what is measured.
        base_hash: of the model that training begins from.
        recipe: how it is trained; None where the owner's command does it.
    """

    def __init__(self, subject: Subject, evaluation: Evaluation, base_hash: str, recipe: Recipe | None) -> None:
        self.ids, self.recipe = subject.documents.ids, recipe
        self.command = subject.retrain_command if recipe is None else None
        self.common = {
            "format": 1,
            "base": base_hash,
            "objective": subject.objective.describe(),
            "evaluation": evaluation.hash,
            "device": subject.device.type,
            "dtype": str(next(subject.model.parameters()).dtype),
            "versions": known_versions(),
        }

    def of(self, job: Job) -> str:
        """The key of one job; its name is no part of it."""
        settings: dict[str, object] = {"train": job.train}
        if self.recipe is not None:
            settings["recipe"] = self.recipe.with_seed(job.seed if job.train else 0).model_dump(mode="json")
        if job.train:
            settings["command"] = self.command
            settings["seed"] = job.seed if self.command is None or "{seed}" in self.command else None
            settings["documents"] = digest("\n".join(self.ids[row] for row in job.rows))
            settings["weights"] = [job.weights.get(row, 1.0) for row in job.rows] if job.weights else None
        return digest_json({**self.common, **settings})[:32]


@cache
def known_versions() -> dict[str, str]:
    """`versions`, looked up once in a process."""
    return versions()


def perform(work: Work, job: Job, key: str, path: Path, should_stop: Callable[[], bool] | None = None) -> JobResult:
    """Carry out one job and write its result to ``path``, atomically.

    The same job gives the same bits in this process and in another one on the same machine.

    Raises:
        InputError: no usable document is left.
        ArtefactError: the start is not the model that it was when the jobs were planned.
    """
    began = time.perf_counter()
    model, steps, final = work.start_model(job.seed), 0, None
    if job.train:
        stay = set(job.rows)
        examples = [example for example in work.examples if example.row in stay]
        if not examples:
            raise InputError(f"{job.label}: none of its {len(job.rows)} documents can be trained on")
        recipe = work.recipe.with_seed(job.seed)
        record = train(model, examples, work.objective, recipe, weights=job.weights, should_stop=should_stop)
        if recipe.lora is None and record.base_hash != work.base_hash:
            raise ArtefactError(
                f"{job.label}: the start model is another one than when the jobs were planned "
                f"({work.base_hash[:12]} -> {record.base_hash[:12]}); a start function must give the same model "
                "every time, and its folder must not change"
            )
        if record.stopped:
            raise KeyboardInterrupt
        steps, final = record.steps, record.final_hash
    measured = work.evaluation.measure(model, work.objective, threads=work.recipe.threads)
    result = JobResult(
        key=key,
        name=job.name,
        seed=job.seed,
        documents=len(job.rows),
        steps=steps,
        seconds=round(time.perf_counter() - began, 3),
        final_hash=final,
        measured=measured,
        versions=known_versions(),
    )
    write_model(path, result)
    return result
