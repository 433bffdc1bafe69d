"""Sinks that a curvature is fitted with: covariances of both sides of every matrix, second moments in a given basis."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor

from rootward.capture.precision import TOKENS, WIDE, product
from rootward.capture.sinks import BUFFER, BaseSink
from rootward.core.block import Block, Factor, LookupFactor, MatrixFactor, VectorFactor, widened
from rootward.core.errors import ArtefactError, LayoutMismatch
from rootward.core.layout import ParamLayout
from rootward.curvature.kronecker import Basis, Covariance, Covariances, flat, rotate

Place = tuple[int, tuple[int, ...], tuple[int, ...]]
WIDEST = 16_384
"""A side that is wider (an output head's) is a diagonal: its covariance would take more than a gigabyte."""
Memory = tuple[Place, ...]
"""Where the inputs of all uses of a parameter lie, with shapes and strides."""


def _memory(x: Tensor) -> Place:
    return x.data_ptr(), tuple(x.shape), x.stride()


class CovarianceSums(BaseSink):
    """Sums over tokens of ``x x^T`` for both sides of every matrix, or for one of them; `result` gives their means.

    The input's side needs no backward pass (``sides`` "inputs"), and more documents: measured on a language model,
    what few documents get wrong of an EK-FAC is the covariance of inputs. Two sinks, of inputs and of outputs, are
    put together by `merge`.

    Matrices that are given the very same input (query, key and value; gate and up) share one sum, under the name that
    comes first in the layout: they are recognised by their memory in each batch. Padding is left out. A table's side
    of one-hot inputs is its diagonal. A vector has one side: sums over a document's tokens.
    """

    positions = True

    def __init__(
        self, layout: ParamLayout, sides: Literal["both", "inputs", "outputs"] = "both", *, quick: bool = False
    ) -> None:
        super().__init__(layout)
        self.quick = quick
        self.backward, self.inputs = sides != "inputs", sides == "inputs"
        self.wanted = sides
        self.sums: dict[str, Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self.documents: Counter[str] = Counter()
        self.left: dict[str, str] = {}
        self.right: dict[str, str] = {}
        self._seen: dict[Memory, tuple[str, tuple[weakref.ref[Tensor], ...]]] = {}
        self._counted: set[str] = set()
        self._fresh: set[str] = set()
        self._mask: Tensor | None = None

    def begin(self, block: Block) -> None:
        """Start a block: inputs are compared within it only. Later turns have the same inputs with other labels."""
        super().begin(block)
        self._seen.clear()
        self._counted.clear()
        self._mask = None if bool(block.mask.all()) else block.mask

    def end(self) -> None:
        """Call inputs that were met for the first time after the first in the layout that is given them.

        A backward pass meets the last first, a forward pass the first: both are to find one name.
        """
        for key in self._fresh:
            both = {"left": self.left, "right": self.right}
            users = [(name, side) for name in self.layout.names for side, keys in both.items() if keys.get(name) == key]
            best = "{}:{}".format(*users[0])
            if best != key:
                for name, side in users:
                    both[side][name] = best
                self.sums[best] = self.sums.pop(key)
                for counts in (self.tokens, self.documents):
                    counts[best] = counts.pop(key)
        self._fresh.clear()
        super().end()

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Add one parameter's tokens."""
        left, right = f"{name}:left", f"{name}:right"
        matrices = [factor for factor in factors if isinstance(factor, MatrixFactor)]
        if all(isinstance(factor, VectorFactor) for factor in factors):
            self._output(self.right, name, right, lambda: torch.stack([widened(f).gradient() for f in factors]).sum(0))
        elif len(matrices) < len(factors):
            self._table(name, factors)
        elif matrices[0].transposed:
            self._input(self.left, name, left, [factor.left for factor in matrices])
            for factor in matrices:
                self._output(self.right, name, right, lambda f=factor: self._rows(f.right))
        else:
            for factor in matrices:
                self._output(self.left, name, left, lambda f=factor: self._rows(f.left))
            self._input(self.right, name, right, [factor.right for factor in matrices])

    def _table(self, name: str, factors: Sequence[Factor]) -> None:
        """A table's lookups, and its uses as a head where it is tied to one: its rows' side is a diagonal for both."""
        left, right = f"{name}:left", f"{name}:right"
        for factor in factors:
            if isinstance(factor, LookupFactor):
                if self.wanted != "outputs":
                    self._set(self.left, name, self._add_counts(left, factor))
                self._output(self.right, name, right, lambda f=factor: self._rows(f.right))
            elif isinstance(factor, MatrixFactor):
                if self.wanted != "inputs":
                    self._set(self.left, name, self._add_squares(left, self._rows(factor.left)))
                if self.wanted != "outputs":
                    self._set(self.right, name, self._add(right, self._rows(factor.right), is_input=True))

    def _set(self, sides: dict[str, str], name: str, key: str) -> None:
        if sides.setdefault(name, key) != key:
            self._refuse(name, sides[name], key)

    @staticmethod
    def _refuse(name: str, one: str, other: str) -> NoReturn:
        raise ArtefactError(
            f"{name}: its input was shared with {one} in one batch and with {other} in another; leave it "
            "out with `parameters`"
        )

    def _output(self, sides: dict[str, str], name: str, key: str, rows: Callable[[], Tensor]) -> None:
        if self.wanted != "inputs":
            self._set(sides, name, self._add(key, rows()))

    def _input(self, sides: dict[str, str], name: str, key: str, inputs: Sequence[Tensor]) -> None:
        if self.wanted != "outputs":
            self._set(sides, name, self._add_inputs(sides.get(name, key), inputs))

    def _rows(self, x: Tensor) -> Tensor:
        """Tokens ``[m, d]`` without padding; a token may have several rows (heads, places of an image)."""
        if self._mask is not None:
            n, t = self._mask.shape
            if x.shape[1] % t == 0:
                return x.reshape(n, t, x.shape[1] // t, x.shape[-1])[self._mask].flatten(0, 1)
        return x.flatten(0, 1)

    def _add_inputs(self, key: str, inputs: Sequence[Tensor]) -> str:
        """Add the inputs of all uses once, whoever is given them, under the key of the first to come."""
        identity = tuple(_memory(x) for x in inputs)
        found, seen = self._seen.get(identity, (key, ()))
        if seen and all(ref() is not None for ref in seen):  # the memory of one that is gone may be another's by now
            return found
        self._seen[identity] = (key, tuple(weakref.ref(x) for x in inputs))
        if key in self._counted:
            self._refuse(key.rpartition(":")[0], key, "its own")
        if key not in self.sums:
            self._fresh.add(key)
        for x in inputs:
            self._add(key, self._rows(x), is_input=True)
        return key

    def _add(self, key: str, x: Tensor, *, is_input: bool = False) -> str:
        assert self.block is not None
        if self.block.turn and is_input:
            return key
        d = x.shape[-1]
        if d > WIDEST:
            return self._add_squares(key, x)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if key not in self.sums:
            self.sums[key] = torch.zeros(d, d, dtype=x.dtype, device=x.device)
        _add_symmetric(self.sums[key], x, quick=self.quick)
        self._count(key, len(x))
        return key

    def _count(self, key: str, tokens: int) -> None:
        assert self.block is not None
        if self.block.turn == 0:
            self.tokens[key] += tokens
            self.documents[key] += len(self.block) if key not in self._counted else 0
            self._counted.add(key)

    def _add_counts(self, key: str, factor: LookupFactor) -> str:
        assert self.block is not None
        ids = self._rows(factor.ids.unsqueeze(-1)).flatten()
        if key not in self.sums:
            self.sums[key] = torch.zeros(factor.vocabulary, dtype=torch.float32, device=ids.device)
        if self.block.turn == 0:
            self.sums[key] += torch.bincount(ids, minlength=factor.vocabulary).to(self.sums[key])
            self._count(key, len(ids))
        return key

    def _add_squares(self, key: str, rows: Tensor) -> str:
        if key not in self.sums:
            self.sums[key] = torch.zeros(rows.shape[-1], dtype=torch.float32, device=rows.device)
        self.sums[key] += rows.float().square().sum(0)
        self._count(key, len(rows))
        return key

    def merge(self, other: CovarianceSums) -> None:
        """Add a twin that saw other documents or sides; `ArtefactError` where inputs are shared in another way."""
        self.layout.require(other.layout, "merge")
        for mine, theirs in ((self.left, other.left), (self.right, other.right)):
            for name, key in theirs.items():
                self._set(mine, name, key)
        for key, value in other.sums.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()
        self.tokens.update(other.tokens)
        self.documents.update(other.documents)

    def result(self) -> Covariances:
        """Means over tokens; a parameter that no document reached has sides of zeros."""
        sides: dict[str, Covariance] = {}
        for key, total in self.sums.items():
            moment = total / max(self.tokens[key], 1)
            if moment.dim() == 2:
                moment = moment.triu() + moment.triu(1).T
            sides[key] = Covariance(moment, self.tokens[key])
        left: dict[str, str | None] = {}
        right: dict[str, str | None] = {}
        tokens: dict[str, float] = {}
        for name in self.layout.names:
            vector = len(self.layout.shape(name)) == 1
            left[name] = None if vector else self.left.get(name, f"{name}:left")
            right[name] = self.right.get(name, f"{name}:right")
            for key, width in zip((left[name], right[name]), flat(self.layout, name), strict=True):
                if key is not None and key not in sides:
                    sides[key] = Covariance(torch.zeros(width), 0)
            key = right[name]
            assert key is not None
            tokens[name] = self.tokens[key] / max(self.documents[key], 1)
        return Covariances(self.layout, sides, left, right, tokens)


_TILE = 512
"""Width from which the lower half of ``x^T x`` is left out, tile by tile."""


def _add_symmetric(total: Tensor, x: Tensor, *, quick: bool = False) -> None:
    """Add ``x^T x`` to the upper triangle's tiles of ``total``; what lies below the diagonal tiles is not kept up."""
    d = x.shape[-1]
    if quick and d >= WIDE and x.dtype == torch.float32:
        for part in x.bfloat16().split(TOKENS):  # each product is rounded: the sum is of float32
            total += part.T @ part
        return
    step = d if d < 2 * _TILE else max(_TILE // 2, d // 8)
    for start in range(0, d, step):
        stop = min(start + step, d)
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


class SecondMoments(BaseSink):
    """``sums[name][g, rows, cols]``: squares of documents' gradients in a basis, summed over documents of group g.

    ``U^T G_n V`` squared entry by entry. With the covariances' eigenvectors as bases these are EK-FAC's corrected
    eigenvalues, without bases the diagonal of the Fisher matrix. Documents are dealt to ``groups`` by their place in
    the pass, so that two halves tell how far the sums can be relied on.

    Activations and output gradients are rotated rather than gradients where that is cheaper (by shape); a document
    with one token per factor needs no gradient at all: the sum is one product of squares.
    """

    positions = True

    def __init__(
        self, layout: ParamLayout, bases: Mapping[str, Basis], groups: int = 1, *, quick: bool = False
    ) -> None:
        super().__init__(layout)
        self.quick = quick
        if set(bases) != set(layout.names):
            raise LayoutMismatch(f"second moments: expected bases of {len(layout.names)} parameters, got {len(bases)}")
        self.bases = bases
        self.groups = groups
        self.sums: dict[str, Tensor] = {}
        self.documents = torch.zeros(groups, dtype=torch.int64)
        users = Counter(id(side) for basis in bases.values() for side in basis if side is not None)
        self._shared = {key for key, count in users.items() if count > 1}
        self._turned: dict[tuple[Place, int], tuple[Tensor, Tensor]] = {}
        self._members: list[Tensor] = []
        self._buffer: Tensor | None = None

    def begin(self, block: Block) -> None:
        """Start a block: its documents are dealt to the groups."""
        super().begin(block)
        self._turned.clear()
        dealt = block.index % self.groups
        self._members = [(dealt == g).nonzero().flatten() for g in range(self.groups)]
        if block.turn == 0:
            self.documents += torch.tensor([len(members) for members in self._members])

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Add one parameter's squares."""
        wide = [widened(factor) for factor in factors]
        basis = self.bases[name]
        first = wide[0]
        if len(wide) == 1 and isinstance(first, MatrixFactor):
            self._matrix(name, first, basis)
        elif len(wide) == 1 and isinstance(first, LookupFactor) and basis[0] is None:
            self._lookup(name, first, basis[1])
        elif all(isinstance(factor, VectorFactor) for factor in wide):
            total = sum(factor.gradient() for factor in wide)
            assert isinstance(total, Tensor)
            self._add(name, rotate(total.unsqueeze(1), basis).squeeze(1).square().unsqueeze(1))
        else:  # several uses of one parameter: their gradients are added up first
            self._several(name, wide, basis)

    def end(self) -> None:
        """Let go of the block's rotated inputs."""
        self._turned.clear()
        super().end()

    def _add(self, name: str, squares: Tensor) -> None:
        """Add ``squares[n, rows, cols]`` by group."""
        for g, members in enumerate(self._members):
            if len(members):
                part = squares if len(members) == len(squares) else squares[members.to(squares.device)]
                self._total(name, squares)[g] += part.sum(0)

    def _total(self, name: str, like: Tensor) -> Tensor:
        if name not in self.sums:
            shape = (self.groups, *flat(self.layout, name))
            self.sums[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.sums[name]

    def _turn(self, x: Tensor, side: Tensor | None) -> Tensor:
        """Rotate tokens; what several parameters share is rotated once a block."""
        if side is None:
            return x
        if id(side) not in self._shared:
            return product(x, side.to(x), quick=self.quick)
        key = (_memory(x), id(side))
        if key not in self._turned:  # x is kept, so that its memory is not given to another within the block
            self._turned[key] = (x, product(x, side.to(x), quick=self.quick))
        return self._turned[key][1]

    def _matrix(self, name: str, factor: MatrixFactor, basis: Basis) -> None:
        n, t, rows = factor.left.shape
        cols = factor.right.shape[-1]
        through_tokens = t * (
            (rows * rows if basis[0] is not None else 0) + (cols * cols if basis[1] is not None else 0)
        )
        through_gradient = (rows * rows * cols if basis[0] is not None else 0) + (
            rows * cols * cols if basis[1] is not None else 0
        )
        tokens_first = t == 1 or through_tokens <= through_gradient
        left = self._turn(factor.left, basis[0]) if tokens_first else factor.left
        right = self._turn(factor.right, basis[1]) if tokens_first else factor.right
        for g, members in enumerate(self._members):
            if not len(members):
                continue
            members = members.to(left.device)
            mine = (left, right) if len(members) == n else (left[members], right[members])
            total = self._total(name, left)[g]
            if t == 1:
                total.addmm_(mine[0].squeeze(1).square().T, mine[1].squeeze(1).square())
                continue
            step = max(1, BUFFER // (rows * cols))
            for start in range(0, len(members), step):
                gradient = self._form(mine[0][start : start + step], mine[1][start : start + step])
                if not tokens_first:
                    gradient = rotate(gradient, basis)
                total += gradient.square_().sum(0)

    def _form(self, left: Tensor, right: Tensor) -> Tensor:
        """Gradients ``[n, rows, cols]`` in a buffer that is used again."""
        shape = (len(left), left.shape[-1], right.shape[-1])
        size = shape[0] * shape[1] * shape[2]
        if self._buffer is None or self._buffer.numel() < size or self._buffer.dtype != left.dtype:
            self._buffer = left.new_empty(max(size, min(BUFFER, 4 * size)))
        gradient = self._buffer[:size].view(shape)
        torch.bmm(left.transpose(1, 2), right, out=gradient)
        return gradient

    def _lookup(self, name: str, factor: LookupFactor, side: Tensor | None) -> None:
        """A document's gradient of a table has a row for each of its tokens' ids: those alone are formed."""
        right = self._turn(factor.right, side)
        _, t, width = right.shape
        for g, members in enumerate(self._members):
            if not len(members):
                continue
            members = members.to(right.device)
            document = torch.arange(len(members), device=right.device).repeat_interleave(t)
            places = document * factor.vocabulary + factor.ids[members].flatten()
            unique, inverse = places.unique(return_inverse=True)
            rows = right.new_zeros(len(unique), width).index_add_(0, inverse, right[members].reshape(-1, width))
            self._total(name, right)[g].index_add_(0, unique % factor.vocabulary, rows.square_())

    def _several(self, name: str, factors: Sequence[Factor], basis: Basis) -> None:
        """Gradients of a few documents at a time are formed and rotated."""
        rows, cols = flat(self.layout, name)
        step = max(1, BUFFER // (rows * cols))
        for g, members in enumerate(self._members):
            for picked in members.split(step) if len(members) else ():
                gradient: Tensor | None = None
                for factor in factors:
                    part = torch.cat([factor.take(slice(n, n + 1)).gradient() for n in picked.tolist()])
                    gradient = part if gradient is None else gradient + part
                assert gradient is not None
                turned = rotate(gradient.reshape(len(picked), rows, cols), basis)
                self._total(name, turned)[g] += turned.square().sum(0)

    def merge(self, other: SecondMoments) -> None:
        """Add a twin that saw other documents in the same bases."""
        self.layout.require(other.layout, "merge")
        if self.groups != other.groups:
            raise LayoutMismatch(f"merge: expected {self.groups} groups, got {other.groups}")
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.documents = self.documents + other.documents

    def group(self, g: int) -> dict[str, Tensor]:
        """Means over one group's documents, ``[rows, cols]`` by name."""
        count = max(int(self.documents[g]), 1)
        return {n: self._or_zero(n)[g] / count for n in self.layout.names}

    def result(self) -> dict[str, Tensor]:
        """Means over all documents, ``[rows, cols]`` by name; zeros where no document reached a parameter."""
        count = max(int(self.documents.sum()), 1)
        return {n: self._or_zero(n).sum(0) / count for n in self.layout.names}

    def _or_zero(self, name: str) -> Tensor:
        return self.sums[name] if name in self.sums else torch.zeros(self.groups, *flat(self.layout, name))
