"""TRAK: Attributing Model Behavior at Scale (Park et al., 2023, arXiv:2303.14186).

The model is taken as linear in its gradients. With the output function of a document, the log-odds of its targets
``f_n = log(p_n / (1 - p_n))``, its feature is the projected gradient

    phi_n = P^T grad f_n = - P^T grad L_n / (1 - p_n)

and the score of document n, from the one-step Newton update of the linear model (their section 3),

    score[q, n] = mean_c [ phi_q (Phi^T Phi / N + lam)^-1 phi_n ] * mean_c [ 1 - p_n ]

with the means over models c taken separately, ``phi_q`` the projected gradient of the measurement and
``lam = damping x mean eigenvalue``. For one model that is ``- <phi_q, (...)^-1 P^T grad L_n>``: positive = training
more on the document raises the measurement.

Deviations: ``Phi^T Phi`` is divided by the number of documents, so that scores are in the unit of the other methods (N
times theirs). With several trained tokens ``p_n`` is the geometric mean of their probabilities, from the mean token
loss, and each token counts as if it had that one. The models are checkpoints of one training instead of independent
ones. Their soft threshold is left out. By default the projection is of Kronecker form, matrix by matrix
(``projection = "gaussian"``, ``"rademacher"`` or ``"sjlt"`` is over the whole gradient to ``dimension`` entries), and
the kernel is damped: undamped, as the authors' own code has it, it fits each of few documents exactly and ranks badly.

Exact when: up to a factor, the model is linear in its parameters, nothing is lost in the projection, and p (1 - p),
which they leave out of the kernel, is the same for all documents. The oracle test is the formula on dense gradients.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rootward.capture.inputs import MethodInputs
from rootward.capture.projected import DocumentRows, document_rows, query_rows, stored_rows
from rootward.capture.projection import Projection, Sketch
from rootward.capture.sketch import Whole
from rootward.core.errors import InputError
from rootward.core.registry import Card, MethodConfig, Tuned, register
from rootward.core.scores import Scores
from rootward.curvature.base import Damping
from rootward.curvature.projected import ProjectedCurvature

CARD = Card(
    key="trak_park2023",
    label="TRAK",
    question="attribution",
    paper="TRAK: Attributing Model Behavior at Scale",
    reference="arXiv:2303.14186",
    needs=("gradients",),
    cost="1 forward+backward per document and checkpoint; projected rows in memory",
    unit="measurement per unit of loss weight",
    aliases=("trak",),
    presets={"trak_checkpoints": {"checkpoints": "all"}},
    notes="with several trained tokens the probability of a document is the geometric mean of theirs",
)


class Config(MethodConfig):
    """Options. The authors' kernel is undamped and has far fewer dimensions than there are documents."""

    TUNED: ClassVar = Tuned("damping", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0))
    projection: Literal["kronecker", "gaussian", "rademacher", "sjlt", "none"] = Field(
        default="kronecker",
        description="kronecker: each matrix by two sides; others: the whole gradient at once; none: no projection",
    )
    rank: int = Field(default=16, ge=1, description="kronecker: rank x rank dimensions for each matrix")
    dimension: int = Field(default=1024, ge=1, description="gaussian, rademacher, sjlt: dimensions in all")
    damping: float = Field(default=0.1, ge=0, description="over the mean eigenvalue of the kernel")
    checkpoints: Literal["final", "all"] = Field(default="final", description="all: averaged over the checkpoints kept")
    seed: int = Field(default=0, ge=0, description="of the projection")
    source: Literal["pass", "index"] = Field(
        default="pass", description="pass: over the documents; index: a gradient store"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.source == "index":  # which has its own projection: see `_stored`
            return self
        read = {"kronecker": {"rank", "seed"}, "none": set[str]()}.get(self.projection, {"dimension", "seed"})
        idle = sorted(({"rank", "dimension", "seed"} - read) & self.model_fields_set)
        if idle:
            raise ValueError(f"projection = {self.projection!r} does not read {', '.join(idle)}; leave that out")
        return self


def _sketch(inputs: MethodInputs, config: Config) -> Sketch:
    layout = inputs.tracked.layout
    if config.projection in ("gaussian", "rademacher", "sjlt"):
        return Whole(layout, config.dimension, config.projection, config.seed)
    rank = None if config.projection == "none" else config.rank
    return Projection(layout, rank, config.seed, str(inputs.subject.device))


def _stored(inputs: MethodInputs, config: Config) -> tuple[Projection, DocumentRows]:
    given = sorted({"projection", "rank", "dimension", "seed"} & config.model_fields_set)
    if given:
        raise InputError(f"source = 'index': an index has its own projection; leave out {', '.join(given)}")
    if config.checkpoints != "final":
        raise InputError("source = 'index': an index holds the final weights' gradients; use checkpoints = 'final'")
    return stored_rows(inputs)


def _model(
    inputs: MethodInputs, documents: DocumentRows, sketch: Sketch, damping: Damping
) -> tuple[Tensor, Tensor, ProjectedCurvature]:
    """One model's ``phi_q K^-1 phi_n [q, n]``, ``1 - p_n [n]`` and its kernel."""
    tokens = torch.tensor([max(example.targets, 1) for example in inputs.subject.encoded], dtype=torch.float64)
    doubt = -torch.expm1(-documents.losses / tokens)
    # a document that is certain has no gradient either: its feature is 0
    over = torch.where(doubt > 0, -1 / torch.where(doubt > 0, doubt, 1.0), 0.0)
    features = documents.rows.double() * over.unsqueeze(1)
    kernel = ProjectedCurvature.of(features, damping=damping)
    products = kernel.apply(query_rows(inputs, sketch).double()) @ features.T
    return products, doubt, kernel


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document, a row for each query."""
    damping = Damping(config.damping)
    notes: list[str] = []
    if config.source == "index":
        sketch, documents = _stored(inputs, config)
        products, doubt, kernel = _model(inputs, documents, sketch, damping)
        directions = len(kernel.eigenvalues)
        notes += kernel.notes
        size = "whole" if sketch.rank is None else f"projected to rank {sketch.rank}"
        notes.append(f"gradients from an index, {size}")
    else:
        sketch = _sketch(inputs, config)
        models: list[int | None] = [None]
        if config.checkpoints == "all":
            models = list(range(len(inputs.checkpoint_rates("checkpoints = 'all'"))))
        products, doubt, directions = torch.zeros(()), torch.zeros(()), 0
        for model in models:
            with inputs.holding(model):
                found = _model(inputs, document_rows(inputs, sketch), sketch, damping)
            products, doubt = products + found[0] / len(models), doubt + found[1] / len(models)
            directions = max(directions, len(found[2].eigenvalues))
            notes += found[2].notes
    count = len(inputs.subject.encoded)
    notes.append(f"{sketch.width} dimensions, {count} documents")
    if config.damping == 0 and directions >= 0.5 * count:
        notes.append(
            f"the undamped kernel has {directions} directions for {count} documents and can fit each of them: "
            "project to fewer dimensions, or set damping"
        )
    return inputs.scored(CARD, products * doubt, notes=notes)
