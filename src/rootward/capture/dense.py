"""Exact curvatures of small models: the whole matrix, or from the rows of a few documents' gradients.

Which matrix (all are means over documents, of losses summed over a document's targets):

    ggn        Gauss-Newton. One target per document: gradients at every label, weighted by its probability. Several
               targets (which have no common label) or many labels: products with every unit vector
    fisher     the true Fisher matrix, which is the Gauss-Newton matrix; with several targets per document or many
               labels an estimate of it from labels drawn from the model (`Labels`)
    empirical  second moments of the documents' own gradients
    hessian    products with every unit vector (double backward)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rootward.capture.hvp import CurvatureProducts
from rootward.capture.inputs import free_memory
from rootward.capture.projection import Projection
from rootward.capture.run import predictions_of, run_pass
from rootward.capture.sinks import BaseSink
from rootward.capture.sites import Tracked
from rootward.core.block import Block, Factor, widened
from rootward.core.errors import InputError, NumericalError
from rootward.core.layout import ParamLayout
from rootward.core.progress import Progress, silent
from rootward.curvature.base import Damping
from rootward.curvature.dense import LARGEST, DenseCurvature
from rootward.curvature.gram import GramCurvature, require_small
from rootward.curvature.low_rank import LowRankCurvature
from rootward.subject.encode import Example
from rootward.subject.objectives import Objective
from rootward.subject.predictions import Labels

COPIES = 4
"""The matrix, its eigenvectors and what the decomposition works in."""
MOST_LABELS = 1000
"""With more outputs, labels are not gone through one by one unless `Labels` asks for it."""
CHUNK = 16
"""Unit vectors multiplied in one call; the forward pass is shared by them."""
Kind = Literal["ggn", "fisher", "empirical", "hessian"]
RowKind = Literal["ggn", "fisher", "empirical"]


class GradientRows(BaseSink):
    """Hands every block's dense gradients ``[n, P]`` in float64, in the layout's order, to a function."""

    def __init__(self, layout: ParamLayout, receive: Callable[[Tensor], None]) -> None:
        super().__init__(layout)
        self.receive = receive
        self.projection = Projection(layout, None)
        self._current: Tensor | None = None

    def begin(self, block: Block) -> None:
        """Start the block's rows."""
        super().begin(block)
        self._current = torch.zeros(len(block), self.layout.size, dtype=torch.float64)

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Form one parameter's gradients."""
        assert self._current is not None
        for factor in map(widened, factors):
            self._current[:, self.layout.slices[name]] += self.projection.project(name, factor).double().cpu()

    def end(self) -> None:
        """Hand the rows over; a document whose gradient is not finite is a `NumericalError` that names it."""
        assert self.block is not None and self._current is not None
        bad = (~torch.isfinite(self._current).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NumericalError(
                f"the gradients of {len(bad)} documents are not finite, first document {self.block.ids[bad[0]]}; look "
                "at that document's gradient, load the model with dtype float32, or leave such documents out "
                "(skip_not_finite)"
            )
        self.receive(self._current)
        self._current = None
        super().end()


def _labels(
    model: nn.Module, objective: Objective, examples: Sequence[Example], kind: Kind, labels: Labels | None
) -> Labels | None:
    """Whose labels give the rows whose second moment is the matrix; None where there are none."""
    if kind in ("empirical", "hessian"):
        return Labels("data") if kind == "empirical" else None
    if kind == "fisher" and labels is not None:
        return labels
    single = all(example.targets == 1 for example in examples)
    if single and predictions_of(model, objective, examples[0]).outputs.shape[1] <= MOST_LABELS:
        return Labels("exact")
    return Labels("sampled") if kind == "fisher" else None


def _refuse(examples: Sequence[Example], kind: str) -> None:
    if not examples:
        raise InputError("exact curvature: expected at least one document, got none")
    if kind not in ("ggn", "fisher", "empirical", "hessian"):
        raise InputError(f"exact curvature: expected 'ggn', 'fisher', 'empirical' or 'hessian', got {kind!r}")


def exact_curvature(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    kind: Kind = "ggn",
    *,
    labels: Labels | None = None,
    damping: Damping | None = None,
    token_budget: int | None = None,
    progress: Progress = silent,
) -> DenseCurvature:
    """The whole matrix of a small model, decomposed.

    Args:
        model: left as it was.
        objective: makes batches and losses.
        examples: the documents that the matrix is a mean over.
        tracked: the parameters; at most `LARGEST` entries.
        kind: see the head of this file.
        labels: for "fisher": whose labels; by default exact where every document has one target, else a draw each.
        damping: the curvature's own.
        token_budget: padded tokens per batch.
        progress: told of every batch or of every few unit vectors.

    Raises:
        InputError: too many parameters (before anything is run), or no documents. NumericalError: a loss or gradient
            is not finite; the message names the document.
    """
    _refuse(examples, kind)
    layout = tracked.layout
    if layout.size > LARGEST:
        raise InputError(
            f"exact curvature: expected at most {LARGEST:,} parameters, got {layout.size:,}, whose matrix would need "
            f"{COPIES * 8 * layout.size**2 / 1e9:,.3g} GB; attribute fewer with `parameters`, or use a solver ('cg'), "
            "EK-FAC, or the Gram matrix of a few documents"
        )
    chosen = _labels(model, objective, examples, kind, labels)
    total = torch.zeros(layout.size, layout.size, dtype=torch.float64)
    if chosen is not None:

        def add(rows: Tensor) -> None:
            total.addmm_(rows.T, rows)

        _pass(model, objective, examples, tracked, chosen, add, token_budget, progress)
        total /= len(examples)
    else:
        products = CurvatureProducts(
            model, objective, examples, layout, "hessian" if kind == "hessian" else "ggn", token_budget
        )
        _columns(products, total, progress)
    return DenseCurvature.of(layout, total, kind, damping)


def gram_curvature(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    kind: RowKind = "empirical",
    *,
    labels: Labels | None = None,
    damping: Damping | None = None,
    token_budget: int | None = None,
    progress: Progress = silent,
) -> GramCurvature:
    """The same matrix, of any number of parameters, from the gradients of a few documents; see `exact_curvature`.

    Raises:
        InputError: before the pass: rows and matrix would take more than half of the free memory, there are more than
            `LARGEST` of both rows and parameters, or "ggn" is asked of documents with several targets or many labels,
            which have no rows.
    """
    width = tracked.layout.size
    rows = _rows("gram", model, objective, examples, tracked, width, kind, labels, token_budget, progress)
    return GramCurvature.of(tracked.layout, rows, len(examples), damping)


def low_rank_curvature(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    rank: int,
    kind: RowKind = "empirical",
    *,
    labels: Labels | None = None,
    damping: Damping | None = None,
    token_budget: int | None = None,
    progress: Progress = silent,
) -> LowRankCurvature:
    """From the same rows, for each parameter: ``rank`` eigenpairs and the diagonal of what they leave out.

    An approximation: of a few documents' gradients the small eigenpairs are mostly chance, of which the diagonal is
    kept, and what parameters have in common is left out. Errors are those of `gram_curvature`.
    """
    width = max(tracked.layout.sizes.values())
    rows = _rows("low rank", model, objective, examples, tracked, width, kind, labels, token_budget, progress)
    return LowRankCurvature.of_rows(
        tracked.layout, rows, rank, documents=len(examples), rest="diagonal", damping=damping
    )


def _rows(
    name: str,
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    width: int,
    kind: RowKind,
    labels: Labels | None,
    token_budget: int | None,
    progress: Progress,
) -> Tensor:
    """Gradients ``[m, P]`` in float64 whose second moment over the documents is the matrix; see `gram_curvature`.

    ``width`` is that of the widest block that is decomposed.
    """
    _refuse(examples, kind)
    if kind == "hessian":
        raise InputError(f"{name}: a Hessian has no rows; use 'ggn', or exact_curvature (solver 'dense')")
    chosen = _labels(model, objective, examples, kind, labels)
    if chosen is None:
        raise InputError(
            f"{name}: 'ggn' is of a row for every label, which only documents with one target and at most "
            f"{MOST_LABELS} labels have; use 'fisher' with sampled labels for documents with several targets or more "
            "labels"
        )
    each = chosen.draws if chosen.kind == "sampled" else 1
    if chosen.kind == "exact":
        each = predictions_of(model, objective, examples[0]).outputs.shape[1]
    count = len(examples) * each
    require_small(name, count, width)
    need = 8 * count * tracked.layout.size + COPIES * 8 * min(count, width) ** 2
    if need > 0.5 * free_memory(torch.device("cpu")):
        raise InputError(
            f"{name}: {len(examples)} documents with {each} rows of {tracked.layout.size:,} entries need "
            f"{need / 1e9:.3g} GB, more than half of what is free; take fewer documents or parameters, or use EK-FAC"
        )
    rows: list[Tensor] = []
    _pass(model, objective, examples, tracked, chosen, rows.append, token_budget, progress)
    return torch.cat(rows)


def _pass(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    labels: Labels,
    receive: Callable[[Tensor], None],
    token_budget: int | None,
    progress: Progress,
) -> None:
    run_pass(
        model,
        objective,
        examples,
        [GradientRows(tracked.layout, receive)],
        tracked=tracked,
        token_budget=token_budget,
        progress=progress,
        task="curvature",
        labels=labels,
    )


def _columns(products: CurvatureProducts, total: Tensor, progress: Progress) -> None:
    """Fill ``total`` with products of unit vectors."""
    layout, like = products.layout, products.like()
    for start in range(0, layout.size, CHUNK):
        stop = min(start + CHUNK, layout.size)
        unit = torch.zeros(stop - start, layout.size, dtype=torch.float64)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
        found = products({n: value.to(like[n]) for n, value in layout.unflatten(unit).items()})
        total[start:stop] = torch.cat([found[n].flatten(1).double().cpu() for n in layout.names], 1)
        progress("curvature", stop, layout.size)
