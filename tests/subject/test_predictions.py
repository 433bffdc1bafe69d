"""Predictions: losses from outputs, labels drawn from the model, and every label with its probability."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor, nn

from rootward.core.errors import InputError
from rootward.subject.documents import load_documents
from rootward.subject.encode import Example
from rootward.subject.objectives import CausalLM, Classification, Regression
from rootward.subject.predictions import Labels, Predictions
from tests.subject.small import ROWS, byte_tokenizer, tiny_llama


class Columns(nn.Module):
    """Takes one set of positions for all rows, as older models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: Any = 0) -> Tensor:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        return output.logits[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else output.logits


MODELS: dict[str, Any] = {"rows": tiny_llama, "columns": Columns}


def supervised(categorical: bool, count: int = 4) -> tuple[nn.Module, Any, list[Example]]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    model = nn.Linear(3, 2).double()
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    rows = [{"x": x[n], "y": n % 2 if categorical else y[n]} for n in range(count)]
    objective = Classification() if categorical else Regression()
    return model, objective, list(objective.encode(load_documents(rows)))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("response_only", [True, False])
@pytest.mark.parametrize("form", MODELS)
def test_losses_are_those_of_a_language_model(form: str, response_only: bool, keep: bool):
    model = MODELS[form]()
    objective = CausalLM(byte_tokenizer(), response_only=response_only, keep_logits=keep)
    encoded = objective.encode(load_documents(ROWS))
    batch = objective.collate(encoded)
    assert len({example.length for example in encoded}) > 2  # so that there is padding
    predictions = objective.predictions(model, batch)
    torch.testing.assert_close(predictions.losses(), objective.losses(model, batch))
    assert len(predictions.targets) == encoded.trained_tokens
    assert torch.bincount(predictions.documents).tolist() == [example.targets for example in encoded]
    for n, example in enumerate(encoded):
        assert predictions.targets[predictions.documents == n].tolist() == example.ids[example.trained].tolist()


@pytest.mark.parametrize("categorical", [True, False])
def test_losses_are_those_of_a_supervised_objective(categorical: bool):
    model, objective, examples = supervised(categorical)
    batch = objective.collate(examples)
    predictions = objective.predictions(model, batch)
    torch.testing.assert_close(predictions.losses(), objective.losses(model, batch))
    outputs = model(batch.inputs["x"])
    other = predictions.losses(1 - predictions.targets)
    if categorical:
        expected = -outputs.log_softmax(1)[torch.arange(4), 1 - batch.targets]
    else:
        expected = 0.5 * (outputs - (1 - batch.targets)).square().sum(1)
    torch.testing.assert_close(other, expected)
    assert [part is not None for part in predictions.relabelled(Labels(), batch.ids)] == [True]


def categorical(outputs: Tensor) -> Predictions:
    count = len(outputs)
    return Predictions(outputs, torch.zeros(count, dtype=torch.int64), torch.arange(count), count)


def test_sampled_classes_follow_the_model():
    logits = torch.tensor([0.3, -1.0, 1.2, -40.0, 0.0, -2.0])
    count = 4000
    predictions = categorical(logits.expand(count, -1))
    drawn = predictions.sample(predictions.noise([f"d{n}" for n in range(count)], 0, 0))
    seen = torch.bincount(drawn, minlength=6)
    assert seen[3] == 0  # a class without probability
    possible = [0, 1, 2, 4, 5]
    assert chisquare(seen[possible].numpy(), (logits.double().softmax(0) * count)[possible].numpy()).pvalue > 1e-3
    flat = torch.full((5,), count / 5, dtype=torch.float64)
    assert chisquare(seen[possible].numpy(), flat.numpy()).pvalue < 1e-9


def test_a_uniform_number_at_either_end_is_a_class_that_can_be():
    outputs = torch.tensor([[0.0, 1.0, 0.5]]).expand(3, -1)
    noise = torch.tensor([[0.0], [1.0], [1 - 1e-12]], dtype=torch.float64)
    assert categorical(outputs).sample(noise).tolist() == [0, 2, 2]
    certain = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    assert categorical(certain).sample(noise).tolist() == [1, 1, 1]


def test_sampled_means_have_unit_variance_around_the_model():
    outputs = torch.tensor([[2.0, -1.0]], dtype=torch.float64).expand(2000, -1)
    predictions = Predictions(outputs, torch.zeros_like(outputs), torch.arange(2000), 2000, categorical=False)
    noise = predictions.sample(predictions.noise([f"d{n}" for n in range(2000)], 1, 0)) - outputs
    for column in noise.T:
        assert kstest(column.numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(noise.T)[0, 1])) < 4 / 2000**0.5


def test_draws_seeds_and_tokens_have_noise_of_their_own():
    documents = torch.zeros(500, dtype=torch.int64)
    predictions = Predictions(torch.zeros(500, 3), documents, documents, 1)
    first, again, draw, seed = (predictions.noise(["a"], s, d).flatten() for s, d in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first, again)
    for other in (draw, seed, first.roll(1), predictions.noise(["b"], 0, 0).flatten()):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 4 / 500**0.5


