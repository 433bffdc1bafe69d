"""Products, norms and token scores: every way of computing them gives what dense per-document gradients give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rootward.capture import sinks as sinks_room
from rootward.capture.projection import Projection
from rootward.capture.run import run_pass
from rootward.capture.sinks import Losses, PooledActivations, Products, ProjectedRows, WeightedSum, low_rank
from rootward.capture.sites import Tracked, track
from rootward.core.block import Block, LookupFactor, MatrixFactor, VectorFactor, factor_inner, total_gradient
from rootward.core.errors import ArtefactError, LayoutMismatch
from rootward.core.layout import ParamLayout
from rootward.subject.objectives import Classification
from tests.capture import worlds as w
from tests.capture.test_factors import two_linears_tied

LENGTHS = (5, 11, 3, 8, 11, 2)
MODELS = {
    "llama-tied": lambda: w.llama(tie_word_embeddings=True),
    "gpt2": w.gpt2,
    "qwen3": w.qwen3,
    "tied-linears": two_linears_tied,
    "gpt2-untied": lambda: w.gpt2(tie_word_embeddings=False),
}


def queries(tracked: Tracked, count: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    layout = tracked.layout
    return {
        n: torch.randn(count, *layout.shape(n), generator=generator, dtype=torch.float64).to(dtype)
        for n in layout.names
    }


def truth(model: nn.Module, tracked: Tracked, query: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Products ``[q, n]`` and squared norms ``[n]`` from dense gradients."""
    dense = w.flat(w.naive(model, w.causal(), w.documents(LENGTHS), tracked.layout.names))
    return w.flat({n: query[n] for n in tracked.layout.names}) @ dense.T, dense.square().sum(1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_agrees_with_dense_gradients(name: str, count: int, monkeypatch: pytest.MonkeyPatch):
    model, examples = MODELS[name](), w.documents(LENGTHS)
    tracked = track(model, ".*")
    query = queries(tracked, count)
    dots, squares = truth(model, tracked, query)
    n = len(examples)
    ranked = {x: q if q.dim() < 3 else low_rank(q, 10**6) for x, q in query.items()}
    ways = {
        "dense": Products(tracked.layout, query, n, norms=True),
        "tokens": Products(tracked.layout, query, n, norms=True, tokens=True),
        "low rank": Products(tracked.layout, ranked, n, norms=True),
    }
    rows = ProjectedRows(Projection(tracked.layout, None), n, torch.float64)
    # a buffer smaller than some documents together: gradients are formed a few at a time
    monkeypatch.setattr(sinks_room, "BUFFER", 1200)
    run_pass(model, w.causal(), examples, [*ways.values(), rows], tracked=tracked, token_budget=33)
    for way, sink in ways.items():
        assert sink.squared is not None
        torch.testing.assert_close(sink.dots, dots, rtol=1e-9, atol=1e-9, msg=lambda m, way=way: f"{way}: {m}")
        torch.testing.assert_close(sink.squared, squares, rtol=1e-9, atol=0, msg=lambda m, way=way: f"{way}: {m}")
    torch.testing.assert_close(rows.projection.project_dense(query) @ rows.rows.T, dots, rtol=1e-9, atol=1e-9)
    by_token = ways["tokens"].by_token
    assert by_token is not None
    for row, example in enumerate(examples):
        assert by_token[row].shape == (count, example.length)
        torch.testing.assert_close(by_token[row].sum(1), dots[:, row], rtol=1e-9, atol=1e-9)


def test_token_scores_stand_at_their_tokens():
    """The head is asked for trained positions only; its share must still be credited to the right token."""
    model, examples = w.llama(), w.documents(LENGTHS)
    tracked = track(model, "lm_head")
    query = queries(tracked, 1)
    sinks = []
    for objective in (w.causal(keep_logits=False), w.causal()):
        sink = Products(tracked.layout, query, len(examples), tokens=True)
        run_pass(model, objective, examples, [sink], tracked=tracked)
        sinks.append(sink.by_token)
    for row, example in enumerate(examples):
        torch.testing.assert_close(sinks[1][row], sinks[0][row], rtol=1e-10, atol=1e-12)
        silent = ~torch.cat([example.trained[1:], torch.zeros(1, dtype=torch.bool)])
        assert not bool(sinks[1][row][0, silent].any())
        assert bool(sinks[1][row][0, ~silent].all())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_images_are_one_piece_and_pooled_tokens_are_refused():
    model, examples = w.digits_cnn(), w.images()
    tracked = track(model, r"^0\.|^3\.|^12\.")
    query = queries(tracked, 2)
    sink = Products(tracked.layout, query, len(examples), norms=True, tokens=True)
    run_pass(model, Classification(), examples, [sink], tracked=tracked)
    dense = w.flat(w.naive(model, Classification(), examples, tracked.layout.names))
    wanted = w.flat({n: query[n] for n in tracked.layout.names}) @ dense.T
    torch.testing.assert_close(sink.dots, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([sink.by_token[n] for n in range(len(examples))], 1), wanted)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).mean(1))

    pooled = Pooled()
    documents = [
        replace(e, ids=torch.arange(4), x=torch.arange(4), trained=torch.ones(4, dtype=torch.bool)) for e in w.vectors()
    ]
    tracked = track(pooled, "head.weight")
    sink = Products(tracked.layout, queries(tracked, 1, torch.float32), 6, tokens=True)
    with pytest.raises(ArtefactError, match="one factor per token"):
        run_pass(pooled, Classification(), documents, [sink], tracked=tracked)


