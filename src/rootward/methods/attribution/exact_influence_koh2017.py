"""Understanding Black-box Predictions via Influence Functions (Koh & Liang, 2017, arXiv:1703.04730).

Upweighting document n by eps moves the minimiser of the mean loss by ``-eps (H + lam)^-1 grad L_n`` to first order
(their equation 1), hence a measurement m by

    score[q, n] = - <grad m_q, (G + lam I)^-1 grad L_n>

(their equation 2 for any measurement). Positive = training more on the document raises the measurement. Removing the
document changes it by about ``-score / number of documents``. ``s = (G + lam I)^-1 grad m`` is solved for the mean of
the queries, or for each, and multiplied with every document's gradient in one pass. Solvers:

    cg      conjugate gradients on products with G; its residual is in the notes. ``preconditioner = "ekfac"`` fits
            EK-FAC, damps it alike, and takes other steps to the same solution: fewer where inputs differ much in scale
            (a third, on a single layer), more where layers act together and the damping is small (twice as many, on
            small perceptrons): compare the steps in the notes
    lissa   the stochastic series (Agarwal et al. 2017), products with ``batch`` documents drawn anew in each step
    dense   the whole matrix, for at most 12,000 parameters
    gram    the matrix of few documents from the products of their gradients, for any number of parameters; documents
            with several targets have no such products for "ggn", "fisher" takes a sampled label of each
    low_rank  an approximation from the same gradients: for each parameter ``rank`` eigenpairs and the diagonal of what
            they leave out (`curvature.low_rank`), without what parameters have in common

Deviations: G is the Gauss-Newton matrix by default. Theirs is the Hessian (``curvature = "hessian"``), which away from
a minimum has negative eigenvalues, so that the optimum above does not exist; they raise the damping then, and so does
the error here. LiSSA's scale is estimated from the largest eigenvalue where none is given. A
document's loss is a sum over its tokens. A Hessian, or the Gauss-Newton matrix with linear outputs, may be singular:
then the damping decides.

Exact when: the model is at a minimum of a quadratic loss (ridge regression), to first order in the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from rootward.capture.curvatures import fitted
from rootward.capture.dense import COPIES, exact_curvature, gram_curvature, low_rank_curvature
from rootward.capture.fit import FitConfig
from rootward.capture.hvp import CurvatureProducts
from rootward.capture.inputs import MethodInputs
from rootward.core.registry import Card, MethodConfig, Need, Tuned, Work, register
from rootward.core.scores import Scores
from rootward.curvature.base import Damping
from rootward.curvature.solvers import arnoldi, conjugate_gradients, lissa, mean_eigenvalue

CARD = Card(
    key="exact_influence_koh2017",
    label="influence function (exact curvature)",
    question="attribution",
    paper="Understanding Black-box Predictions via Influence Functions",
    reference="arXiv:1703.04730",
    needs=("gradients",),
    cost="cg: 1 + steps x (2 + queries) passes over the documents, lissa: depth x repeats of a batch; dense, gram, "
    "low_rank: every document's gradient at once in memory; 1 forward+backward per document for the scores",
    unit="measurement per unit of loss weight",
    aliases=("exact_influence", "influence_function", "if_cg"),
    several=True,
)
POWER_STEPS = 20
"""Krylov steps that LiSSA's scale is estimated with."""
TRACE_VECTORS = 10
"""Random vectors that the mean eigenvalue is estimated with."""
HEADROOM = 1.5
"""Scale over the largest eigenvalue: matrices of few documents have larger ones."""
READ_BY = {
    "tolerance": "cg", "steps": "cg", "rank": "low_rank",
    "scale": "lissa", "depth": "lissa", "repeats": "lissa", "batch": "lissa",
}  # fmt: skip
"""Options that one solver alone reads."""


