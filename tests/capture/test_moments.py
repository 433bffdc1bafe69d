"""Covariances and second moments against plain autograd and hooks, one document at a time."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rootward.capture import moments as room
from rootward.capture.moments import CovarianceSums, SecondMoments
from rootward.capture.run import run_pass
from rootward.capture.sinks import BaseSink
from rootward.capture.sites import Tracked, track
from rootward.core.block import Block, Factor, LookupFactor, MatrixFactor, VectorFactor
from rootward.core.errors import ArtefactError, LayoutMismatch
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping
from rootward.curvature.kronecker import Basis, Covariances, Eigenbases, flat
from rootward.subject.encode import Example
from rootward.subject.objectives import Classification, Objective
from rootward.subject.predictions import Labels
from tests.capture import worlds as w
from tests.capture.test_factors import WORLDS

LENGTHS = (5, 11, 3, 8, 11, 2)
DATA = Labels()


@dataclass
class Sides:
    """Rows of one parameter, one token after the other; a table's left side is counts or squares ``[m, v]``."""

    left: list[Tensor] = field(default_factory=list[Tensor])
    right: list[Tensor] = field(default_factory=list[Tensor])
    tokens: int = 0


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """``[places, c * h * w]``: what the first output channel depends on at each place, by autograd."""
    values = module(x)[0, 0].flatten()
    rows = [torch.autograd.grad(value, module.weight, retain_graph=True)[0][0].flatten() for value in values]
    return torch.stack(rows)


def rows_of(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor | None, Tensor]:
    """Rows of inputs (none for a table) and of output gradients of one call for one document."""
    if isinstance(module, nn.Embedding):
        kept = x.flatten() != (-1 if module.padding_idx is None else module.padding_idx)
        return None, g.flatten(0, -2) * kept.unsqueeze(1)
    if isinstance(module, nn.Conv2d):
        return patches(module, x), g[0].flatten(1).T
    return x.flatten(0, -2), g.flatten(0, -2)