def _factors(kind: str, seed: int, t: int, v: int = 9, d: int = 5) -> MatrixFactor | LookupFactor | VectorFactor:
    g = torch.Generator().manual_seed(seed)
    right = torch.randn(3, t, d, generator=g, dtype=torch.float64)
    if kind == "matrix":
        return MatrixFactor(torch.randn(3, t, v, generator=g, dtype=torch.float64), right)
    return LookupFactor(torch.randint(0, v, (3, t), generator=g), right, v) if kind == "lookup" else VectorFactor(right)


@pytest.mark.parametrize("pair", ["matrix matrix", "matrix lookup", "lookup matrix", "lookup lookup", "vector vector"])
def test_inner_products_of_factors(pair: str):
    a, b = (_factors(kind, seed, 4 + seed) for seed, kind in enumerate(pair.split()))
    wanted = (a.gradient() * b.gradient()).flatten(1).sum(1)
    torch.testing.assert_close(factor_inner(a, b), wanted, rtol=1e-12, atol=1e-12)
    together = total_gradient({"p": [a, b]})["p"].flatten(1).square().sum(1)
    torch.testing.assert_close(sinks_room.ghost_squares(a, b), together, rtol=1e-12, atol=1e-12)


def test_a_vector_and_a_matrix_have_no_inner_product():
    with pytest.raises(LayoutMismatch):
        factor_inner(_factors("vector", 0, 4), _factors("matrix", 0, 4))


def test_dot_tokens_are_what_they_say():
    query = torch.randn(2, 9, 5, dtype=torch.float64)
    for kind in ("matrix", "lookup"):
        factor = _factors(kind, 1, 4)
        wanted = torch.einsum("qvd,nvd->qn", query, factor.gradient())
        torch.testing.assert_close(factor.dot_tokens(query).sum(-1), wanted)
        part = factor.take(slice(1, 3))
        torch.testing.assert_close(part.gradient(), factor.gradient()[1:3])


def test_low_rank_keeps_the_share_it_reports():
    query = torch.randn(2, 6, 3, 2, dtype=torch.float64)  # a convolution's: its trailing dimensions are columns
    for rank, exact in ((2, False), (6, True)):
        approximation = low_rank(query, rank)
        back = approximation.u @ approximation.v.transpose(1, 2)
        lost = (back - query.flatten(2)).square().sum() / query.square().sum()
        assert approximation.kept == pytest.approx(1 - float(lost), abs=1e-12)
        assert (approximation.kept == pytest.approx(1, abs=1e-12)) == exact
    with pytest.raises(LayoutMismatch):
        low_rank(torch.randn(2, 6), 2)