class Config(MethodConfig):
    """Options."""

    TUNED: ClassVar = Tuned("damping", (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0))
    curvature: Literal["ggn", "hessian", "fisher"] = Field(
        default="ggn",
        description="ggn: Gauss-Newton; hessian: of the loss itself; fisher: labels sampled from the model",
    )
    solver: Literal["cg", "lissa", "dense", "gram", "low_rank"] = Field(
        default="cg",
        description="by products (cg, lissa), whole (dense), by documents (gram), eigenpairs and diagonal (low_rank)",
    )
    damping: float = Field(default=0.01, ge=0, description="added to every eigenvalue")
    relative: float = Field(default=0.0, ge=0, description="damping over the mean eigenvalue, added to `damping`")
    documents: int | None = Field(default=None, ge=1, description="curvature of so many documents instead of all")
    tolerance: float = Field(default=1e-5, gt=0, description="cg: relative residual at which a query is solved")
    steps: int = Field(default=100, ge=1, description="cg: at most so many products")
    preconditioner: Literal["none", "ekfac"] = Field(default="none", description="cg: what its steps are scaled by")
    rank: int = Field(default=32, ge=1, description="low_rank: eigenpairs of each parameter")
    scale: float | None = Field(default=None, gt=0, description="lissa: above half of the largest eigenvalue")
    depth: int = Field(default=10_000, ge=1, description="lissa: terms of the series")
    repeats: int = Field(default=1, ge=1, description="lissa: series averaged")
    batch: int = Field(default=32, ge=1, description="lissa: documents drawn in each step")
    queries: Literal["mean", "each"] = Field(
        default="mean", description="one score for the mean of the queries, or a score for each"
    )
    seed: int = Field(default=0, description="of all that is drawn")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        idle = [n for n, solver in READ_BY.items() if n in self.model_fields_set and solver != self.solver]
        if idle:
            readers = ", ".join(sorted({READ_BY[name] for name in idle}))
            raise ValueError(
                f"solver = {self.solver!r} does not read {', '.join(idle)} (read by {readers}); leave that out"
            )
        if self.curvature == "fisher" and self.solver in ("cg", "lissa"):
            raise ValueError(
                "curvature = 'fisher' is for solver = 'dense', 'gram' or 'low_rank'; 'ggn' is the same matrix without "
                "sampling"
            )
        if self.curvature == "hessian" and self.solver in ("gram", "low_rank"):
            raise ValueError(f"solver = {self.solver!r} is for curvature = 'ggn' or 'fisher': a Hessian has no rows")
        if self.curvature == "hessian" and self.relative and self.solver != "dense":
            raise ValueError("relative = 0 is needed for a Hessian's products, whose mean eigenvalue may be negative")
        if self.preconditioner != "none" and (self.solver != "cg" or not self.damping + self.relative > 0):
            raise ValueError("preconditioner = 'ekfac' is for solver = 'cg' with a damping above 0")
        return self


