"""Random projection: exact algebra against dense gradients, unbiased inner products, stable columns."""

from __future__ import annotations

import pytest
import torch

from rootward.capture.projection import Projection
from rootward.capture.run import run_pass
from rootward.capture.sinks import ProjectedRows
from rootward.capture.sites import track
from rootward.core.errors import InputError, LayoutMismatch
from rootward.core.layout import ParamLayout
from tests.capture import worlds as w


@pytest.mark.parametrize("model", ["gpt2", "llama-tied"])
@pytest.mark.parametrize("rank", [1, 3, 20, None])
def test_rows_are_projections_of_dense_gradients(rank: int | None, model: str):
    net = w.gpt2() if model == "gpt2" else w.llama(tie_word_embeddings=True)
    examples, tracked = w.documents((5, 9, 3, 12)), track(net, ".*")
    projection = Projection(tracked.layout, rank)
    sink = ProjectedRows(projection, len(examples), torch.float64)
    run_pass(net, w.causal(), examples, [sink], tracked=tracked, token_budget=20)
    wanted = projection.project_dense(w.naive(net, w.causal(), examples, tracked.layout.names))
    assert wanted.shape[1] == projection.width == sum(s.stop - s.start for s in projection.slices.values())
    torch.testing.assert_close(sink.rows, wanted, rtol=1e-9, atol=1e-9)
    if rank is None:
        assert projection.width == tracked.layout.size


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12), (4, 3, 5, 2), (30,), (3, 3)])
def test_inner_products_are_unbiased_for_every_shape(shape: tuple[int, ...]):
    layout = ParamLayout(("p",), (shape,))
    g, h = torch.randn(2, *shape, dtype=torch.float64)
    h = h + 0.5 * g
    true = float((g * h).sum())
    found = []
    for seed in range(400):
        rows = Projection(layout, 4, seed).project_dense({"p": torch.stack([g, h])})
        found.append(float(rows[0] @ rows[1]))
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / len(found) ** 0.5
    assert abs(float(values.mean()) - true) <= 3 * error + 1e-9
    assert 3 * error < abs(true), "too loose to find a wrong factor"


def test_columns_depend_on_name_and_seed_alone():
    both = ParamLayout(("a", "b"), ((9, 8), (7, 9)))
    alone = ParamLayout(("b",), ((7, 9),))
    value = {"a": torch.randn(1, 9, 8), "b": torch.randn(1, 7, 9)}
    whole = Projection(both, 2)
    rows = whole.project_dense(value)
    assert torch.equal(rows[:, whole.slices["b"]], Projection(alone, 2).project_dense(value))
    assert not torch.equal(rows, Projection(both, 2, seed=1).project_dense(value))
    torch.set_default_dtype(torch.float64)
    try:
        again = Projection(both, 2).project_dense(value)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rows, again)
    assert Projection(both, 2).describe() != Projection(both, 3).describe()


def test_narrow_sides_are_kept_and_wrong_ranks_refused():
    layout = ParamLayout(("a", "v"), ((2, 9), (5,)))
    projection = Projection(layout, 3)
    assert projection.shapes == {"a": (2, 3), "v": (1, 5)}
    with pytest.raises(InputError, match="at least 1"):
        Projection(layout, 0)


def test_given_sides_take_the_place_of_random_ones():
    layout = ParamLayout(("a", "v", "c"), ((5, 9), (7,), (8, 3, 2)))
    generator = torch.Generator().manual_seed(0)
    left, right, third = (
        torch.randn(d, k, generator=generator, dtype=torch.float64) for d, k in ((5, 2), (9, 4), (7, 3))
    )
    given = {"a": (left, right), "v": (None, third)}
    projection = Projection(layout, 3, 1, given=given)
    assert projection.shapes == {"a": (2, 4), "v": (1, 3), "c": (3, 3)}
    value = {n: torch.randn(2, *layout.shape(n), generator=generator, dtype=torch.float64) for n in layout.names}
    rows = projection.project_dense(value)
    torch.testing.assert_close(rows[:, projection.slices["a"]], (left.T @ value["a"] @ right).flatten(1))
    torch.testing.assert_close(rows[:, projection.slices["v"]], value["v"] @ third)
    plain = Projection(layout, 3, 1)
    torch.testing.assert_close(rows[:, projection.slices["c"]], plain.project_one("c", value["c"]))
    # the transpose holds for given sides too, and the fingerprint knows them
    full = sum(v.flatten(1) @ value[name].flatten(1).T for name, v in projection.lift(rows).items())
    torch.testing.assert_close(full, rows @ rows.T)
    nudged = Projection(layout, 3, 1, given={**given, "v": (None, third + 1e-9)})
    assert len({str(p.describe()) for p in (plain, projection, nudged)}) == 3
    assert str(Projection(layout, 3, 1, given=dict(given)).describe()) == str(projection.describe())


def test_given_sides_of_another_width_are_refused():
    layout = ParamLayout(("a", "v"), ((5, 9), (7,)))
    with pytest.raises(LayoutMismatch, match=r"a: expected sides \[5, k\] and \[9, m\], got \(9, 2\)"):
        Projection(layout, 3, given={"a": (torch.zeros(9, 2), None)})
    with pytest.raises(LayoutMismatch, match="v: a vector has a right side only"):
        Projection(layout, 3, given={"v": (torch.zeros(1, 1), None)})
