"""What a pass makes of its blocks: sums for queries, products with queries, norms, projected rows, pooled activations.

Every sink can be merged with a twin that saw other documents, which is all that several workers need. Half-precision
factors are widened to float32 before anything is summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rootward.capture.projection import Sketch
from rootward.core.block import Block, Factor, LookupFactor, MatrixFactor, VectorFactor, factor_inner, widened
from rootward.core.errors import ArtefactError, LayoutMismatch
from rootward.core.layout import ParamLayout

CANCELLED = 1e-5
"""Below this share of its tokens' own squares, a norm from products of tokens with tokens is rounding in float32."""
BUFFER = 8_388_608
"""Entries of the reused buffer in which per-document gradients are formed (32 MB in float32).

A whole batch of 32 documents for matrices of 1024 x 256; smaller pieces were slower, as every piece reads all queries.
"""


class BaseSink:
    """Common ground: wants the parameters of a layout, keeps the current block."""

    backward = True
    inputs = False
    modules: tuple[str, ...] = ()
    positions = False
    """Whether factors must stand at their tokens' places ``t`` (else a head may see the trained positions only)."""

    def __init__(self, layout: ParamLayout) -> None:
        self.layout = layout
        self.block: Block | None = None
        self._names = frozenset(layout.names)

    def wants(self, name: str) -> bool:
        """Parameters of the layout."""
        return name in self._names

    def begin(self, block: Block) -> None:
        """Keep the block."""
        self.block = block

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Sinks without backward get none."""

    def activation(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Sinks without modules get none."""

    def end(self) -> None:
        """Forget the block."""
        self.block = None


class WeightedSum(BaseSink):
    """Gradients of weighted sums of documents: ``sums[name][q, *shape] = sum_n weight[n, q] dL_n/dname``.

    With a measurement's parts as documents and their weights this is the gradient of every query's measurement.
    """

    def __init__(self, layout: ParamLayout, weights: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layout)
        self.weights = weights
        self.sums: dict[str, Tensor] = {}
        self.dtype = dtype

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Add the block; a query's documents are summed inside one product."""
        assert self.block is not None
        shape = self.layout.shape(name)
        device = factors[0].right.device if not isinstance(factors[0], VectorFactor) else factors[0].rows.device
        weights = self.weights[self.block.index].to(device)
        if name not in self.sums:
            self.sums[name] = torch.zeros(self.weights.shape[1], *shape, dtype=self.dtype, device=device)
        for q in weights.any(0).nonzero().flatten().tolist():
            n = weights[:, q].nonzero().flatten()
            for factor in map(widened, factors):
                _add_weighted(self.sums[name][q], factor, n, weights[n, q])

    def merge(self, other: WeightedSum) -> None:
        """Add the sums of a twin that saw other documents."""
        self.layout.require(other.layout, "merge")
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def result(self) -> dict[str, Tensor]:
        """``[q, *shape]`` for every parameter; zeros where no document reached it."""
        for name in self.layout.names:
            if name not in self.sums:
                self.sums[name] = torch.zeros(self.weights.shape[1], *self.layout.shape(name), dtype=self.dtype)
        return {name: self.sums[name] for name in self.layout.names}


def _add_weighted(target: Tensor, factor: Factor, n: Tensor, weight: Tensor) -> None:
    if isinstance(factor, MatrixFactor):
        left = (factor.left[n] * weight[:, None, None].to(factor.left.dtype)).flatten(0, 1)
        target.view(left.shape[1], -1).add_((left.T @ factor.right[n].flatten(0, 1)).to(target.dtype))
    elif isinstance(factor, LookupFactor):
        rows = (factor.right[n] * weight[:, None, None].to(factor.right.dtype)).flatten(0, 1).to(target.dtype)
        target.index_add_(0, factor.ids[n].flatten(), rows)
    else:
        target.add_((factor.rows[n].sum(1) * weight[:, None].to(factor.rows.dtype)).sum(0).to(target.dtype))


@dataclass(frozen=True)
class LowRank:
    """``u[q, rows, r]``, ``v[q, cols, r]``: a query's matrix as ``u v^T``; ``kept`` is its share of squared norm."""

    u: Tensor
    v: Tensor
    kept: float


def low_rank(query: Tensor, rank: int) -> LowRank:
    """Best rank-``rank`` approximation of each ``query[q, rows, cols]`` (truncated SVD, float64 inside).

    Trailing dimensions (a convolution's) are columns.
    """
    if query.dim() < 3:
        raise LayoutMismatch(
            f"low rank: expected queries of a matrix parameter [q, rows, cols], got {tuple(query.shape)}"
        )
    u, s, vh = torch.linalg.svd(query.flatten(2).double(), full_matrices=False)
    rank = min(rank, s.shape[-1])
    kept = float((s[..., :rank] ** 2).sum() / (s**2).sum().clamp_min(torch.finfo(torch.float64).tiny))
    root = s[..., :rank].sqrt()
    left = (u[..., :rank] * root[..., None, :]).to(query.dtype)
    right = (vh[..., :rank, :].transpose(-1, -2) * root[..., None, :]).to(query.dtype)
    return LowRank(left.contiguous(), right.contiguous(), kept)


