"""LESS: Selecting Influential Data for Targeted Instruction Tuning (Xia et al., 2024, arXiv:2402.04333).

Which documents' Adam steps point the way that the measurement asks for? At every checkpoint i, with the moments (m, v)
that the optimiser had there after t steps, a document's gradient g becomes the step that Adam would take on this
document alone,

    Gamma(g) = m' / (sqrt(v') + eps)      m' = (b1 m + (1 - b1) g) / (1 - b1^(t+1))
                                          v' = (b2 v + (1 - b2) g^2) / (1 - b2^(t+1))

and the score is minus the cosine of the projected query gradient with the projected step (their definition 3.1),
summed over checkpoints by their share of the learning rate:

    score[q, n] = - sum_i eta_i cos(P grad m_q(theta_i), P Gamma(grad L_n(theta_i)))      sum_i eta_i = 1

``eta_i`` is the mean rate of the steps since the checkpoint before. Positive = a step on the document raises the
measurement. The cosine takes out the length that sums over tokens have; inside Gamma the size of g does matter, and it
is that of a training step on this document alone: the mean over its trained tokens (with the recipe's ``reduction =
"document"`` their sum). The momentum m is the same for all documents, so cosines lie closer together than those of
gradients, and their middle is not zero; ``momentum = false`` leaves it out (m = 0).

Deviations: the moments are corrected for bias and eps stands outside the root, as in AdamW here (their code corrects
neither and adds eps under the root; in the cosine both wash out but for entries near eps). Each query has its own
score; they take the mean over a task's examples and then the best task. Their checkpoints are those of a short warm-up
on 5% of the data, ours those of the subject's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.inputs import MethodInputs
from rootward.capture.projected import query_rows
from rootward.capture.projection import Projection, Sketch
from rootward.capture.sinks import BUFFER, BaseSink
from rootward.capture.sketch import DENSE_ENTRIES, Whole
from rootward.core.block import Block, Factor, widened
from rootward.core.errors import InputError
from rootward.core.registry import Card, MethodConfig, Need, Work, register
from rootward.core.scores import Scores
from rootward.subject.checkpoints import Moments
from rootward.subject.training import step_divisor

CARD = Card(
    key="less_xia2024",
    label="LESS (cosine with Adam's steps)",
    question="attribution",
    paper="LESS: Selecting Influential Data for Targeted Instruction Tuning",
    reference="arXiv:2402.04333",
    needs=("gradients", "training"),
    cost="1 forward+backward per document and checkpoint; every document's gradient is formed, a parameter at a time, "
    "and its projection takes time and memory that grow with `dimension`: most of both, for short documents",
    unit="cosine",
    aliases=("less",),
    notes="needs checkpoints with the optimiser's state (AdamW); meant for adapters, whose gradients are small. "
    "projection = 'sjlt' costs far less than random signs, and so does 'none', without an error, where a batch's whole "
    "gradients fit in memory",
)


FORMED = 4
"""Plain passes that forming every document's gradient and step takes, about."""


class Config(MethodConfig):
    """Options; the paper projects the gradients of all adapters together to 8192 numbers with random signs."""

    dimension: int = Field(default=8192, ge=1, description="numbers that a gradient is projected to")
    projection: Literal["auto", "rademacher", "sjlt", "none"] = Field(
        default="auto",
        description="auto: none where the gradient is no longer than the dimension, rademacher where its matrix can be "
        "kept, else sjlt",
    )
    momentum: bool = Field(default=True, description="whether a document's step has the optimiser's momentum in it")
    seed: int = Field(default=0, ge=0, description="of the projection")


