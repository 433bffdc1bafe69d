"""A document's own loss: what surprises the model most.

Documents that teach something new are those that the model, before it was trained on them, did not expect. Where a
habit is the only new thing in the data this finds its documents without any query, and no method that needs a
gradient should be credited for doing the same. ``at = "start"`` takes the loss under the model that training began
from (one forward pass per document), ``"final"`` under the subject itself, where high loss means not learnt.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

from pydantic import Field

from rootward.capture.inputs import MethodInputs
from rootward.capture.sinks import Losses
from rootward.core.registry import Card, MethodConfig, register
from rootward.core.scores import Scores

CARD = Card(
    key="loss",
    label="the document's own loss",
    question="attribution",
    paper="baseline",
    reference="none",
    needs=("activations",),
    cost="1 forward per document",
    unit="nats",
    presets={"loss_at_start": {"at": "start"}},
    baseline=True,
)


class Config(MethodConfig):
    """Under which weights the loss is taken."""

    at: Literal["final", "start"] = Field(
        default="final", description="under the final weights, or those training began from"
    )


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Loss of every usable document in nats, the same for every query."""
    encoded = inputs.subject.encoded
    sink = Losses(len(encoded))
    with inputs.subject.at_start() if config.at == "start" else nullcontext():
        inputs.feed([sink], encoded, "losses")
    note = f"under the weights at the {'start of training' if config.at == 'start' else 'end'}"
    return inputs.scored(CARD, inputs.likeness * sink.losses, gradients=False, notes=(note,))
