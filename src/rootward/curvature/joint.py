"""EK-FAC with the largest entries of its eigenbasis taken jointly.

EK-FAC treats all entries of the eigenbasis as uncorrelated, within a matrix and between matrices. Of those with the
largest eigenvalues that is wrong, and they are what the inverse of a lightly damped curvature is about. So for the
``K`` largest, of whatever parameters, the whole second-moment matrix ``H [K, K]`` is kept, and the others stay
diagonal:

    G  =  B [ H (+) diag(Lam outside) ] B^T          B: the eigenbases of all parameters

With all entries it is the exact second moment of the sampled gradients, with none it is EK-FAC. (Ours; in the spirit
of the low-rank corrections of K-FAC by Koroko et al. 2022, arXiv:2201.10285.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping, Gradients, check_gradients, check_power, damped_power
from rootward.curvature.kronecker import JITTERED, KroneckerCurvature, eigenbasis, flat, rotate


def largest_entries(base: KroneckerCurvature, count: int) -> dict[str, Tensor]:
    """The ``count`` entries with the largest eigenvalues: places ``[k]`` in each parameter's flattened eigenbasis."""
    names = base.layout.names
    every = torch.cat([base.blocks[name].eigenvalues.flatten().cpu() for name in names])
    chosen = every.topk(min(count, len(every))).indices
    found: dict[str, Tensor] = {}
    start = 0
    for name in names:
        size = base.blocks[name].eigenvalues.numel()
        mine = chosen[(chosen >= start) & (chosen < start + size)] - start
        found[name] = mine.sort().values
        start += size
    return found


@dataclass(frozen=True)
class JointCurvature:
    """``entries[name]`` are places in a parameter's flattened eigenbasis, in the layout's order rows of ``vectors``.

    ``eigenvalues [k]`` and ``vectors [k, k]`` are those of the entries' second-moment matrix, ``notes`` what happened
    when it was decomposed.
    """

    base: KroneckerCurvature
    entries: Mapping[str, Tensor]
    eigenvalues: Tensor
    vectors: Tensor
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, base: KroneckerCurvature, entries: Mapping[str, Tensor], moment: Tensor) -> JointCurvature:
        """From the entries' second moments ``[k, k]``, a mean over documents.

        Raises:
            LayoutMismatch: entries of other parameters, or a matrix of another size. NumericalError: it is not finite.
        """
        if set(entries) != set(base.layout.names):
            raise LayoutMismatch(f"joint: expected entries of {len(base.layout.names)} parameters, got {len(entries)}")
        count = sum(len(places) for places in entries.values())
        if tuple(moment.shape) != (count, count):
            raise LayoutMismatch(f"joint: expected second moments ({count}, {count}), got {tuple(moment.shape)}")
        values, vectors, jittered = eigenbasis(moment)
        notes = (f"joint entries: {JITTERED}",) if jittered else ()
        damping = replace(base.damping, scope="whole")
        return cls(base.damped(damping), entries, values.clamp_min(0), vectors, notes)

    @property
    def layout(self) -> ParamLayout:
        """The parameters."""
        return self.base.layout

    @property
    def kind(self) -> str:
        """Its name."""
        return f"{self.base.kind} + {len(self.eigenvalues)} entries jointly"

    @property
    def damping(self) -> Damping:
        """The default damping."""
        return self.base.damping

    @cached_property
    def mean(self) -> float:
        """Mean eigenvalue over all parameters."""
        inside = float(self.eigenvalues.sum())
        replaced = sum(
            float(self.base.blocks[name].eigenvalues.flatten()[places].double().sum())
            for name, places in self.entries.items()
        )
        return self.base.mean + (inside - replaced) / self.layout.size

    def damped(self, damping: Damping) -> JointCurvature:
        """The same with another damping."""
        return replace(self, base=self.base.damped(damping))

    def apply(self, gradients: Gradients, power: float = -1.0, damping: Damping | None = None) -> dict[str, Tensor]:
        """``(G + lam I)^power x`` for ``{name: [q, *shape]}``.

        Raises:
            InputError: a damping by block: the joint entries are of several parameters and need one for all.
            LayoutMismatch, NumericalError: see `KroneckerCurvature.apply`.
        """
        used = damping or self.damping
        if used.scope != "whole":
            raise InputError("joint: expected a damping with scope = 'whole', one for all parameters, got 'block'")
        check_power(power)
        count = check_gradients(self.layout, gradients, self.kind)
        lam = used.of(self.mean, self.mean)
        turned: dict[str, Tensor] = {}
        inside: list[Tensor] = []
        for name in self.layout.names:
            block = self.base.blocks[name]
            x = rotate(gradients[name].reshape(count, *flat(self.layout, name)), block.basis).flatten(1)
            inside.append(x[:, self.entries[name].to(x.device)])
            turned[name] = x * damped_power(block.eigenvalues, lam, power).flatten().to(x)
        scale = damped_power(self.eigenvalues, lam, power)
        joined = torch.cat(inside, 1).double()
        vectors = self.vectors.to(joined)
        solved = ((joined @ vectors) * scale.to(joined)) @ vectors.T
        result: dict[str, Tensor] = {}
        start = 0
        for name in self.layout.names:
            places = self.entries[name].to(joined.device)
            part = solved[:, start : start + len(places)]
            start += len(places)
            turned[name][:, places] = part.to(turned[name])
            shaped = turned[name].view(count, *flat(self.layout, name))
            back = rotate(shaped, self.base.blocks[name].basis, back=True)
            result[name] = back.reshape(gradients[name].shape)
        return result
