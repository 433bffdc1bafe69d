"""Sketches: exact algebra against dense gradients, unbiased inner products, columns that depend on name and seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rootward.capture import sketch as room
from rootward.capture.projection import Projection, Sketch, sketch_dense
from rootward.capture.run import run_pass
from rootward.capture.sinks import ProjectedRows
from rootward.capture.sites import track
from rootward.capture.sketch import Masked, Scaled, Whole, hashed, hashing, scaled_sides
from rootward.core.errors import InputError, LayoutMismatch
from rootward.core.layout import ParamLayout
from rootward.subject.objectives import Classification
from tests.capture import worlds as w


def positive(layout: ParamLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(layout.names, layout.shapes, strict=True)
    return {name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for name, shape in shapes}


MAKE: dict[str, Callable[[ParamLayout, int], Sketch]] = {
    "gaussian": lambda layout, seed: Whole(layout, 6, "gaussian", seed),
    "rademacher": lambda layout, seed: Whole(layout, 6, "rademacher", seed),
    "sjlt": lambda layout, seed: Whole(layout, 6, "sjlt", seed),
    "masked": lambda layout, seed: Masked(layout, 6, 3, seed),
    "masked only": lambda layout, seed: Masked(layout, 6, 1, seed),
    "scaled": lambda layout, seed: Scaled(Projection(layout, 3, seed), positive(layout)),
    "scaled sides": lambda layout, seed: scaled_sides(Projection(layout, 3, seed), positive(layout)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("model", ["gpt2", "llama-tied", "cnn"])
def test_rows_are_sketches_of_dense_gradients(kind: str, model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "BUFFER", 700)  # several pieces, of one document for the larger matrices
    if model == "cnn":
        net, objective, examples = w.digits_cnn(), Classification(), w.images()
    else:
        net = w.gpt2() if model == "gpt2" else w.llama(tie_word_embeddings=True)
        objective, examples = w.causal(), w.documents((5, 9, 3, 12))
    tracked = track(net, ".*")
    sketch = MAKE[kind](tracked.layout, 0)
    sink = ProjectedRows(sketch, len(examples), torch.float64)
    run_pass(net, objective, examples, [sink], tracked=tracked, token_budget=20)
    wanted = sketch_dense(sketch, w.naive(net, objective, examples, tracked.layout.names))
    assert wanted.shape[1] == sketch.width
    torch.testing.assert_close(sink.rows, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sjlt", "masked", "masked only"])
@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12), (4, 3, 5, 2), (30,), (2, 2)])
def test_inner_products_are_unbiased_for_every_shape(kind: str, shape: tuple[int, ...]):
    layout = ParamLayout(("p",), (shape,))
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    h = h + g
    true = float((g * h).sum())
    found = []
    for seed in range(300):
        rows = sketch_dense(MAKE[kind](layout, seed), {"p": torch.stack([g, h])})
        found.append(float(rows[0] @ rows[1]))
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / len(found) ** 0.5
    assert abs(float(values.mean()) - true) <= 3.5 * error + 1e-9
    assert 3.5 * error < 0.7 * abs(true), "too loose to find a wrong factor"


def test_the_whole_sketch_adds_parameters_into_the_same_columns():
    layout = ParamLayout(("a", "b"), ((3, 4), (5,)))
    value = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 5)}
    zero = {name: torch.zeros_like(v) for name, v in value.items()}
    sketch = Whole(layout, 7)
    rows = [sketch_dense(sketch, {**zero, name: value[name]}) for name in layout.names]
    torch.testing.assert_close(sketch_dense(sketch, value), rows[0] + rows[1])
    assert rows[0].abs().min() > 0
    assert rows[1].abs().min() > 0


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sjlt", "masked", "masked only"])
def test_columns_depend_on_name_and_seed_alone(kind: str):
    both, alone = ParamLayout(("a", "b"), ((9, 8), (7, 9))), ParamLayout(("b",), ((7, 9),))
    value = {"a": torch.zeros(1, 9, 8), "b": torch.randn(1, 7, 9)}
    whole, single = MAKE[kind](both, 0), MAKE[kind](alone, 0)
    rows = sketch_dense(whole, value)
    assert torch.equal(rows[:, whole.slices["b"]], sketch_dense(single, value))
    assert not torch.equal(rows, sketch_dense(MAKE[kind](both, 1), value))
    assert whole.describe() == MAKE[kind](both, 0).describe() != MAKE[kind](both, 1).describe()
    torch.set_default_dtype(torch.float64)
    try:
        again = sketch_dense(MAKE[kind](both, 0), value)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rows, again)


def test_a_hash_is_a_matrix_with_one_sign_per_input():
    columns, signs = hashing(50, 4, torch.Generator().manual_seed(0))
    matrix = torch.zeros(50, 4).index_put((torch.arange(50), columns), signs.float())
    x = torch.randn(3, 50)
    torch.testing.assert_close(hashed(x, (columns, signs), 4), x @ matrix)
    assert set(signs.tolist()) == {-1, 1}
    assert set(columns.tolist()) == {0, 1, 2, 3}


def test_given_masks_pick_what_they_say_and_do_not_scale():
    layout = ParamLayout(("p", "v"), ((5, 7), (30,)))
    chosen = {"p": (torch.tensor([4, 0]), torch.tensor([6, 1])), "v": (None, torch.tensor([3, 2, 1, 0]))}
    sketch = Masked(layout, 4, 1, chosen=chosen)
    value = {"p": torch.randn(2, 5, 7), "v": torch.randn(2, 30)}
    wanted = torch.cat([value["p"][:, [0, 4]][:, :, [1, 6]].flatten(1), value["v"][:, :4]], 1)
    assert torch.equal(sketch_dense(sketch, value), wanted)
    assert sketch.describe() != Masked(layout, 4, 1).describe()
    other = Masked(layout, 4, 1, chosen={**chosen, "p": (torch.tensor([4, 1]), torch.tensor([6, 1]))})
    assert sketch.describe() != other.describe()
    with pytest.raises(LayoutMismatch, match="p: expected 2 of 5 entries on the left"):
        _ = Masked(layout, 4, 1, chosen={**chosen, "p": (torch.tensor([4]), torch.tensor([6, 1]))}).masks


def test_scaled_sides_are_exact_for_moments_of_rank_one():
    layout = ParamLayout(("wide", "narrow", "vector", "short", "conv"), ((7, 9), (2, 9), (20,), (3,), (4, 3, 2, 2)))
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for name in layout.names:
        shape = layout.shape(name)
        rows = torch.rand(shape[0], generator=generator, dtype=torch.float64) + 0.1
        rest = torch.rand(shape[1:], generator=generator, dtype=torch.float64) + 0.1 if len(shape) > 1 else None
        moments[name] = rows if rest is None else rows.view(-1, *[1] * rest.dim()) * rest
    value = {n: torch.randn(2, *layout.shape(n), generator=generator, dtype=torch.float64) for n in layout.names}
    for rank in (3, None):
        projection = Projection(layout, rank, 5)
        factored = scaled_sides(projection, moments)
        dense = Scaled(projection, {name: v.rsqrt() for name, v in moments.items()})
        torch.testing.assert_close(factored.project_dense(value), sketch_dense(dense, value))
        assert len({str(s.describe()) for s in (projection, factored, dense)}) == 3


def test_what_cannot_be_is_refused():
    layout = ParamLayout(("p",), ((2**14, 2**10),))
    with pytest.raises(InputError, match="dimension: expected at least 1"):
        Whole(layout, 0)
    with pytest.raises(InputError, match=r"at most \d+ entries .* use 'sjlt' or 'kronecker'"):
        Whole(layout, 64)
    assert Whole(layout, 64, "sjlt").width == 64
    with pytest.raises(InputError, match="at least 1, got 4 and 0"):
        Masked(layout, 4, 0)
    with pytest.raises(LayoutMismatch, match=r"p: expected scales \(16384, 1024\)"):
        Scaled(Projection(layout, 3), {"p": torch.ones(3)})
