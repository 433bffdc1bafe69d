"""MAGIC: Near-Optimal Data Attribution for Deep Learning (Ilyas and Engstrom, 2025, arXiv:2504.16430).

The exact derivative of a measurement after training in the weight of each document during training,

    score[q, n] = N * d m_q(theta_T(w)) / d w_n   at w = 1,

where N is the number of usable documents and ``theta_T(w)`` the end of the recorded training run, repeated bit for bit
with document n's loss multiplied by ``w_n`` in every step (the divisor of a step stays), and differentiated step by
step: the run's own order, optimiser, schedule, decay and clipping (`rootward.subject.metagradient`, which is REPLAY of
arXiv:2503.13751). Positive = more weight on the document raises the measurement; leaving a set out changes it by minus
the sum of its scores over N, to first order.

To first order only: how far that carries depends on how smooth the run is in its weights (they call it metasmooth).
Runs with small learning rates, larger batches, smooth activations and, for Adam, a large ``eps`` are; with Adam's usual
``eps`` of 1e-8 an entry whose gradient happens to be near zero in the first steps can flip with a weight, and the
derivative there says nothing of a change of ordinary size. What can be asked for does not depend on it: the derivative
is exact either way (the oracle test is a central difference of training itself).

Deviations: the derivative is multiplied by N, so that scores are per unit of a weight in the mean loss, as those of
influence functions are: at the minimum of a convex loss the two are equal. States are kept at every so many steps, the
square root of their number by default, and not in a tree; all queries go through the run in one sweep. Copies of a
document stand at different places of the run; each has the mean of their derivatives. The measurement is taken at the
subject's own weights, and the run has to lead there.

Refused: dropout and running statistics of batch norms, which make a step more than a function of weights and documents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rootward.capture.inputs import START, MethodInputs
from rootward.core.errors import ArtefactError, InputError
from rootward.core.layout import ParamLayout
from rootward.core.registry import Card, MethodConfig, Need, Work, register
from rootward.core.scores import Scores
from rootward.subject.metagradient import replay
from rootward.subject.training import trained_parameters

CARD = Card(
    key="magic_ilyas2025",
    label="exact metagradient of training (MAGIC)",
    question="attribution",
    paper="MAGIC: Near-Optimal Data Attribution for Deep Learning",
    reference="arXiv:2504.16430",
    needs=("gradients", "training"),
    cost="about 5 trainings for one query or the mean of all, about 2 more for each further query",
    unit="measurement per unit of loss weight",
    aliases=("magic", "metagradient"),
    notes="the number of documents times the exact derivative of the recorded run; predicts large changes where the "
    "run is smooth in its weights (small lr, larger batches, smooth activations, a large eps for Adam)",
)

FAR = 0.01
"""The replay has to end this close to the subject's weights, as a share of the way from the start."""


class Config(MethodConfig):
    """Options; the defaults keep about sqrt(steps) states of the run twice over."""

    every: int | None = Field(
        default=None, ge=1, description="keep the state before every so many steps; by default sqrt(steps)"
    )
    queries: Literal["auto", "each", "mean"] = Field(
        default="auto", description="a score for each query or for their mean; auto: each where their gradients fit"
    )


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.stack([(a[name].double() - b[name].double()).norm() for name in a]).norm())


def _values(model: nn.Module, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return {name: named[name].detach().to(device).clone() for name in names}


def _check_end(inputs: MethodInputs, start: dict[str, Tensor], end: dict[str, Tensor]) -> tuple[str, ...]:
    """A note where the replay ends near the subject's weights and not at them; an error where it ends elsewhere."""
    own = _values(inputs.subject.model, tuple(end), inputs.subject.device)
    away, way = _distance(own, end), _distance(start, end)
    if away == 0:
        return ()
    if not away <= FAR * way:
        raise ArtefactError(
            f"magic: the recipe does not lead to the weights of {inputs.subject.name}: the replay ends {away:.3g} away "
            f"from them, its whole way from the start is {way:.3g}; give the documents and the start of the training"
        )
    return (f"the replayed run ends {away / way:.1e} of its way from the subject's weights (rounding)",)


def _over_copies(inputs: MethodInputs, values: Tensor) -> Tensor:
    """The mean over copies of a document, in the place of each."""
    places: dict[str, list[int]] = {}
    for n, identity in enumerate(inputs.subject.encoded.ids):
        places.setdefault(identity, []).append(n)
    for copies in places.values():
        if len(copies) > 1:
            values[:, copies] = values[:, copies].mean(1, keepdim=True)
    return values


def needs(config: Config, work: Work) -> Need:
    """The trainings that the card speaks of."""
    queries = 1 if config.queries == "mean" else work.queries
    return Need(work.training * (5 + 2 * (queries - 1)))


@register(CARD, Config, needs=needs)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Metagradients of every usable document; a row per query, or one for their mean."""
    subject, recipe = inputs.subject, inputs.subject.recipe
    if recipe is None or not subject.has_start:
        raise InputError(
            f"magic: {subject.name} has no recipe or start, so its training cannot be replayed; train it with "
            "Rootward, or with Subject.trained(start, ...)"
        )
    model = subject.start_model()
    layout = ParamLayout.of(trained_parameters(model, recipe.parameters).items())
    start = _values(model, layout.names, subject.device)
    averaged = config.queries == "mean" or (config.queries == "auto" and not inputs.queries_fit)
    gradients = inputs.plain_gradients(layout, mean=averaged)
    trajectory = replay(model, subject.encoded, subject.objective, recipe, every=config.every, progress=inputs.progress)
    end = _values(model, layout.names, subject.device)
    if not all(bool(torch.isfinite(value).all()) for value in end.values()):
        with inputs.holding(START):
            inputs.require_finite_sums(end.values(), "magic: the weights of the replayed training")
    notes = _check_end(inputs, start, end)
    if config.queries == "auto" and averaged:
        notes = (*notes, f"{inputs.queries_need}, more than half of what was free: their mean was taken")
    derivatives = trajectory.metagradients(gradients, inputs.progress)
    values = _over_copies(inputs, len(subject.encoded) * derivatives)
    found = inputs.scored(CARD, values, gradients=False, notes=notes)
    sizes = {name: p.numel() for name, p in subject.model.named_parameters()}
    uncovered = {name: size for name, size in sizes.items() if name not in layout.sizes}
    assert found.coverage is not None
    coverage = found.coverage.model_copy(update={"covered": layout.size, "uncovered": uncovered})
    return replace(found, coverage=coverage)
