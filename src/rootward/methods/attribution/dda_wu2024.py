"""DDA: Enhancing Training Data Attribution for LLMs with Fitting Error Consideration (Wu et al., arXiv:2410.01285).

Debias and denoise attribution: two corrections of an influence score I for fine-tuned models, which are never at the
minimum that influence functions assume. What the base model made of document and query before it saw the data is taken
out (debias), and what is left is smoothed over the course of training, as documents are fitted to different degrees at
any one time (denoise):

    score[q, n] = mean_c I[q, n](theta_c) - beta I[q, n](theta_0)        I = - <grad m_q, grad L_n>

over the checkpoints c of the training, theta_0 being its start. Positive = the document raises the measurement by more
than it would have before training. Such a difference need not have the sign of the effect: a document that has been
learnt has a small gradient, and with it a small I, at the end. ``normalise = "both"`` takes cosines for I, whose size
does not shrink as the loss does. ``beta = 0`` denoises only, ``checkpoints = "final"`` debiases only.

Deviations: I is the inner product of gradients (no inverse curvature), and the measurement any one, with its contrast
of two answers in place of the contrast of two models that were tuned further on right and wrong ones. The smoothing is
the plain mean over checkpoints.

Exact when: with ``beta = 0`` and one checkpoint, the gradient dot product there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.inputs import START, MethodInputs
from rootward.core.errors import InputError
from rootward.core.registry import Card, MethodConfig, Tuned, register
from rootward.core.scores import Scores

CARD = Card(
    key="dda_wu2024",
    label="debiased and denoised gradient product (DDA)",
    question="attribution",
    paper="Enhancing Training Data Attribution for Large Language Models with Fitting Error Consideration",
    reference="arXiv:2410.01285",
    needs=("gradients", "training"),
    cost="1 forward+backward per document for the start and each checkpoint, without the weight gradients",
    unit="measurement per unit of loss weight",
    aliases=("dda",),
    notes="a difference from the start of training: of documents that have been learnt its sign is not the effect's",
)


class Config(MethodConfig):
    """Options; the defaults take the start out of the mean over all checkpoints."""

    TUNED: ClassVar = Tuned("beta", (0.0, 0.1, 0.3, 1.0))
    beta: float = Field(default=1.0, ge=0, description="how much of the influence at the start is taken out")
    checkpoints: Literal["all", "final"] = Field(
        default="all", description="all: averaged over the checkpoints kept; final: the final weights alone"
    )
    normalise: Literal["none", "both"] = Field(default="none", description="both: cosines in place of products")


def _influence(inputs: MethodInputs, place: int | None, config: Config) -> Tensor:
    """``I[q, n]`` at the start, at a checkpoint, or (None) at the final weights."""
    cosine = config.normalise == "both"
    layout = inputs.tracked.layout  # measured at the subject's own weights, before others take their place
    with inputs.holding(place):
        queries = inputs.query_gradients(layout, mean=not inputs.queries_fit)
        found = inputs.products(queries, inputs.subject.encoded, norms=cosine)
    if not cosine:
        return -found.dots
    assert found.squared is not None
    lengths = torch.stack([g.flatten(1).double().square().sum(1) for g in queries.values()]).sum(0).sqrt().cpu()
    scale = lengths.unsqueeze(1) * found.squared.sqrt()
    return -found.dots / torch.where(scale == 0, 1.0, scale)


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document; a row per query, or one for their mean where their gradients do not fit."""
    subject = inputs.subject
    if config.beta and not subject.has_start:
        raise InputError(
            f"dda: the start of {subject.name}'s training is not known; give it with start = ..., or use beta = 0"
        )
    places: list[int | None] = [None]
    if config.checkpoints == "all":
        places = list(range(len(inputs.checkpoint_rates("checkpoints = 'all'"))))
    total = torch.stack([_influence(inputs, place, config) for place in places]).mean(0)
    notes = [f"mean over {len(places)} checkpoints" if config.checkpoints == "all" else "at the final weights"]
    if config.beta:
        total = total - config.beta * _influence(inputs, START, config)
        notes.append(f"less {config.beta:g} x the start of training")
    if not inputs.queries_fit:
        notes.append(f"{inputs.queries_need}, more than half of what was free: their mean was taken")
    unit = "cosine" if config.normalise == "both" else None
    return inputs.scored(CARD, total, unit=unit, notes=notes)
