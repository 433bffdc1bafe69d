"""MAGIC against retraining: differences in a document's weight, and sets of documents left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from rootward.api import attribute
from rootward.core.errors import ArtefactError, InputError
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Regression
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.training import train
from rootward.verification.loo import leave_one_out, loo, sample_documents
from tests.methods.contract import close
from tests.verification import convex

DRAWN = np.random.default_rng(0)
ROWS: list[dict[str, Any]] = [
    {"x": DRAWN.normal(size=3).tolist(), "y": DRAWN.normal(size=2).tolist()} for _ in range(12)
]
PROBE = torch.tensor(DRAWN.normal(size=(2, 3)))
RECIPE = Recipe(optimiser="adamw", lr=5e-3, eps=1e-2, epochs=3, batch_size=4, dtype="float64", schedule="linear")
SMOOTH = Recipe(optimiser="sgd", lr=2e-2, epochs=3, batch_size=4, dtype="float64", schedule="linear")


def fresh() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def on_probe(model: nn.Module) -> Tensor:
    return model(PROBE).square().sum(1)


def asked() -> Behaviour:
    return Behaviour.scalar("size", on_probe, ["first", "second"])


def trained(rows: list[dict[str, Any]] = ROWS, recipe: Recipe = RECIPE) -> Subject:
    return Subject.trained(fresh, rows, Regression(), recipe)


def run(subject: Subject, behaviour: Behaviour | None = None, **options: Any) -> Scores:
    return attribute(subject, behaviour or asked(), "magic", options=options)


def retrained(subject: Subject, weights: dict[int, float]) -> np.ndarray[Any, Any]:
    model = subject.start_model()
    assert subject.recipe is not None
    train(model, subject.encoded, subject.objective, subject.recipe, weights=weights)
    return on_probe(model).detach().numpy()


def test_scores_are_differences_of_training_in_the_weight_of_a_document():
    subject, half = trained(), 1e-5
    found = run(subject)
    expected = [(retrained(subject, {n: 1 + half}) - retrained(subject, {n: 1 - half})) / (2 * half) for n in range(12)]
    close(found.values, 12 * np.stack(expected, 1), rtol=1e-6)
    assert found.queries == ("first", "second")
    assert found.notes == ()
    mean = run(subject, queries="mean")
    assert mean.queries == ("mean",)
    close(mean.values[0], found.values.mean(0))


def test_at_the_minimum_of_a_convex_loss_scores_are_influence_and_leave_one_out_has_their_size(tmp_path: Path):
    subject = convex.subject()  # full batches and many steps
    behaviour = convex.behaviour()
    found = run(subject, behaviour)
    exact = attribute(
        subject, behaviour, "exact_influence", options={"solver": "dense", "damping": 0.0, "queries": "each"}
    )
    close(found.values, exact.values, rtol=1e-3)
    left_out = leave_one_out(subject, sample_documents(subject, 10), behaviour, seeds=(0,), cache=tmp_path, workers=0)
    unscaled = replace(found, values=found.values / convex.N)
    judged = loo({"magic": found, "unscaled": unscaled}, left_out, resamples=100, permutations=10)
    slope, wrong = judged.of("magic").slope, judged.of("unscaled").slope
    assert slope is not None and wrong is not None
    assert slope.value == pytest.approx(1, abs=0.2)  # leave-one-out is larger by 1 / (1 - leverage)
    assert wrong.value == pytest.approx(convex.N * slope.value, rel=1e-4)
    assert judged.of("magic").pearson.value > 0.98


def test_a_loss_has_the_sign_of_the_loss():
    subject, half = trained(), 1e-4
    behaviour = Behaviour.loss("own", [{"x": PROBE[0].tolist(), "y": [0.3, -0.2]}])
    found = run(subject, behaviour)
    ends = []
    for sign in (1, -1):
        model = subject.start_model()
        train(model, subject.encoded, subject.objective, RECIPE, weights={3: 1 + sign * half})
        ends.append(behaviour.evaluate(model, subject.objective)[0])
    assert found.values[0, 3] == pytest.approx(12 * (ends[0] - ends[1]) / (2 * half), rel=1e-5)


def test_sets_left_out_of_a_smooth_run_change_what_their_scores_add_up_to():
    subject = trained(recipe=SMOOTH)
    found, before = run(subject).values, retrained(subject, {})
    drawn = np.random.default_rng(1)
    sets = [drawn.choice(12, size=3, replace=False) for _ in range(12)]
    actual = np.stack([retrained(subject, {int(n): 0.0 for n in chosen}) - before for chosen in sets])
    predicted = np.stack([-found[:, chosen].sum(1) / 12 for chosen in sets])
    shuffled = np.stack([-found[:, drawn.permutation(12)][:, chosen].sum(1) for chosen in sets])
    assert (predicted * actual).sum() / np.square(predicted).sum() == pytest.approx(1, abs=0.1)
    for q in range(2):
        assert spearmanr(predicted[:, q], actual[:, q]).statistic > 0.95
    assert np.mean([spearmanr(shuffled[:, q], actual[:, q]).statistic for q in range(2)]) < 0.6  # the null


def test_the_segment_length_does_not_matter():
    subject = trained()
    for every in (1, 5):
        assert run(subject, every=every).values.tobytes() == run(subject).values.tobytes()
    with pytest.raises(InputError, match="magic: every: expected a whole number of at least 1 .*got 0"):
        run(subject, every=0)


def test_copies_have_the_mean_of_their_derivatives():
    subject, half = trained([*ROWS, ROWS[0]]), 1e-5
    found = run(subject).values
    each = [(retrained(subject, {n: 1 + half}) - retrained(subject, {n: 1 - half})) / (2 * half) for n in (0, 12)]
    assert not np.allclose(each[0], each[1], rtol=1e-3)
    close(found[:, 0], 13 * (each[0] + each[1]) / 2)
    assert (found[:, 0] == found[:, 12]).all()


def test_a_run_that_does_not_lead_to_the_subject_is_refused():
    subject = trained()
    with pytest.raises(ArtefactError, match="recipe does not lead to the weights of subject: the replay ends"):
        run(Subject(subject.model, ROWS[:-1], Regression(), recipe=RECIPE, start=fresh))
    with torch.no_grad():
        next(subject.model.parameters())[0, 0] += 1e-6
    assert "of its way from the subject's weights (rounding)" in run(subject).notes[0]


def test_a_subject_without_recipe_or_start_is_refused():
    subject = trained()
    for options in ({"recipe": RECIPE}, {"start": fresh}):
        with pytest.raises(InputError, match="has no recipe or start, so its training cannot be replayed"):
            run(Subject(subject.model, ROWS, Regression(), **options))


def test_all_that_was_trained_is_covered():
    recipe = RECIPE.model_copy(update={"parameters": r"^2\."})
    coverage = run(trained(recipe=recipe)).coverage
    assert coverage is not None
    assert (coverage.parameters, coverage.covered, coverage.uncovered) == (32, 12, {"0.weight": 15, "0.bias": 5})


def test_progress_is_told_of_both_ways():
    told: list[tuple[str, int, int]] = []
    attribute(trained(), asked(), "magic", progress=lambda *step: told.append(step))
    assert told[-18:] == [(task, n, 9) for task in ("replay", "metagradient") for n in range(1, 10)]
