"""Small supervised subjects for curvature methods: float64, documents ``{"x", "y"}``, everything as flat rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification, Regression
from rootward.subject.subject import Subject
from tests.capture import worlds as w


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(rows: int = 6, model: nn.Module | None = None, **options: Any) -> Subject:
    x = randn(rows, 5, seed=4)
    items = [{"x": x[n], "y": n % 3} for n in range(rows)]
    return Subject(model or w.perceptron(), items, Classification(), parameters=".*", **options)


def overflowing() -> tuple[Subject, str]:
    """A subject with one document whose loss is not finite, and that document's id."""
    model = nn.Linear(5, 3).double()
    model.weight.data *= 1e10
    x = randn(5, 5, seed=4)
    x[3, 4] = 1e300
    subject = Subject(model, [{"x": x[n], "y": n % 3} for n in range(5)], Classification(), parameters=".*")
    return subject, subject.encoded[3].id


RIDGE = 0.3


def ridge(rows: int = 8) -> tuple[Subject, Tensor, Tensor]:
    """Linear regression at the minimum of its mean loss plus ``RIDGE / 2 |theta|^2``; with its design and targets."""
    x, y = randn(rows, 3, seed=1), randn(rows, 1, seed=2)
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = fit(x, y, torch.ones(rows, dtype=torch.float64)).T
    items = [{"x": x[n], "y": y[n]} for n in range(rows)]
    return Subject(model, items, Regression(), parameters=".*"), x, y


def fit(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """The minimiser ``[3, 1]`` of ``1/N sum_n weight_n L_n + RIDGE / 2 |theta|^2``, N the number of rows."""
    scaled = weights.unsqueeze(1) * x / len(x)
    return torch.linalg.solve(scaled.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), scaled.T @ y)


def outputs(points: Tensor) -> Behaviour:
    """The first output of the model at each point."""
    names = [f"p{q}" for q in range(len(points))]
    return Behaviour.scalar("outputs", lambda model: model(points)[:, 0], names)


def document_rows(subject: Subject) -> Tensor:
    """``[n, P]``: plain autograd."""
    names = [name for name, _ in subject.model.named_parameters()]
    return w.flat(w.naive(subject.model, subject.objective, subject.encoded, names))


def query_rows(subject: Subject, behaviour: Behaviour) -> Tensor:
    """``[q, P]``: plain autograd."""
    assert behaviour.function is not None
    values = behaviour.function(subject.model)
    parameters = list(subject.model.parameters())
    rows = [torch.autograd.grad(v, parameters, retain_graph=True) for v in values]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
