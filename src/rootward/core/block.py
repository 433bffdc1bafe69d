"""What a pass over documents hands to its sinks: per parameter the *factored* gradient of every document.

A parameter's gradient for document ``n`` is kept as a sum over tokens ``t`` that nobody has to carry out:

    matrix   dL_n/dW      = sum_t  left[n,t,:]^T  right[n,t,:]      W[rows, cols] in its own orientation
    lookup   dL_n/dE[v,:] = sum_t  [ids[n,t] = v] right[n,t,:]      E[vocabulary, width]
    vector   dL_n/db      = sum_t  rows[n,t,:]                      b[width]

so a Linear weight ``[o, i]`` has left = output gradients, right = activations; a Conv1D weight ``[i, o]`` the
reverse. A parameter that is used in two places (tied weights) simply has two factors: its gradient is their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rootward.core.errors import LayoutMismatch


@dataclass(frozen=True)
class MatrixFactor:
    """``left[n,t,rows]``, ``right[n,t,cols]``; ``transposed`` says that rows are inputs (Conv1D), not outputs."""

    left: Tensor
    right: Tensor
    transposed: bool = False

    def take(self, part: slice) -> MatrixFactor:
        """The documents of a slice."""
        return MatrixFactor(self.left[part], self.right[part], self.transposed)

    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of one document's gradient."""
        return self.left.shape[-1], self.right.shape[-1]

    def gradient(self) -> Tensor:
        """Per-document gradient ``[n, rows, cols]``."""
        return torch.bmm(self.left.transpose(1, 2), self.right)

    def dot_tokens(self, query: Tensor) -> Tensor:
        """``left_t^T Q right_t`` per token for ``query[q, rows, cols]``: ``[q, n, t]``."""
        n, t, _ = self.left.shape
        result = [((self.left.reshape(n * t, -1) @ q) * self.right.reshape(n * t, -1)).sum(-1) for q in query]
        return torch.stack(result).view(len(query), n, t)


@dataclass(frozen=True)
class LookupFactor:
    """``ids[n,t]`` into a table of ``vocabulary`` rows, ``right[n,t,width]``."""

    ids: Tensor
    right: Tensor
    vocabulary: int

    def take(self, part: slice) -> LookupFactor:
        """The documents of a slice."""
        return LookupFactor(self.ids[part], self.right[part], self.vocabulary)

    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of one document's gradient."""
        return self.vocabulary, self.right.shape[-1]

    def gradient(self) -> Tensor:
        """Per-document gradient ``[n, vocabulary, width]``."""
        n, _, width = self.right.shape
        result = self.right.new_zeros(n, self.vocabulary, width)
        return result.scatter_add_(1, self.ids.unsqueeze(-1).expand_as(self.right), self.right)

    def dot_tokens(self, query: Tensor) -> Tensor:
        """``Q[ids_t] . right_t`` per token for ``query[q, vocabulary, width]``: ``[q, n, t]``."""
        return torch.stack([(q[self.ids] * self.right).sum(-1) for q in query])


@dataclass(frozen=True)
class VectorFactor:
    """``rows[n,t,width]``: biases and the scales of norms."""

    rows: Tensor

    def take(self, part: slice) -> VectorFactor:
        """The documents of a slice."""
        return VectorFactor(self.rows[part])

    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of one document's gradient."""
        return (self.rows.shape[-1],)

    def gradient(self) -> Tensor:
        """Per-document gradient ``[n, width]``."""
        return self.rows.sum(1)

    def dot_tokens(self, query: Tensor) -> Tensor:
        """``q . rows_t`` per token for ``query[q, width]``: ``[q, n, t]``."""
        return torch.einsum("ntd,qd->qnt", self.rows, query)


Factor = MatrixFactor | LookupFactor | VectorFactor


def widened(factor: Factor) -> Factor:
    """The factor with half-precision values in float32, for whoever sums."""

    def up(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    if isinstance(factor, MatrixFactor):
        return MatrixFactor(up(factor.left), up(factor.right), factor.transposed)
    if isinstance(factor, LookupFactor):
        return LookupFactor(factor.ids, up(factor.right), factor.vocabulary)
    return VectorFactor(up(factor.rows))


def factor_inner(a: Factor, b: Factor) -> Tensor:
    """``<dL_n/dW of a, dL_n/dW of b>`` per document ``[n]``, without either gradient being formed.

    Both are factors of the same parameter, so their gradients have the same shape; a table of ``vocabulary`` rows may
    also be used as a matrix (a tied output head).
    """
    if isinstance(a, VectorFactor) and isinstance(b, VectorFactor):
        return (a.rows.sum(1) * b.rows.sum(1)).sum(-1)
    if isinstance(a, VectorFactor) or isinstance(b, VectorFactor):
        raise LayoutMismatch("expected two factors of one parameter, got a vector and a matrix")
    right = torch.bmm(a.right, b.right.transpose(1, 2))
    if isinstance(a, MatrixFactor) and isinstance(b, MatrixFactor):
        left = torch.bmm(a.left, b.left.transpose(1, 2))
    elif isinstance(a, LookupFactor) and isinstance(b, LookupFactor):
        left = (a.ids.unsqueeze(2) == b.ids.unsqueeze(1)).to(right.dtype)
    elif isinstance(a, MatrixFactor) and isinstance(b, LookupFactor):
        left = a.left.gather(2, b.ids.unsqueeze(1).expand(-1, a.left.shape[1], -1))
    else:
        return factor_inner(b, a)
    return (left * right).sum((1, 2))


@dataclass(frozen=True)
class Block:
    """The documents of one batch.

    ``index[n]`` are positions in the pass's document list and ``ids`` their content hashes; ``mask[n,t]`` marks real
    tokens; ``losses[n]`` are summed over the tokens that are trained on, ``trained[n]`` is their number. ``turn``
    counts the backward passes over one batch: it is above 0 where the same documents come again with other labels.

    Law: the sum of ``gradient()`` over blocks equals the whole-batch gradient.
    """

    index: Tensor
    ids: Sequence[str]
    mask: Tensor
    losses: Tensor
    trained: Tensor
    turn: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def total_gradient(factors: Mapping[str, Sequence[Factor]]) -> dict[str, Tensor]:
    """Dense per-document gradients ``[n, *shape]`` of every parameter: the slow twin used by tests."""
    result: dict[str, Tensor] = {}
    for name, parts in factors.items():
        dense = parts[0].gradient()
        for part in parts[1:]:
            dense = dense + part.gradient()
        result[name] = dense
    return result
