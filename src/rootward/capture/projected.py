"""Projected gradients of all documents and of all queries: what methods in a projected space begin with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rootward.capture.inputs import MethodInputs, free_memory, require_finite
from rootward.capture.moments import CovarianceSums, SecondMoments
from rootward.capture.projection import Projection, Sides, Sketch, sketch_dense
from rootward.capture.sinks import ProjectedRows
from rootward.core.errors import InputError, NumericalError
from rootward.curvature.kronecker import Covariances, Eigenbases
from rootward.subject.encode import Example

BYTES = 20
"""Of memory for each entry of a row: the row itself, its copy in float64, what was made of it."""


@dataclass(frozen=True)
class DocumentRows:
    """``rows[n, width]`` of every usable document's projected loss gradient, and its loss in nats ``[n]`` (float64)."""

    rows: Tensor
    losses: Tensor


def _dtype(inputs: MethodInputs) -> torch.dtype:
    """Rows of a float64 model are kept in float64."""
    wide = next(inputs.subject.model.parameters()).dtype == torch.float64
    return torch.float64 if wide else torch.float32


def _rows_of(inputs: MethodInputs, sketch: Sketch, examples: list[Example], task: str) -> ProjectedRows:
    needed, free = len(examples) * sketch.width * BYTES, free_memory(torch.device("cpu"))
    if needed > 0.8 * free:
        raise InputError(
            f"{task}: {len(examples)} projected gradients of {sketch.width} entries take {needed / 1e9:.3g} GB with "
            f"their curvature, of which {free / 1e9:.3g} GB are free; project to fewer dimensions, or attribute fewer "
            "parameters with `parameters`"
        )
    sink = ProjectedRows(sketch, len(examples), _dtype(inputs))
    inputs.feed([sink], examples, task)
    return sink


def document_rows(inputs: MethodInputs, sketch: Sketch) -> DocumentRows:
    """One pass over the usable documents with their own labels, under the weights that the model has now.

    Raises:
        InputError: the rows would not fit in memory. NumericalError: a document's loss or gradient is not finite.
    """
    sink = _rows_of(inputs, sketch, list(inputs.subject.encoded), "documents")
    require_finite(sink.rows, inputs.subject.encoded, "projected gradients")
    return DocumentRows(sink.rows, sink.losses)


def stored_rows(inputs: MethodInputs) -> tuple[Projection, DocumentRows]:
    """The rows of the index that was given, and the projection that it was built with.

    Raises:
        InputError: no index was given. ArtefactError: it is of another model, documents or settings.
        LayoutMismatch: it is of other parameters.
    """
    store = inputs.store
    if store is None:
        raise InputError("source = 'index': no index was given; run `rootward index` first, or use source = 'pass'")
    store.require(inputs.subject.fingerprint())
    projection = replace(store.projection, device=str(inputs.subject.device))
    projection.layout.require(inputs.tracked.layout, f"index {store.folder}")
    rows = torch.cat([block.to(_dtype(inputs)) for _, block in store.blocks()])
    return projection, DocumentRows(rows, store.losses())


def query_rows(inputs: MethodInputs, sketch: Sketch) -> Tensor:
    """``[q, width]``: projected gradients of the measurement, a row per query.

    Those of a measurement made of losses are sums of its parts' projected gradients, so that no gradient of full size
    is kept; a function of the model has one of full size per query. Where those do not fit, the mean's is the only row.

    Raises:
        InputError: the behaviour's function gives another number of values, or depends on no attributed parameter.
        NumericalError: a value or gradient is not finite.
    """
    behaviour = inputs.behaviour
    if behaviour.kind == "scalar":
        dense = inputs.query_gradients(sketch.layout, mean=not inputs.queries_fit)
        return sketch_dense(sketch, {name: g.to(_dtype(inputs)) for name, g in dense.items()}).cpu()
    parts = behaviour.parts(inputs.subject.objective)
    sink = _rows_of(inputs, sketch, [part.example for part in parts], "queries")
    bad = (~torch.isfinite(sink.rows).all(1)).nonzero().flatten().tolist()
    if bad:
        raise NumericalError(
            f"query {behaviour.queries[parts[bad[0]].query].name!r}: its gradient is not finite; look at that query, "
            "or load the model with dtype float32"
        )
    weights = torch.zeros(len(behaviour), len(parts), dtype=sink.rows.dtype)
    for n, part in enumerate(parts):
        weights[part.query, n] = part.weight
    return weights @ sink.rows


def squared_gradients(inputs: MethodInputs) -> dict[str, Tensor]:
    """Mean over documents of every entry of the gradient squared, ``[*shape]`` by name: one pass, their own labels.

    Raises `NumericalError` that names the document whose gradient is not finite.
    """
    layout = inputs.tracked.layout
    sink = SecondMoments(layout, {name: (None, None) for name in layout.names})
    inputs.feed([sink], inputs.subject.encoded, "second moments")
    inputs.require_finite_sums(sink.sums.values(), "second moments")
    return {name: value.reshape(layout.shape(name)) for name, value in sink.result().items()}


def covariances(inputs: MethodInputs) -> Covariances:
    """Covariances of both sides of every matrix over all documents' tokens: one pass, their own labels.

    Raises `NumericalError` that names the document whose gradient is not finite.
    """
    sink = CovarianceSums(inputs.tracked.layout)
    inputs.feed([sink], inputs.subject.encoded, "covariances")
    inputs.require_finite_sums(sink.sums.values(), "covariances")
    return sink.result()


def principal(projection: Projection, bases: Eigenbases) -> Projection:
    """The projection with the covariances' leading eigenvectors as sides, as many as the random ones have columns.

    A table's side of one-hot inputs, whose covariance is diagonal, keeps its random side.
    """
    given: dict[str, Sides] = {}
    for name in projection.layout.names:
        pairs = zip(projection.sides(name), bases.basis(name), strict=True)
        left, right = (
            side if side is None or vectors is None else vectors[:, -side.shape[1] :] for side, vectors in pairs
        )
        given[name] = left, right
    return Projection(projection.layout, projection.rank, projection.seed, projection.device, given)
