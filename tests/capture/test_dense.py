"""Exact curvatures against matrices from autograd, one document, target and output at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rootward.capture import dense as dense_room
from rootward.capture.dense import exact_curvature, gram_curvature, low_rank_curvature
from rootward.capture.sites import Tracked, track
from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature import gram as gram_room
from rootward.curvature.base import Damping
from rootward.curvature.dense import DenseCurvature
from rootward.subject.objectives import Classification, Regression
from rootward.subject.predictions import Labels
from tests.capture import worlds as w
from tests.capture.test_hvp import Steep, naive_ggn, naive_hessian, regression, vectors

OBJECTIVES = {"classes": (Classification(), w.vectors), "squares": (Regression(), regression)}


def _with_tracked(objective: Any, examples: Any) -> Any:
    model, tracked = tracked_perceptron()
    return model, objective, examples, tracked


def tracked_perceptron() -> tuple[nn.Module, Tracked]:
    model = w.perceptron()
    return model, track(model, ".*")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical", "hessian"])
def test_every_kind_is_the_matrix_it_says(kind: Any, name: str):
    model, tracked = tracked_perceptron()
    objective, make = OBJECTIVES[name]
    examples = make()
    if kind == "empirical":
        each = w.flat(w.naive(model, objective, examples, tracked.layout.names))
        expected = each.T @ each / len(examples)
    elif kind == "hessian":
        expected = naive_hessian(model, objective, examples)
    else:
        expected = naive_ggn(model, objective, examples, tracked.layout.names)
    found = exact_curvature(model, objective, examples, tracked, kind, token_budget=3, damping=Damping(0.0, 0.5))
    torch.testing.assert_close(found.matrix(), expected, rtol=1e-8, atol=1e-10)
    assert (found.source, found.damping.absolute, found.layout) == (kind, 0.5, tracked.layout)


def test_documents_of_several_targets_have_the_sum_over_them():
    model, examples = w.gpt2(), w.documents((4, 3, 5))
    tracked = track(model, r"1\.attn\.c_proj\.weight")
    found = exact_curvature(model, w.causal(), examples, tracked)
    expected = naive_ggn(model, w.causal(), examples, tracked.layout.names)
    torch.testing.assert_close(found.matrix(), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_a_weight_that_is_used_twice_has_one_gradient():
    model, examples = w.gpt2(), w.documents((4, 3, 5))
    tracked = track(model, "wte")
    each = w.flat(w.naive(model, w.causal(), examples, tracked.layout.names))
    gram = gram_curvature(model, w.causal(), examples, tracked)
    torch.testing.assert_close(gram.rows.T @ gram.rows, each.T @ each, rtol=1e-8, atol=1e-8)


def test_drawn_labels_estimate_the_same_matrix():
    """The error falls as one over the root of the draws; the documents' own labels are another matrix."""
    model, examples = w.gpt2(), w.documents((4, 3, 5))
    tracked = track(model, r"1\.attn\.c_proj\.bias")
    exact = exact_curvature(model, w.causal(), examples, tracked).matrix()

    def error(kind: Any, labels: Labels | None = None) -> float:
        found = exact_curvature(model, w.causal(), examples, tracked, kind, labels=labels).matrix()
        return float((found - exact).norm() / exact.norm())

    few = [error("fisher", Labels("sampled", 2, seed)) for seed in range(4)]
    many = [error("fisher", Labels("sampled", 128, seed)) for seed in range(4)]
    assert 4 < sum(few) / sum(many) < 16  # 8 in the mean
    assert error("empirical") > 2 * max(many)
    one = exact_curvature(model, w.causal(), examples, tracked, "fisher").matrix()
    torch.testing.assert_close(
        one, exact_curvature(model, w.causal(), examples, tracked, "fisher", labels=Labels("sampled")).matrix()
    )