class World:
    """One model, its documents and dense truth, made once for all examples of hypothesis."""

    model = w.llama()
    tracked = track(model, r"layers\.1\.|norm")
    examples = w.documents((5, 11, 3, 8, 11, 2, 7, 7))
    query = queries(tracked, 2)

    @classmethod
    def scores(cls, order: list[int], budget: int, packing: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        products = Products(cls.tracked.layout, cls.query, len(order), norms=True)
        weights = torch.eye(len(cls.examples), dtype=torch.float64)[order]
        sums = WeightedSum(cls.tracked.layout, weights, torch.float64)
        examples = [cls.examples[n] for n in order]
        run_pass(
            cls.model, w.causal(), examples, [products, sums], tracked=cls.tracked, token_budget=budget, packing=packing
        )
        assert products.squared is not None
        return products.dots, products.squared, sums.result()


@settings(max_examples=12)
@given(st.permutations(range(8)), st.integers(1, 120), st.booleans())
def test_batch_size_order_and_packing_do_not_matter(order: list[int], budget: int, packing: bool):
    dots, squares, sums = World.scores(list(range(8)), 10**6)
    other = World.scores(order, budget, packing)
    torch.testing.assert_close(other[0], dots[:, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other[1], squares[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(w.flat(other[2]), w.flat(sums), rtol=1e-9, atol=1e-9)


@settings(max_examples=8)
@given(st.lists(st.booleans(), min_size=8, max_size=8), st.integers(1, 60))
def test_shards_merge_to_the_whole(left: list[bool], budget: int):
    """Every sink, each half of the documents in a sink of its own."""
    layout, examples = World.tracked.layout, World.examples
    projection = Projection(layout, 3)
    weights = torch.randn(8, 2, dtype=torch.float64)

    def make() -> tuple[Products, WeightedSum, ProjectedRows, Losses, PooledActivations]:
        return (
            Products(layout, World.query, 8, norms=True, tokens=True), WeightedSum(layout, weights, torch.float64),
            ProjectedRows(projection, 8, torch.float64), Losses(8), PooledActivations("model.layers.0", 8),
        )  # fmt: skip

    def feed(chosen: list[int]) -> tuple[Products, WeightedSum, ProjectedRows, Losses, PooledActivations]:
        sinks = make()
        parts = [Shifted(sink, torch.tensor(chosen, dtype=torch.int64)) for sink in sinks]
        run_pass(
            World.model, w.causal(), [examples[n] for n in chosen], parts, tracked=World.tracked, token_budget=budget
        )
        return sinks

    whole, a, b = (
        feed(list(range(8))),
        feed([n for n in range(8) if left[n]]),
        feed([n for n in range(8) if not left[n]]),
    )
    for mine, other in zip(a, b, strict=True):
        mine.merge(other)
    torch.testing.assert_close(a[0].dots, whole[0].dots, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a[0].squared, whole[0].squared, rtol=1e-9, atol=1e-9)
    for n in range(8):
        torch.testing.assert_close(a[0].by_token[n], whole[0].by_token[n], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a[1].result(), whole[1].result(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a[2].rows, whole[2].rows, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a[2].losses, whole[2].losses)
    torch.testing.assert_close(a[3].losses, whole[3].losses)
    assert torch.equal(a[3].trained, torch.tensor([e.targets for e in examples]))
    torch.testing.assert_close(a[4].pooled, whole[4].pooled, rtol=1e-9, atol=1e-9)


class Shifted:
    """Hands a sink its blocks under the positions that the documents have in the whole."""

    def __init__(self, sink: sinks_room.BaseSink, places: Tensor) -> None:
        self.sink, self.places = sink, places

    def begin(self, block: object) -> None:
        self.sink.begin(replace(block, index=self.places[block.index]))

    def __getattr__(self, name: str) -> object:
        return getattr(self.sink, name)


def test_merging_unlike_twins_is_refused():
    layout = World.tracked.layout
    with pytest.raises(LayoutMismatch):
        ProjectedRows(Projection(layout, 3), 8).merge(ProjectedRows(Projection(layout, 3, seed=1), 8))
    with pytest.raises(LayoutMismatch):
        PooledActivations("a", 8).merge(PooledActivations("b", 8))
    other = track(World.model, r"layers\.0\.").layout
    with pytest.raises(LayoutMismatch):
        WeightedSum(layout, torch.ones(1, 1)).merge(WeightedSum(other, torch.ones(1, 1)))
    with pytest.raises(LayoutMismatch):
        Products(layout, {}, 8)


def test_a_duplicate_has_the_same_score():
    dots, squares, _ = World.scores([0, 1, 2, 1, 3, 1], 10**6)
    assert torch.equal(dots[:, 1], dots[:, 3]) and torch.equal(dots[:, 1], dots[:, 5])
    assert float(squares[1]) == float(squares[3])
    assert not torch.allclose(dots[:, 1], dots[:, 2])
    apart, *_ = World.scores([0, 1, 2, 1, 3, 1], 11)
    torch.testing.assert_close(apart[:, 1], dots[:, 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apart[:, 5], apart[:, 1], rtol=1e-12, atol=1e-12)


def test_weighted_sums_take_only_the_documents_of_a_query():
    weights = torch.zeros(8, 3, dtype=torch.float64)
    weights[2, 0], weights[5, 0], weights[7, 2] = -2.0, 0.5, 1.5
    sink = WeightedSum(World.tracked.layout, weights, torch.float64)
    run_pass(World.model, w.causal(), World.examples, [sink], tracked=World.tracked, token_budget=20)
    dense = w.naive(World.model, w.causal(), World.examples, World.tracked.layout.names)
    for name, found in sink.result().items():
        wanted = torch.einsum("nq,n...->q...", weights, dense[name])
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
        assert not bool(found[1].any())


def test_a_step_on_a_positively_scored_document_raises_the_measurement():
    """Score = -<d measurement, d loss>; a step of descent on the document changes the measurement by lr x score."""
    model, examples = w.gpt2(), w.documents((6, 7, 8, 9, 10))  # Llama's norm is in float32, too coarse for slopes
    tracked = track(model, ".*")
    measured, rest = examples[:1], examples[1:]
    measurement = WeightedSum(tracked.layout, torch.full((1, 1), -1.0, dtype=torch.float64), torch.float64)
    run_pass(model, w.causal(), measured, [measurement], tracked=tracked)
    products = Products(tracked.layout, measurement.result(), len(rest))
    run_pass(model, w.causal(), rest, [products], tracked=tracked)
    scores = -products.dots[0]
    params = dict(model.named_parameters())

    def value() -> float:
        with torch.no_grad():
            return -float(w.causal().losses(model, w.causal().collate(measured)).sum())

    for row, document in enumerate(rest):
        gradient = w.naive(model, w.causal(), [document], tracked.layout.names)
        values = []
        for rate in (1e-6, -1e-6):
            with torch.no_grad():
                for name, g in gradient.items():
                    params[name].sub_(rate * g[0])
                values.append(value())
                for name, g in gradient.items():
                    params[name].add_(rate * g[0])
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx(float(scores[row]), rel=1e-3)
    assert float(scores.max()) > 0


def test_pooled_activations_are_means_over_real_tokens():
    model, examples = w.llama(), w.documents(LENGTHS)
    sink = PooledActivations("model.layers.0", len(examples))
    run_pass(model, w.causal(), examples, [sink], token_budget=24)
    packed = PooledActivations("model.layers.0", len(examples))
    run_pass(model, w.causal(), examples, [packed], token_budget=24, packing=True)
    for row, example in enumerate(examples):
        with torch.no_grad():
            wanted = model(example.ids[None], output_hidden_states=True).hidden_states[1][0].mean(0)
        torch.testing.assert_close(sink.pooled[row], wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(packed.pooled[row], wanted, rtol=1e-10, atol=1e-12)


def test_pooled_activations_of_a_module_that_returns_a_tuple():
    model, examples = w.gpt2(), w.documents(LENGTHS)
    sink = PooledActivations("transformer.h.1.attn", len(examples))  # returns (output, weights)
    logits = PooledActivations("lm_head", len(examples))
    run_pass(model, w.causal(), examples, [sink, logits], token_budget=24)
    kept: list[Tensor] = []
    handle = model.transformer.h[1].attn.register_forward_hook(lambda m, a, out: kept.append(out[0]))
    for row, example in enumerate(examples):
        with torch.no_grad():
            out = model(example.ids[None])
        torch.testing.assert_close(sink.pooled[row], kept[-1][0].mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(logits.pooled[row], out.logits[0].mean(0), rtol=1e-10, atol=1e-12)
    handle.remove()


def test_losses_need_no_backward(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(Tensor, "backward", refuse)
    sink = Losses(8)
    run_pass(World.model, w.causal(), World.examples, [sink])
    with torch.no_grad():
        for row, example in enumerate(World.examples):
            logits = World.model(example.ids[None]).logits[0].log_softmax(-1)
            wanted = -sum(logits[t - 1, example.ids[t]] for t in range(1, example.length) if example.trained[t])
            assert float(sink.losses[row]) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("kinds", ["matrix", "lookup", "matrix lookup"])
def test_norms_that_cancel_are_formed_in_full(kinds: str):
    """Tokens that cancel to a ten-thousandth: products of tokens with tokens leave nothing true in float32."""
    factors = []
    for seed, kind in enumerate(kinds.split()):
        factor = _factors(kind, seed, 6)
        rest = 1e-4 * torch.randn(factor.right.shape, generator=torch.Generator().manual_seed(1))
        right = torch.cat([factor.right, rest - factor.right], 1).float()
        if isinstance(factor, MatrixFactor):
            factors.append(MatrixFactor(torch.cat([factor.left] * 2, 1).float(), right))
        else:
            factors.append(LookupFactor(torch.cat([factor.ids] * 2, 1), right, 9))
    exact = sum(_double(f).gradient() for f in factors).flatten(1).square().sum(1)
    layout = ParamLayout(("p",), ((9, 5),))
    sink = Products(layout, {"p": torch.ones(1, 9, 5)}, 3, norms=True)
    block = Block(torch.arange(3), "abc", torch.ones(3, 12, dtype=torch.bool), torch.zeros(3), torch.zeros(3))
    sink.begin(block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks_room, "_ghost_is_cheaper", lambda matrices: True)
        sink.consume("p", factors)
    sink.end()
    assert sink.squared is not None
    torch.testing.assert_close(sink.squared, exact, rtol=0.05, atol=0)


def _double(factor: MatrixFactor | LookupFactor) -> MatrixFactor | LookupFactor:
    if isinstance(factor, MatrixFactor):
        return MatrixFactor(factor.left.double(), factor.right.double())
    return LookupFactor(factor.ids, factor.right.double(), factor.vocabulary)


def test_layers_that_no_query_reaches_are_not_hooked():
    objective, model = w.causal(), w.llama()
    tracked, examples = track(model), w.documents([5, 9, 7])
    upper = [name for name in tracked.layout.names if ".1." in name]
    g = torch.Generator().manual_seed(0)
    queries = {
        name: torch.zeros(2, *tracked.layout.shape(name))
        if name in upper
        else torch.randn(2, *tracked.layout.shape(name), generator=g, dtype=next(model.parameters()).dtype)
        for name in tracked.layout.names
    }
    seen: list[str] = []

    class Watched(Products):
        def consume(self, name, factors):
            seen.append(name)
            super().consume(name, factors)

    sink = Watched(tracked.layout, queries, 3)
    run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=64)
    assert upper and seen and not set(seen) & set(upper)
    whole = Products(tracked.layout, queries, 3, norms=True)
    run_pass(model, objective, examples, [whole], tracked=tracked, token_budget=64)
    torch.testing.assert_close(sink.dots, whole.dots)
    nothing = Products(tracked.layout, {n: torch.zeros_like(q) for n, q in queries.items()}, 3)
    run_pass(model, objective, examples, [nothing], tracked=tracked, token_budget=64)
    assert not nothing.dots.any()