def _decomposed(inputs: MethodInputs, config: Config, query: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    subject, tracked = inputs.subject, inputs.tracked
    examples = _products(inputs, "ggn").subset(config.documents, config.seed).examples
    damping, budget, progress = Damping(config.relative, config.damping), inputs.token_budget, inputs.progress
    if config.solver == "low_rank":
        assert config.curvature != "hessian"  # refused by the config
        low = low_rank_curvature(subject.model, subject.objective, examples, tracked, config.rank, config.curvature,
                                 damping=damping, token_budget=budget, progress=progress)  # fmt: skip
        pairs = sum(len(block.values) for block in low.blocks)
        note = (
            f"low rank: {pairs} eigenpairs of {len(low.blocks)} parameters and the diagonal, {len(examples)} documents"
        )
        return low.apply(query), [note, *low.notes]
    if config.solver == "gram":
        assert config.curvature != "hessian"
        gram = gram_curvature(subject.model, subject.objective, examples, tracked, config.curvature,
                              damping=damping, token_budget=budget, progress=progress)  # fmt: skip
        return gram.apply(query), [f"gram: {len(gram.rows)} rows of {len(examples)} documents", *gram.notes]
    curvature = exact_curvature(subject.model, subject.objective, examples, tracked, config.curvature,
                                damping=damping, token_budget=budget, progress=progress)  # fmt: skip
    return curvature.apply(query), list(curvature.remarks())


def _products(inputs: MethodInputs, kind: Literal["hessian", "ggn"]) -> CurvatureProducts:
    return CurvatureProducts(
        inputs.subject.model,
        inputs.subject.objective,
        inputs.subject.encoded,
        inputs.tracked.layout,
        kind,
        inputs.token_budget,
        inputs.progress,
    )


def _iterative(inputs: MethodInputs, config: Config, query: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    layout = inputs.tracked.layout
    whole = _products(inputs, "hessian" if config.curvature == "hessian" else "ggn")
    products = whole.subset(config.documents, config.seed)
    lam, notes = config.damping, list[str]()
    if config.relative:
        lam += config.relative * mean_eigenvalue(
            layout, products, probes=TRACE_VECTORS, seed=config.seed, like=products.like()
        )
        notes.append(f"damping {lam:.4g}, with the mean eigenvalue estimated from {TRACE_VECTORS} random vectors")
    if config.solver == "cg":
        near = None
        if config.preconditioner == "ekfac":
            fit = fitted(inputs, FitConfig(kind="ekfac", seed=config.seed), Damping(0.0, lam, "whole"))
            near = fit.curvature
            notes.append(f"preconditioner: {fit.record.note}")
        found = conjugate_gradients(
            layout, products, query, lam, tolerance=config.tolerance, steps=config.steps, preconditioner=near
        )
    else:
        scale = config.scale
        if scale is None:
            pairs = arnoldi(layout, products, POWER_STEPS, seed=config.seed, like=products.like())
            scale = HEADROOM * (abs(float(pairs.values[0])) + lam) or 1.0
            notes += pairs.notes
            notes.append(f"LiSSA's scale {scale:.4g}: {HEADROOM} times the largest eigenvalue, estimated")
        draw = products.drawing(config.batch, config.seed)
        found = lissa(layout, products, query, lam, scale=scale, depth=config.depth, repeats=config.repeats, draw=draw)
    residual = float(found.residual.max())
    notes += [f"{config.solver}: {found.steps} steps, largest relative residual {residual:.2g}", *found.notes]
    return found.values, notes


def _solved(inputs: MethodInputs, config: Config, *, mean: bool) -> tuple[dict[str, Tensor], list[str]]:
    """``(G + lam I)^-1 grad m`` by parameter, for every query or their mean, and what to say of it."""
    query = inputs.query_gradients(inputs.tracked.layout, mean=mean)
    solve = _iterative if config.solver in ("cg", "lissa") else _decomposed
    return solve(inputs, config, query)


def token_scores(inputs: MethodInputs, config: Config, positions: Sequence[int]) -> dict[int, np.ndarray]:
    """Token scores of the mean over queries, for documents at these positions: they sum to the score."""
    solved, _ = _solved(inputs, config, mean=True)
    found = inputs.products(solved, [inputs.subject.encoded[n] for n in positions], tokens=True).by_token
    assert found is not None
    return {position: -found[n][0].numpy() for n, position in enumerate(positions)}


def needs(config: Config, work: Work) -> Need:
    """The products with the curvature, each a forward, a linearisation and a backward, and the pass for the scores."""
    part = min(1.0, (config.documents or work.documents) / work.documents)
    if config.solver in ("gram", "low_rank"):
        return Need(1 + part, memory_bytes=round(8 * work.parameters * part * work.documents))
    if config.solver == "dense":  # with one target for each document it is as many passes as outputs
        return Need(1 + 2 * part * work.parameters, at_most=True, memory_bytes=8 * COPIES * work.parameters**2)
    queries = 1 if config.queries == "mean" else work.queries
    before = 3 * TRACE_VECTORS if config.relative else 0
    if config.solver == "cg":
        fit = 2 if config.preconditioner == "ekfac" else 0
        steps = min(config.steps, 2 * work.parameters)
        return Need(1 + fit + part * (before + steps * (2 + queries)), at_most=True)
    before += 3 * POWER_STEPS if config.scale is None else 0
    drawn = config.depth * config.repeats * min(1.0, config.batch / work.documents)
    return Need(1 + part * before + drawn * (2 + queries))


@register(CARD, Config, tokens=token_scores, needs=needs)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document; one row for the mean of the queries, or one per query."""
    solved, notes = _solved(inputs, config, mean=config.queries == "mean")
    dots = inputs.products(solved, inputs.subject.encoded).dots
    return inputs.scored(CARD, -dots, notes=notes)
