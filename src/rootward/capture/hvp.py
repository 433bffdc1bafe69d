"""Products of vectors with the Hessian or the Gauss-Newton matrix of the mean document loss, by differentiating twice.

    hessian   H v = d/dtheta <dL/dtheta, v>,  L = mean over documents of their losses (Pearlmutter 1994)
    ggn       G v = mean over documents of sum_t J_t^T B_t J_t v   (Schraudolph 2002)

with ``J_t`` the derivative of the outputs at trained target t and ``B_t`` the loss's second derivative in them:
``diag(p) - p p^T`` for classes, the unit matrix for half squared errors. The Gauss-Newton matrix equals the Fisher
matrix of these losses, is never negative, and equals the Hessian where outputs are linear in the parameters.
``J_t v`` comes from differentiating ``J^T u`` in u, so that a model needs reverse mode only. Both are exact for any
differentiable model, tied weights and adapters included.

Fused attention has no second derivative: it is kept to its plain form within these products.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rootward.capture.batching import automatic_budget, batches
from rootward.capture.inputs import differentiable
from rootward.capture.run import _check
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.core.hashing import digest
from rootward.core.layout import ParamLayout
from rootward.core.progress import Progress, silent
from rootward.curvature.base import Gradients
from rootward.curvature.solvers import Operator
from rootward.subject.encode import Batch, Example
from rootward.subject.objectives import Objective
from rootward.subject.predictions import Predictions

SHARE = 4
"""A graph that is differentiated twice holds about so many times what a pass keeps for each token."""


@contextmanager
def _twice_differentiable(model: nn.Module) -> Generator[None]:
    """Scaled dot-product attention in its plain form; `ArtefactError` for kinds that have none."""
    kind = str(getattr(getattr(model, "config", None), "_attn_implementation", "sdpa"))
    if "flash" in kind or "flex" in kind:
        raise ArtefactError(
            f"second derivatives: expected a model with attention 'eager' or 'sdpa', got {kind!r}; load it with "
            "attn_implementation = 'eager'"
        )
    with sdpa_kernel(SDPBackend.MATH):
        yield


@dataclass(frozen=True)
class CurvatureProducts:
    """The matrix of these examples as an operator: call it with ``{name: [q, *shape]}``.

    Nothing of the model is changed: modes and ``requires_grad`` flags are put back after every call.

    Attributes:
        layout: the parameters, by their names in the model.
        kind: "hessian" or "ggn".
        token_budget: padded tokens per batch; None takes a quarter of what fits an ordinary pass.
        progress: told after every batch of every call.
    """

    model: nn.Module
    objective: Objective
    examples: Sequence[Example]
    layout: ParamLayout
    kind: Literal["hessian", "ggn"] = "ggn"
    token_budget: int | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError("curvature products: expected at least one document, got none")
        if self.kind not in ("hessian", "ggn"):
            raise InputError(f"curvature products: expected kind 'hessian' or 'ggn', got {self.kind!r}")

    @cached_property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @cached_property
    def budget(self) -> int:
        """Padded tokens per batch."""
        if self.token_budget is not None:
            return self.token_budget
        return max(1, automatic_budget(self.model, self.objective, self.examples, self.device) // SHARE)

    def like(self) -> dict[str, Tensor]:
        """One zero vector ``[1, *shape]`` for each parameter, as solvers that start from nothing need it."""
        named = dict(self.model.named_parameters())
        wide = {n: torch.float64 if named[n].dtype == torch.float64 else torch.float32 for n in self.layout.names}
        return {n: torch.zeros(1, *self.layout.shape(n), dtype=wide[n], device=self.device) for n in self.layout.names}

    def subset(self, documents: int | None, seed: int = 0) -> CurvatureProducts:
        """The matrix of at most so many documents, chosen by a hash of seed and content: the same in any order."""
        if documents is None or documents >= len(self.examples):
            return self
        if documents < 1:
            raise InputError(f"curvature products: expected at least 1 document, got {documents}")
        chosen = sorted(self.examples, key=lambda e: digest(f"{seed}|{e.id}"))[:documents]
        return replace(self, examples=chosen, token_budget=self.budget)

    def drawing(self, documents: int, seed: int = 0) -> Operator:
        """An unbiased estimate of the same matrix: every call draws ``documents`` documents anew, with replacement."""
        if documents < 1:
            raise InputError(f"curvature products: expected to draw at least 1 document, got {documents}")
        ordered = sorted(self.examples, key=lambda e: e.id)
        generator = torch.Generator().manual_seed(seed)

        def product(gradients: Gradients) -> dict[str, Tensor]:
            drawn = torch.randint(len(ordered), (documents,), generator=generator, dtype=torch.int64).tolist()
            return replace(self, examples=[ordered[n] for n in drawn], token_budget=self.budget)(gradients)

        return product

    def __call__(self, gradients: Gradients) -> dict[str, Tensor]:
        """``A x`` for every query, without damping.

        Raises:
            NumericalError: a document's loss or a product is not finite. ArtefactError: the model cannot be
                differentiated twice, or does not depend on these parameters.
        """
        result = self._product(gradients)
        for name, value in result.items():
            if not bool(torch.isfinite(value).all()):
                raise self._blame(name, gradients)
        return result

    def _blame(self, name: str, gradients: Gradients) -> NumericalError:
        """The error of a product that is not finite: halving finds the document, for the price of two products."""
        message = f"{self.kind} product: the entries of {name} are not finite"
        if not all(bool(torch.isfinite(value).all()) for value in gradients.values()):
            return NumericalError(message)

        def broken(examples: Sequence[Example]) -> bool:
            found = replace(self, examples=examples, token_budget=self.budget)._product(gradients)
            return not all(bool(torch.isfinite(value).all()) for value in found.values())

        part = list(self.examples)
        while len(part) > 1:
            half = part[: len(part) // 2]
            part = half if broken(half) else part[len(part) // 2 :]
        if not broken(part):
            return NumericalError(f"{message}, although each document's are: they are too large to be summed")
        return NumericalError(
            f"{message}, first document {part[0].id} (row {part[0].row}); look at that document's gradient, load the "
            "model with dtype float32, or leave such documents out (skip_not_finite)"
        )

    def _product(self, gradients: Gradients) -> dict[str, Tensor]:
        count = len(gradients[self.layout.names[0]])
        sums = {n: torch.zeros_like(gradients[n]) for n in self.layout.names}
        with differentiable(self.model, self.layout) as wanted, _twice_differentiable(self.model):
            vectors = [
                [gradients[n][q].to(p) for n, p in zip(self.layout.names, wanted, strict=True)] for q in range(count)
            ]
            done = 0
            for positions in batches(self.examples, self.budget):
                batch = self.objective.collate([self.examples[n] for n in positions], self.device)
                self._add(batch, wanted, vectors, sums, look=done == 0)
                done += len(positions)
                self.progress(f"{self.kind} products", done, len(self.examples))
        return {n: value / len(self.examples) for n, value in sums.items()}

    def _add(
        self, batch: Batch, wanted: list[Tensor], vectors: list[list[Tensor]], sums: dict[str, Tensor], *, look: bool
    ) -> None:
        try:
            first = _Hessian(self, batch, wanted) if self.kind == "hessian" else _GaussNewton(self, batch, wanted)
            if look:
                _require_smooth(first.derivatives)
            for q, vector in enumerate(vectors):
                for name, part in zip(self.layout.names, first.times(vector), strict=True):
                    if part is not None:
                        sums[name][q] += part.to(sums[name])
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise _not_smooth(str(error)) from error


class _Hessian:
    """One batch's gradient, ready to be differentiated along vectors."""

    def __init__(self, products: CurvatureProducts, batch: Batch, wanted: list[Tensor]) -> None:
        losses = products.objective.losses(products.model, batch)
        _check(losses.detach(), batch)
        _require_path(losses)
        self.wanted = wanted
        self.derivatives = torch.autograd.grad(losses.sum(), wanted, create_graph=True, allow_unused=True)

    def times(self, vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(g, v) for g, v in zip(self.derivatives, vector, strict=True) if g is not None and g.requires_grad]
        if not pairs:  # the loss is linear in the parameters
            return [None] * len(vector)
        return _grad([g for g, _ in pairs], self.wanted, [v for _, v in pairs])


