"""Products with the Hessian and the Gauss-Newton matrix against matrices built by autograd, and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rootward.capture.hvp import CurvatureProducts
from rootward.capture.sites import track
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.core.layout import ParamLayout
from rootward.subject.encode import Example
from rootward.subject.objectives import Classification, Objective, Regression
from tests.capture import worlds as w

DOCUMENTS = w.documents((4, 3))


def vectors(layout: ParamLayout, count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(count, layout.size, generator=generator, dtype=torch.float64)
    return layout.unflatten(rows)


def every_parameter(model: nn.Module) -> ParamLayout:
    return ParamLayout.of(dict(model.named_parameters()))


def naive_hessian(model: nn.Module, objective: Objective, examples: Sequence[Example]) -> Tensor:
    """``[P, P]`` by differentiating the mean loss as a function of one vector."""
    layout = every_parameter(model)
    batch = objective.collate(examples)

    def loss(vector: Tensor) -> Tensor:
        class Called(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return torch.func.functional_call(model, layout.unflatten(vector), (x,))

        return objective.losses(Called(), batch).mean()

    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = torch.autograd.functional.hessian(loss, start)
    assert isinstance(found, Tensor)
    return found


def naive_ggn(model: nn.Module, objective: Objective, examples: Sequence[Example], names: Sequence[str]) -> Tensor:
    """Mean over documents of ``sum_t J^T B J`` with J an output and a target at a time."""
    model.eval()
    wanted = [dict(model.named_parameters())[name] for name in names]
    total = torch.zeros(sum(p.numel() for p in wanted), sum(p.numel() for p in wanted), dtype=torch.float64)
    for example in examples:
        predictions = objective.predictions(model, objective.collate([example]))
        for output in predictions.outputs:
            grads = [torch.autograd.grad(value, wanted, retain_graph=True) for value in output]
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]).detach()
            p = output.detach().softmax(0)
            middle = torch.diag(p) - torch.outer(p, p) if predictions.categorical else torch.eye(len(output)).to(p)
            total += jacobian.T @ middle @ jacobian
    return total / len(examples)


def regression() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    return w.pairs(
        torch.randn(4, 5, generator=generator, dtype=torch.float64),
        torch.randn(4, 3, generator=generator, dtype=torch.float64),
    )


def rows(layout: ParamLayout, named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].flatten(1) for name in layout.names], 1)


@pytest.mark.parametrize("budget", [1, 3, 100])
@pytest.mark.parametrize("objective", [Classification(), Regression()])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_small_network_against_dense_matrices(kind: Any, objective: Objective, budget: int):
    model = w.perceptron()
    examples = w.vectors() if isinstance(objective, Classification) else regression()
    layout = every_parameter(model)
    if kind == "hessian":
        matrix = naive_hessian(model, objective, examples)
    else:
        matrix = naive_ggn(model, objective, examples, layout.names)
    x = vectors(layout)
    found = CurvatureProducts(model, objective, examples, layout, kind, token_budget=budget)(x)
    torch.testing.assert_close(rows(layout, found), rows(layout, x) @ matrix, rtol=1e-9, atol=1e-9)


LANGUAGE: dict[str, tuple[Callable[[], nn.Module], str, float, float]] = {
    # step and tolerance: what works in float32 inside (Llama's norms) bounds what a difference of gradients can show
    "gpt2": (w.gpt2, r"0\.attn\.c_attn\.weight|ln_1\.weight|wte", 1e-5, 1e-6),
    "llama": (w.llama, r"0\.self_attn\.[qv]_proj|norm|1\.mlp\.down", 1e-4, 1e-3),
    "tied llama": (lambda: w.llama(tie_word_embeddings=True), "embed_tokens|1.self_attn", 1e-4, 1e-3),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_hessian_of_a_language_model_against_differences_of_gradients(name: str):
    make, parameters, step, tolerance = LANGUAGE[name]
    model, objective = make(), w.causal()
    layout = track(model, parameters).layout
    x = vectors(layout, 1)
    found = rows(layout, CurvatureProducts(model, objective, DOCUMENTS, layout, "hessian", token_budget=4)(x))
    sides = []
    with torch.no_grad():
        named = dict(model.named_parameters())
        for sign in (1, -2):
            for n in layout.names:
                named[n] += sign * step * x[n][0]
            with torch.enable_grad():
                sides.append(w.flat(w.naive(model, objective, DOCUMENTS, layout.names)).mean(0))
    expected = (sides[0] - sides[1]) / (2 * step)
    assert float((found[0] - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_gauss_newton_matrix_of_a_language_model_against_its_definition(name: str):
    make, parameters, _, _ = LANGUAGE[name]
    model, objective = make(), w.causal()
    layout = track(model, parameters).layout
    keep = layout.names[:1]  # the twin is slow
    layout = ParamLayout(keep, (layout.shape(keep[0]),))
    x = vectors(layout)
    found = CurvatureProducts(model, objective, DOCUMENTS, layout, token_budget=100)(x)
    expected = rows(layout, x) @ naive_ggn(model, objective, DOCUMENTS, layout.names)
    torch.testing.assert_close(rows(layout, found), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("make", [w.gpt2, w.llama, w.qwen3])
def test_products_are_symmetric_and_do_not_depend_on_batches_or_on_the_attention_in_use(
    kind: Any, make: Callable[..., nn.Module]
):
    model, layout = make(), track(make(), "attn").layout
    x, examples = vectors(layout), w.documents((5, 9, 3, 5))
    found = CurvatureProducts(model, w.causal(), examples, layout, kind, token_budget=100)(x)
    cross = rows(layout, x) @ rows(layout, found).T
    torch.testing.assert_close(cross, cross.T, rtol=1e-5, atol=1e-6 * float(cross.abs().max()))
    eager = make(attn_implementation="eager")
    for other, budget in ((model, 5), (eager, 100)):
        again = CurvatureProducts(other, w.causal(), examples, layout, kind, token_budget=budget)(x)
        for n in layout.names:
            torch.testing.assert_close(again[n], found[n], rtol=1e-5, atol=1e-6 * float(found[n].abs().max()))


def test_with_linear_outputs_the_two_matrices_are_one():
    model = nn.Linear(5, 3).double()
    layout, x = every_parameter(model), vectors(every_parameter(model))
    both = [
        CurvatureProducts(model, Classification(), w.vectors(), layout, k, token_budget=9)(x)
        for k in ("hessian", "ggn")
    ]
    for name in layout.names:
        torch.testing.assert_close(both[0][name], both[1][name], rtol=1e-10, atol=1e-12)


def test_a_subset_depends_on_seed_and_content_alone():
    model, examples = w.perceptron(), w.vectors()
    layout = every_parameter(model)
    x = vectors(layout)
    whole = CurvatureProducts(model, Classification(), examples, layout, token_budget=9)
    turned = CurvatureProducts(model, Classification(), examples[::-1], layout, token_budget=9)
    chosen = whole.subset(3, seed=1)
    assert len({e.id for e in chosen.examples}) == 3
    for name, value in chosen(x).items():
        torch.testing.assert_close(value, turned.subset(3, seed=1)(x)[name], rtol=1e-12, atol=1e-14)
    assert {tuple(e.id for e in whole.subset(3, seed=s).examples) for s in range(9)} != {
        tuple(e.id for e in chosen.examples)
    }
    assert whole.subset(None) is whole
    assert whole.subset(6) is whole


def test_drawn_products_are_unbiased_and_the_same_for_a_seed():
    model, examples = w.perceptron(), w.vectors()
    layout = every_parameter(model)
    x = vectors(layout, 1)
    whole = CurvatureProducts(model, Classification(), examples, layout, token_budget=9)
    draw = whole.drawing(2, seed=3)
    along = torch.stack([(rows(layout, draw(x)) * rows(layout, x)).sum() for _ in range(300)])
    exact = float((rows(layout, whole(x)) * rows(layout, x)).sum())
    error = float(along.std()) / 300**0.5
    assert abs(float(along.mean()) - exact) < 4 * error
    assert error < 0.1 * exact
    turned = CurvatureProducts(model, Classification(), examples[::-1], layout, token_budget=9)
    torch.testing.assert_close(rows(layout, turned.drawing(2, seed=3)(x)), rows(layout, whole.drawing(2, seed=3)(x)))
    first, second = whole.drawing(2, seed=3)(x), whole.drawing(2, seed=4)(x)
    assert torch.equal((rows(layout, first) * rows(layout, x)).sum(), along[0])
    assert not torch.equal(rows(layout, first), rows(layout, second))


def test_single_precision_stays_and_solvers_are_told_of_it():
    model = w.perceptron(torch.float32)
    layout = every_parameter(model)
    products = CurvatureProducts(model, Classification(), w.vectors(), layout)
    x = {n: v.float() for n, v in vectors(layout).items()}
    assert {v.dtype for v in products(x).values()} == {torch.float32}
    assert {n: tuple(v.shape) for n, v in products.like().items()} == {n: (1, *layout.shape(n)) for n in layout.names}
    assert {v.dtype for v in products.like().values()} == {torch.float32}
    assert products.budget >= 1
    half = w.perceptron(torch.bfloat16)
    assert {v.dtype for v in CurvatureProducts(half, Classification(), w.vectors(), layout).like().values()} == {
        torch.float32
    }


def test_the_model_is_left_as_it_was():
    model = w.llama()
    model.train()
    model.model.layers[0].eval()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    layout = track(model, "mlp").layout
    before = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    products = CurvatureProducts(model, w.causal(), DOCUMENTS, layout, "hessian")
    products(vectors(layout))

    def stop(task: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CurvatureProducts(model, w.causal(), DOCUMENTS, layout, "ggn", progress=stop)(vectors(layout))
    assert [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()] == before
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_document_whose_loss_is_not_finite_is_named(kind: Any):
    model, examples = w.perceptron(), w.vectors()
    examples[4].x[0] = torch.nan
    layout = every_parameter(model)
    with pytest.raises(NumericalError, match=r"first document d4 \(row 4\)"):
        CurvatureProducts(model, Classification(), examples, layout, kind)(vectors(layout))


class Steep(nn.Module):
    """Finite losses with an infinite slope at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).abs().sqrt()


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_that_are_not_finite_are_errors(kind: Any):
    model, examples = Steep(), w.vectors()
    examples[1].x[:] = 0
    layout = every_parameter(model)
    with pytest.raises(NumericalError, match="product: the entries of linear.weight are not finite"):
        CurvatureProducts(model, Classification(), examples, layout, kind)(vectors(layout))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class OnceOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(self.linear(x))