class AdamCosines(BaseSink):
    """``cosines[q, n]`` of projected queries with the projected Adam step on every document.

    Args:
        sketch: the projection.
        queries: projected gradients ``[q, width]``.
        moments: the optimiser's at these weights.
        divisors: what a document's summed loss is divided by, ``[n]``.
        momentum: False leaves the first moment out.
    """

    def __init__(
        self, sketch: Sketch, queries: Tensor, moments: Moments, divisors: Sequence[int], *, momentum: bool = True
    ) -> None:
        super().__init__(sketch.layout)
        self.sketch, self.moments, self.momentum = sketch, moments, momentum
        norms = queries.norm(dim=1, keepdim=True)
        self.queries = queries / torch.where(norms > 0, norms, 1.0)
        self.divisors = torch.tensor(divisors)
        self.cosines = torch.zeros(len(queries), len(divisors), dtype=torch.float64)
        self._rows: Tensor | None = None

    def begin(self, block: Block) -> None:
        """Start the block's rows."""
        super().begin(block)
        self._rows = self.queries.new_zeros(len(block), self.sketch.width)

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Form one parameter's gradients of a few documents at a time, turn them into steps, project them."""
        assert self.block is not None
        assert self._rows is not None
        wide = [widened(factor) for factor in factors]
        count = len(self.block)
        step = max(1, BUFFER // self.layout.sizes[name])
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            gradient = sum((factor.take(part).gradient() for factor in wide[1:]), wide[0].take(part).gradient())
            gradient = gradient.reshape(-1, *self.layout.shape(name))
            sizes = self.divisors[self.block.index[part]].to(gradient)
            update = self.direction(name, gradient / sizes.view(-1, *[1] * (gradient.dim() - 1)))
            rows = self.sketch.project_one(name, update)
            self._rows[part, self.sketch.slices[name]] += rows.to(self._rows)

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """Adam's direction ``[n, *shape]`` from gradients of the step's loss."""
        (b1, b2), count = self.moments.betas, self.moments.step + 1
        first, second = (part.to(gradient) for part in self.moments.values[name])
        kept = b1 * first if self.momentum else torch.zeros_like(first)
        m = (kept + (1 - b1) * gradient) / (1 - b1**count)
        v = (b2 * second + (1 - b2) * gradient.square()) / (1 - b2**count)
        return m / (v.sqrt() + self.moments.eps)

    def end(self) -> None:
        """Write the block's columns; a document without a step has 0."""
        assert self.block is not None
        assert self._rows is not None
        norms = self._rows.norm(dim=1)
        values = (self.queries @ self._rows.T) / torch.where(norms == 0, 1.0, norms)
        self.cosines[:, self.block.index] = values.double().cpu()
        self._rows = None
        super().end()


def _kind(config: Config, parameters: int) -> Literal["rademacher", "sjlt", "none"]:
    """What "auto" stands for with so many parameters."""
    if config.projection != "auto":
        return config.projection
    kept = parameters * config.dimension <= DENSE_ENTRIES
    return "none" if parameters <= config.dimension else "rademacher" if kept else "sjlt"


def _sketch(inputs: MethodInputs, config: Config) -> Sketch:
    layout = inputs.tracked.layout
    kind = _kind(config, layout.size)
    if kind == "none":
        return Projection(layout, None, device=str(inputs.subject.device))
    return Whole(layout, config.dimension, kind, config.seed)


def _all_moments(inputs: MethodInputs) -> list[Moments]:
    """Every checkpoint's, with second moments of all attributed parameters; an `InputError` names what is missing."""
    found: list[Moments] = []
    for index in range(len(inputs.subject.checkpoints)):
        moments = inputs.subject.moments(index)
        if moments is None or not moments.second:
            raise InputError(
                f"less: expected the optimiser's second moments beside checkpoint {index}, found none; train with "
                "optimiser = 'adamw' and checkpoints in Rootward, or use tracin_cp"
            )
        missing = [name for name in inputs.tracked.layout.names if name not in moments.second]
        if missing:
            raise InputError(
                f"less: checkpoint {index} has no second moments of {len(missing)} attributed parameters, first "
                f"{missing[0]}: they were not trained; attribute those that were, with `parameters`"
            )
        found.append(moments)
    return found


def _divisors(inputs: MethodInputs) -> list[int]:
    recipe = inputs.subject.recipe
    examples = inputs.subject.encoded
    return [e.targets if recipe is None else step_divisor([e], recipe) for e in examples]


def _cosines(inputs: MethodInputs, sketch: Sketch, moments: Moments, divisors: Sequence[int], momentum: bool) -> Tensor:
    """At the weights that the model has now."""
    sink = AdamCosines(sketch, query_rows(inputs, sketch), moments, divisors, momentum=momentum)
    inputs.feed([sink], inputs.subject.encoded, "documents")
    return sink.cosines


def needs(config: Config, work: Work) -> Need:
    """At each checkpoint the steps, which are formed, and their projection: 2 P dimension operations for a document.

    A plain pass has about 6 P for each token.
    """
    kind = _kind(config, work.parameters)
    dense = kind == "rademacher"
    one = FORMED + (config.dimension / (3 * work.tokens) if dense else 0)
    entry = 4 * config.dimension if dense else 9 if kind == "sjlt" else 0
    return Need(one * max(1, work.checkpoints), at_most=dense, memory_bytes=entry * work.parameters)


@register(CARD, Config, needs=needs)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document, a row for each query."""
    rates = inputs.checkpoint_rates("less: checkpoints", average=True)
    moments, sketch, divisors = _all_moments(inputs), _sketch(inputs, config), _divisors(inputs)
    total = torch.zeros(())
    for index, rate in enumerate(rates):
        with inputs.holding(index):
            found = _cosines(inputs, sketch, moments[index], divisors, config.momentum)
        total = total - rate / (sum(rates) or 1.0) * found
    return inputs.scored(CARD, total, notes=(f"{len(rates)} checkpoints, {sketch.width} dimensions",))
