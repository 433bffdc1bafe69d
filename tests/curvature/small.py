"""A layout of 55 parameters, random gradients and matrices over it, and the plain way to a power of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from rootward.core.layout import ParamLayout
from rootward.curvature.solvers import Operator

LAYOUT = ParamLayout(("weight", "bias"), ((5, 10), (5,)))
P = LAYOUT.size


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(count: int = 3, seed: int = 1) -> dict[str, Tensor]:
    return LAYOUT.unflatten(randn(count, P, seed=seed))


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].flatten(1) for name in LAYOUT.names], 1)


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def power(matrix: Tensor, lam: float, exponent: float) -> Tensor:
    """``(matrix + lam I)^exponent`` of a positive matrix by repeated square roots and inverses, no shared code."""
    damped = matrix + lam * torch.eye(len(matrix), dtype=matrix.dtype)
    if exponent == -1.0:
        return torch.linalg.inv(damped)
    # Newton's iteration for the square root (Denman & Beavers 1976)
    y, z = damped, torch.eye(len(damped), dtype=damped.dtype)
    for _ in range(60):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return y if exponent == 0.5 else z


def operator(matrix: Tensor) -> Operator:
    return lambda x: LAYOUT.unflatten(flat(dict(x)) @ matrix.T)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
