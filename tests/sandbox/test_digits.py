"""The digits: parts that share no image, a training that repeats, and closed forms against autograd and retraining."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rootward.core.errors import InputError
from rootward.sandbox.digits import (
    RECIPE,
    Digits,
    Softmax,
    accuracy,
    digits,
    digits_subject,
    loss_of,
    start,
)
from rootward.subject.loading import model_hash


@pytest.fixture(scope="module")
def small() -> Digits:
    return digits(train=120, queries=20, tuning=20)


def test_no_image_is_in_two_parts():
    found = digits()
    rows = [x.tobytes() for part in (found.train, found.queries, found.tuning) for x in part.x]
    assert (len(found.train), len(found.queries), len(found.tuning)) == (1400, 100, 100)
    assert len(set(rows)) == len(rows)
    assert found.train.x.min() == 0
    assert found.train.x.max() == 1


def test_queries_stay_when_there_are_fewer_documents(small: Digits):
    fewer = digits(train=10, queries=20, tuning=20)
    assert np.array_equal(fewer.queries.x, small.queries.x)
    assert np.array_equal(fewer.train.x, small.train.x[:10])


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1700, 100, 100)])
def test_sizes_that_cannot_be_are_refused(sizes: tuple[int, int, int]):
    with pytest.raises(InputError, match="1797"):
        digits(*sizes)


def test_the_subject_learns_repeats_and_starts_anew(small: Digits):
    recipe = RECIPE.model_copy(update={"epochs": 12, "batch_size": 20})
    first, second = digits_subject(small, recipe), digits_subject(small, recipe)
    assert model_hash(first.model) == model_hash(second.model)
    assert model_hash(first.start_model()) == model_hash(start()) != model_hash(first.model)
    assert accuracy(first.model, small.queries) > 0.6 > 0.3 > accuracy(start(), small.queries)
    assert len(first.checkpoints) == 5
    behaviour = loss_of(small.queries)
    logits = first.model(torch.from_numpy(small.queries.x))
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(small.queries.y), reduction="none")
    np.testing.assert_allclose(behaviour.evaluate(first.model, first.objective), expected.detach(), rtol=1e-5)


def test_the_smooth_perceptron_begins_with_the_same_weights(small: Digits):
    recipe = RECIPE.model_copy(update={"epochs": 1, "checkpoints": 0})
    subject = digits_subject(small, recipe, smooth=True)
    assert [type(part).__name__ for part in subject.model.children()] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert model_hash(subject.start_model()) == model_hash(start())


def test_gradients_and_hessian_of_the_convex_twin_are_those_of_autograd(small: Digits):
    few = digits(train=6, queries=20, tuning=20).train
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 64)) / 8)
    weights = torch.arange(6, dtype=torch.float64)
    x, y = torch.from_numpy(few.x).double(), torch.from_numpy(few.y)

    def losses(flat: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(x @ flat.view(10, 64).T, y, reduction="none")

    toy = Softmax(few)
    jacobian = torch.autograd.functional.jacobian(losses, matrix.flatten())
    hessian = torch.autograd.functional.hessian(lambda w: (weights * losses(w)).sum() / 6, matrix.flatten())
    np.testing.assert_allclose(toy.gradients(matrix.numpy()), jacobian, atol=1e-14)
    np.testing.assert_allclose(toy.hessian(matrix.numpy(), weights.numpy()), hessian, atol=1e-14)
    np.testing.assert_allclose(toy.losses(matrix.numpy(), few), losses(matrix.flatten()), atol=1e-14)


def test_the_minimum_moves_with_a_weight_as_its_derivative_says(small: Digits):
    toy, step = Softmax(small.train, 1e-2), 1e-4
    best = toy.fit()
    curvature = toy.hessian(best) + toy.l2 * np.eye(640)
    slope = -np.linalg.solve(curvature, toy.gradients(best)[7]) / len(small.train)
    moved = []
    for sign in (1, -1):
        weights = np.ones(len(small.train))
        weights[7] += sign * step
        moved.append(toy.fit(weights, best).ravel())
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), slope, atol=1e-7 * np.abs(slope).max())


def test_weight_zero_is_leaving_out(small: Digits):
    weights = np.ones(len(small.train))
    weights[100:] = 0
    part = digits(train=100, queries=20, tuning=20).train
    fewer = Softmax(part, 1e-2 * 120 / 100).fit()  # the mean of 120 has a divisor of its own
    np.testing.assert_allclose(Softmax(small.train, 1e-2).fit(weights), fewer, atol=1e-9)
    with pytest.raises(InputError, match="120 weights"):
        Softmax(small.train).fit(np.ones(3))
