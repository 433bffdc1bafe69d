"""Scaling Up Influence Functions (Schioppa, Zablotskaia, Vilar, Sokolov, 2022, arXiv:2112.03052).

An Arnoldi iteration on products with the curvature G of the mean document loss, from a random start, gives its largest
eigenpairs by magnitude, ``P [k, parameters]`` and ``Lambda [k]``. The influence function is taken in their span alone:

    score[q, n] = - <P grad m_q, Lambda^-1 P grad L_n>

so what lies outside the span counts nothing (a pseudo-inverse, not a damped inverse): of few pairs and many parameters
the scores see little, and small ones may have the wrong sign. Positive = training more on the document raises the
measurement. The iteration is paid once; a query then costs its gradient, lifted back to ``P^T Lambda^-1 P grad m_q``,
and one pass over the documents.

Deviations: G is the Gauss-Newton matrix by default, whose eigenvalues are never negative; theirs is the Hessian
(``curvature = "hessian"``), of which large negative eigenvalues turn the sign of what they carry. ``damping`` may be
added to the eigenvalues. Products with gradients are formed in reverse mode, theirs in forward
mode. Ritz vectors are orthogonalised twice; ``documents`` takes the curvature of a part, as they do.

Exact when: the iteration spans everything (as many steps as parameters), and G has no null space.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.hvp import CurvatureProducts
from rootward.capture.inputs import MethodInputs
from rootward.core.errors import NumericalError
from rootward.core.registry import Card, MethodConfig, Need, Tuned, Work, register
from rootward.core.scores import Scores
from rootward.curvature.dense import as_named, as_rows
from rootward.curvature.solvers import Eigenpairs, arnoldi

CARD = Card(
    key="arnoldi_schioppa2022",
    label="influence function (Arnoldi)",
    question="attribution",
    paper="Scaling Up Influence Functions",
    reference="arXiv:2112.03052",
    needs=("gradients",),
    cost="3 passes per iteration over the documents that the curvature is taken of; 1 forward+backward per document",
    unit="measurement per unit of loss weight",
    aliases=("arnoldi", "arnoldi_influence"),
    several=True,
)
TOLERANCE = 1e-2
"""A Ritz pair with a larger residual, over its eigenvalue, is called unconverged in the notes."""


class Config(MethodConfig):
    """Options."""

    TUNED: ClassVar = Tuned("damping", (0.0, 0.001, 0.01, 0.1, 1.0, 10.0))
    curvature: Literal["ggn", "hessian"] = Field(
        default="ggn", description="ggn: Gauss-Newton, never negative; hessian: as in the paper"
    )
    iterations: int = Field(default=200, ge=1, description="size of the Krylov space")
    top: int = Field(default=20, ge=1, description="eigenpairs kept, by magnitude")
    damping: float = Field(default=0.0, ge=0, description="added to the magnitude of the kept eigenvalues")
    documents: int | None = Field(default=None, ge=1, description="curvature of so many documents instead of all")
    queries: Literal["mean", "each"] = Field(
        default="mean", description="one score for the mean of the queries, or a score for each"
    )
    seed: int = Field(default=0, description="of the first Krylov vector and of the documents drawn")


def _eigenpairs(inputs: MethodInputs, config: Config) -> tuple[Eigenpairs, list[str]]:
    """The pairs that are kept, and what to say of them. Values that are 0 to rounding are left out."""
    subject, layout = inputs.subject, inputs.tracked.layout
    products = CurvatureProducts(
        subject.model,
        subject.objective,
        subject.encoded,
        layout,
        config.curvature,
        inputs.token_budget,
        inputs.progress,
    ).subset(config.documents, config.seed)
    like = products.like()
    found = arnoldi(layout, products, config.iterations, seed=config.seed, like=like).largest(config.top)
    sizes = found.values.abs()
    eps = max(torch.finfo(value.dtype).eps for value in like.values())
    count = int((sizes > layout.size**0.5 * eps * sizes.max()).sum())
    if count == 0:
        raise NumericalError(
            f"arnoldi: expected a {config.curvature} matrix with an eigenvalue other than 0, got none; the documents' "
            "loss does not depend on these parameters to second order"
        )
    kept = found.largest(count)
    kept_note = f"{count} eigenvalues from {float(kept.values[0]):.4g} to {float(kept.values[-1]):.4g} were kept"
    notes = [kept_note, *kept.notes]
    rough = int((kept.residuals > TOLERANCE * kept.values.abs()).sum())
    if rough:
        notes.append(f"{rough} of them have not converged in {config.iterations} iterations; raise `iterations`")
    negative = int((kept.values < 0).sum())
    if negative:
        notes.append(f"{negative} of them are negative: the Hessian is indefinite; consider curvature = 'ggn'")
    return kept, notes


def _projected(inputs: MethodInputs, pairs: Eigenpairs, damping: float, query: dict[str, Tensor]) -> dict[str, Tensor]:
    """``P^T (Lambda + damping)^-1 P grad m`` by parameter."""
    layout = inputs.tracked.layout
    rows = as_rows(layout, query, pairs.vectors.dtype)
    inverse = 1 / (pairs.values + damping * pairs.values.sign())
    return as_named(layout, (rows @ pairs.vectors.T * inverse.to(rows)) @ pairs.vectors, query)


def needs(config: Config, work: Work) -> Need:
    """Three passes for an iteration, of which there are no more than parameters, and one for the scores."""
    steps = min(config.iterations, work.parameters)
    part = min(1.0, (config.documents or work.documents) / work.documents)
    return Need(1 + 3 * steps * part, memory_bytes=4 * work.parameters * steps)


@register(CARD, Config, needs=needs)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document; one row for the mean of the queries, or one per query."""
    query = inputs.query_gradients(inputs.tracked.layout, mean=config.queries == "mean")
    pairs, notes = _eigenpairs(inputs, config)
    lifted = _projected(inputs, pairs, config.damping, query)
    return inputs.scored(CARD, -inputs.products(lifted, inputs.subject.encoded).dots, notes=notes)
