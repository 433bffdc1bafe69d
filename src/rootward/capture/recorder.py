"""Hooks on the attributed modules: inputs are kept in the forward pass, output gradients become factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rootward.capture.sites import Site, Tracked
from rootward.core.block import Factor, LookupFactor, MatrixFactor, VectorFactor
from rootward.core.errors import ArtefactError, RootwardError
from rootward.subject.encode import Batch


class _Root(torch.autograd.Function):
    """Starts the graph at a module's output without making it a leaf, so that in-place operations may follow."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].new_zeros(())


class Recorder:
    """Keeps inputs, turns output gradients into factors and delivers a parameter's factors when it has them all.

    Args:
        tracked: the modules to hook.
        deliver: called once per parameter and batch.
        refused: where given, collects parameters of modules without a per-document gradient instead of raising.
        forward: there is no backward pass: factors have the inputs, and zeros for output gradients. They are made in
            `finish`, a module's at a time: a convolution's unfolded patches are many times its input.
    """

    def __init__(
        self,
        tracked: Tracked,
        deliver: Callable[[str, list[Factor]], None],
        refused: set[str] | None = None,
        *,
        forward: bool = False,
    ) -> None:
        self.sites = tracked.sites
        self.forward = forward
        self.deliver = deliver
        self.refused = refused
        self.calls: dict[str, int] = defaultdict(int)
        self.found: dict[str, list[Factor]] = defaultdict(list)
        self.waiting: list[tuple[Site, Tensor, Tensor]] = []
        self.documents = self.positions = 0
        self.unpack: Tensor | None = None

    def start(self, batch: Batch) -> None:
        """Forget the batch before and learn the shape of this one."""
        self.unpack = batch.unpack
        shape = batch.mask.shape if self.unpack is None else next(iter(batch.inputs.values())).shape
        self.documents, self.positions = int(shape[0]), int(shape[1])
        self.clear()

    def attach(self) -> list[Any]:
        """Register the hooks; the handles remove them."""
        return [s.module.register_forward_hook(self._hook(s), with_kwargs=True) for s in self.sites]

    def _hook(self, site: Site) -> Callable[..., Tensor | None]:
        def forward(
            module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
        ) -> Tensor | None:
            if not torch.is_grad_enabled() and not self.forward:
                return None  # a part of the model that the loss does not flow through
            try:
                value = inputs[0] if inputs else next(iter(named.values()))
                kept = site.keep(value, self.documents, self.positions)
            except RootwardError as error:
                if self.refused is not None:
                    self.refused.update(site.params.values())
                    return None
                raise type(error)(
                    f"module {site.name} ({type(module).__name__}): {error}; leave it out with `parameters`"
                ) from error
            if output.shape[0] == 1 and self.documents > 1:
                # position embeddings are computed once and added to every document: give each its own copy
                output = output.expand(self.documents, *output.shape[1:])
            for name in site.params.values():
                self.calls[name] += 1
            if self.forward:
                self.waiting.append((site, kept, output.new_zeros(()).expand_as(output)))
                return None
            if not output.requires_grad:
                anchor = torch.zeros((), device=output.device, dtype=output.dtype, requires_grad=True)
                output = _Root.apply(output, anchor)  # type: ignore[assignment]
            output.register_hook(lambda gradient: self._receive(site, kept, gradient))
            return output

        return forward

    def _add(self, site: Site, kept: Tensor, gradient: Tensor) -> None:
        for name, factor in site.factors(kept, gradient, self.positions):
            if self.unpack is not None:
                factor = unpacked(factor, self.unpack, self.positions)
            self.found[name].append(factor)

    def _receive(self, site: Site, kept: Tensor, gradient: Tensor) -> None:
        self._add(site, kept, gradient)
        for name in site.params.values():
            if len(self.found[name]) == self.calls[name]:
                self.deliver(name, self.found.pop(name))

    def finish(self) -> None:
        """Deliver what is still waiting, and what is incomplete: one of its uses was not part of the loss."""
        for site, kept, gradient in self.waiting:  # inputs stay to the end: see below
            self._receive(site, kept, gradient)
        self.waiting.clear()
        pending = dict(self.found)  # kept alive to the end, so that a sink can tell which inputs are the very same
        self.found.clear()
        for name, factors in pending.items():
            self.deliver(name, factors)

    def clear(self) -> None:
        """Let go of the last batch, also after an error in the middle of it."""
        self.calls.clear()
        self.found.clear()
        self.waiting.clear()


def pick(x: Tensor, unpack: Tensor, positions: int) -> Tensor:
    """Packed rows ``[rows, T * m, d]`` to documents ``[n, t * m, d]``; positions of no document become zero."""
    if x.dim() < 2 or x.shape[1] % positions or x.shape[0] * positions <= int(unpack.max()):
        raise ArtefactError(
            f"expected {positions} tokens in every packed row, got shape {tuple(x.shape)}; run without packing"
        )
    each = x.shape[1] // positions
    picked = x.reshape(x.shape[0] * positions, each, *x.shape[2:])[unpack.clamp(min=0)]
    real = (unpack >= 0).view(*unpack.shape, *[1] * (picked.dim() - 2))
    return torch.where(real, picked, torch.zeros((), dtype=x.dtype, device=x.device)).flatten(1, 2)


def unpacked(factor: Factor, unpack: Tensor, positions: int) -> Factor:
    """A factor of packed rows with ``positions`` tokens as one of documents."""

    def each(x: Tensor) -> Tensor:
        return pick(x, unpack, positions)

    if isinstance(factor, MatrixFactor):
        return MatrixFactor(each(factor.left), each(factor.right), factor.transposed)
    if isinstance(factor, LookupFactor):
        return LookupFactor(each(factor.ids), each(factor.right), factor.vocabulary)
    return VectorFactor(each(factor.rows))
