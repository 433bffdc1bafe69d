"""TrackStar: Scalable Influence and Fact Tracing for Large Language Model Pretraining (Chang et al., 2024).

arXiv:2410.17413.

Gradients are corrected by the optimiser's second moments v, projected, whitened and brought to unit norm:

    h(x) = R^-1/2 P (grad x / sqrt(v)),     score[q, n] = - < h(m_q) / |h(m_q)| , h(L_n) / |h(L_n)| >

so that it is a cosine. R mixes the second moments of both sides, a block per parameter (their section A.1.3):

    R = lam R_query + (1 - lam) R_train

Components that all queries have in common, such as their template, count less the larger lam is; by default lam is
where both spectra meet at their component (1,000 of 65,536 dimensions; here the same share of the dimensions, or the
last that the queries have). Positive = training more on the document raises the measurement.

v is the optimiser's at the last checkpoint where that was kept, else the mean of squared gradients over the documents.
Dividing entry by entry would need every gradient to be formed, so by default v is reduced to the outer product of its
row and column means, which is what Adafactor, their optimiser, keeps (``scaling = "factored"``); ``"exact"`` forms the
gradients. Entries of v below 1e-8 of its mean over all parameters count as that.

Deviations: any measurement for the query's loss; blocks are parameters instead of groups of layers; R is damped by a
share of each block's mean eigenvalue (the paper names no damping), since it is singular with fewer documents than
dimensions; the projection is 16 x 16 for each matrix instead of 65,536 dimensions in all.

Exact when: without projection and damping no approximation is left but R itself; the oracle test is the formula on
dense gradients.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.inputs import MethodInputs
from rootward.capture.projected import document_rows, query_rows, squared_gradients
from rootward.capture.projection import Projection, Sketch
from rootward.capture.sketch import Scaled, scaled_sides
from rootward.core.errors import InputError
from rootward.core.registry import Card, MethodConfig, Tuned, register
from rootward.core.scores import Scores
from rootward.curvature.base import Damping
from rootward.curvature.projected import ProjectedCurvature

CARD = Card(
    key="trackstar_chang2024",
    label="TrackStar",
    question="attribution",
    paper="Scalable Influence and Fact Tracing for Large Language Model Pretraining",
    reference="arXiv:2410.17413",
    needs=("gradients",),
    cost="1 forward+backward per document, 2 where the optimiser's state was not kept; projected rows in memory",
    unit="cosine",
    aliases=("trackstar",),
)
COMPONENT = 1000 / 65536
"""Share of the components, from the largest, at which both spectra meet."""
FLOOR = 1e-8


class Config(MethodConfig):
    """Options."""

    TUNED: ClassVar = Tuned("damping", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0))
    rank: int | None = Field(default=16, ge=1, description="of each side of a matrix; none keeps whole gradients")
    scaling: Literal["factored", "exact", "none"] = Field(
        default="factored", description="by second moments: factored into rows and columns, exact, or not at all"
    )
    moments: Literal["auto", "optimiser", "documents"] = Field(
        default="auto", description="whose second moments; auto: the optimiser's if the last checkpoint has them"
    )
    query_share: float | None = Field(
        default=None, ge=0, le=1, description="lam, the queries' share of R; by default where the spectra meet"
    )
    damping: float = Field(default=0.1, ge=0, description="over the mean eigenvalue of each block of R")
    seed: int = Field(default=0, ge=0, description="of the random sides")


def _second_moments(inputs: MethodInputs, config: Config) -> tuple[dict[str, Tensor], str]:
    """``v[*shape]`` by name, no entry below the floor, and where it is from."""
    subject, names = inputs.subject, inputs.tracked.layout.names
    source, found = "the documents' gradients", None
    if config.moments != "documents" and subject.checkpoints:
        kept = subject.moments(len(subject.checkpoints) - 1)
        if kept is not None and all(name in kept.second for name in names):
            found, source = {name: kept.second[name].double() for name in names}, f"the optimiser (step {kept.step})"
    if found is None and config.moments == "optimiser":
        raise InputError(
            "moments = 'optimiser': expected second moments of every attributed parameter beside the last checkpoint, "
            "found none; train with optimiser = 'adamw' and checkpoints, or use moments = 'documents'"
        )
    if found is None:
        found = {name: value.double() for name, value in squared_gradients(inputs).items()}
    mean = sum(float(v.sum()) for v in found.values()) / inputs.tracked.layout.size
    if mean == 0:
        raise InputError(f"second moments: expected some above 0 in {source}, got zeros alone; use scaling = 'none'")
    return {name: v.clamp_min(FLOOR * mean) for name, v in found.items()}, source


def _sketch(inputs: MethodInputs, config: Config) -> tuple[Sketch, str]:
    projection = Projection(inputs.tracked.layout, config.rank, config.seed, str(inputs.subject.device))
    if config.scaling == "none":
        return projection, "gradients not scaled"
    moments, source = _second_moments(inputs, config)
    note = f"gradients scaled by second moments from {source}"
    if config.scaling == "exact":
        return Scaled(projection, {name: v.rsqrt() for name, v in moments.items()}), note
    return scaled_sides(projection, moments), f"{note}, of rank one"


def _share(queries: ProjectedCurvature, documents: ProjectedCurvature) -> float:
    """``lam`` with which the sorted eigenvalues of ``lam R_query`` and ``(1 - lam) R_train`` meet at the component."""
    q, n = queries.eigenvalues, documents.eigenvalues
    if not len(q) or not len(n):
        return 0.0
    place = min(max(round(COMPONENT * queries.width), 1), len(q), len(n)) - 1
    return float(n[place] / (q[place] + n[place]))


def _unit(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document, a row for each query."""
    sketch, note = _sketch(inputs, config)
    rows, queries = document_rows(inputs, sketch).rows, query_rows(inputs, sketch)
    parts = list(sketch.slices.values())
    share = config.query_share
    said: tuple[str, ...] = ()
    if share is None:
        sides = ProjectedCurvature.of(queries, parts), ProjectedCurvature.of(rows, parts)
        share, said = _share(*sides), (*sides[0].notes, *sides[1].notes)
    # the second moment of these rows is the mixture: each side's mean, times its share
    total = len(queries) + len(rows)
    scales = (share * total / len(queries)) ** 0.5, ((1 - share) * total / len(rows)) ** 0.5
    mixed = torch.cat([scales[0] * queries, scales[1] * rows])
    curvature = ProjectedCurvature.of(mixed, parts, Damping(config.damping))
    values = -_unit(curvature.apply(queries, -0.5)) @ _unit(curvature.apply(rows, -0.5)).T
    mixture = f"R is {share:.3g} of the queries' and {1 - share:.3g} of the documents'"
    return inputs.scored(CARD, values, notes=tuple(dict.fromkeys((note, mixture, *said, *curvature.notes))))
