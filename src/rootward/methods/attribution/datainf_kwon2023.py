"""DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models.

(Kwon, Wu, Wu, Zou, 2023, arXiv:2310.00902.)

The curvature is the empirical Fisher matrix, one block per parameter l, and the inverse of its mean is replaced by the
mean of its documents' inverses (their equation 5), each of which has a closed form (Sherman-Morrison):

    (G_l + lam_l)^-1 x  ~  1/N sum_n (g_n g_n^T + lam_l)^-1 x
                        =  1/lam_l [ x - 1/N sum_n <g_n, x> / (lam_l + |g_n|^2) g_n ]

with g_n the document's gradient in l and ``lam_l = damping x mean_n |g_n|^2 / d_l`` (d_l entries; 0.1 in the paper).
The score is ``- sum_l <that for the query, g_k>``. Positive = training more on the document raises the measurement.

No gradient is kept: a pass takes norms and products with the queries for every parameter, a second one the weighted sum
above, a third one its products with every document. A parameter that no document's gradient reaches counts nothing.

Deviations: a document's loss is a sum over its tokens; any measurement in place of the mean validation loss.

Exact when: there is one document, or all gradients are alike up to sign. The inverse's error is O(d_l^2) (theorem 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rootward.capture.inputs import MethodInputs, require_finite
from rootward.capture.sinks import BaseSink, Products, WeightedSum
from rootward.core.block import Block, Factor
from rootward.core.layout import ParamLayout
from rootward.core.registry import Card, MethodConfig, Tuned, register
from rootward.core.scores import Scores

CARD = Card(
    key="datainf_kwon2023",
    label="DataInf",
    question="attribution",
    paper="DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models",
    reference="arXiv:2310.00902",
    needs=("gradients",),
    cost="3 forward+backward passes over the documents",
    unit="measurement per unit of loss weight",
    aliases=("datainf",),
    several=True,
)


class Config(MethodConfig):
    """Options; the paper's damping."""

    TUNED: ClassVar = Tuned("damping", (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0))
    damping: float = Field(default=0.1, gt=0, description="over the mean squared gradient per entry, by parameter")
    queries: Literal["mean", "each"] = Field(
        default="mean", description="one score for the mean of the queries, or a score for each"
    )


def _alone(layout: ParamLayout, name: str) -> ParamLayout:
    return ParamLayout((name,), (layout.shape(name),))


class _Apart(BaseSink):
    """Products with the queries and norms, each parameter's kept apart; they share one buffer for gradients."""

    def __init__(self, layout: ParamLayout, query: Mapping[str, Tensor], documents: int) -> None:
        super().__init__(layout)
        self.each = {n: Products(_alone(layout, n), {n: query[n]}, documents, norms=True) for n in layout.names}
        self._shared: Tensor | None = None

    def begin(self, block: Block) -> None:
        for sink in self.each.values():
            sink.begin(block)

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        sink = self.each[name]
        sink._buffer = self._shared
        sink.consume(name, factors)
        self._shared, sink._buffer = sink._buffer, None

    def end(self) -> None:
        for sink in self.each.values():
            sink.end()


def _preconditioned(
    inputs: MethodInputs, query: Mapping[str, Tensor], damping: float
) -> tuple[dict[str, Tensor], list[str]]:
    """The mean of the inverses times every query's gradient ``[q, *shape]``, and what to say of it."""
    layout, count = inputs.tracked.layout, len(inputs.subject.encoded)
    first = _Apart(layout, query, count)
    inputs.feed([first], inputs.subject.encoded, "norms and products")
    found = [torch.stack([sink.squared, *sink.dots]) for sink in first.each.values() if sink.squared is not None]
    require_finite(torch.cat(found).T, inputs.subject.encoded, "gradients")  # before one is taken for no gradient
    lams: dict[str, float] = {}
    sums: dict[str, WeightedSum] = {}
    for name, sink in first.each.items():
        assert sink.squared is not None
        lams[name] = damping * float(sink.squared.mean()) / layout.sizes[name]
        if lams[name] > 0:
            weights = (sink.dots / (lams[name] + sink.squared) / count).T
            sums[name] = WeightedSum(_alone(layout, name), weights.to(query[name].dtype), query[name].dtype)
    if sums:
        inputs.feed(list(sums.values()), inputs.subject.encoded, "weighted sum")
    result = {
        name: (query[name] - sums[name].result()[name].to(query[name])) / lams[name]
        if name in sums
        else torch.zeros_like(query[name])
        for name in layout.names
    }
    dead = [name for name in layout.names if name not in sums]
    if not dead:
        return result, []
    return result, [f"no document's gradient reaches {len(dead)} parameters, first {dead[0]}: they count nothing"]


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document; one row for the mean of the queries, or one per query."""
    query = inputs.query_gradients(inputs.tracked.layout, mean=config.queries == "mean")
    solved, notes = _preconditioned(inputs, query, config.damping)
    return inputs.scored(CARD, -inputs.products(solved, inputs.subject.encoded).dots, notes=notes)
