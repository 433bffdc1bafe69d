"""`ParamLayout`: names, shapes and order of a set of parameters, so that no vector travels without its meaning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from rootward.core.errors import LayoutMismatch
from rootward.core.hashing import difference, digest_json


@dataclass(frozen=True)
class ParamLayout:
    """Ordered names and shapes; ``hash`` identifies it.

    Law: combining values of unlike layouts raises `LayoutMismatch`; a parameter is addressed by name.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise LayoutMismatch(f"expected one shape per name, got {len(self.names)} names, {len(self.shapes)} shapes")
        if len(set(self.names)) != len(self.names):
            twice = sorted({n for n in self.names if self.names.count(n) > 1})
            raise LayoutMismatch(f"expected unique parameter names, got {', '.join(twice)} more than once")

    @classmethod
    def of(cls, named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> ParamLayout:
        """Layout of named tensors, in their order."""
        pairs = cast("Iterable[tuple[str, Tensor]]", named.items() if isinstance(named, Mapping) else named)
        items = list(pairs)
        return cls(tuple(name for name, _ in items), tuple(tuple(value.shape) for _, value in items))

    @cached_property
    def hash(self) -> str:
        """16 hex digits of names, shapes and order."""
        return digest_json([[n, list(s)] for n, s in zip(self.names, self.shapes, strict=True)])[:16]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of entries of each parameter."""
        return {n: math.prod(s) for n, s in zip(self.names, self.shapes, strict=True)}

    @cached_property
    def size(self) -> int:
        """Number of entries in all."""
        return sum(self.sizes.values())

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in a flat vector of this layout."""
        result: dict[str, slice] = {}
        start = 0
        for name, size in self.sizes.items():
            result[name] = slice(start, start + size)
            start += size
        return result

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter; `LayoutMismatch` if the name is not in the layout."""
        if name not in self.sizes:
            raise LayoutMismatch(f"expected one of the layout's {len(self.names)} parameters, got {name!r}")
        return self.shapes[self.names.index(name)]

    def require(self, other: ParamLayout, where: str) -> None:
        """Raise `LayoutMismatch`, with the differing names, unless ``other`` is the same layout."""
        if self == other:
            return
        mine = {n: list(s) for n, s in zip(self.names, self.shapes, strict=True)}
        theirs = {n: list(s) for n, s in zip(other.names, other.shapes, strict=True)}
        detail = difference(mine, theirs) or "  same parameters in another order"
        raise LayoutMismatch(f"{where}: expected parameter layout {self.hash}, got {other.hash}:\n{detail}")

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Named tensors, in any order of keys, to one vector ``[size]`` in the layout's order."""
        if set(named) != set(self.names) or any(tuple(named[n].shape) != self.shape(n) for n in self.names):
            self.require(ParamLayout.of(named), "flatten")
        return torch.cat([named[name].reshape(-1) for name in self.names]) if self.names else torch.zeros(0)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """One vector ``[..., size]`` to named tensors ``[..., *shape]`` (views)."""
        if vector.shape[-1] != self.size:
            raise LayoutMismatch(f"expected a vector of {self.size} entries, got {vector.shape[-1]}")
        lead = vector.shape[:-1]
        return {n: vector[..., self.slices[n]].reshape((*lead, *self.shape(n))) for n in self.names}