def twin(
    model: nn.Module, objective: Objective, examples: Sequence[Example], names: Sequence[str], labels: Labels = DATA
) -> dict[str, Sides]:
    """Every document alone; inputs and output gradients of every module by hooks, vectors by autograd."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    found: dict[str, Sides] = defaultdict(Sides)
    calls: list[tuple[nn.Module, Tensor, list[Tensor]]] = []

    def note(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
        gradients: list[Tensor] = []
        output.register_hook(lambda g: gradients.append(g.clone()))
        calls.append((module, (inputs[0] if inputs else named["input"]).detach().clone(), gradients))

    kinds = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules() if isinstance(m, kinds)]
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    for example in examples:
        calls.clear()
        batch = replace(objective.collate([example]), keep=None)  # a head sees every token
        turns = list(objective.predictions(model, batch).relabelled(labels, batch.ids))
        noted = list(calls)
        for turn, losses in enumerate(turns):
            grads = torch.autograd.grad(losses.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
            for (name, p), g in zip(parameters.items(), grads, strict=True):
                if p.dim() == 1 and g is not None:
                    found[name].right.append(g[None])
                    found[name].tokens += turn == 0
            for module, x, gradients in noted:
                if not gradients:
                    continue
                name = canonical[id(module.weight)]
                inputs, outputs = rows_of(module, x, gradients[-1])
                head = isinstance(module, nn.Linear) and is_table(model, module.weight)
                if inputs is None:
                    assert isinstance(module, nn.Embedding)
                    counts = nn.functional.one_hot(x.flatten(), module.num_embeddings).to(outputs)
                    sides = (counts if turn == 0 else counts[:0], outputs)
                elif isinstance(module, Conv1D):
                    sides = (inputs if turn == 0 else inputs[:0], outputs)
                else:
                    sides = (outputs, inputs if turn == 0 else inputs[:0])
                found[name].left.append(sides[0].square() if head else sides[0])
                found[name].right.append(sides[1])
                found[name].tokens += len(outputs) if turn == 0 else 0
    for handle in handles:
        handle.remove()
    for name, p in parameters.items():
        p.requires_grad_(flags[name])
    return {name: found[name] for name in names}


def is_table(model: nn.Module, weight: Tensor) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is weight for m in model.modules())


def check_twin(found: Covariances, expected: dict[str, Sides], count: int) -> None:
    for name, sides in expected.items():
        left, right = found.left[name], found.right[name]
        assert right is not None
        assert found.tokens[name] == pytest.approx(sides.tokens / count)
        rows = torch.cat(sides.right)
        close(found.sides[right].moment, rows.T @ rows / sides.tokens)
        if not sides.left:
            assert left is None
            continue
        assert left is not None
        rows = torch.cat(sides.left)
        if found.sides[left].moment.dim() == 1:
            close(found.sides[left].moment.double(), rows.sum(0) / sides.tokens, 1e-6)
        else:
            close(found.sides[left].moment, rows.T @ rows / sides.tokens)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def covariances(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    budget: int = 24,
    labels: Labels = DATA,
    sides: Any = "both",
) -> CovarianceSums:
    sink = CovarianceSums(tracked.layout, sides)
    run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=budget, labels=labels)
    return sink


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [n for n in WORLDS if n not in ("gpt2-untied", "llama-tied-biased", "qwen3")])
def test_covariances_are_those_of_hooks(name: str):
    model, objective, examples = WORLDS[name]()
    tracked = track(model, ".*")
    expected = twin(model, objective, examples, tracked.layout.names)
    budget = 4 if isinstance(objective, Classification) else 24
    check_twin(covariances(model, objective, examples, tracked, budget).result(), expected, len(examples))


@pytest.mark.parametrize("labels", [Labels("sampled", 1, 3), Labels("sampled", 3)])
def test_labels_go_to_the_outputs_alone_and_count_a_document_once(labels: Labels):
    model, objective, examples = w.gpt2(tie_word_embeddings=False), w.causal(), w.documents(LENGTHS)
    tracked = track(model, "h.1|wte")
    sums = covariances(model, objective, examples, tracked, labels=labels)
    check_twin(sums.result(), twin(model, objective, examples, tracked.layout.names, labels), 6)
    data = covariances(model, objective, examples, tracked)
    assert (sums.tokens, sums.documents) == (data.tokens, data.documents)
    key = "transformer.h.1.attn.c_attn.weight"
    close(sums.sums[f"{key}:left"], data.sums[f"{key}:left"])
    assert not torch.allclose(sums.sums[f"{key}:right"], data.sums[f"{key}:right"], rtol=0.1)


def test_every_label_by_its_probability():
    model, objective, examples = w.perceptron(), Classification(), w.vectors()
    tracked, labels = track(model, ".*"), Labels("exact")
    sums = covariances(model, objective, examples, tracked, 4, labels)
    check_twin(sums.result(), twin(model, objective, examples, tracked.layout.names, labels), 6)
    assert set(sums.documents.values()) == {6}


@pytest.mark.parametrize("name", ["little", "gpt2-untied", "lora", "cnn"])
def test_inputs_by_a_forward_pass_and_outputs_make_the_whole(name: str):
    model, objective, examples = WORLDS[name]() if name != "cnn" else equal_convolutions()
    tracked = track(model, ".*")
    budget = 4 if isinstance(objective, Classification) else 24
    whole = covariances(model, objective, examples, tracked, budget).result()
    inputs = covariances(model, objective, examples, tracked, budget, sides="inputs")
    inputs.merge(covariances(model, objective, examples, tracked, budget, sides="outputs"))
    parts = inputs.result()
    for name in tracked.layout.names:
        for mine, theirs in ((parts.left, whole.left), (parts.right, whole.right)):
            a, b = mine[name], theirs[name]
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                close(parts.sides[a].moment, whole.sides[b].moment)
        assert parts.tokens[name] == pytest.approx(whole.tokens[name])


@pytest.mark.parametrize("sides", ["both", "inputs"])
def test_queries_keys_and_values_share_an_input(sides: str):
    model, examples = w.llama(), w.documents(LENGTHS)
    sums = covariances(model, w.causal(), examples, track(model), sides=sides)
    for layer in range(2):
        at = f"model.layers.{layer}."
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({sums.right[f"{at}{module}.weight"] for module in group}) == 1
    assert len(set(sums.right.values())) == 8  # 4 inputs in each of 2 layers
    found = sums.result()
    bases = Eigenbases.of(found, torch.float64)
    assert bases.basis("model.layers.0.mlp.gate_proj.weight")[1] is bases.basis("model.layers.0.mlp.up_proj.weight")[1]


class Branches(nn.Module):
    """Inputs that lie in the same place and are not the same: turned, and only one of two uses in common."""

    def __init__(self) -> None:
        super().__init__()
        self.straight, self.turned = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twice, self.once, self.pair = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.straight(x) + self.turned(x.transpose(1, 2)))
        u = torch.tanh(self.once(h) + self.twice(h) + self.pair(h))
        return self.head(torch.tanh(self.twice(u) + self.pair(u)).mean(1))


def branches() -> tuple[nn.Module, Objective, list[Example]]:
    torch.manual_seed(4)
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    return Branches().double(), Classification(), w.pairs(x, torch.arange(5) % 3)


def equal_convolutions() -> tuple[nn.Module, Objective, list[Example]]:
    """Patches of one shape after another, each in memory that the one before has just left."""
    torch.manual_seed(4)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)).double()
    return model, Classification(), w.pairs(torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.arange(5) % 3)


class Patches(BaseSink):
    """The most unfolded inputs that are alive at a time when the next parameter's come."""

    inputs, backward = True, False

    def __init__(self, layout: ParamLayout) -> None:
        super().__init__(layout)
        self.refs: list[weakref.ref[Tensor]] = []
        self.most = 0

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        self.refs += [weakref.ref(factor.right) for factor in factors if isinstance(factor, MatrixFactor)]
        self.most = max(self.most, sum(ref() is not None for ref in self.refs))