class Products(BaseSink):
    """Inner products of every document's gradient with every query's, without the gradients being kept.

    ``dots[q, n] = <query_q, dL_n>`` summed over parameters. Where ``norms``, ``squared[n] = |dL_n|^2`` too; where
    ``tokens``, ``by_token[n]`` is ``[q, t]`` and sums to ``dots[:, n]``.

    Parameters for which every query is zero are left out of the pass (unless norms are wanted). Per parameter one of
    three ways is taken, by the number of queries: a low-rank query goes through both factors; one query (or token
    scores) goes through one side; several against per-document gradients formed in one reused buffer.
    """

    def __init__(
        self,
        layout: ParamLayout,
        queries: Mapping[str, Tensor | LowRank],
        documents: int,
        *,
        norms: bool = False,
        tokens: bool = False,
    ) -> None:
        super().__init__(layout)
        if set(queries) != set(layout.names):
            raise LayoutMismatch(
                f"queries: expected {len(layout.names)} parameters of layout {layout.hash}, got {len(queries)}"
            )
        first = next(iter(queries.values()))
        count = (first.u if isinstance(first, LowRank) else first).shape[0]
        self.queries = queries
        if not norms:  # a parameter that no query's gradient reaches needs no hook: above a concept's layer, say
            reached = [name for name, query in queries.items() if _any(query)]
            self._names = frozenset(reached or layout.names[:1])
        self.dots = torch.zeros(count, documents, dtype=torch.float64)
        self.squared = torch.zeros(documents, dtype=torch.float64) if norms else None
        self.by_token: dict[int, Tensor] | None = {} if tokens else None
        self.positions = tokens
        self._dot: Tensor | None = None
        self._square: Tensor | None = None
        self._token: Tensor | None = None
        self._buffer: Tensor | None = None

    def begin(self, block: Block) -> None:
        """Start the block's sums."""
        super().begin(block)
        self._dot = self._square = self._token = None

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Add one parameter's products."""
        factors = [widened(f) for f in factors]
        matrices = [f for f in factors if isinstance(f, MatrixFactor)]
        query = self.queries[name]
        through_gradients = (
            bool(matrices) and isinstance(query, Tensor) and query.shape[0] > 1 and self.by_token is None
        )
        whole = len(matrices) == len(factors)
        squares: Tensor | None = None
        if through_gradients:
            assert isinstance(query, Tensor)
            dots, squares = self._dense(matrices, query, self.squared is not None and whole)
            self._dot = _plus(self._dot, dots)
        for factor in factors:
            if not (through_gradients and isinstance(factor, MatrixFactor)):
                self._add(factor, query)
        if self.squared is None:
            return
        if squares is None:
            # a table's gradient is formed where it must be only: its rows are far more than a document's tokens
            ghost = not whole or _ghost_is_cheaper(matrices)
            squares = _mended(ghost_squares(*factors), factors) if ghost else self._dense(matrices, None, True)[1]
        self._square = _plus(self._square, squares)

    def _add(self, factor: Factor, query: Tensor | LowRank) -> None:
        """Products of one factor, token by token."""
        assert self.block is not None
        if isinstance(factor, VectorFactor) and isinstance(query, Tensor) and self.by_token is None:
            self._dot = _plus(self._dot, query.to(factor.rows.dtype) @ factor.rows.sum(1).T)
            return
        each = _token_products(factor, query)
        self._dot = _plus(self._dot, each.sum(-1))
        if self.by_token is None:
            return
        tokens = self.block.mask.shape[1]
        if each.shape[-1] % tokens == 0:  # heads of a token; all places of an image, which is one piece
            each = each.view(*each.shape[:2], tokens, -1).sum(-1)
        if each.shape[-1] != tokens:
            raise ArtefactError(
                f"token scores: expected one factor per token ({tokens}), got {each.shape[-1]}; leave modules that see "
                "pooled tokens out with `parameters`"
            )
        self._token = _plus(self._token, each)

    def _dense(
        self, matrices: Sequence[MatrixFactor], query: Tensor | None, norms: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Products with ``query[q, *shape]`` and squared norms, through per-document gradients in a reused buffer."""
        n, _, rows = matrices[0].left.shape
        cols = matrices[0].right.shape[-1]
        step = max(1, min(n, BUFFER // (rows * cols)))
        flat = query.reshape(query.shape[0], -1).to(matrices[0].left.dtype) if query is not None else None
        dots: list[Tensor] = []
        squares: list[Tensor] = []
        for start in range(0, n, step):
            gradient = self._form(matrices, slice(start, min(start + step, n)), rows, cols)
            if flat is not None:
                dots.append(flat @ gradient.T)
            if norms:
                squares.append(torch.linalg.vector_norm(gradient, dim=1).square())
        return (torch.cat(dots, 1) if dots else None), (torch.cat(squares) if squares else None)

    def _form(self, matrices: Sequence[MatrixFactor], part: slice, rows: int, cols: int) -> Tensor:
        count = part.stop - part.start
        like = matrices[0].left
        if self._buffer is None or self._buffer.numel() < count * rows * cols or self._buffer.dtype != like.dtype:
            self._buffer = like.new_empty(max(BUFFER, count * rows * cols))
        gradient = self._buffer[: count * rows * cols].view(count, rows, cols)
        torch.bmm(matrices[0].left[part].transpose(1, 2), matrices[0].right[part], out=gradient)
        for factor in matrices[1:]:
            gradient.baddbmm_(factor.left[part].transpose(1, 2), factor.right[part])
        return gradient.view(count, -1)

    def end(self) -> None:
        """Write the block's columns."""
        assert self.block is not None
        index = self.block.index
        if self._dot is not None:
            self.dots[:, index] = self._dot.double().cpu()
        if self.squared is not None and self._square is not None:
            self.squared[index] = self._square.double().cpu()
        if self.by_token is not None and self._token is not None:
            lengths = self.block.mask.sum(1).tolist()
            for row, n in enumerate(index.tolist()):
                self.by_token[n] = self._token[:, row, : lengths[row]].double().cpu()
        super().end()

    def merge(self, other: Products) -> None:
        """Add a twin that saw other documents."""
        self.layout.require(other.layout, "merge")
        self.dots += other.dots
        if self.squared is not None and other.squared is not None:
            self.squared += other.squared
        if self.by_token is not None and other.by_token is not None:
            self.by_token.update(other.by_token)


def gradient_norms(layout: ParamLayout, documents: int, device: torch.device) -> Products:
    """A sink of documents' squared gradient norms alone (``squared``): its one query is zero."""
    nothing = {name: torch.zeros(1, *layout.shape(name), device=device) for name in layout.names}
    return Products(layout, nothing, documents, norms=True)


def _any(query: Tensor | LowRank) -> bool:
    return bool((query.u if isinstance(query, LowRank) else query).any())


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor:
    assert more is not None
    return more if total is None else total + more


def _ghost_is_cheaper(matrices: Sequence[MatrixFactor]) -> bool:
    rows, cols = matrices[0].left.shape[2], matrices[0].right.shape[2]
    lengths = [m.left.shape[1] for m in matrices]
    pairs = sum(a * b for i, a in enumerate(lengths) for b in lengths[i:])
    return pairs * (rows + cols) < (sum(lengths) + 1) * rows * cols


def ghost_squares(*factors: Factor) -> Tensor:
    """``|dL_n/dW|^2 [n]`` of all of a parameter's factors, from products of tokens with tokens.

    For one matrix that is ``sum_{t,s} (left_t . left_s)(right_t . right_s)``.
    """
    total: Tensor | None = None
    for i, a in enumerate(factors):
        for j, b in enumerate(factors[i:]):
            total = _plus(total, factor_inner(a, b) * (2 if j else 1))
    if total is None:
        raise LayoutMismatch("ghost norms: expected at least one factor, got none")
    return total


def _mended(squares: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Ghost squares, with those of documents whose tokens cancel (even to below 0) taken from the formed gradient."""
    if all(isinstance(factor, VectorFactor) for factor in factors):
        return squares  # of sums over tokens already
    scale = sum(_token_squares(factor) for factor in factors)
    for n in (squares < CANCELLED * scale).nonzero().flatten().tolist():
        gradient: Tensor | None = None
        for factor in factors:
            gradient = _plus(gradient, factor.take(slice(n, n + 1)).gradient())
        assert gradient is not None
        squares[n] = gradient.square().sum()
    return squares


def _token_squares(factor: Factor) -> Tensor:
    """``sum_t |left_t|^2 |right_t|^2 [n]``: what the squared norm would be if no two tokens had anything in common."""
    if isinstance(factor, VectorFactor):
        return factor.rows.square().sum((1, 2))
    right = factor.right.square().sum(-1)
    return (factor.left.square().sum(-1) * right if isinstance(factor, MatrixFactor) else right).sum(1)


def _token_products(factor: Factor, query: Tensor | LowRank) -> Tensor:
    """Products per token ``[q, n, t]``."""
    if not isinstance(query, LowRank):
        if isinstance(factor, MatrixFactor):
            shaped = query.reshape(query.shape[0], factor.left.shape[-1], factor.right.shape[-1])
            return factor.dot_tokens(shaped.to(factor.left.dtype))
        return factor.dot_tokens(
            query.to(factor.right.dtype if isinstance(factor, LookupFactor) else factor.rows.dtype)
        )
    if isinstance(factor, VectorFactor):
        raise LayoutMismatch("a low-rank query needs a matrix parameter, got a vector")
    us, vs = query.u.to(factor.right.dtype), query.v.to(factor.right.dtype)
    if isinstance(factor, LookupFactor):
        return torch.stack([(u[factor.ids] * (factor.right @ v)).sum(-1) for u, v in zip(us, vs, strict=True)])
    return torch.stack([((factor.left @ u) * (factor.right @ v)).sum(-1) for u, v in zip(us, vs, strict=True)])


class ProjectedRows(BaseSink):
    """Every document's projected gradient ``rows[n, width]`` (see `Sketch`), with its loss."""

    def __init__(self, projection: Sketch, documents: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(projection.layout)
        self.projection = projection
        self.rows = torch.zeros(documents, projection.width, dtype=dtype)
        self.losses = torch.zeros(documents, dtype=torch.float64)

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Project one parameter of the block."""
        assert self.block is not None
        total: Tensor | None = None
        for factor in map(widened, factors):
            total = _plus(total, self.projection.project(name, factor))
        assert total is not None
        self.rows[self.block.index, self.projection.slices[name]] += total.to(self.rows.dtype).cpu()

    def end(self) -> None:
        """Write the losses."""
        assert self.block is not None
        self.losses[self.block.index] = self.block.losses.double().cpu()
        super().end()

    def merge(self, other: ProjectedRows) -> None:
        """Add the rows of a twin that saw other documents."""
        if self.projection.describe() != other.projection.describe():
            raise LayoutMismatch(
                f"merge: expected projection {self.projection.describe()}, got {other.projection.describe()}"
            )
        self.rows += other.rows
        self.losses += other.losses


class Losses(BaseSink):
    """Losses and trained tokens of every document; no backward pass."""

    backward = False

    def __init__(self, documents: int) -> None:
        super().__init__(ParamLayout((), ()))
        self.losses = torch.zeros(documents, dtype=torch.float64)
        self.trained = torch.zeros(documents, dtype=torch.int64)

    def end(self) -> None:
        """Write the block's losses."""
        assert self.block is not None
        self.losses[self.block.index] = self.block.losses.double().cpu()
        self.trained[self.block.index] = self.block.trained.cpu()
        super().end()

    def merge(self, other: Losses) -> None:
        """Add the losses of a twin that saw other documents."""
        self.losses += other.losses
        self.trained += other.trained


class PooledActivations(BaseSink):
    """One module's output at a document's real tokens, their mean or (``last``) the last: ``pooled[n, d]``."""

    backward = False

    def __init__(self, module: str, documents: int, *, last: bool = False) -> None:
        super().__init__(ParamLayout((), ()))
        self.modules = (module,)
        self.documents, self.last = documents, last
        self.pooled: Tensor | None = None
        self._current: Tensor | None = None

    def activation(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Pool the block."""
        if values.dim() == 2:
            values = values.unsqueeze(1)
        if values.dim() != 3 or values.shape[:2] != mask.shape:
            raise ArtefactError(
                f"{name}: expected an output [{mask.shape[0]}, {mask.shape[1]}, width], got shape {tuple(values.shape)}"
            )
        wide = values if values.dtype == torch.float64 else values.float()
        if self.last:
            place = mask.to(torch.int64).cumsum(1).argmax(1)
            self._current = wide[torch.arange(len(wide), device=wide.device), place]
            return
        # zeros, not weights of zero: what a model writes at padding may be anything
        wide = torch.where(mask.unsqueeze(-1), wide, torch.zeros((), dtype=wide.dtype, device=wide.device))
        self._current = wide.sum(1) / mask.sum(1, keepdim=True).to(wide.dtype)

    def end(self) -> None:
        """Write the block's rows."""
        assert self.block is not None
        if self._current is None:
            raise ArtefactError(f"{self.modules[0]}: expected the module to run for every batch, it did not")
        if self.pooled is None:
            self.pooled = torch.zeros(self.documents, self._current.shape[-1], dtype=self._current.dtype)
        self.pooled[self.block.index] = self._current.cpu()
        self._current = None
        super().end()

    def merge(self, other: PooledActivations) -> None:
        """Add the rows of a twin that saw other documents."""
        if (self.modules, self.documents, self.last) != (other.modules, other.documents, other.last):
            raise LayoutMismatch(
                f"merge: expected {self.modules[0]} of {self.documents} documents, "
                f"got {other.modules[0]} of {other.documents}"
            )
        if other.pooled is not None:
            self.pooled = other.pooled.clone() if self.pooled is None else self.pooled + other.pooled
