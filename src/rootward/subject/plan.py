"""The training recipe: all that decides a training run, so that it can be repeated bit for bit.

The order of the documents depends on each document's id, the seed and the epoch, never on the other
documents: taking some out leaves the others in the order they had. A step takes the next ``batch_size`` of
that order.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from rootward.core.errors import InputError
from rootward.core.records import SCHEMA_VERSION, Model, read_model, write_model
from rootward.subject.loading import DTYPES

RECORD = "rootward_training.json"


class Lora(Model):
    """Train low-rank adapters instead of the weights: ``W + (alpha / rank) B A`` on the modules named."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Recipe(Model):
    """How a subject is trained. Unknown keys are errors.

    ``reduction`` "token": a step's loss is the sum of losses over the number of trained tokens of its batch;
    "document": over the number of its documents. ``weight_decay`` is AdamW's (decoupled), and on every
    trained parameter; for SGD it is L2. ``clip`` is the largest gradient norm. ``checkpoints`` is
    how many are kept, spread evenly over the steps, the last being the end; or the shares of the steps after which
    they are taken, such as (0.1, 0.5, 1.0). ``parameters`` is a regular expression (searched in the
    name) for what is trained, of those that require a gradient.
    """

    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    reduction: Literal["token", "document"] = "token"
    clip: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=1)
    dtype: str = "float32"
    checkpoints: int | tuple[float, ...] = 0
    parameters: str = ".*"
    lora: Lora | None = None

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"expected one of {', '.join(DTYPES)}")
        return value

    @field_validator("checkpoints")
    @classmethod
    def _valid_checkpoints(cls, value: int | tuple[float, ...]) -> int | tuple[float, ...]:
        if isinstance(value, int):
            if value < 0:
                raise ValueError("expected 0 or more")
        elif any(not 0 < share <= 1 for share in value):
            raise ValueError("expected shares of the steps, above 0 and at most 1")
        return value

    @field_validator("parameters")
    @classmethod
    def _valid_pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Recipe:
        """Checked recipe; `InputError` names the option that is wrong and lists those there are."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
            raise InputError(f"recipe: {problems} (options: {', '.join(cls.model_fields)})") from error

    def with_seed(self, seed: int) -> Recipe:
        """The same recipe with another seed."""
        return self.model_copy(update={"seed": seed})

    def steps(self, examples: int) -> int:
        """Optimiser steps for this many usable documents."""
        return self.epochs * math.ceil(examples / self.batch_size)

    def rate(self, step: int, total: int) -> float:
        """Learning rate of step 0, 1, ... of ``total``: linear warm-up, then the schedule (down to 0)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.lr * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    def checkpoint_steps(self, total: int) -> tuple[int, ...]:
        """Numbers of finished steps after which a checkpoint is taken."""
        return tuple(sorted({math.ceil(round(total * share, 6)) for share in self.checkpoint_shares}))

    @property
    def checkpoint_shares(self) -> tuple[float, ...]:
        """Shares of the steps after which a checkpoint is taken."""
        if isinstance(self.checkpoints, int):
            return tuple((k + 1) / self.checkpoints for k in range(self.checkpoints))
        return self.checkpoints


class TrainingRecord(Model):
    """What was trained, on what, and what came out: ``rootward_training.json`` in the model's folder.

    ``losses`` are each epoch's mean loss in the recipe's reduction. ``final_hash`` is the model's hash in the
    recipe's dtype.
    """

    schema_version: int = SCHEMA_VERSION
    recipe: Recipe
    base: str | None = None
    base_hash: str
    objective: dict[str, Any] = Field(default_factory=dict[str, Any])
    documents_hash: str
    documents: int
    steps: int
    stopped: bool = False
    seconds: float
    losses: list[float]
    final_hash: str
    checkpoints: list[str] = Field(default_factory=list[str])
    versions: dict[str, str]
    machine: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write into the model's folder, atomically."""
        write_model(folder / RECORD, self)

    @classmethod
    def load(cls, folder: Path) -> TrainingRecord | None:
        """The folder's record, None if it has none; a damaged one is an `ArtefactError`."""
        return read_model(cls, folder / RECORD) if (folder / RECORD).exists() else None


def order(seed: int, epoch: int, ids: Sequence[str]) -> list[int]:
    """Positions of ``ids`` in the order of training; what stays keeps its order when others are taken out.

    Duplicates are told apart by how often their id came before, so the first of two keeps its place when the
    second goes.
    """
    seen: dict[str, int] = {}
    keys: list[tuple[bytes, int]] = []
    for position, identity in enumerate(ids):
        occurrence = seen[identity] = seen.get(identity, -1) + 1
        keys.append(
            (
                hashlib.blake2b(f"{seed}|{epoch}|{identity}|{occurrence}".encode(), digest_size=16).digest(),
                position,
            )
        )
    return [position for _, position in sorted(keys)]
