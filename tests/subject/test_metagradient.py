"""Metagradients against central differences of the training itself, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.subject.documents import load_documents
from rootward.subject.encode import Encoded
from rootward.subject.loading import model_hash
from rootward.subject.metagradient import Trajectory, replay
from rootward.subject.objectives import CausalLM, Classification, Objective, Regression
from rootward.subject.recipe import Recipe, train
from tests.subject.small import ROWS, byte_tokenizer, tiny_llama

Measure = Callable[[nn.Module], Tensor]


def points(count: int = 7) -> Encoded:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(3, generator=generator).tolist(), "y": torch.randn(2, generator=generator).tolist()}
        for _ in range(count)
    ]
    return Regression().encode(load_documents(rows))


PROBE = torch.randn(4, 3, generator=torch.Generator().manual_seed(5)).double()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def on_probe(model: nn.Module) -> Tensor:
    return model(PROBE).square().sum(1)[:2]


def gradients(model: nn.Module, measure: Measure, names: Sequence[str]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    values = measure(model)
    rows = [torch.autograd.grad(v, [named[n] for n in names], retain_graph=True, allow_unused=True) for v in values]
    return {
        n: torch.stack([torch.zeros_like(named[n]) if row[k] is None else row[k] for row in rows])
        for k, n in enumerate(names)
    }


def pulled(trajectory: Trajectory, measure: Measure) -> Tensor:
    return trajectory.metagradients(gradients(trajectory.model, measure, list(trajectory.parameters)))


def differences(
    fresh: Callable[[], nn.Module],
    examples: Encoded,
    objective: Objective,
    recipe: Recipe,
    measure: Measure,
    documents: Sequence[int],
    half: float,
    at: dict[int, float] | None = None,
) -> Tensor:
    """Central differences ``[q, n]`` of whole trainings in the weight of a document."""
    columns = []
    for n in documents:
        ends = []
        for sign in (1, -1):
            model, row = fresh(), examples[n].row
            weights = {**(at or {}), row: (at or {}).get(row, 1.0) + sign * half}
            train(model, examples, objective, recipe, weights=weights)
            ends.append(measure(model).detach())
        columns.append((ends[0] - ends[1]) / (2 * half))
    return torch.stack(columns, 1)


def close(found: Tensor, expected: Tensor, share: float) -> None:
    assert float(expected.abs().max()) > 1e-4
    assert float((found - expected).abs().max() / expected.abs().max()) < share


FULL: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 2, "clip": 0.5, "weight_decay": 0.1}
RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {"optimiser": "sgd", "lr": 0.05},
    "sgd, all": {"optimiser": "sgd", "lr": 0.05, "momentum": 0.9, **FULL},
    "adamw": {"lr": 0.01, "eps": 1e-2, "betas": (0.8, 0.95)},
    "adamw, all": {"lr": 0.01, "eps": 1e-2, "reduction": "document", **FULL},
    "adamw, linear": {"lr": 0.01, "eps": 1e-2, "schedule": "linear", "clip": 50.0},
}


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_against_differences_of_training(options: dict[str, Any]) -> None:
    examples, recipe = points(), Recipe(epochs=3, batch_size=3, dtype="float64", **options)
    trajectory = replay(net(), examples, Regression(), recipe)
    expected = differences(net, examples, Regression(), recipe, on_probe, range(7), 1e-5)
    close(pulled(trajectory, on_probe), expected, 1e-6)


def test_a_usual_eps_is_differentiated_too_where_steps_are_small_enough_to_see_it() -> None:
    examples, recipe = points(), Recipe(epochs=2, batch_size=3, dtype="float64", lr=0.01)
    expected = differences(net, examples, Regression(), recipe, on_probe, range(7), 1e-7)
    close(pulled(replay(net(), examples, Regression(), recipe), on_probe), expected, 1e-4)


def test_the_replay_is_the_training_and_leaves_its_end() -> None:
    examples, recipe = points(), Recipe(epochs=3, batch_size=3, dtype="float64", lr=0.01, clip=0.5)
    model, twin = net(), net()
    record = train(twin, examples, Regression(), recipe)
    state = torch.get_rng_state()
    trajectory = replay(model, examples, Regression(), recipe, every=4)
    assert model_hash(model) == record.final_hash
    training = model.training
    pulled(trajectory, on_probe)
    assert model_hash(model) == record.final_hash
    assert model.training == training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("options", [RECIPES["sgd, all"], RECIPES["adamw, all"]], ids=["sgd", "adamw"])
def test_what_is_kept_does_not_matter(options: dict[str, Any]) -> None:
    examples, recipe = points(), Recipe(epochs=3, batch_size=3, dtype="float64", **options)
    kept, found = [], []
    for every in (1, 2, 4, 100, None):
        trajectory = replay(net(), examples, Regression(), recipe, every=every)
        kept.append(len(trajectory.states))
        found.append(pulled(trajectory, on_probe))
    assert kept == [9, 5, 3, 1, 3]
    assert all(torch.equal(other, found[0]) for other in found)


def test_linear_in_the_measurement_and_every_query_by_itself() -> None:
    examples, recipe = points(), Recipe(epochs=2, batch_size=3, dtype="float64", lr=0.01, eps=1e-2)
    trajectory = replay(net(), examples, Regression(), recipe)
    both = pulled(trajectory, on_probe)
    mixed = pulled(trajectory, lambda m: (on_probe(m) @ torch.tensor([2.0, -3.0]).double())[None])
    torch.testing.assert_close(mixed[0], 2 * both[0] - 3 * both[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pulled(trajectory, lambda m: on_probe(m)[1:]), both[1:], rtol=1e-12, atol=1e-15)


def test_the_way_from_weight_one_to_weight_zero_is_the_integral_of_the_derivative() -> None:
    examples = points()
    recipe = Recipe(epochs=3, batch_size=3, dtype="float64", optimiser="sgd", lr=0.05, momentum=0.5)
    row = examples[2].row
    ends = []
    for weight in (1.0, 0.0):
        model = net()
        train(model, examples, Regression(), recipe, weights={row: weight})
        ends.append(on_probe(model).detach())
    nodes = [(0.0, 7), (0.25, 32), (0.5, 12), (0.75, 32), (1.0, 7)]  # Boole's rule, over 90
    slopes = [
        share / 90 * pulled(replay(net(), examples, Regression(), recipe, weights={row: w}), on_probe)[:, 2]
        for w, share in nodes
    ]
    close(sum(slopes, torch.zeros(2).double()), ends[0] - ends[1], 1e-5)


def test_a_weight_given_by_the_document_counts_as_a_factor() -> None:
    from dataclasses import replace

    examples = points()
    doubled = Encoded([replace(e, weight=2.0) if n == 1 else e for n, e in enumerate(examples)])
    recipe = Recipe(epochs=2, batch_size=3, dtype="float64", optimiser="sgd", lr=0.05)
    found = pulled(replay(net(), doubled, Regression(), recipe), on_probe)
    close(found, differences(net, doubled, Regression(), recipe, on_probe, range(7), 1e-5), 1e-6)


def test_only_what_is_trained_carries_the_derivative() -> None:
    examples = points()
    recipe = Recipe(epochs=2, batch_size=3, dtype="float64", lr=0.01, eps=1e-2, parameters=r"2\.weight|0\.bias")
    trajectory = replay(net(), examples, Regression(), recipe)
    assert list(trajectory.parameters) == ["0.bias", "2.weight"]
    close(
        pulled(trajectory, on_probe),
        differences(net, examples, Regression(), recipe, on_probe, range(7), 1e-5),
        1e-6,
    )


class Spare(nn.Module):
    """With a parameter that the loss does not reach: the optimiser passes over it, decay and all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    examples = points()
    recipe = Recipe(epochs=2, batch_size=3, dtype="float64", lr=0.01, eps=1e-2, weight_decay=0.5)

    def fresh() -> nn.Module:
        return Spare().double()

    def measure(model: Any) -> Tensor:
        return (model.used(PROBE) * model.spare(PROBE)).sum().reshape(1)

    trajectory = replay(fresh(), examples, Regression(), recipe)
    expected = differences(fresh, examples, Regression(), recipe, measure, range(7), 1e-5)
    close(pulled(trajectory, measure), expected, 1e-6)