def test_sampled_labels_depend_on_the_document_alone():
    model, objective = tiny_llama(dtype=torch.float64), CausalLM(byte_tokenizer())
    encoded = objective.encode(load_documents(ROWS))

    def labels(examples: list[Example]) -> dict[str, list[int]]:
        batch = objective.collate(examples)
        with torch.no_grad():
            predictions = objective.predictions(model, batch)
        drawn = predictions.sample(predictions.noise(batch.ids, 3, 1))
        return {i: drawn[predictions.documents == n].tolist() for n, i in enumerate(batch.ids)}

    whole = labels(list(encoded))
    assert labels(list(encoded)[::-1]) == whole
    assert {i: found for example in encoded for i, found in labels([example]).items()} == whole
    assert labels([encoded[2], encoded[2], encoded[4]]) == {i: whole[i] for i in (encoded[2].id, encoded[4].id)}
    for documents in (torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1])):  # targets in any order
        mixed = Predictions(torch.zeros(4, 3), documents, documents, 2).noise(["a", "b"], 0, 0)
        alone = Predictions(torch.zeros(2, 3), documents[:2], torch.zeros(2, dtype=torch.int64), 1)
        assert torch.equal(mixed[documents == 0], alone.noise(["a"], 0, 0))


def jacobians(model: nn.Module, outputs: Tensor) -> list[Tensor]:
    """``[c, p]`` per document."""
    parameters = list(model.parameters())
    rows = [[torch.autograd.grad(o, parameters, retain_graph=True) for o in row] for row in outputs]
    return [torch.stack([torch.cat([g.flatten() for g in grad]) for grad in row]) for row in rows]


def second_moments(model: nn.Module, predictions: Predictions, labels: Labels, ids: tuple[str, ...]) -> Tensor:
    """Sum over turns and documents of ``g g^T``."""
    parameters, total = list(model.parameters()), torch.zeros(())
    for losses in predictions.relabelled(labels, ids):
        for value in losses:
            grad = torch.autograd.grad(value, parameters, retain_graph=True)
            g = torch.cat([part.flatten() for part in grad])
            total = total + torch.outer(g, g)
    return total


@pytest.mark.parametrize("categorical", [True, False])
def test_exact_labels_make_the_gauss_newton_matrix(categorical: bool):
    model, objective, examples = supervised(categorical)
    batch = objective.collate(examples)
    predictions = objective.predictions(model, batch)
    found = second_moments(model, predictions, Labels("exact"), batch.ids)
    expected = torch.zeros_like(found)
    for row, jacobian in zip(predictions.outputs.detach(), jacobians(model, predictions.outputs), strict=True):
        p = row.softmax(0)
        middle = torch.diag(p) - torch.outer(p, p) if categorical else torch.eye(2, dtype=p.dtype)
        expected += jacobian.T @ middle @ jacobian
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    empirical = second_moments(model, predictions, Labels(), batch.ids)
    assert not torch.allclose(empirical, expected, rtol=0.1)


@pytest.mark.parametrize("categorical", [True, False])
def test_sampled_labels_estimate_the_exact_matrix_for_any_number_of_draws(categorical: bool):
    model, objective, examples = supervised(categorical)
    batch = objective.collate(examples)
    predictions = objective.predictions(model, batch)
    exact = second_moments(model, predictions, Labels("exact"), batch.ids)
    runs = torch.stack([second_moments(model, predictions, Labels("sampled", 10, s), batch.ids) for s in range(20)])
    error, spread = runs.mean(0) - exact, runs.std(0) / 20**0.5
    assert float((error.abs() / spread.clamp_min(1e-12)).median()) < 1.5
    assert float(error.norm() / exact.norm()) < 0.3
    assert float(error.trace().abs()) < 4 * float(runs.diagonal(dim1=1, dim2=2).sum(1).std()) / 20**0.5


def test_a_class_without_probability_adds_nothing():
    outputs = torch.tensor([[0.3, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for losses in categorical(outputs).relabelled(Labels("exact"), ["a"]):
        (g,) = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
        total += torch.outer(g[0], g[0])
    p = outputs.detach()[0].softmax(0)
    torch.testing.assert_close(total, torch.diag(p) - torch.outer(p, p))


def test_labels_that_cannot_be_are_refused():
    documents = torch.tensor([0, 0, 1])
    several = Predictions(torch.zeros(3, 2), documents, documents, 2)
    with pytest.raises(InputError, match="one target per document, got 3 targets of 2 documents; use 'sampled'"):
        list(several.relabelled(Labels("exact"), ["a", "b"]))
    gap = torch.tensor([0, 0])  # as many targets as documents, but two of one
    with pytest.raises(InputError, match="one target per document"):
        list(Predictions(torch.zeros(2, 2), gap, gap, 2).relabelled(Labels("exact"), ["a", "b"]))
    with pytest.raises(InputError, match="expected 'data', 'sampled' or 'exact', got 'true'"):
        Labels("true")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1 draw, got 0"):
        Labels("sampled", 0)
