"""Tail patch: one step does what the gradient says, and leaves the model as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rootward.core.errors import InputError
from rootward.core.records import read_model, write_model
from rootward.subject.behaviour import Behaviour
from rootward.subject.loading import model_hash
from rootward.subject.subject import Subject
from rootward.verification.tail_patch import TailPatch, tail_patch
from tests.verification import convex


def products(subject: Subject) -> np.ndarray:
    """What one plain step of lr 1 does to each query, exactly: ``-grad m . grad L_n`` (both are linear)."""
    x, y, points = (part.astype(np.float64) for part in convex.data())
    weight = next(subject.model.parameters()).detach().double().numpy().reshape(-1)
    return -points @ ((x @ weight - y)[:, None] * x).T


def test_it_is_the_product_of_gradients_times_the_step(line: Subject, tmp_path: Path) -> None:
    exact = products(line)
    before = model_hash(line.model)
    patch = tail_patch(line, convex.scored(line, exact, "gradient"), convex.behaviour(), count=4, lr=1e-2)
    assert model_hash(line.model) == before
    found = patch.of("gradient")
    expected = 1e-2 * np.sort(exact, axis=1)[:, ::-1][:, :4].mean(1)
    assert found.top == pytest.approx(expected.tolist(), rel=1e-3)
    assert found.beyond_random.value == pytest.approx(np.mean(found.top) - np.mean(patch.random))
    assert found.beyond_random.low > 0
    assert (patch.optimiser, patch.lr, patch.count) == ("sgd", 1e-2, 4)
    write_model(tmp_path / "patch.json", patch)
    assert read_model(TailPatch, tmp_path / "patch.json") == patch


def test_methods_share_the_steps_and_the_control(line: Subject) -> None:
    exact = products(line)
    tables = {"gradient": convex.scored(line, exact, "gradient"), "length": convex.noise(line)}
    told: list[tuple[str, int, int]] = []
    both = tail_patch(line, tables, convex.behaviour(), count=4, lr=1e-2, progress=lambda *step: told.append(step))
    for name, table in tables.items():
        alone = tail_patch(line, {name: table}, convex.behaviour(), count=4, lr=1e-2)
        assert alone.methods == [both.of(name)]
        assert (alone.random, alone.control) == (both.random, both.control)
    tops = {n for table in tables.values() for n in np.argsort(-table.values, axis=1)[:, :4].ravel().tolist()}
    assert len(told) == told[-1][1] == told[-1][2]
    assert len(tops) <= len(told) <= len(tops) + 4  # each document once, whoever ranks it
    with pytest.raises(InputError, match="expected one of gradient, length, got nobody"):
        both.of("nobody")


def test_random_scores_gain_nothing_over_random_documents(line: Subject) -> None:
    gains = [
        tail_patch(line, convex.noise(line, seed), convex.behaviour(), count=10, lr=1e-2, seed=seed)
        .of("noise")
        .beyond_random.value
        for seed in range(12)
    ]
    assert abs(np.mean(gains)) < 2.5 * np.std(gains, ddof=1) / 12**0.5


def test_a_goal_of_less_turns_the_sign(line: Subject) -> None:
    lower = Behaviour.scalar("value", convex.outputs, [f"point {q}" for q in range(convex.QUERIES)], goal="lower")
    scores = convex.scored(line, products(line), "gradient")
    worst = replace(scores, values=-scores.values)
    up = tail_patch(line, scores, convex.behaviour(), count=3, lr=1e-2).of("gradient")
    down = tail_patch(line, worst, lower, count=3, lr=1e-2).of("gradient")  # the documents of the top are the same
    assert down.top == pytest.approx([-value for value in up.top])
    found = tail_patch(line, scores, lower, count=3, lr=1e-2).of("gradient")
    assert found.effect.value > 0 > down.effect.value


def test_the_recipe_steps_with_its_own_optimiser(line: Subject) -> None:
    recipe = convex.RECIPE.model_copy(
        update={"optimiser": "adamw", "lr": 1e-3, "warmup_steps": 5, "schedule": "cosine"}
    )
    adam = Subject(line.model, line.documents, line.objective, recipe=recipe)
    scores = convex.scored(line, products(line), "gradient")
    found = tail_patch(adam, scores, convex.behaviour(), count=1).of("gradient")
    x, y, points = convex.data()
    weight = next(line.model.parameters()).detach().numpy().reshape(-1)
    for q in range(convex.QUERIES):
        n = int(np.argmax(scores.values[q]))
        step = -1e-3 * np.sign((x[n] @ weight - y[n]) * x[n])  # Adam's first step: lr times the sign
        assert found.top[q] == pytest.approx(float(points[q] @ step), rel=1e-3)
    with pytest.raises(InputError, match="a learning rate of its own"):
        tail_patch(adam, scores, convex.behaviour(), optimiser="sgd")


def test_what_cannot_be_done_is_refused(line: Subject) -> None:
    scores = convex.noise(line)
    for count in (0, convex.N):
        with pytest.raises(InputError, match="count: expected 1 to 39"):
            tail_patch(line, scores, convex.behaviour(), count=count)
    bare = Subject(line.model, line.documents, line.objective)
    with pytest.raises(InputError, match="no recipe is known"):
        tail_patch(bare, scores, convex.behaviour())
    assert tail_patch(bare, scores, convex.behaviour(), optimiser="sgd", lr=0.1, count=1).lr == 0.1
    with pytest.raises(InputError, match="at least one method"):
        tail_patch(line, {}, convex.behaviour())
    with pytest.raises(InputError, match="no scores for"):
        tail_patch(line, replace(scores, queries=tuple("abcde")), convex.behaviour())
