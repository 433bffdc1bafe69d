"""Documents whose loss or gradient is not finite: found one by one, so that the others can be used without them."""

from __future__ import annotations

import torch

from rootward.capture.run import run_pass
from rootward.capture.sinks import Losses, gradient_norms
from rootward.capture.sites import Tracked, track
from rootward.core.progress import Progress, silent
from rootward.subject.encode import Example
from rootward.subject.subject import Subject

LOSS = "the loss is not finite"
GRADIENT = "the gradient is not finite"


def without_not_finite(subject: Subject, token_budget: int | None = None, progress: Progress = silent) -> Subject:
    """The subject without the documents whose loss, or whose gradient's squared norm, is not finite.

    Two passes over the documents with the model's present weights: a forward pass, and for what is left a forward and
    backward pass over the parameters to attribute. At other weights (a checkpoint's) further documents may fail, which
    is then an error as it is without this. What is left out is counted in the coverage and has no score: see
    `Subject.without`.

    Raises:
        InputError: no document is left. ArtefactError: see `run_pass`.
    """
    examples = list(subject.encoded)
    losses = Losses(len(examples))
    run_pass(
        subject.model,
        subject.objective,
        examples,
        [losses],
        token_budget=token_budget,
        progress=progress,
        task="losses",
        finite=False,
    )
    subject = subject.without(_bad(losses.losses), LOSS)
    tracked, examples = track(subject.model, subject.parameters), list(subject.encoded)
    return subject.without(_bad(_squares(subject, tracked, examples, token_budget, progress)), GRADIENT)


def _squares(
    subject: Subject, tracked: Tracked, examples: list[Example], token_budget: int | None, progress: Progress
) -> torch.Tensor:
    """Squared norms ``[n]`` over all parameters that have factors at all."""
    sink = gradient_norms(tracked.layout, len(examples), subject.device)
    run_pass(
        subject.model,
        subject.objective,
        examples,
        [sink],
        tracked=tracked,
        token_budget=token_budget,
        progress=progress,
        task="gradients",
        refused=set(),
    )
    assert sink.squared is not None
    return sink.squared


def _bad(values: torch.Tensor) -> list[int]:
    return (~torch.isfinite(values)).nonzero().flatten().tolist()
