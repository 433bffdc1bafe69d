"""SOURCE against retraining: exact where curvature and gradients stay, close to finite differences elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rootward.api import attribute
from rootward.core.errors import InputError
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Regression
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.training import train

N, D = 12, 3


def data() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + 0.3 * torch.randn(N, 1, generator=g, dtype=torch.float64)
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def optimum() -> nn.Module:
    rows = data()
    x, y = torch.stack([r["x"] for r in rows]), torch.stack([r["y"] for r in rows])
    model = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model


def zero() -> nn.Module:
    model = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def asked() -> Behaviour:
    probes = [[1.0, 0.5, -1.0], [0.2, -1.0, 0.3]]
    x = torch.tensor(probes, dtype=torch.float64)
    return Behaviour.scalar("predictions", lambda model: model(x).squeeze(1), ["a", "b"])


def measured(start: Callable[[], nn.Module], recipe: Recipe, rows: list[dict[str, Any]]) -> np.ndarray:
    """``d m_q / d w_n`` times N by central differences of whole trainings: ``[q, n]``."""
    subject = Subject(start(), rows, Regression(), recipe=recipe, start=start)
    found = np.zeros((2, N))
    for n in range(N):
        ends = []
        for sign in (1, -1):
            model = start()
            train(model, subject.encoded, Regression(), recipe, weights={n: 1 + sign * 1e-4})
            ends.append(asked().evaluate(model))
        found[:, n] = (ends[0] - ends[1]) / 2e-4 * N
    return found


def recipe(**changes: Any) -> Recipe:
    options: dict[str, Any] = {"optimiser": "sgd", "lr": 1e-3, "batch_size": N, "epochs": 400, "checkpoints": 1}
    return Recipe(**(options | {"dtype": "float64", "reduction": "document"} | changes))


@pytest.mark.parametrize(
    "changes", [{}, {"momentum": 0.5}, {"reduction": "token"}, {"weight_decay": 0.0, "epochs": 40}]
)
def test_it_is_exact_where_nothing_changes(changes):
    """At the optimum full batches do not move the weights: curvature and gradients are the same in every step."""
    plan = recipe(**changes)
    subject = Subject.trained(optimum, data(), Regression(), plan)
    scores = attribute(subject, asked(), "source", options={"queries": "each"})
    truth = measured(optimum, plan, data())
    np.testing.assert_allclose(scores.values, truth, rtol=5e-3, atol=5e-3 * np.abs(truth).max())


def test_influence_at_the_end_is_another_thing():
    """A short training has not converged: the influence function overestimates what it did."""
    plan = recipe(epochs=40)
    subject = Subject.trained(optimum, data(), Regression(), plan)
    options = {"queries": "each", "damping": 0.0, "sensitivity": False}
    converged = attribute(subject, asked(), "ekfac", options=options).values
    truth = measured(optimum, plan, data())
    assert np.abs(converged).max() > 5 * np.abs(truth).max()


def test_more_checkpoints_come_closer_to_a_run_that_moves():
    truth = measured(zero, recipe(), data())
    errors = []
    for count in (1, 4, 20):
        subject = Subject.trained(zero, data(), Regression(), recipe(checkpoints=count))
        scores = attribute(subject, asked(), "source", options={"queries": "each"})
        errors.append(np.linalg.norm(scores.values - truth) / np.linalg.norm(truth))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.03


def test_adam_is_followed_in_its_own_coordinates():
    plan = recipe(optimiser="adamw", lr=2e-3, epochs=100, checkpoints=10)
    rows = [{"x": r["x"] * torch.tensor([5.0, 1.0, 0.2]).double(), "y": r["y"]} for r in data()]
    truth = measured(zero, plan, rows)
    subject = Subject.trained(zero, rows, Regression(), plan)
    options = {"queries": "each"}
    own = attribute(subject, asked(), "source", options=options).values
    plain = attribute(subject, asked(), "source", options={**options, "adam": "ignore"}).values
    agreed = [np.corrcoef(values.ravel(), truth.ravel())[0, 1] for values in (own, plain)]
    assert agreed[0] > 0.8 and agreed[0] > agreed[1] + 0.05


def test_the_mean_of_the_queries_is_the_mean_of_the_scores():
    subject = Subject.trained(zero, data(), Regression(), recipe(checkpoints=3))
    each = attribute(subject, asked(), "source", options={"queries": "each"})
    mean = attribute(subject, asked(), "source")
    np.testing.assert_allclose(mean.values[0], each.values.mean(0), rtol=1e-5)
    assert [note.split(",")[0] for note in each.notes] == [f"checkpoint {n}" for n in range(3)]


def test_what_is_missing_is_named():
    subject = Subject(zero(), data(), Regression(), start=zero)
    with pytest.raises(InputError, match="has no recipe; train it here"):
        attribute(subject, asked(), "source")
    subject = Subject.trained(zero, data(), Regression(), recipe(checkpoints=0))
    with pytest.raises(InputError, match="has no checkpoints"):
        attribute(subject, asked(), "source")
