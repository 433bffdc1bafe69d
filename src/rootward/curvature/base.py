"""What every curvature is: a symmetric positive matrix over a layout's parameters that can be raised to a power.

``G`` is the mean over documents of a second moment of gradients (Fisher, Gauss-Newton) or of Hessians, of losses that
are summed over a document's tokens. With the damping ``lam`` it is ``G + lam I``, and `Curvature.apply` gives

    power -1      (G + lam I)^-1 x       influence:  effect of document n on m  =  - <grad m, (G + lam I)^-1 grad L_n>
    power -1/2    (G + lam I)^-1/2 x     whitening:  twice it is power -1
    power 1/2     (G + lam I)^1/2 x      back from whitened space

Gradients are ``{name: [q, *shape]}`` for every parameter of the layout, as the passes give them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout

Gradients = Mapping[str, Tensor]
"""``[q, *shape]`` by parameter name."""
RELATIVE = 0.1
"""Default damping over the mean eigenvalue (as kronfluence has it for every layer)."""


@dataclass(frozen=True)
class Damping:
    """``lam = relative * mean eigenvalue + absolute``; the mean is over a ``block`` or over the ``whole`` matrix.

    A block is what a curvature inverts on its own: one parameter for those that are block-diagonal.
    """

    relative: float = RELATIVE
    absolute: float = 0.0
    scope: Literal["block", "whole"] = "block"

    def __post_init__(self) -> None:
        if not (self.relative >= 0 and self.absolute >= 0):
            raise InputError(
                f"damping: expected numbers of at least 0, got relative = {self.relative}, absolute = {self.absolute}"
            )
        if self.scope not in ("block", "whole"):
            raise InputError(f"damping scope: expected 'block' or 'whole', got {self.scope!r}")

    def of(self, block_mean: float, whole_mean: float) -> float:
        """``lam`` of a block with this mean eigenvalue."""
        return self.relative * (block_mean if self.scope == "block" else whole_mean) + self.absolute


DEFAULT = Damping()
"""0.1 of each block's mean eigenvalue."""


class Curvature(Protocol):
    """A damped matrix over ``layout``; ``damping`` may be replaced in each call, the factors stay."""

    @property
    def layout(self) -> ParamLayout:
        """The parameters."""
        ...

    @property
    def kind(self) -> str:
        """Its name: "identity", "diagonal", "kfac", "ekfac", "exact", "gram", "low_rank"."""
        ...

    def apply(self, gradients: Gradients, power: float = -1.0, damping: Damping | None = None) -> dict[str, Tensor]:
        """``(G + lam I)^power x`` for every query; the same shapes and dtypes as given."""
        ...


def check_gradients(layout: ParamLayout, gradients: Gradients, where: str) -> int:
    """The number of queries; the gradients must be those of the layout, alike in q, and finite."""
    if set(gradients) != set(layout.names):
        missing = sorted(set(layout.names) ^ set(gradients))
        raise LayoutMismatch(
            f"{where}: expected gradients of {len(layout.names)} parameters, got {len(gradients)}; "
            f"first that differs: {missing[0]}"
        )
    count = len(gradients[layout.names[0]])
    for name in layout.names:
        expected, value = (count, *layout.shape(name)), gradients[name]
        if tuple(value.shape) != expected:
            raise LayoutMismatch(f"{where}: {name}: expected shape {expected}, got {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(f"{where}: the gradient of {name} is not finite; look at the query's loss")
    return count


def check_power(power: float) -> None:
    """Powers other than -1, -1/2 and 1/2 are an `InputError`."""
    if power not in (-1.0, -0.5, 0.5):
        raise InputError(f"power: expected -1, -1/2 or 1/2, got {power}")


def damped_power(eigenvalues: Tensor, lam: float, power: float) -> Tensor:
    """``(eigenvalues + lam)^power`` in float64, with 0 where a power below 0 meets 0 (the pseudo-inverse).

    Eigenvalues below 0, which rounding gives a positive matrix, count as 0.
    """
    total = eigenvalues.double().clamp_min(0) + lam
    safe = torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, safe**power, 0.0)
