"""What methods are given: scores from values, gradients by plain autograd, rates of checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rootward.capture.inputs import START, MethodInputs
from rootward.capture.sinks import Losses
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.core.layout import ParamLayout
from rootward.core.registry import Card
from rootward.subject.behaviour import Behaviour
from rootward.subject.loading import model_hash
from rootward.subject.objectives import Regression
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject

CARD = Card("method", "m", "attribution", "paper", "none", ("gradients",), "none", unit="units")
ROWS: list[dict[str, Any]] = [{"x": [float(n), 1.0], "y": [1.0 - n, 0.5]} for n in range(5)]
RECIPE = Recipe(lr=0.01, batch_size=2, epochs=2, checkpoints=2, dtype="float64", schedule="linear", warmup_steps=2)


def fresh() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def subject() -> Subject:
    return Subject.trained(fresh, ROWS, Regression(), RECIPE, parameters=r"0\.weight")


def asked(count: int = 2) -> Behaviour:
    return Behaviour.loss("own", ROWS[:count])


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_values_become_scores_with_what_else_there_is_to_say(kind: str):
    inputs = MethodInputs(subject(), asked())
    values = torch.arange(10, dtype=torch.float64).view(2, 5)
    found = inputs.scored(CARD, values if kind == "tensor" else values.numpy(), notes=["a note"])
    assert found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, values.numpy())
    assert (found.queries, found.unit, found.method) == (inputs.query_names, "units", "method")
    assert (found.goal, found.behaviour, found.notes) == ("lower", "own", ("a note",))
    assert (found.document_ids, found.rows) == (inputs.subject.encoded.ids, (0, 1, 2, 3, 4))
    assert found.coverage is not None
    assert found.coverage.covered == 6
    other = inputs.scored(CARD, values[:1], unit="other", gradients=False)
    assert (other.queries, other.unit) == (("mean",), "other")
    assert other.coverage is not None
    assert other.coverage.covered == 0


def test_forward_passes_alone_measure_no_parameters():
    said: list[tuple[str, int, int]] = []
    inputs = MethodInputs(subject(), asked(), 2**20, progress=lambda *step: said.append(step))
    losses = Losses(5)
    inputs.feed([losses], inputs.subject.encoded, "the losses")
    assert "tracked" not in vars(inputs) and said == [("the losses", 5, 5)]
    x, y = (torch.tensor([row[key] for row in ROWS], dtype=torch.float64) for key in ("x", "y"))
    own = inputs.subject.model(x).detach()
    torch.testing.assert_close(losses.losses, 0.5 * (own - y).square().sum(1))
    inputs.products({"0.weight": torch.ones(1, 3, 2)}, inputs.subject.encoded)
    assert "tracked" in vars(inputs)


def test_values_without_queries_are_for_their_mean_even_of_one():
    inputs = MethodInputs(subject(), asked(1))
    assert inputs.scored(CARD, np.ones(5)).queries == ("mean",)
    assert inputs.scored(CARD, np.ones((1, 5))).queries == inputs.query_names


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("kind", ["loss", "scalar"])
def test_plain_gradients_are_those_of_a_pass(mean: bool, kind: str):
    there = subject()

    def function(model: nn.Module) -> Tensor:
        return model(torch.ones(2, 2).double()).square().sum(1) * torch.tensor([1.0, -2.0])

    behaviour = asked() if kind == "loss" else Behaviour.scalar("s", function, ["a", "b"])
    inputs = MethodInputs(there, behaviour)
    before = model_hash(there.model)
    every = inputs.plain_gradients(ParamLayout.of(there.model.named_parameters()), mean=mean)
    assert {name: g.shape[1:] for name, g in every.items()} == {n: p.shape for n, p in there.model.named_parameters()}
    passed = inputs.query_gradients(inputs.tracked.layout, mean=mean)
    torch.testing.assert_close(every["0.weight"], passed["0.weight"], rtol=1e-9, atol=1e-12)
    assert float(every["2.bias"].abs().max()) > 0.01
    assert model_hash(there.model) == before
    assert all(p.grad is None and p.requires_grad for p in there.model.parameters())


def test_a_loss_that_is_not_finite_is_named_with_its_query():
    there = subject()
    with torch.no_grad():
        next(there.model.parameters())[0, 0] = torch.nan
    layout = ParamLayout.of(there.model.named_parameters())
    with pytest.raises(NumericalError, match=r"query '0': the loss of its document \w{16} is not finite"):
        MethodInputs(there, asked()).plain_gradients(layout, mean=False)


def test_holding_puts_weights_in_place_and_back():
    there = subject()
    inputs, own = MethodInputs(there, asked()), model_hash(there.model)
    seen = {}
    for place in (None, START, 0, 1):
        with inputs.holding(place):
            seen[place] = model_hash(there.model)
        assert model_hash(there.model) == own
    assert seen[None] == seen[1] == own  # the last checkpoint is the end
    assert seen[START] == model_hash(fresh())
    assert len(set(seen.values())) == 3


def test_rates_of_checkpoints():
    there = subject()
    rates = [RECIPE.rate(step, 6) for step in range(6)]
    inputs = MethodInputs(there, asked())
    assert inputs.checkpoint_rates("x") == [rates[2], rates[5]]
    np.testing.assert_allclose(inputs.checkpoint_rates("x", average=True), [np.mean(rates[:3]), np.mean(rates[3:])])
    kept = there.checkpoints
    there.checkpoints = (*kept, kept[0])
    with pytest.raises(
        ArtefactError, match="x: with these documents the recipe makes 2 checkpoints, the subject has 3"
    ):
        inputs.checkpoint_rates("x")
    there.recipe = None
    assert inputs.checkpoint_rates("x", average=True) == [1.0, 1.0, 1.0]
    there.checkpoints = ()
    with pytest.raises(InputError, match="x: the subject has none"):
        inputs.checkpoint_rates("x")


def test_one_document_is_not_ranked():
    for rows, said in ((ROWS[:1], True), (ROWS[:2], False), ([ROWS[0], ROWS[0]], True)):
        subject = Subject(fresh(), rows, Regression())
        found = MethodInputs(subject, Behaviour.loss("q", ROWS[:1])).scored(
            CARD, torch.zeros(1, len(rows)), notes=("a",)
        )
        assert ("one document: there is nothing to rank" in found.notes) == said
        assert found.notes[0] == "a"