def test_a_forward_pass_unfolds_one_convolution_at_a_time():
    model, objective, examples = equal_convolutions()
    tracked = track(model, r"[0246]\.weight")
    sink = Patches(tracked.layout)
    run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=100)
    assert (len(sink.refs), sink.most) == (4, 1)


@pytest.mark.parametrize("make", [branches, equal_convolutions])
def test_inputs_that_differ_are_not_shared(make: Callable[[], Any]):
    model, objective, examples = make()
    tracked = track(model, "weight")
    for budget in (1, 3, 100):
        sums = covariances(model, objective, examples, tracked, budget)
        check_twin(sums.result(), twin(model, objective, examples, tracked.layout.names), 5)
        if make is branches:
            assert sums.right["twice.weight"] == sums.right["pair.weight"] != sums.right["once.weight"]


def test_half_precision_is_summed_in_float32_and_not_shared_by_chance():
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())]
    half = nn.Sequential(*layers, nn.Linear(6, 3)).to(torch.bfloat16)
    examples = w.pairs(torch.randn(64, 6), torch.arange(64) % 3)
    tracked = track(half, ".*")
    sums = covariances(half, Classification(), examples, tracked, 64)
    assert len(set(sums.right.values())) == len(tracked.layout.names)
    expected = twin(half, Classification(), examples, tracked.layout.names)
    for name in tracked.layout.names:
        assert sums.sums[f"{name}:right"].dtype == torch.float32
        rows = torch.cat(expected[name].right).double()
        close(sums.result().sides[f"{name}:right"].moment.double(), rows.T @ rows / 64, 0.02)
    side = orthogonal(6, 0).float()
    bases: dict[str, Basis] = {
        n: (None, side if len(tracked.layout.shape(n)) == 2 else None) for n in tracked.layout.names
    }
    moments = SecondMoments(tracked.layout, bases)
    run_pass(half, Classification(), examples, [moments], tracked=tracked, token_budget=64)
    single = {n: g.float() for n, g in w.naive(half, Classification(), examples, tracked.layout.names).items()}
    for name, value in moments.result().items():
        assert value.dtype == torch.float32
        close(value, rotated(single[name], bases[name], tracked.layout, name).square().mean(0), 0.05)


@pytest.mark.parametrize("name", ["little", "gpt2-untied"])
def test_batches_order_and_parts_do_not_matter(name: str):
    model, objective, examples = WORLDS[name]()
    tracked = track(model, ".*")
    whole = covariances(model, objective, examples, tracked, 10**6)
    merged = covariances(model, objective, examples[4:] + examples[:1], tracked, 1)
    merged.merge(covariances(model, objective, examples[1:4][::-1], tracked, 20))
    a, b = whole.result(), merged.result()
    assert (a.left, a.right, a.tokens) == (b.left, b.right, b.tokens)
    for key, side in a.sides.items():
        assert side.tokens == b.sides[key].tokens
        close(side.moment, b.sides[key].moment, 1e-6 if side.moment.dtype == torch.float32 else 1e-9)