def test_a_model_in_training_mode_is_judged_in_evaluation_mode_and_left_as_it_was():
    """A batch norm in training mode refuses a batch of one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    tracked, examples = track(model.eval(), r"[02]\.weight"), w.vectors()
    expected = exact_curvature(model, Classification(), examples, tracked).matrix()
    model.train()
    found = exact_curvature(model, Classification(), examples, tracked)
    assert model.training and model[1].training
    torch.testing.assert_close(found.matrix(), expected)
    gram = gram_curvature(model, Classification(), examples, tracked, "ggn")
    torch.testing.assert_close(gram.rows.T @ gram.rows / len(examples), expected)


def test_many_labels_are_not_gone_through(monkeypatch: pytest.MonkeyPatch):
    model, tracked = tracked_perceptron()
    arguments = model, Classification(), w.vectors(), tracked
    exact = exact_curvature(*arguments).matrix()
    monkeypatch.setattr(dense_room, "MOST_LABELS", 2)
    torch.testing.assert_close(exact_curvature(*arguments).matrix(), exact, rtol=1e-8, atol=1e-10)
    drawn = exact_curvature(*arguments, "fisher").matrix()
    assert float((drawn - exact).norm() / exact.norm()) > 0.1
    asked = exact_curvature(*arguments, "fisher", labels=Labels("exact")).matrix()
    torch.testing.assert_close(asked, exact, rtol=1e-8, atol=1e-10)
    with pytest.raises(InputError, match="at most 2 labels"):
        gram_curvature(*arguments, "ggn")


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_gram_curvature_is_the_exact_one(kind: Any, count: int):
    model, tracked = tracked_perceptron()
    arguments = (model, Classification(), w.vectors()[:count], tracked, kind)
    x = vectors(tracked.layout, 5)  # more queries than documents
    gram = gram_curvature(*arguments, token_budget=2, damping=Damping(0.1))
    assert len(gram.rows) == count * (1 if kind == "empirical" else 3)
    for power in (-1.0, -0.5, 0.5):
        a, b = gram.apply(x, power), exact_curvature(*arguments, damping=Damping(0.1)).apply(x, power)
        for name in tracked.layout.names:
            torch.testing.assert_close(a[name], b[name], rtol=1e-7, atol=1e-7 * float(b[name].abs().max()))


def test_the_gram_curvature_of_a_language_model_takes_drawn_labels():
    model, examples = w.gpt2(), w.documents((4, 3, 5))
    tracked = track(model, r"1\.attn\.c_proj\.bias")
    gram = gram_curvature(model, w.causal(), examples, tracked, "fisher", labels=Labels("sampled", 3, 1))
    exact = exact_curvature(model, w.causal(), examples, tracked, "fisher", labels=Labels("sampled", 3, 1))
    assert gram.rows.shape == (9, 16)
    torch.testing.assert_close(gram.rows.T @ gram.rows / 3, exact.matrix(), rtol=1e-8, atol=1e-10)


class Untouched(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it was run")


def test_too_much_is_refused_before_anything_is_run(monkeypatch: pytest.MonkeyPatch):
    model = Untouched(130)
    with pytest.raises(InputError, match=r"at most 12,000 parameters, got 13,000, whose matrix would need 5.41 GB"):
        exact_curvature(model, Classification(), w.vectors(), track(model))
    monkeypatch.setattr(dense_room, "free_memory", lambda device: 9_999)
    small = Untouched(5)
    with pytest.raises(InputError, match=r"6 documents with 1 rows of 500 entries need 2.52e-05 GB"):
        gram_curvature(small, Classification(), w.vectors(), track(small))
    perceptron, tracked = tracked_perceptron()
    with pytest.raises(InputError, match="6 documents with 3 rows of 115 entries"):
        gram_curvature(perceptron, Classification(), w.vectors(), tracked, "ggn")
    monkeypatch.undo()
    monkeypatch.setattr(gram_room, "LARGEST", 17)  # 18 rows
    monkeypatch.setattr(dense_room, "_pass", lambda *_: pytest.fail("it was run"))
    with pytest.raises(InputError, match=r"gram: 18 rows \(documents x labels\) of 115 entries: expected at most 17"):
        gram_curvature(perceptron, Classification(), w.vectors(), tracked, "ggn")
    with pytest.raises(InputError, match=r"low rank: 18 rows .* of 49 entries"):
        low_rank_curvature(perceptron, Classification(), w.vectors(), tracked, 2, "ggn")


def test_with_more_rows_than_parameters_it_is_the_same_matrix():
    """18 rows of 15 entries, and of 5 and 3 of them in blocks."""
    model, examples = nn.Linear(5, 3).double(), w.vectors()
    tracked = track(model, ".*")
    x = vectors(tracked.layout, 4)
    exact = exact_curvature(model, Classification(), examples, tracked)
    gram = gram_curvature(model, Classification(), examples, tracked, "ggn")
    assert len(gram.rows) == len(gram.eigenvalues) == tracked.layout.size
    torch.testing.assert_close(gram.rows.T @ gram.rows / len(examples), exact.matrix(), rtol=1e-8, atol=1e-10)
    for power in (-1.0, -0.5, 0.5):
        a, b = (c.apply(x, power, Damping(0.1)) for c in (gram, exact))
        for name in tracked.layout.names:
            torch.testing.assert_close(a[name], b[name], rtol=1e-7, atol=1e-7)


def test_what_has_no_matrix_is_refused():
    model, tracked = tracked_perceptron()
    for function in (exact_curvature, gram_curvature):
        with pytest.raises(InputError, match="at least one document"):
            function(model, Classification(), [], tracked)
        with pytest.raises(InputError, match="got 'nonsense'"):
            function(model, Classification(), w.vectors(), tracked, "nonsense")
    with pytest.raises(InputError, match="gram: a Hessian has no rows"):
        gram_curvature(model, Classification(), w.vectors(), tracked, "hessian")  # type: ignore[arg-type]
    language = w.gpt2()
    with pytest.raises(InputError, match="documents with several targets"):
        gram_curvature(language, w.causal(), w.documents((4, 5)), track(language), "ggn")
    with pytest.raises(InputError, match="one target per document"):
        exact_curvature(
            language,
            w.causal(),
            w.documents((9,)),
            track(language, r"1\.attn\.c_proj\.bias"),
            "fisher",
            labels=Labels("exact"),
        )
    curvature = exact_curvature(model, Classification(), w.vectors(), tracked)
    other = ParamLayout(tracked.layout.names[:1], tracked.layout.shapes[:1])
    with pytest.raises(LayoutMismatch, match="first that differs"):
        curvature.apply(vectors(other))


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_a_document_that_is_not_finite_is_named(kind: Any):
    model, tracked = tracked_perceptron()
    examples = w.vectors()
    examples[2].x[0] = torch.nan
    for function in (exact_curvature, gram_curvature):
        with pytest.raises(NumericalError, match="document d2"):
            function(model, Classification(), examples, tracked, kind)
    steep, still = Steep(), w.vectors()
    still[4].x[:] = 0  # a finite loss, but no finite gradient
    for function in (exact_curvature, gram_curvature):
        with pytest.raises(NumericalError, match="gradients of 1 documents are not finite, first document d4"):
            function(steep, Classification(), still, track(steep, ".*"), kind)


def test_a_model_in_single_precision_is_summed_in_double():
    model = w.perceptron(torch.float32)
    tracked = track(model, ".*")
    found = exact_curvature(model, Classification(), w.vectors(), tracked)
    double = exact_curvature(*_with_tracked(Classification(), w.vectors()))
    assert found.eigenvalues.dtype == torch.float64
    torch.testing.assert_close(found.matrix(), double.matrix(), rtol=1e-4, atol=1e-5)
    assert isinstance(found, DenseCurvature)
