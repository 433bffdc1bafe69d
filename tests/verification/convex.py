"""Linear regression trained to its minimum: influence has a closed form, and retraining follows it closely."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.supervised import Regression
from rootward.subject.training import train

N, WIDTH, QUERIES = 40, 3, 5
RECIPE = Recipe(optimiser="sgd", lr=0.4, epochs=40, batch_size=N, reduction="document")


def start() -> torch.nn.Module:
    """A function of a module, which a worker process can import."""
    model = torch.nn.Linear(WIDTH, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    return model


def data(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """``x[n, i]``, ``y[n]`` with noise, and query points ``[q, i]``."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(N, WIDTH)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5]) + generator.normal(size=N)).astype(np.float32)
    return x, y, generator.normal(size=(QUERIES, WIDTH)).astype(np.float32)


@cache
def _points() -> torch.Tensor:
    return torch.from_numpy(data()[2])


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """The model's value at each query point, ``[q]``."""
    return model(_points()).reshape(-1)


def behaviour() -> Behaviour:
    return Behaviour.scalar("value", outputs, [f"point {q}" for q in range(QUERIES)])


def subject(order: NDArray[np.int64] | None = None) -> Subject:
    """The trained model; ``order`` permutes the documents."""
    x, y, _ = data()
    rows = np.arange(N) if order is None else order
    items = [{"x": x[n], "y": [float(y[n])]} for n in rows]
    made = Subject(start(), items, Regression(), recipe=RECIPE, start=start)
    train(made.model, made.encoded, made.objective, RECIPE)
    return made


def influence(made: Subject, sign: float = 1.0) -> Scores:
    """``-grad m . H^-1 . grad L_n`` with the mean Hessian ``x'x / N``, from the data alone."""
    x, y, points = (part.astype(np.float64) for part in data())
    hessian = x.T @ x / N
    best = np.linalg.solve(x.T @ x, x.T @ y)
    gradients = (x @ best - y)[:, None] * x
    values = -points @ np.linalg.solve(hessian, gradients.T)
    place = {document: n for n, document in enumerate(_ids())}
    columns = [place[name] for name in made.documents.ids]
    return scored(made, sign * values[:, columns], "influence")


def noise(made: Subject, seed: int = 0) -> Scores:
    return scored(made, np.random.default_rng(seed).normal(size=(QUERIES, N)), "noise")


def scored(made: Subject, values: NDArray[np.float64], method: str) -> Scores:
    names = tuple(f"point {q}" for q in range(QUERIES))
    return Scores(values.astype(np.float32), names, made.documents.ids, method, "1")


@cache
def _ids() -> tuple[str, ...]:
    x, y, _ = data()
    items = [{"x": x[n], "y": [float(y[n])]} for n in range(N)]
    return Subject(start(), items, Regression()).documents.ids