def test_parts_that_do_not_fit_are_refused():
    model = w.gpt2()
    one, other = track(model, "h.0.attn.*weight"), track(model, "h.1.attn.*weight")
    with pytest.raises(LayoutMismatch):
        CovarianceSums(one.layout).merge(CovarianceSums(other.layout))
    bases: dict[str, Basis] = {n: (None, None) for n in one.layout.names}
    with pytest.raises(LayoutMismatch, match="expected 2 groups, got 1"):
        SecondMoments(one.layout, bases, 2).merge(SecondMoments(one.layout, bases, 1))
    with pytest.raises(LayoutMismatch, match="expected bases of 2 parameters, got 0"):
        SecondMoments(one.layout, {})
    first, second = CovarianceSums(one.layout), CovarianceSums(one.layout)
    first.left[one.layout.names[0]], second.left[one.layout.names[0]] = "a", "b"
    with pytest.raises(ArtefactError, match="shared with a in one batch and with b"):
        first.merge(second)


def test_what_no_document_reaches_has_sides_of_zeros():
    layout = ParamLayout(("w", "b"), ((3, 2), (4,)))
    found = CovarianceSums(layout).result()
    assert (found.left["b"], found.tokens) == (None, {"w": 0.0, "b": 0.0})
    bases = Eigenbases.of(found, torch.float64)
    assert bases.kfac(Damping()).dead == ("w", "b")
    assert {
        n: tuple(v.shape) for n, v in SecondMoments(layout, dict.fromkeys(layout.names, (None, None))).result().items()
    } == {
        "w": (3, 2),
        "b": (1, 4),
    }


@pytest.mark.parametrize("width", [7, 1023, 1024, 1100])
def test_wide_sides_are_whole_although_half_is_summed(width: int):
    generator = torch.Generator().manual_seed(0)
    layout = ParamLayout(("w",), ((2, width),))
    sums, rows = CovarianceSums(layout), []
    for _ in range(2):
        left, right = (torch.randn(2, 3, d, generator=generator, dtype=torch.float64) for d in (2, width))
        sums.begin(block(2, 3))
        sums.consume("w", [MatrixFactor(left, right)])
        sums.end()
        rows.append(right.flatten(0, 1))
    x = torch.cat(rows)
    close(sums.result().sides["w:right"].moment, x.T @ x / 12)


def orthogonal(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def random_bases(layout: ParamLayout, *, tables: tuple[str, ...] = ()) -> dict[str, Basis]:
    """Orthogonal on every side; rows of tables and vectors stay as they are."""
    found: dict[str, Basis] = {}
    for seed, name in enumerate(layout.names):
        rows, cols = flat(layout, name)
        plain = name in tables or len(layout.shape(name)) == 1
        found[name] = (None if plain else orthogonal(rows, seed), orthogonal(cols, seed + 100))
    return found


def rotated(g: Tensor, basis: Basis, layout: ParamLayout, name: str) -> Tensor:
    x = g.reshape(len(g), *flat(layout, name))
    left, right = (
        torch.eye(d).to(x) if side is None else side.to(x) for side, d in zip(basis, x.shape[1:], strict=True)
    )
    return torch.einsum("nab,ac,bd->ncd", x, left, right)


def second_moments(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    bases: dict[str, Basis],
    budget: int = 24,
    groups: int = 1,
    labels: Labels = DATA,
) -> SecondMoments:
    sink = SecondMoments(tracked.layout, bases, groups)
    run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=budget, labels=labels)
    return sink


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("buffer", [room.BUFFER, 40])
@pytest.mark.parametrize("name", [n for n in WORLDS if n != "llama-tied-biased"])
def test_second_moments_are_those_of_autograd_gradients(name: str, buffer: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "BUFFER", buffer)
    model, objective, examples = WORLDS[name]()
    tracked = track(model, ".*")
    tables = tuple(n for n in tracked.layout.names if "wte" in n or "embed" in n)
    if buffer == 40:
        tables = ()  # their rows are rotated too
    bases = random_bases(tracked.layout, tables=tables)
    budget = 4 if isinstance(objective, Classification) else 24
    sums = second_moments(model, objective, examples, tracked, bases, budget, 2)
    gradients = w.naive(model, objective, examples, tracked.layout.names)
    assert sums.documents.tolist() == [len(examples[::2]), len(examples[1::2])]
    for name in tracked.layout.names:
        squares = rotated(gradients[name], bases[name], tracked.layout, name).square()
        close(sums.result()[name], squares.mean(0))
        for g in range(2):
            close(sums.group(g)[name], squares[g::2].mean(0))


def block(n: int, t: int, turn: int = 0) -> Block:
    everything = torch.ones(n, t, dtype=torch.bool)
    return Block(torch.arange(n), [f"d{k}" for k in range(n)], everything, torch.zeros(n), torch.ones(n), turn)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("turned", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 6, 5), (40, 3, 4), (2, 30, 2), (1, 1, 4)])
