"""LoGra: What is Your Data Worth to GPT? (Choe et al., 2024, arXiv:2405.13954; the LogIX library).

Gradients of a matrix are projected on both sides, ``g_n = P_out^T G_n P_in``, without being formed, and influence is
taken in the projected space, one block per matrix (their section 3):

    score[q, n] = - sum_l g_q,l^T (F_l + lam_l)^-1 g_n,l        F_l = mean_n g_n,l g_n,l^T

with ``lam_l`` a share of the block's mean eigenvalue. The sides are the leading eigenvectors of the covariances of
inputs and output gradients (``init = "pca"``, one pass more) or random. ``fisher = "ekfac"`` replaces ``F_l`` by its
diagonal in the eigenbasis of the projected covariances. ``normalise = "self_influence"`` divides by
``sqrt(g_n^T (F + lam)^-1 g_n)``, their guard against documents of large gradient (l-RelatIF, Barshan et al. 2020).
Positive = training more on the document raises the measurement.

Deviations: the labels are the documents' own throughout (as theirs); any measurement for the test loss; the default
rank is 16 where theirs is up to 64 for models of billions of parameters.

Exact when: no side is wider than the rank: the block-diagonal empirical Fisher matrix, whatever the sides.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.inputs import MethodInputs
from rootward.capture.projected import (
    DocumentRows,
    covariances,
    document_rows,
    principal,
    query_rows,
    stored_rows,
)
from rootward.capture.projection import Projection
from rootward.core.errors import InputError
from rootward.core.layout import ParamLayout
from rootward.core.registry import Card, MethodConfig, Tuned, register
from rootward.core.scores import Scores
from rootward.curvature.base import Damping
from rootward.curvature.kronecker import (
    JITTERED,
    Basis,
    Covariances,
    Eigenbases,
    KroneckerBlock,
    KroneckerCurvature,
    eigenbasis,
    rotate,
)
from rootward.curvature.projected import ProjectedCurvature

CARD = Card(
    key="logra_choe2024",
    label="LoGra",
    question="attribution",
    paper="What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence Functions",
    reference="arXiv:2405.13954",
    needs=("gradients",),
    cost="1 forward+backward per document, 2 with PCA sides; projected rows in memory",
    unit="measurement per unit of loss weight",
    aliases=("logra", "logix"),
    presets={"logra_random": {"init": "random"}, "logra_relatif": {"normalise": "self_influence"}},
)


class Config(MethodConfig):
    """Options."""

    TUNED: ClassVar = Tuned("damping", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0))
    init: Literal["pca", "random"] = Field(
        default="pca", description="pca: the covariances' largest eigenvectors; random: Gaussian sides"
    )
    rank: int = Field(default=16, ge=1, description="of each side: rank x rank dimensions for each matrix")
    fisher: Literal["raw", "ekfac"] = Field(
        default="raw", description="raw: of the projected gradients; ekfac: its diagonal in the projected eigenbasis"
    )
    damping: float = Field(default=0.1, ge=0, description="over the mean eigenvalue of each matrix's block")
    normalise: Literal["none", "self_influence"] = Field(
        default="none", description="self_influence: divide by its root (RelatIF)"
    )
    seed: int = Field(default=0, ge=0, description="of the random sides")
    source: Literal["pass", "index"] = Field(
        default="pass", description="pass: over the documents; index: a gradient store"
    )


class _Ekfac:
    """Diagonal second moments of rows in the eigenbasis of the projected covariances."""

    def __init__(self, projection: Projection, found: Covariances, rows: Tensor, damping: Damping) -> None:
        self.projection = projection
        shapes = projection.shapes
        self.layout = ParamLayout(tuple(shapes), tuple(shapes.values()))
        blocks: dict[str, KroneckerBlock] = {}
        self._jittered: list[str] = []
        for name, part in self._named(rows).items():
            basis = self._basis(name, found)
            blocks[name] = KroneckerBlock(basis, rotate(part, basis).square().mean(0))
        self.curvature = KroneckerCurvature(self.layout, "ekfac", blocks, damping)

    def _named(self, rows: Tensor) -> dict[str, Tensor]:
        slices = self.projection.slices
        return {n: rows[:, slices[n]].reshape(len(rows), *self.layout.shape(n)) for n in self.layout.names}

    def _basis(self, name: str, found: Covariances) -> Basis:
        keys = found.left[name], found.right[name]
        sides: list[Tensor | None] = []
        for key, side in zip(keys, self.projection.sides(name), strict=True):
            vectors, jittered = (None, False) if key is None else _projected_basis(found.sides[key].moment, side)
            sides.append(vectors)
            self._jittered += [key] if key is not None and jittered else []
        return sides[0], sides[1]

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{', '.join(self._jittered)}: {JITTERED}",) if self._jittered else ()

    def apply(self, rows: Tensor, power: float) -> Tensor:
        named = self.curvature.apply(self._named(rows), power)
        return torch.cat([named[name].flatten(1) for name in self.layout.names], 1)


def _projected_basis(moment: Tensor, side: Tensor | None) -> tuple[Tensor | None, bool]:
    """Eigenvectors of ``P^T A P`` as columns (None where A is diagonal and there is no P), and if a jitter was used."""
    moment = moment.double().cpu()
    if side is None:
        return (None, False) if moment.dim() == 1 else eigenbasis(moment)[1:]
    wide = side.double().cpu()
    return eigenbasis(wide.T @ (moment.unsqueeze(1) * wide if moment.dim() == 1 else moment @ wide))[1:]


def _rows(inputs: MethodInputs, config: Config) -> tuple[Projection, DocumentRows, Covariances | None, tuple[str, ...]]:
    """The projection, every document's row, the covariances where they were needed, and what to say of them."""
    if config.source == "index":
        given = sorted({"rank", "seed"} & config.model_fields_set)
        if given:
            raise InputError(f"source = 'index': an index has its own projection; leave out {', '.join(given)}")
        if config.init != "random":
            raise InputError("source = 'index': an index has random sides; use init = 'random' (logra_random)")
        projection, documents = stored_rows(inputs)
        return projection, documents, covariances(inputs) if config.fisher == "ekfac" else None, ()
    notes: tuple[str, ...] = ()
    projection, found = Projection(inputs.tracked.layout, config.rank, config.seed, str(inputs.subject.device)), None
    if config.init == "pca" or config.fisher == "ekfac":
        found = covariances(inputs)
    if config.init == "pca":
        assert found is not None
        dtype = next(inputs.subject.model.parameters()).dtype
        bases = Eigenbases.of(found, torch.float64 if dtype == torch.float64 else torch.float32)
        projection = principal(projection, bases)
        notes = (f"{', '.join(bases.jittered)}: {JITTERED}",) if bases.jittered else ()
    return projection, document_rows(inputs, projection), found, notes


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document, a row for each query."""
    projection, documents, found, said = _rows(inputs, config)
    queries, rows, damping = query_rows(inputs, projection), documents.rows, Damping(config.damping)
    if config.fisher == "ekfac":
        assert found is not None
        curvature = _Ekfac(projection, found, rows, damping)
    else:
        curvature = ProjectedCurvature.of(rows, list(projection.slices.values()), damping)
    if config.normalise == "self_influence":
        # (F + lam)^-1/2 on both sides: a document's norm there is the root of its influence on itself
        whitened = curvature.apply(rows, -0.5)
        norms = whitened.norm(dim=1)
        values = curvature.apply(queries, -0.5) @ whitened.T / torch.where(norms > 0, norms, 1.0)
    else:
        values = curvature.apply(queries, -1.0) @ rows.T
    source = "index" if config.source == "index" else f"{config.init} sides"
    size = "whole gradients" if projection.rank is None else f"rank {projection.rank}"
    unit = CARD.unit if config.normalise == "none" else "measurement per root of self-influence"
    notes = (f"{source}, {size}: {projection.width} dimensions", *said, *curvature.notes)
    return inputs.scored(CARD, -values, unit=unit, notes=notes)
