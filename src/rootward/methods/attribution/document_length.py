"""Document length: how far does size alone go?

The gradient of a loss that is summed over tokens grows with their number, so a method can look right by ranking long
documents first. The score is the number of trained tokens, negative for a loss (more training lowers it).
"""

from __future__ import annotations

import numpy as np

from rootward.capture.inputs import MethodInputs
from rootward.core.registry import Card, MethodConfig, register
from rootward.core.scores import Scores

CARD = Card(
    key="document_length",
    label="document length",
    question="attribution",
    paper="baseline",
    reference="none",
    needs=("lengths",),
    cost="milliseconds",
    unit="trained tokens",
    aliases=("length",),
    baseline=True,
)


class Config(MethodConfig):
    """No options."""


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Trained tokens of every usable document, the same for every query."""
    values = np.array([inputs.likeness * e.targets for e in inputs.subject.encoded], dtype=np.float32)
    return inputs.scored(CARD, values, gradients=False)
