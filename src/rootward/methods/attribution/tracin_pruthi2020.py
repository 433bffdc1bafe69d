"""TracIn: Estimating Training Data Influence by Tracing Gradient Descent (Pruthi et al., 2020, arXiv:2002.08484).

One step of gradient descent on document n moves a measurement m by ``- eta <grad m, grad L_n>``. TracInCP (their
equation 1) sums this over checkpoints c of the training run, weighted by the learning rate there:

    score[q, n] = - sum_c eta_c <grad m_q(theta_c), grad L_n(theta_c)>        (normalise = "none")

with eta_c relative to the largest. The checkpoints are those that were kept and, where the subject's base is known, the
start of training: what a document teaches is steepest before it has been learnt. With the final weights alone and
eta = 1 this is the plain gradient dot product. ``normalise = "document"`` divides each document's gradient by its norm,
so that long or surprising documents do not win by size; ``"both"`` divides the query's too: the cosine. Positive =
training more on the document raises the measurement.

Deviations: their measurement is the loss of a test example, here any measurement, and the sign follows it; their sum
runs over steps in which the document was used, here over all checkpoints alike; gradients may be projected
(``source = "index"``, their section 4 suggests random projections) or the query of low rank (``rank``).

Exact when: one document is one step of plain SGD with a small learning rate (the oracle test).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.inputs import START, MethodInputs
from rootward.capture.projection import Projection
from rootward.capture.sinks import LowRank, low_rank
from rootward.capture.store import GradientStore
from rootward.core.errors import InputError
from rootward.core.registry import Card, MethodConfig, register
from rootward.core.scores import Scores
from rootward.scoring.streamed import streamed_products

CARD = Card(
    key="tracin_pruthi2020",
    label="gradient dot product (TracIn)",
    question="attribution",
    paper="Estimating Training Data Influence by Tracing Gradient Descent",
    reference="arXiv:2002.08484",
    needs=("gradients",),
    cost="1 forward+backward per document and checkpoint, without the weight gradients",
    unit="measurement per unit of loss weight",
    aliases=("tracin", "gradient_dot"),
    presets={
        "tracin_cp": {"checkpoints": "all"},
        "gradient_cosine": {"normalise": "both"},
        "gradient_dot_at_start": {"checkpoints": "start"},
        "tracin_cp_unit": {"checkpoints": "all", "normalise": "document"},
    },
    several=True,
)


class Config(MethodConfig):
    """Options; the defaults give the gradient dot product at the final weights."""

    checkpoints: Literal["final", "start", "all"] = Field(
        default="final",
        description="the final weights, those training began from, or the sum over the checkpoints kept and the start",
    )
    normalise: Literal["none", "document", "both"] = Field(
        default="none", description="document: by the norm of each document's gradient; both: cosines"
    )
    queries: Literal["auto", "each", "mean"] = Field(
        default="auto", description="a score for each query or for their mean; auto: each where their gradients fit"
    )
    rank: int | None = Field(default=None, ge=1, description="approximate the mean query's matrices to this rank")
    source: Literal["pass", "index"] = Field(
        default="pass", description="pass: over the documents; index: a gradient store"
    )


def _weights(inputs: MethodInputs, config: Config) -> list[tuple[int | None, float]]:
    """(checkpoint, its learning rate over the largest); -1 is the start of training, None the subject's own weights."""
    subject = inputs.subject
    if config.checkpoints == "final":
        return [(None, 1.0)]
    if config.checkpoints == "start":
        return [(START, 1.0)]
    rates = inputs.checkpoint_rates("checkpoints = 'all'")
    found: list[tuple[int | None, float]] = list(enumerate(rates))
    if subject.recipe is None:
        return found
    if subject.has_start:
        # the first steps are taken from here, at the full rate once the warm-up is over
        found.insert(0, (START, subject.recipe.lr))
    largest = max(rate for _, rate in found) or 1.0
    return [(k, rate / largest) for k, rate in found]


def _averaged(inputs: MethodInputs, config: Config) -> bool:
    """Whether the scores are for the mean query: asked for, or the gradients of each do not fit."""
    if config.queries == "auto":
        return config.rank is not None or not inputs.queries_fit
    return config.queries == "mean" or config.rank is not None


def _query(inputs: MethodInputs, config: Config, *, average: bool = False) -> dict[str, Tensor | LowRank]:
    """Query gradients; ``average``: their mean after normalisation, which gives the mean of the scores."""
    dense = inputs.query_gradients(inputs.tracked.layout, mean=_averaged(inputs, config))
    if config.normalise == "both":
        size = torch.stack([g.flatten(1).double().square().sum(1) for g in dense.values()]).sum(0).sqrt()
        scale = 1 / torch.where(size == 0, 1.0, size)
        dense = {name: g * scale.to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for name, g in dense.items()}
    if average:
        dense = {name: g.mean(0, keepdim=True) for name, g in dense.items()}
    if config.rank is None:
        return dict(dense)
    rank = config.rank
    return {name: low_rank(g.flatten(2), rank) if g.dim() >= 3 else g for name, g in dense.items()}


