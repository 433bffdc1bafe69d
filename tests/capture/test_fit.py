"""Fits: where they are exact, how many documents they take, going on after a stop, and what can go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import rootward.capture.fit as fits
from rootward.capture.fit import Fit, FitConfig, Fitted
from rootward.capture.fitparts import Parts
from rootward.capture.moments import CovarianceSums
from rootward.capture.run import run_pass
from rootward.capture.sites import track
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import DEFAULT, Damping
from rootward.curvature.kronecker import Covariances, KroneckerCurvature, flat
from rootward.subject.encode import Example
from rootward.subject.objectives import Classification, Objective, Regression
from tests.capture import worlds as w
from tests.capture.test_hvp import naive_ggn

KINDS = ("ekfac", "kfac", "diagonal")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(count: int, width: int = 5, seed: int = 4) -> list[Example]:
    return w.pairs(randn(count, width, seed=seed), torch.arange(count) % 3)


def fit(
    model: nn.Module,
    examples: Sequence[Example],
    objective: Objective | None = None,
    *,
    damping: Damping = DEFAULT,
    budget: int = 100,
    parameters: str = ".*",
    parts: Parts | None = None,
    progress: Any = None,
    **config: Any,
) -> Fitted:
    return Fit(
        model,
        objective or Classification(),
        examples,
        track(model, parameters),
        FitConfig(**config),
        damping,
        budget,
        progress or (lambda task, done, total: None),
        parts,
    ).run()


def solved(curvature: KroneckerCurvature, count: int = 4) -> Tensor:
    """``[q, p]``: what the curvature makes of random vectors."""
    found = curvature.apply(curvature.layout.unflatten(randn(count, curvature.layout.size, seed=8)))
    return torch.cat([found[name].flatten(1) for name in curvature.layout.names], 1)


def exactly(layout: ParamLayout, matrix: Tensor, damping: Damping, count: int = 4) -> Tensor:
    """The same with a dense matrix."""
    lam = damping.relative * float(matrix.diagonal().mean())
    unit = torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(matrix + lam * unit, randn(count, layout.size, seed=8).T).T


def close(a: Tensor, b: Tensor, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def regression(count: int = 9) -> tuple[nn.Module, list[Example]]:
    torch.manual_seed(0)
    return nn.Linear(4, 3, bias=False).double(), w.pairs(randn(count, 4), randn(count, 3, seed=1))


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_linear_regression_is_exact(kind: str):
    """Its Gauss-Newton matrix is the unit matrix of the outputs times the covariance of the inputs."""
    model, examples = regression()
    found = fit(model, examples, Regression(), kind=kind)
    matrix = naive_ggn(model, Regression(), examples, found.curvature.layout.names)
    close(solved(found.curvature), exactly(found.curvature.layout, matrix, Damping()))
    assert found.record.labels == "exact"


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_a_layer_of_classes_is_exact_for_a_single_document(kind: str):
    torch.manual_seed(0)
    model, examples = nn.Linear(5, 3, bias=False).double(), points(1)
    found = fit(model, examples, kind=kind)
    matrix = naive_ggn(model, Classification(), examples, found.curvature.layout.names)
    close(solved(found.curvature), exactly(found.curvature.layout, matrix, Damping()))
    assert found.record.agreement is None


def test_corrected_eigenvalues_have_the_diagonal_of_the_gauss_newton_matrix_in_their_basis():
    model, examples = w.perceptron(), points(30)
    found = fit(model, examples).curvature
    matrix = naive_ggn(model, Classification(), examples, found.layout.names)
    for name, part in found.layout.slices.items():
        left, right = (
            torch.eye(d, dtype=torch.float64) if side is None else side
            for side, d in zip(found.blocks[name].basis, flat(found.layout, name), strict=True)
        )
        basis = torch.kron(left, right)
        close((basis.T @ matrix[part, part] @ basis).diagonal(), found.blocks[name].eigenvalues.flatten())


def test_a_diagonal_is_that_of_the_squares():
    model, examples = w.gpt2(), w.documents((5, 9, 3, 4))
    found = fit(model, examples, w.causal(), kind="diagonal", labels="data", parameters="h.1").curvature
    gradients = w.naive(model, w.causal(), examples, found.layout.names)
    for name in found.layout.names:
        close(found.blocks[name].eigenvalues.view(found.layout.shape(name)), gradients[name].square().mean(0))


def test_identity_runs_nothing():
    model, examples = regression()
    next(model.parameters()).data.fill_(torch.nan)
    found = fit(model, examples, Regression(), kind="identity")
    assert (found.curvature.kind, found.record.documents) == ("identity", 0)


def test_labels_of_choice():
    model, examples = w.perceptron(), points(3)
    assert isinstance(model, nn.Sequential)
    tracked = track(model, ".*")
    model.train()
    model[0].eval()

    def labels(objective: Objective, examples: Sequence[Example], model: nn.Module = model, **config: Any) -> Any:
        found = Fit(model, objective, examples, tracked, FitConfig(**config)).labels()
        return found.kind, found.draws, found.seed

    assert labels(Classification(), examples, draws=3, seed=2) == ("exact", 1, 2)
    assert labels(Classification(), examples, draws=3, labels="sampled") == ("sampled", 3, 0)
    assert labels(Classification(), examples, draws=3, labels="data") == ("data", 1, 0)
    assert labels(Classification(), examples, nn.Linear(5, 33).double()) == ("sampled", 1, 0)
    assert labels(w.causal(), w.documents((4, 3)), w.gpt2(), draws=2) == ("sampled", 2, 0)
    assert [model.training, model[0].training, model[1].training] == [True, False, True]
    with pytest.raises(InputError, match="one target per document"):
        fit(w.gpt2(), w.documents((4, 3)), w.causal(), labels="exact")
    with pytest.raises(ValidationError):
        FitConfig(nonsense=1)  # type: ignore[call-arg]


def test_documents_are_added_until_the_halves_agree():
    model, examples = w.perceptron(), points(400)
    used = {target: fit(model, examples, agreement=target).record for target in (0.5, 0.98, 0.997, 0.99999)}
    numbers = [record.documents for record in used.values()]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (64, 400)
    assert 64 < numbers[2] < 400
    assert all(record.half_agreement is not None and record.agreement is not None for record in used.values())
    assert "Estimated correlation" in used[0.98].note
    few = fit(model, examples[:7], agreement=0.99999).record
    assert (few.documents, few.total_documents, few.covariance_documents) == (7, 7, 7)


def test_what_is_asked_for_is_what_is_used():
    seen: dict[str, int] = {}

    def note(task: str, done: int, total: int) -> None:
        seen[task] = seen.get(task, 0) + (total if done == total else 0)

    record = fit(w.perceptron(), points(50), documents=11, covariance_documents=6, progress=note).record
    assert (record.documents, record.covariance_documents) == (11, 6)
    assert seen == {"covariances": 6, "eigenvalues": 11}
    assert (record.kind, record.total_documents) == ("ekfac", 50)
    for text in ("ekfac from 11 of 50 documents", "covariances from 6", "every label by its probability"):
        assert text in record.note


class Passes(Fit):
    """A fit that notes what it ran."""

    ran: ClassVar[list[tuple[str, tuple[str, ...], bool]]] = []

    def feed(self, rows: Sequence[int], sinks: Sequence[Any], labels: Any, task: str) -> None:
        self.ran.append((task, tuple(self.examples[n].id for n in rows), any(sink.backward for sink in sinks)))
        super().feed(rows, sinks, labels, task)


def test_each_statistic_has_documents_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Inputs from the most by a forward pass, output gradients from a few, eigenvalues from others first."""
    monkeypatch.setattr(fits, "FIRST", 6)
    monkeypatch.setattr(fits, "INPUTS", 4)
    monkeypatch.setattr(fits, "OUTPUTS", 1)
    monkeypatch.setattr(Passes, "ran", [])
    model, examples = w.llama(), w.documents([3 + n % 5 for n in range(60)])
    tracked = track(model, r"layers\.0.*proj")
    found = Passes(model, w.causal(), examples, tracked, FitConfig(labels="data", documents=20), token_budget=40).run()
    by_task: dict[tuple[str, bool], list[str]] = {}
    for task, ids, backward in Passes.ran:
        by_task.setdefault((task, backward), []).extend(ids)
    few, others = by_task["covariances", True], by_task["covariances of inputs", False]
    squares = by_task["eigenvalues", True]
    assert (found.record.covariance_documents, found.record.documents) == (len(few) + len(others), 20)
    assert 6 <= len(few) < len(others) < 60 - len(few)
    assert not set(few) & {*others, *squares}
    assert len(set(squares)) == 20 == len(squares)

    def covariances(ids: Sequence[str], sides: Any) -> Covariances:
        sink = CovarianceSums(tracked.layout, sides)
        chosen = [example for example in examples if example.id in ids]
        run_pass(model, w.causal(), chosen, [sink], tracked=tracked, token_budget=1000)
        return sink.result()

    inputs, outputs = covariances([*few, *others], "inputs"), covariances(few, "outputs")
    gradients = w.naive(model, w.causal(), [e for e in examples if e.id in squares], tracked.layout.names)
    for name in tracked.layout.names:
        left, right = found.curvature.blocks[name].basis
        assert left is not None and right is not None
        for basis, one, key in ((left, outputs, outputs.left[name]), (right, inputs, inputs.right[name])):
            assert key is not None
            turned = basis.T @ one.sides[key].moment @ basis
            close(turned, turned.diagonal().diag())
        expected = (left.T @ gradients[name] @ right).square().mean(0)
        close(found.curvature.blocks[name].eigenvalues, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_documents_does_not_matter_to_the_bit(kind: str):
    model, examples = w.gpt2(), w.documents([3 + n % 5 for n in range(20)])
    options: Any = {"kind": kind, "parameters": "h.1", "documents": 12, "covariance_documents": 8, "budget": 30}
    first = fit(model, examples, w.causal(), **options)
    turned = [replace(example, row=n) for n, example in enumerate(examples[::-1])]
    second = fit(model, turned, w.causal(), **options)
    same(first.curvature, second.curvature)
    other = fit(model, examples, w.causal(), **options, seed=1)
    assert not torch.allclose(solved(first.curvature), solved(other.curvature), rtol=0.01)


def same(a: KroneckerCurvature, b: KroneckerCurvature) -> None:
    for name in a.layout.names:
        assert torch.equal(a.blocks[name].eigenvalues, b.blocks[name].eigenvalues)
        for mine, theirs in zip(a.blocks[name].basis, b.blocks[name].basis, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_matter(kind: str):
    model, examples = w.gpt2(), w.documents([3 + n % 5 for n in range(12)])
    options: Any = {"kind": kind, "parameters": "h.1.*(c_proj|ln)"}
    whole = fit(model, examples, w.causal(), budget=1000, **options)
    for budget in (1, 30):
        other = fit(model, examples, w.causal(), budget=budget, **options)
        close(solved(other.curvature), solved(whole.curvature), 1e-6)
        assert other.record.documents == whole.record.documents


class Stop:
    """Raises in the middle of the second pass of a kind; ``tasks`` are the passes that were begun."""

    def __init__(self, task: str | None = None, nth: int = 1) -> None:
        self.task, self.nth, self.tasks = task, nth, list[str]()
        self.last = 0

    def __call__(self, task: str, done: int, total: int) -> None:
        if not self.tasks or self.tasks[-1] != task or done <= self.last:
            self.tasks.append(task)
        self.last = done
        if self.tasks.count(task) == self.nth and task == self.task and done < total:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("task", "nth", "left"),
    [("covariances of inputs", 1, 5), ("covariances", 2, 4), ("eigenvalues", 1, 2), ("eigenvalues", 2, 1)],
)
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, task: str, nth: int, left: int):
    model, examples = w.perceptron(), points(300)
    options: Any = {"agreement": 0.9999, "budget": 16}
    whole = fit(model, examples, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(model, examples, parts=Parts(tmp_path, "key"), progress=Stop(task, nth), **options)
    log = Stop()
    again = fit(model, examples, parts=Parts(tmp_path, "key"), progress=log, **options)
    same(again.curvature, whole.curvature)
    assert len(log.tasks) == left
    changed = {"seconds": {}}
    assert again.record.model_copy(update=changed) == whole.record.model_copy(update=changed)
    assert not list(tmp_path.glob(".*"))
    nothing = Stop()
    same(fit(model, examples, parts=Parts(tmp_path, "key"), progress=nothing, **options).curvature, whole.curvature)
    assert nothing.tasks == []
    Parts(tmp_path, "key").clear()
    assert not list(tmp_path.iterdir())


def test_parts_of_another_fit_are_not_taken(tmp_path: Path):
    examples, other = points(20), w.scattered(w.perceptron())
    fit(w.perceptron(), examples, parts=Parts(tmp_path, "one"))
    found = fit(other, examples, parts=Parts(tmp_path, "two"))
    same(found.curvature, fit(other, examples).curvature)


@pytest.mark.parametrize("name", ["covariances-outputs-few-0", "moments"])
@pytest.mark.parametrize("damage", ["cut", "nonsense"])
def test_a_damaged_part_is_named(tmp_path: Path, name: str, damage: str):
    model, examples = w.perceptron(), points(20)
    fit(model, examples, parts=Parts(tmp_path, "key"))
    (path,) = tmp_path.glob(f"{name}*")
    path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"nonsense")
    with pytest.raises(ArtefactError, match=f"{path.name}: damaged .*remove it"):
        fit(model, examples, parts=Parts(tmp_path, "key"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_is_not_finite_is_named(kind: str):
    examples = points(12)
    broken = examples[7]
    assert broken.x is not None
    broken.x[2] = torch.nan
    with pytest.raises(NumericalError, match=f"first document {broken.id} "):
        fit(w.perceptron(), examples, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_is_named(kind: str):
    """The square root's slope at 0 is infinite; the loss is not."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4, bias=False).double(), nn.Linear(4, 3, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).abs().sqrt())

    examples = points(12)
    broken = examples[7]
    assert broken.x is not None
    broken.x.zero_()
    with pytest.raises(NumericalError, match=f"gradients of 1 .*first document {broken.id} .*skip_not_finite"):
        fit(Root(), examples, kind=kind)


class Lazy(nn.Module):
    """Layers that never run, that run for nothing, and that are given nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.ignored, self.starved = (nn.Linear(5, 5, bias=False) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + 0 * self.ignored(x) + self.starved(0 * x))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_a_gradient_are_reported_and_score_nothing(kind: str):
    torch.manual_seed(0)
    found = fit(Lazy().double(), points(12), kind=kind)
    dead = ("unused.weight", "ignored.weight", "starved.weight")
    assert found.record.dead == found.curvature.dead == dead
    assert "No curvature in 3 parameters, first unused.weight" in found.record.note
    layout = found.curvature.layout
    values = found.curvature.apply(layout.unflatten(randn(2, layout.size)))
    for name, value in values.items():
        assert bool(torch.isfinite(value).all())
        assert bool(value.any()) == (name not in dead)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_few_documents(kind: str, count: int):
    """Covariances of a rank below their width, and more queries than documents."""
    found = fit(w.perceptron(), points(count), kind=kind)
    assert bool(torch.isfinite(solved(found.curvature, 10)).all())
    assert found.record.documents == count
    if kind != "kfac":
        assert (found.record.agreement is None) == (count < 4)
    assert all(bool((block.eigenvalues >= 0).all()) for block in found.curvature.blocks.values())


def test_no_documents_are_refused():
    with pytest.raises(InputError, match="expected at least one document, got none"):
        fit(w.perceptron(), [])


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_inputs_that_are_all_the_same_or_zero(kind: str):
    torch.manual_seed(0)
    for x in (torch.ones(6, 5).double(), torch.zeros(6, 5).double()):
        model = nn.Linear(5, 3).double()
        found = fit(model, w.pairs(x, torch.arange(6) % 3), kind=kind)
        assert bool(torch.isfinite(solved(found.curvature)).all())
        assert found.record.dead == (() if bool(x.any()) else ("weight",))


def test_an_eigendecomposition_that_fails_once_is_retried_and_reported(monkeypatch: pytest.MonkeyPatch):
    model, examples = w.perceptron(), points(30)
    before = fit(model, examples)
    assert before.record.jittered == ()
    real, calls = torch.linalg.eigh, list[int]()

    def failing(matrix: Tensor) -> Any:
        calls.append(len(matrix))
        if len(calls) == 2:
            raise RuntimeError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = fit(model, examples)
    assert len(found.record.jittered) == 1
    assert f"only with a jitter: {found.record.jittered[0]}" in found.record.note
    close(solved(found.curvature), solved(before.curvature), 1e-4)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (_ for _ in ()).throw(RuntimeError("never")))
    with pytest.raises(NumericalError, match=r"weight:(left|right): the eigendecomposition .* failed"):
        fit(model, examples)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_tables_alone(kind: str):
    model, examples = w.gpt2(tie_word_embeddings=False), w.documents((5, 9, 3))
    found = fit(model, examples, w.causal(), parameters="wte|wpe", kind=kind)
    assert len(found.curvature.layout.names) == 2
    assert bool(torch.isfinite(solved(found.curvature)).all())