# --- language models ----------------------------------------------------------------------------------------------


def tiny_gpt2(**options: float) -> GPT2LMHeadModel:
    torch.manual_seed(4)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | options
    config = GPT2Config(
        vocab_size=261, n_embd=8, n_layer=1, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2, **rates,  # type: ignore[arg-type]
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def answers(model: Any) -> Tensor:
    logits = model(input_ids=torch.tensor([[1, 70, 80, 90]])).logits[0]
    return torch.stack([logits[-1, 100] - logits[-1].mean(), logits[1:].square().mean()])


@pytest.mark.parametrize("options", [RECIPES["sgd, all"], RECIPES["adamw, all"]], ids=["sgd", "adamw"])
def test_a_transformer_against_differences_of_training(options: dict[str, Any]) -> None:
    objective = CausalLM(byte_tokenizer())
    examples = objective.encode(load_documents(ROWS))
    recipe = Recipe(epochs=2, batch_size=2, dtype="float64", **options)
    found = pulled(replay(tiny_gpt2(), examples, objective, recipe), answers)
    expected = differences(tiny_gpt2, examples, objective, recipe, answers, (0, 3, 5), 1e-4)
    close(found[:, [0, 3, 5]], expected, 1e-6)


def test_a_llama_against_differences_of_training() -> None:
    # its norms compute in float32, which is what limits the differences
    objective = CausalLM(byte_tokenizer())
    examples = objective.encode(load_documents(ROWS))
    recipe = Recipe(epochs=1, batch_size=3, dtype="float64", optimiser="sgd", lr=0.02)

    def fresh() -> nn.Module:
        return tiny_llama(dtype=torch.float64)

    found = pulled(replay(fresh(), examples, objective, recipe), answers)
    expected = differences(fresh, examples, objective, recipe, answers, (0, 4), 1e-2)
    close(found[:, [0, 4]], expected, 5e-3)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_dropout_is_refused_by_name() -> None:
    objective, recipe = CausalLM(byte_tokenizer()), Recipe(batch_size=2, dtype="float64")
    examples = objective.encode(load_documents(ROWS))
    with pytest.raises(InputError, match=r"loss of a step is random \(.*dropout: p = 0.1.*train with dropout 0"):
        replay(tiny_gpt2(resid_pdrop=0.1), examples, objective, recipe)
    with pytest.raises(InputError, match=r"random \(.*self_attn: attention_dropout = 0.2"):
        replay(tiny_llama(dtype=torch.float64, attention_dropout=0.2), examples, objective, recipe)


def test_running_statistics_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    before = model_hash(model)
    with pytest.raises(InputError, match="training changes the buffer 1.running_mean"):
        replay(model, points(), Regression(), Recipe(batch_size=3))
    assert model_hash(model) == before


def test_half_precision_and_a_bad_schedule_are_refused() -> None:
    with pytest.raises(InputError, match="expected parameters of float32 or float64, got torch.bfloat16"):
        replay(net().bfloat16(), points(), Regression(), Recipe(batch_size=3))
    with pytest.raises(InputError, match="every: expected at least 1 step"):
        replay(net(), points(), Regression(), Recipe(batch_size=3), every=0)


def test_gradients_of_other_parameters_are_refused() -> None:
    trajectory = replay(net(), points(), Regression(), Recipe(batch_size=3, dtype="float64"))
    found = gradients(trajectory.model, on_probe, list(trajectory.parameters))
    with pytest.raises(LayoutMismatch, match=r"expected the gradients of 4 trained parameters, got 3.*2\.bias"):
        trajectory.metagradients({name: g for name, g in found.items() if name != "2.bias"})
    with pytest.raises(LayoutMismatch, match=r"expected gradients \[q, 2\] of 2.bias, got \(2, 1\)"):
        trajectory.metagradients({**found, "2.bias": found["2.bias"][:, :1]})


def test_a_derivative_that_explodes_names_its_step() -> None:
    examples = points()
    recipe = Recipe(batch_size=3, dtype="float64")
    trajectory = replay(net(), examples, Regression(), recipe)
    found = gradients(trajectory.model, on_probe, list(trajectory.parameters))
    found["2.bias"][0, 0] = torch.nan
    with pytest.raises(NumericalError, match="derivative through step 3 of 3 is not finite"):
        trajectory.metagradients(found)


def test_classes_are_differentiated_as_well() -> None:
    rows = [{"x": x.x.tolist(), "y": n % 2} for n, x in enumerate(points()) if x.x is not None]
    examples = Classification().encode(load_documents(rows))
    recipe = Recipe(epochs=2, batch_size=4, dtype="float64", lr=0.01, eps=1e-2)
    found = pulled(replay(net(), examples, Classification(), recipe), on_probe)
    close(found, differences(net, examples, Classification(), recipe, on_probe, range(7), 1e-5), 1e-6)
