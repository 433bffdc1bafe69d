"""Agreement of fits to two halves of a sample, against scores that are actually drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rootward.core.layout import ParamLayout
from rootward.curvature.agreement import Overlap, combined, needed, of_eigenvalues, of_side, reached
from rootward.curvature.base import Damping

Named = dict[str, Tensor]
LAYOUT = ParamLayout(("w", "b"), ((12, 10), (8,)))
SHAPES = {"w": (12, 10), "b": (1, 8)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum() -> dict[str, Tensor]:
    """True eigenvalues that fall off over three decades."""
    return {n: (torch.rand(s, generator=generator(3), dtype=torch.float64) * 7).exp() * 1e-2 for n, s in SHAPES.items()}


def estimated(truth: dict[str, Tensor], documents: int, seed: int) -> dict[str, Tensor]:
    """Means of squares of that many normal gradients in the eigenbasis."""
    source = generator(seed)
    noise = {n: torch.randn(documents, *v.shape, generator=source, dtype=torch.float64) for n, v in truth.items()}
    return {n: truth[n] * noise[n].square().mean(0) for n in truth}


def lam(values: dict[str, Tensor], damping: Damping) -> dict[str, float]:
    whole = sum(float(v.sum()) for v in values.values()) / LAYOUT.size
    return {n: damping.of(float(v.mean()), whole) for n, v in values.items()}


def correlated(first: Named, second: Named, truth: Named, damping: Damping) -> float:
    """Mean correlation over documents of scores by ``(first + lam)^-1`` and ``(second + lam)^-1``, over queries.

    Queries and documents are drawn from the truth. Products of a query and a document have mean 0 over documents.
    """
    source, scores = generator(9), [torch.zeros(()), torch.zeros(())]
    for name, value in truth.items():
        queries, documents = (
            torch.randn(count, value.numel(), generator=source, dtype=torch.float64) * value.flatten().sqrt()
            for count in (300, 400)
        )
        for k, fitted in enumerate((first, second)):
            inverse = 1 / (fitted[name].flatten() + lam(fitted, damping)[name])
            scores[k] = scores[k] + (queries * inverse) @ documents.T
    a, b = scores
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


@pytest.mark.parametrize("damping", [Damping(0.1), Damping(0.1, scope="whole"), Damping(1e-3)])
@pytest.mark.parametrize("documents", [12, 40, 160])
def test_halves_and_wholes_correlate_as_estimated(documents: int, damping: Damping):
    truth, off = spectrum(), list[tuple[float, float, float, float]]()
    for seed in range(6):
        one, two = (estimated(truth, documents // 2, 2 * seed + k) for k in range(2))
        mean = {n: (one[n] + two[n]) / 2 for n in truth}
        half = of_eigenvalues(LAYOUT, one, two, damping)
        off.append((half, correlated(one, two, truth, damping), reached(half), correlated(mean, truth, truth, damping)))
    half, drawn, whole, true = torch.tensor(off).mean(0).tolist()
    assert half == pytest.approx(drawn, abs=0.04)
    assert 1 - half == pytest.approx(1 - drawn, rel=0.15)
    # the whole's is estimated with caution: errors that halves have in common do not change the ranking
    assert true - 0.08 < whole < true + 0.002
    assert 0.4 * (1 - whole) < 1 - true


def test_halves_that_are_the_same_agree_whatever_the_damping():
    truth = spectrum()
    assert of_eigenvalues(LAYOUT, truth, truth, Damping(0.0)) == pytest.approx(1)
    other = estimated(truth, 4, 0)
    rough = [of_eigenvalues(LAYOUT, truth, other, Damping(d)) for d in (1e-4, 1e-2, 1.0, 1e4)]
    assert rough == sorted(rough)
    assert rough[0] < 0.9
    assert rough[-1] > 0.95
    zero = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    assert of_eigenvalues(LAYOUT, zero, zero, Damping()) == 1.0


def sampled_side(width: int, documents: int, seed: int) -> Tensor:
    mixing = torch.randn(width, width, generator=generator(5), dtype=torch.float64)
    x = torch.randn(documents, width, generator=generator(seed), dtype=torch.float64) @ mixing
    return x.T @ x / documents


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_a_side_is_its_formula_as_dense_matrices(damping: float):
    a, b = (sampled_side(5, 9, seed) for seed in (1, 2))
    equal, unequal = torch.full((6,), 0.7, dtype=torch.float64), torch.linspace(0.5, 2, 8).double()
    for others, loose in ((equal, 1e-9), (unequal, 0.1)):
        whole = torch.kron(torch.diag(others), (a + b) / 2)
        unit = torch.eye(len(whole), dtype=torch.float64)
        x, y = (torch.linalg.solve(torch.kron(torch.diag(others), half) + damping * unit, whole) for half in (a, b))
        found = of_side(a, b, others, damping)
        expected = [float((p.T * q).sum()) for p, q in ((x, y), (x, x), (y, y))]
        assert [found.both, found.first, found.second] == pytest.approx(expected, rel=loose)
        assert found.correlation == pytest.approx(expected[0] / (expected[1] * expected[2]) ** 0.5, rel=0.01)
        assert found.correlation < 0.99


def test_a_side_correlates_as_scores_that_are_drawn_do():
    others, damping, off = torch.linspace(0.2, 2, 6).double(), 0.1, list[tuple[float, float]]()
    for seed in range(5):
        a, b = (sampled_side(6, 100, 2 * seed + k) for k in range(2))
        root = torch.linalg.cholesky(torch.kron(torch.diag(others), sampled_side(6, 100_000, 99)))
        q, g = (torch.randn(500, 36, generator=generator(50 + k), dtype=torch.float64) @ root.T for k in range(2))
        unit = damping * torch.eye(36, dtype=torch.float64)
        first, second = (q @ torch.linalg.solve(torch.kron(torch.diag(others), half) + unit, g.T) for half in (a, b))
        drawn = (first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()
        off.append((of_side(a, b, others, damping).correlation, float(drawn)))
    estimate, drawn = torch.tensor(off).mean(0).tolist()
    assert 1 - estimate == pytest.approx(1 - drawn, rel=0.2)
    assert drawn < 0.97


def test_a_side_without_curvature_says_nothing():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    some = torch.eye(3, dtype=torch.float64)
    for a, others in ((zero, torch.ones(4).double()), (some, torch.zeros(4).double())):
        assert of_side(a, a, others, 0.0) == Overlap()
    assert Overlap().correlation == 1.0
    flat = torch.ones(3, 3, dtype=torch.float64)  # of rank one, undamped
    assert of_side(flat, flat, torch.ones(4).double(), 0.0).correlation == pytest.approx(1)


def test_as_many_documents_are_needed_as_reach_the_target():
    """Noise that falls as one over the number of documents."""

    def half(documents: int) -> float:
        return 1 / (1 + 2 * 5.0 / documents)

    for target in (0.98, 0.97):
        count = needed(half(64), 64, target)
        assert reached(half(count)) >= target > reached(half(count - 2))
    assert needed(half(64), 64, 0.5) == 64  # it is reached already
    assert needed(0.001, 64, 0.99) == 64 * 16 + 1  # no further at once
    assert needed(-0.2, 64, 0.99) == 64 * 16 + 1
    assert needed(1.0, 64, 0.99) == 64
    assert reached(1.0) == 1.0


def test_two_sources_of_noise_add_up():
    assert combined(1.0, 0.9) == pytest.approx(0.9)
    source = generator(1)
    signal, one, two = (torch.randn(200_000, generator=source, dtype=torch.float64) * s for s in (1.0, 0.4, 0.3))

    def r(noise: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([signal, signal + noise]))[0, 1])

    assert combined(r(one), r(two)) == pytest.approx(r(one + two), abs=0.002)
