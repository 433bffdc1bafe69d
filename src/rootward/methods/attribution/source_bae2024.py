"""SOURCE: Training Data Attribution via Approximate Unrolled Differentiation (Bae et al., 2024, arXiv:2405.12186).

Influence functions assume that training has converged. SOURCE follows the run instead, in segments l in which the
curvature G_l and the documents' gradients are taken as constant. With learning rates that sum up to t_l, a change of
the gradient in segment l is answered by ``F(G_l) = (1 - exp(-t_l G_l)) / G_l`` and then shrunk by ``exp(-t_k G_k)``
in each segment k that follows (their section 3). Backwards from the measurement at the end of training:

    score[q, n] = - sum_l <F(G_l) x_l, grad L_n(theta_l)>,      x_last = grad m_q,    x_(l-1) = exp(-t_l G_l) x_l

Positive = training more on the document raises the measurement; removing it changes it by about ``-score / number of
documents``. No damping is needed: where the curvature is small, F is t_l. G_l is EK-FAC at each checkpoint that the
training kept, which stands for the steps around it (to the middle between it and its neighbours).

AdamW: the paper's derivation is for SGD. Adam takes plain steps in rescaled coordinates (`capture.rescaling`), so the
same formulas are used there, with its second moments at each checkpoint. Momentum counts as a larger rate, weight
decay as an eigenvalue more; clipping and changes of the optimiser's state by a document are left out.

Deviations: the paper averages curvature and gradients over several checkpoints of a segment (3 segments of 2), here
each checkpoint is a segment; losses are sums over a document's tokens, so for a recipe that divides by tokens their
mean number goes into t.

Exact when: full batches of plain SGD on a quadratic, in the limit of small rates (the oracle test).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.curvatures import FitOptions, fitted, kept_in
from rootward.capture.inputs import MethodInputs
from rootward.capture.rescaling import Scale, adam_scales, rescaled
from rootward.core.errors import InputError
from rootward.core.registry import Card, Need, Tuned, Work, register
from rootward.core.scores import Scores
from rootward.curvature.base import DEFAULT

CARD = Card(
    key="source_bae2024",
    label="SOURCE (approximate unrolling)",
    question="attribution",
    paper="Training Data Attribution via Approximate Unrolled Differentiation",
    reference="arXiv:2405.12186",
    needs=("gradients", "training"),
    cost="EK-FAC influence once per checkpoint; needs recipe and checkpoints (AdamW: with the optimiser's state)",
    unit="measurement per unit of loss weight",
    aliases=("source", "approximate_unrolling"),
    several=True,
)


class Config(FitOptions):
    """Options. What begins with ``fit_`` decides how the factors are made."""

    TUNED: ClassVar = Tuned("rate", (0.1, 0.3, 1.0, 3.0, 10.0))
    curvature: Literal["ekfac", "kfac", "diagonal"] = Field(default="ekfac", description="of each segment")
    queries: Literal["mean", "each"] = Field(
        default="mean", description="one score for the mean of the queries, or a score for each"
    )
    rate: float = Field(default=1.0, gt=0, description="factor of the learning rates that the recipe states")
    adam: Literal["auto", "rescale", "ignore"] = Field(
        default="auto", description="AdamW's second moments as rescaled coordinates; auto: where it was the optimiser"
    )
    folder: str | None = Field(default=None, description="keep each checkpoint's curvature in a folder below this one")


@dataclass(frozen=True)
class Segment:
    """A checkpoint's number and ``time``: the learning rates of the steps that it stands for, summed up."""

    checkpoint: int
    time: float


def segments(inputs: MethodInputs, config: Config) -> list[Segment]:
    """The segments of the run, in the order of training.

    Raises `InputError` where the recipe or checkpoints are not known.
    """
    subject = inputs.subject
    if subject.recipe is None or not subject.checkpoints:
        missing = "recipe" if subject.recipe is None else "checkpoints"
        raise InputError(
            f"source_bae2024: {subject.name} has no {missing}; train it here with `checkpoints = 3` in the recipe, or "
            "use ekfac_grosse2023"
        )
    inputs.checkpoint_rates("source_bae2024")  # as many checkpoints as the recipe makes of these documents
    recipe = subject.recipe
    total = recipe.steps(len(subject.encoded))
    steps = recipe.checkpoint_steps(total)[: len(subject.checkpoints)]
    ends = [round((a + b) / 2) for a, b in pairwise(steps)] + [steps[-1]]
    starts = [0, *ends[:-1]]
    return [
        Segment(number, inputs.training_time(start, end) * config.rate)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _scales(inputs: MethodInputs, config: Config, checkpoint: int) -> dict[str, Scale] | None:
    """Adam's coordinates at a checkpoint; None for plain ones."""
    recipe = inputs.subject.recipe
    assert recipe is not None
    if config.adam == "ignore" or (config.adam == "auto" and recipe.optimiser != "adamw"):
        return None
    moments = inputs.subject.moments(checkpoint)
    if moments is None:
        raise InputError(
            f"source_bae2024: checkpoint {checkpoint} was kept without the optimiser's state; train again, or set "
            "adam = 'ignore' for plain coordinates"
        )
    return adam_scales(inputs.tracked.layout, moments)


def needs(config: Config, work: Work) -> Need:
    """At each checkpoint the fit and the pass for the scores."""
    fit = 2 if config.curvature == "ekfac" else 1
    return Need((fit + 1) * max(1, work.checkpoints))


@register(CARD, Config, needs=needs)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document; one row for the mean of the queries, or one per query."""
    plan, layout = segments(inputs, config), inputs.tracked.layout
    recipe = inputs.subject.recipe
    assert recipe is not None
    divisor, decay = inputs.per_document(), recipe.weight_decay
    queries: dict[str, Tensor] = inputs.query_gradients(layout, mean=config.queries == "mean")
    total: Tensor | None = None
    notes: list[str] = []
    for segment in reversed(plan):
        scales = _scales(inputs, config, segment.checkpoint)
        with inputs.holding(segment.checkpoint):
            folder = kept_in(config.folder, segment.checkpoint)
            fit = fitted(inputs, config.fit_config(config.curvature), DEFAULT, folder, scales)
            notes.append(f"checkpoint {segment.checkpoint}, time {segment.time:.3g}: {fit.record.note}")

            def kept(eigenvalues: Tensor, time: float = segment.time) -> Tensor:
                return torch.exp(-time * (eigenvalues / divisor + decay))

            def answered(eigenvalues: Tensor, time: float = segment.time) -> Tensor:
                rate = eigenvalues / divisor + decay
                whole = -torch.expm1(-time * rate) / torch.where(rate > 0, rate, 1.0)
                return torch.where(rate * time > 1e-12, whole, time) / divisor

            inside = queries if scales is None else rescaled(layout, queries, scales)
            answer = fit.curvature.function(inside, answered)
            queries = fit.curvature.function(inside, kept)
            if scales is not None:
                answer = rescaled(layout, answer, scales)
                queries = rescaled(layout, queries, scales, -1.0)
            part = -inputs.products(answer, inputs.subject.encoded).dots
        total = part if total is None else total + part
    assert total is not None
    return inputs.scored(CARD, total, notes=notes[::-1])