def test_every_way_through_a_matrix_is_the_same(shape: tuple[int, int, int], turned: tuple[bool, bool], groups: int):
    """Few tokens go first, many tokens after their gradient; one token needs no gradient."""
    t, rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    layout = ParamLayout(("w",), ((rows, cols),))
    left, right = (torch.randn(5, t, d, generator=generator, dtype=torch.float64) for d in (rows, cols))
    basis = (orthogonal(rows, 1) if turned[0] else None, orthogonal(cols, 2) if turned[1] else None)
    sums = SecondMoments(layout, {"w": basis}, groups)
    sums.begin(block(5, t))
    sums.consume("w", [MatrixFactor(left, right)])
    sums.end()
    gradient = torch.einsum("ntr,ntc->nrc", left, right)
    close(sums.result()["w"], rotated(gradient, basis, layout, "w").square().mean(0))


def test_several_uses_are_added_before_they_are_squared():
    generator = torch.Generator().manual_seed(0)
    layout = ParamLayout(("e", "b"), ((6, 3), (3,)))
    ids = torch.randint(0, 6, (4, 5), generator=generator)
    looked, left, right, a, b = (torch.randn(4, 5, d, generator=generator).double() for d in (3, 6, 3, 3, 3))
    bases = random_bases(layout, tables=("e",))
    sums = SecondMoments(layout, bases)
    sums.begin(block(4, 5))
    sums.consume("e", [LookupFactor(ids, looked, 6), MatrixFactor(left, right)])
    sums.consume("b", [VectorFactor(a), VectorFactor(b)])
    sums.end()
    table = torch.einsum("ntr,ntc->nrc", left, right)
    for n in range(4):
        for t in range(5):
            table[n, ids[n, t]] += looked[n, t]
    close(sums.result()["e"], rotated(table, bases["e"], layout, "e").square().mean(0))
    close(sums.result()["b"], rotated((a + b).sum(1), bases["b"], layout, "b").square().mean(0))


def test_second_moments_of_batches_orders_and_parts():
    model, objective, examples = WORLDS["little"]()
    tracked = track(model, ".*")
    bases = random_bases(tracked.layout)
    whole = second_moments(model, objective, examples, tracked, bases, 10**6)
    merged = second_moments(model, objective, examples[3:][::-1], tracked, bases, 1)
    merged.merge(second_moments(model, objective, examples[:3], tracked, bases, 20))
    assert merged.documents.tolist() == [6]
    for name, value in whole.result().items():
        close(merged.result()[name], value)


@pytest.mark.parametrize("labels", [Labels("sampled", 3), Labels("exact")])
def test_labels_are_averaged_and_count_a_document_once(labels: Labels):
    model, objective, examples = w.perceptron(), Classification(), w.vectors()
    tracked = track(model, ".*")
    bases = random_bases(tracked.layout)
    sums = second_moments(model, objective, examples, tracked, bases, 4, 2, labels)
    assert sums.documents.tolist() == [3, 3]
    parameters = dict(model.named_parameters())
    for name in tracked.layout.names:
        expected = torch.zeros(flat(tracked.layout, name), dtype=torch.float64)
        for example in examples:
            batch = objective.collate([example])
            for losses in objective.predictions(model, batch).relabelled(labels, batch.ids):
                (g,) = torch.autograd.grad(losses.sum(), parameters[name], retain_graph=True)
                expected += rotated(g[None], bases[name], tracked.layout, name)[0].square() / len(examples)
        close(sums.result()[name], expected)


@pytest.mark.parametrize("name", ["perceptron", "little"])
def test_corrected_eigenvalues_whiten_the_documents_that_they_come_from(name: str):
    model, objective, examples = WORLDS[name]()
    tracked = track(model, ".*")
    bases = Eigenbases.of(covariances(model, objective, examples, tracked).result(), torch.float64)
    each = {n: bases.basis(n) for n in tracked.layout.names}
    eigenvalues = second_moments(model, objective, examples, tracked, each).result()
    curvature = bases.corrected(eigenvalues, Damping(1e-6))
    gradients = w.naive(model, objective, examples, tracked.layout.names)
    white = curvature.project(curvature.apply(gradients, -0.5))
    for n in tracked.layout.names:
        share = eigenvalues[n] / (eigenvalues[n] + curvature.lam(n))  # 1 but for the damping
        close(white[n].square().mean(0), share)
        assert float(share.max()) > 1 - 1e-5