def _unit(dots: Tensor, norms: Tensor | None) -> Tensor:
    """Divide by the documents' norms; a document without gradient scores 0, one whose norm is no number stays so."""
    if norms is None:
        return dots
    return torch.where(norms == 0, 0.0 * dots, dots / torch.where(norms == 0, 1.0, norms))


def _store(inputs: MethodInputs, config: Config) -> GradientStore:
    """The index to read, if it holds what is asked for."""
    store = inputs.store
    if store is None:
        raise InputError("source = 'index': no index was given; run `rootward index` first, or use source = 'pass'")
    if config.checkpoints != "final":
        raise InputError("source = 'index': an index holds the final weights' gradients; use checkpoints = 'final'")
    if config.rank is not None:
        raise InputError("source = 'index': rank is for the queries of a pass; leave it out, an index has its own rank")
    store.require(inputs.subject.fingerprint())
    store.projection.layout.require(inputs.tracked.layout, f"index {store.folder}")
    return store


def _projected_query(inputs: MethodInputs, config: Config, projection: Projection) -> Tensor:
    dense = inputs.query_gradients(projection.layout, mean=_averaged(inputs, config))
    rows = projection.project_dense({name: gradient.cpu() for name, gradient in dense.items()})
    if config.normalise == "both":
        size = rows.norm(dim=1, keepdim=True)
        rows = rows / torch.where(size == 0, 1.0, size)
    return rows


def _from_index(inputs: MethodInputs, config: Config) -> Tensor:
    store = _store(inputs, config)
    rows = _projected_query(inputs, config, store.projection)
    dots, norms = streamed_products(store.blocks(), rows, store.documents, norms=config.normalise != "none")
    return _unit(dots, norms)


def _tokens_from_index(inputs: MethodInputs, config: Config, positions: Sequence[int]) -> list[Tensor]:
    """A projected row's product with the query is the whole gradient's with the lifted query, token by token."""
    store = _store(inputs, config)
    projection = store.projection
    row = _projected_query(inputs, config, projection).mean(0, keepdim=True)
    lifted = {name: query.to(inputs.subject.device) for name, query in projection.lift(row).items()}
    sink = inputs.products(lifted, [inputs.subject.encoded[n] for n in positions], tokens=True)
    assert sink.by_token is not None
    values = [-sink.by_token[n][0] for n in range(len(positions))]
    if config.normalise == "none":
        return values
    _, norms = streamed_products(store.blocks(), row, store.documents, norms=True)
    assert norms is not None
    return [_unit(value, norms[position]) for position, value in zip(positions, values, strict=True)]


def token_scores(inputs: MethodInputs, config: Config, positions: Sequence[int]) -> dict[int, np.ndarray]:
    """Token scores of the mean over queries, for documents at these positions: they sum to the score."""
    if config.source == "index":
        found = _tokens_from_index(inputs, config, positions)
        return {n: value.numpy() for n, value in zip(positions, found, strict=True)}
    examples = [inputs.subject.encoded[n] for n in positions]
    norms = config.normalise != "none"
    total: dict[int, Tensor] = {}
    for checkpoint, weight in _weights(inputs, config):
        with inputs.holding(checkpoint):
            sink = inputs.products(_query(inputs, config, average=True), examples, norms=norms, tokens=True)
        assert sink.by_token is not None
        for n, position in enumerate(positions):
            value = -weight * sink.by_token[n][0]
            if sink.squared is not None:
                value = _unit(value, sink.squared[n].sqrt())
            total[position] = total[position] + value if position in total else value
    return {n: value.numpy() for n, value in total.items()}


@register(CARD, Config, tokens=token_scores)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document; one column per query, or one for their mean."""
    encoded = inputs.subject.encoded
    notes: list[str] = []
    if config.source == "index":
        total = -_from_index(inputs, config)
        rank = inputs.store.projection.rank if inputs.store else None
        notes.append(f"gradients from an index, {'whole' if rank is None else f'projected to rank {rank}'}")
    else:
        total = torch.zeros(0)
        for checkpoint, weight in _weights(inputs, config):
            with inputs.holding(checkpoint):
                sink = inputs.products(_query(inputs, config), encoded, norms=config.normalise != "none")
            norms = sink.squared.sqrt() if sink.squared is not None else None
            part = -weight * _unit(sink.dots, norms)
            total = part if total.numel() == 0 else total + part
    if config.queries == "auto" and config.rank is None and not inputs.queries_fit:
        notes.append(f"{inputs.queries_need}, more than half of what was free: their mean was taken")
    units = {"none": CARD.unit, "document": "measurement per unit gradient", "both": "cosine"}
    return inputs.scored(CARD, total, unit=units[config.normalise], notes=notes)