def test_what_cannot_be_done_is_refused():
    layout = every_parameter(w.perceptron())
    with pytest.raises(InputError, match="at least one document"):
        CurvatureProducts(w.perceptron(), Classification(), [], layout)
    with pytest.raises(InputError, match="expected kind"):
        CurvatureProducts(w.perceptron(), Classification(), w.vectors(), layout, "fisher")  # type: ignore[arg-type]
    whole = CurvatureProducts(w.perceptron(), Classification(), w.vectors(), layout)
    for call in (whole.subset, whole.drawing):
        with pytest.raises(InputError, match="at least 1 document"):
            call(0)
    once, linear = OnceOnly(), every_parameter(OnceOnly())
    for kind in ("hessian", "ggn"):
        with pytest.raises(ArtefactError, match="an operation without a second derivative"):
            CurvatureProducts(once, Classification(), w.vectors(), linear, kind)(vectors(linear))
    model = w.llama()
    model.config._attn_implementation = "flash_attention_2"
    some = track(model, "mlp").layout
    with pytest.raises(ArtefactError, match=r"expected a model with attention 'eager' or 'sdpa', got 'flash"):
        CurvatureProducts(model, w.causal(), DOCUMENTS, some)(vectors(some))
    unused = nn.ModuleDict({"used": nn.Linear(5, 3).double(), "unused": nn.Linear(5, 3).double()})
    unused.forward = unused["used"].forward
    dead = ParamLayout(("unused.weight",), ((3, 5),))
    for kind in ("hessian", "ggn"):
        with pytest.raises(ArtefactError, match="does not depend on any attributed parameter"):
            CurvatureProducts(unused, Classification(), w.vectors(), dead, kind)(vectors(dead))


def test_a_parameter_that_is_not_used_has_a_product_of_zero():
    both = nn.ModuleDict({"used": nn.Linear(5, 3).double(), "unused": nn.Linear(5, 3).double()})
    both.forward = both["used"].forward
    layout = every_parameter(both)
    for kind in ("hessian", "ggn"):
        found = CurvatureProducts(both, Classification(), w.vectors(), layout, kind)(vectors(layout))
        assert not found["unused.weight"].any()
        assert found["used.weight"].any()
