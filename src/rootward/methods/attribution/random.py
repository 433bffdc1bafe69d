"""Random order: the null control that every ranking stands beside.

The score of a document is uniform in [0, 1), drawn from the seed and the document's own hash, so that copies of a
document score alike and the order of the file does not matter.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from rootward.capture.inputs import MethodInputs
from rootward.core.hashing import digest
from rootward.core.registry import Card, MethodConfig, register
from rootward.core.scores import Scores

CARD = Card(
    key="random",
    label="random order",
    question="attribution",
    paper="baseline",
    reference="none",
    needs=("nothing",),
    cost="milliseconds",
    unit="uniform",
    baseline=True,
)


class Config(MethodConfig):
    """The seed of the draw."""

    seed: int = Field(default=0, ge=0, description="of the order")


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """One uniform number per document."""
    values = [int(digest(f"{config.seed}|{e.id}")[:13], 16) / 16**13 for e in inputs.subject.encoded]
    return inputs.scored(CARD, np.array(values, dtype=np.float32), gradients=False)
