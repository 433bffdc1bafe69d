"""GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse Projection (Hu et al., 2025).

arXiv:2505.18976. FactGraSS, for matrices: both sides of a gradient are sparsified by a mask before they are
multiplied, and the product of what is left is hashed (a sparse Johnson-Lindenstrauss transform with one entry per
input) to ``dimension`` entries, so that the cost per token does not depend on the matrix's size. Influence is taken
there, a block per parameter:

    score[q, n] = - sum_l g_q,l^T (F_l + lam_l)^-1 g_n,l        F_l = mean_n g_n,l g_n,l^T

with ``lam_l`` a share of the block's mean eigenvalue. Between mask and hash there are ``blow_up`` (4 in the paper)
times as many entries as after it. Positive = training more on the document raises the measurement.

``mask = "random"`` keeps random entries; ``"largest"`` those rows and columns whose gradients are largest in mean
square over the documents (one pass more).

Deviations: their selective mask is learnt so that products with queries are kept, ``"largest"`` is a simple stand-in
for it; what a random mask keeps is scaled up to make inner products unbiased; the default is 256 dimensions per matrix
where theirs is 4,096 for models of billions of parameters.

Exact when: masks keep everything and ``dimension`` is no less than a parameter's entries, which are not hashed then:
the block-diagonal empirical Fisher matrix.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rootward.capture.inputs import MethodInputs
from rootward.capture.projected import document_rows, query_rows, squared_gradients
from rootward.capture.projection import Sides
from rootward.capture.sketch import Masked
from rootward.core.registry import Card, MethodConfig, Tuned, register
from rootward.core.scores import Scores
from rootward.curvature.base import Damping
from rootward.curvature.projected import ProjectedCurvature

CARD = Card(
    key="grass_hu2025",
    label="GraSS",
    question="attribution",
    paper="GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse Projection",
    reference="arXiv:2505.18976",
    needs=("gradients",),
    cost="1 forward+backward per document; projected rows in memory",
    unit="measurement per unit of loss weight",
    aliases=("grass", "factgrass"),
    presets={"grass_largest": {"mask": "largest"}},
)


class Config(MethodConfig):
    """Options."""

    TUNED: ClassVar = Tuned("damping", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0))
    dimension: int = Field(default=256, ge=1, description="dimensions for each parameter")
    blow_up: int = Field(default=4, ge=1, description="entries between mask and hash over the dimensions")
    mask: Literal["random", "largest"] = Field(
        default="random", description="random, or the rows and columns with the largest mean squares"
    )
    damping: float = Field(default=0.1, ge=0, description="over the mean eigenvalue of each parameter's block")
    seed: int = Field(default=0, ge=0, description="of mask and signs")


def _largest(inputs: MethodInputs, masked: Masked) -> dict[str, Sides]:
    """The rows and columns of every parameter with the largest squared gradients, as many as a mask keeps."""
    found: dict[str, Sides] = {}
    for name, squares in squared_gradients(inputs).items():
        rows = squares.reshape(1, -1) if squares.dim() == 1 else squares.flatten(1)
        left, right = masked.masks[name]
        found[name] = (
            None if left is None else rows.sum(1).topk(len(left)).indices.cpu(),
            None if right is None else rows.sum(0).topk(len(right)).indices.cpu(),
        )
    return found


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document, a row for each query."""
    sketch = Masked(inputs.tracked.layout, config.dimension, config.blow_up, config.seed)
    if config.mask == "largest":
        chosen = _largest(inputs, sketch)
        sketch = Masked(inputs.tracked.layout, config.dimension, config.blow_up, config.seed, chosen)
    rows, queries = document_rows(inputs, sketch).rows, query_rows(inputs, sketch)
    curvature = ProjectedCurvature.of(rows, list(sketch.slices.values()), Damping(config.damping))
    values = -curvature.apply(queries) @ rows.T
    return inputs.scored(CARD, values, notes=(f"{config.mask} masks, {sketch.width} dimensions", *curvature.notes))
