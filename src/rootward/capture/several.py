"""Several behaviours at once: one fit of a curvature and one pass over the documents for the queries of all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rootward.capture.finite import without_not_finite
from rootward.capture.inputs import MethodInputs
from rootward.core import registry
from rootward.core.errors import InputError
from rootward.core.memory import peak_memory_mb
from rootward.core.progress import Progress, silent
from rootward.core.records import Cost
from rootward.core.scores import Scores
from rootward.subject.arguments import check_asked, check_options
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject


def attribute_many(
    subject: Subject,
    behaviours: Sequence[Behaviour],
    method: str = "gradient_dot",
    *,
    options: Mapping[str, Any] | None = None,
    token_budget: int | None = None,
    progress: Progress = silent,
    skip_not_finite: bool = False,
) -> list[Scores]:
    """`attribute` of several behaviours, for little more than the price of one.

    Methods whose card says ``several`` (those that precondition and multiply query gradients) take the queries of all
    behaviours through the same passes: with ``queries = "mean"`` a row for each behaviour. The others run once for
    each, and share what was fitted.

    Args:
        subject: the model and its documents.
        behaviours: what is asked about, in any kinds and with different names.
        method: a key, alias or preset from `rootward methods`.
        options: the method's options, the same for all.
        token_budget: padded tokens per batch; None measures what fits.
        progress: told of every batch.
        skip_not_finite: as in `attribute`.

    Returns:
        The scores of each behaviour, in their order, as `attribute` gives them one by one. The cost is that of all
        together where they share the passes.

    Raises:
        InputError: no behaviours, two of one name, unknown method or option.
    """
    chosen, preset = registry.get(method)
    check_options(options)
    config = chosen.configure({**preset, **(options or {})}, method)
    if not behaviours:
        raise InputError("behaviours: expected at least one, got none")
    for behaviour in behaviours:
        check_asked(subject, behaviour)
    names = [behaviour.name for behaviour in behaviours]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"behaviours: expected different names, got {twice[0]!r} twice; give one another name")
    subject = without_not_finite(subject, token_budget, progress) if skip_not_finite else subject
    inputs = MethodInputs(subject, behaviours[0], token_budget, progress=progress)
    if chosen.card.several:
        together = inputs.about(*behaviours)
        return together.apart(timed(chosen, config, together))
    return [timed(chosen, config, inputs.about(behaviour)) for behaviour in behaviours]


def timed(chosen: registry.Method, config: registry.MethodConfig, inputs: MethodInputs) -> Scores:
    """A method's scores, with what they cost."""
    start = time.perf_counter()
    scores: Scores = chosen.run(inputs, config)
    cost = Cost(seconds=time.perf_counter() - start, peak_memory_mb=peak_memory_mb())
    return replace(scores, cost=cost)