class _GaussNewton:
    """One batch's outputs with ``J^T u`` as a function of u."""

    def __init__(self, products: CurvatureProducts, batch: Batch, wanted: list[Tensor]) -> None:
        self.predictions: Predictions = products.objective.predictions(products.model, batch)
        self.outputs = self.predictions.outputs
        _check(self.predictions.losses().detach(), batch)
        _require_path(self.outputs)
        self.wanted = wanted
        self.probe = torch.zeros_like(self.outputs, requires_grad=True)
        self.derivatives = torch.autograd.grad(
            self.outputs, wanted, self.probe, create_graph=True, allow_unused=True, materialize_grads=False
        )

    def times(self, vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(g, v) for g, v in zip(self.derivatives, vector, strict=True) if g is not None]
        (pushed,) = _grad([g for g, _ in pairs], [self.probe], [v for _, v in pairs])
        assert pushed is not None
        if self.predictions.categorical:
            p = self.outputs.detach().softmax(1)
            pushed = p * pushed
            pushed = pushed - p * pushed.sum(1, keepdim=True)
        return _grad([self.outputs], self.wanted, [pushed])


def _grad(outputs: list[Tensor], inputs: Sequence[Tensor], along: list[Tensor]) -> Sequence[Any]:
    return torch.autograd.grad(outputs, inputs, along, retain_graph=True, allow_unused=True)


def _require_path(value: Tensor) -> None:
    if not value.requires_grad:
        raise ArtefactError("the loss does not depend on any attributed parameter; choose others with `parameters`")


def _require_smooth(derivatives: Sequence[Tensor | None]) -> None:
    """Refuse functions that were written for one derivative only.

    Autograd leaves them out of a second derivative without a word where it does not have to go through them.
    """
    waiting: list[Any] = [value.grad_fn for value in derivatives if value is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in ("torch::autograd::Error", "Error"):
            raise _not_smooth("an autograd function marked once_differentiable")
        waiting += [following for following, _ in node.next_functions]


def _not_smooth(what: str) -> ArtefactError:
    return ArtefactError(
        f"the model has an operation without a second derivative ({what}); load it with attn_implementation = 'eager', "
        "or use a curvature that needs one derivative only (EK-FAC, the empirical Fisher matrix)"
    )
