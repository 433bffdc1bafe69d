"""GraSS: exact block-diagonal influence where nothing is left out, and its formula on masked gradients."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from rootward.capture.inputs import tracked_of
from rootward.capture.projection import sketch_dense
from rootward.capture.sketch import Masked
from tests.methods.contract import World, close, contrast, loss, naive_gradients, naive_queries, run, scalar

BEHAVIOURS = {"contrast": contrast, "loss": loss, "scalar": scalar}
SMALL = r"layers\.1\.(self_attn\.[qk]|.*norm)"


def influence(g: torch.Tensor, q: torch.Tensor, parts: list[slice]) -> torch.Tensor:
    scores = torch.zeros(len(q), len(g), dtype=g.dtype)
    for part in parts:
        fisher = g[:, part].T @ g[:, part] / len(g)
        lam = 0.1 * float(fisher.diagonal().mean())
        scores -= q[:, part] @ torch.linalg.solve(fisher + lam * torch.eye(len(fisher), dtype=g.dtype), g[:, part].T)
    return scores


@pytest.mark.parametrize("kind", BEHAVIOURS)
def test_with_masks_that_keep_everything_it_is_exact_block_influence(world: World, kind: str):
    subject, behaviour = world.subject(parameters=SMALL), BEHAVIOURS[kind]()
    layout = tracked_of(subject).layout
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, behaviour, layout.names)
    found = run(subject, behaviour, "grass", dimension=4096, damping=0.1)
    close(found.values, influence(g, q, list(layout.slices.values())), rtol=1e-5)


def test_the_more_columns_the_hash_has_the_closer_it_is_to_exact(world: World):
    subject = world.subject(parameters=r"mlp\.")
    layout = tracked_of(subject).layout
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, contrast(), layout.names)
    exact = influence(g, q, list(layout.slices.values())).flatten()

    def alike(dimension: int) -> float:
        """Mean correlation with the exact scores over seeds, with masks that keep everything."""
        found = [run(subject, contrast(), "grass", dimension=dimension, blow_up=4096, seed=k) for k in range(5)]
        rows = [torch.stack([exact, torch.from_numpy(f.values).double().flatten()]) for f in found]
        return sum(float(torch.corrcoef(pair)[0, 1]) for pair in rows) / 5

    few, some, many = alike(2), alike(16), alike(min(layout.sizes.values()) - 1)
    assert few < some < many
    assert many > 0.95


@pytest.mark.parametrize("name", ["grass", "grass_largest"])
def test_sketched_it_is_the_formula_of_sketched_gradients(world: World, name: str):
    subject = world.subject(parameters=".*")  # a table of one-hot inputs among them
    layout = tracked_of(subject).layout
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, contrast(), layout.names)
    sketch = Masked(layout, 9, 4, 3)
    if name == "grass_largest":
        chosen = {}
        for part, value in layout.unflatten(g.square().mean(0)).items():
            matrix = value.reshape(-1, value.shape[-1])
            rows, cols = (matrix.sum(axis).argsort(descending=True) for axis in (1, 0))
            left, right = sketch.masks[part]
            chosen[part] = None if left is None else rows[: len(left)], None if right is None else cols[: len(right)]
        sketch = Masked(layout, 9, 4, 3, chosen)
    rows = [sketch_dense(sketch, layout.unflatten(part)) for part in (g, q)]
    expected = influence(rows[0], rows[1], list(sketch.slices.values()))
    found = run(subject, contrast(), name, dimension=9, seed=3)
    close(found.values, expected, rtol=1e-5)
    assert f"{sketch.width} dimensions" in found.notes[0]


def test_large_damping_ranks_as_the_gradient_product(world: World):
    subject = world.subject(parameters=r"layers\.1\.self_attn\.q")
    found = run(subject, contrast(), "grass", dimension=4096, damping=1e9).values
    plain = run(subject, contrast(), "gradient_dot").values
    for mine, theirs in zip(found, plain, strict=True):
        assert spearmanr(mine, theirs).statistic == pytest.approx(1)
