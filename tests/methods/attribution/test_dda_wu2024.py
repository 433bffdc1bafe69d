"""DDA against plain loops over start and checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rootward.capture.inputs import tracked_of
from rootward.core.errors import InputError
from rootward.subject.subject import Subject
from tests.methods.contract import World, close, contrast, loss, naive_gradients, naive_queries, run


def influence(subject: Subject, behaviour: Any, names: tuple[str, ...], normalise: str) -> Tensor:
    queries = naive_queries(subject, behaviour, names)
    documents = naive_gradients(subject, subject.encoded, names)
    found = -queries @ documents.T
    if normalise == "both":
        found = found / queries.norm(dim=1, keepdim=True) / documents.norm(dim=1)
    return found


@pytest.mark.parametrize("normalise", ["none", "both"])
@pytest.mark.parametrize("checkpoints", ["all", "final"])
def test_against_plain_loops(world: World, normalise: str, checkpoints: str):
    subject, asked = world.subject(), contrast()
    names = tracked_of(subject).layout.names
    with subject.at_start():
        start = influence(subject, asked, names, normalise)
    found = []
    for index in range(2):
        with subject.at_checkpoint(index):
            found.append(influence(subject, asked, names, normalise))
    smooth = torch.stack(found).mean(0) if checkpoints == "all" else influence(subject, asked, names, normalise)
    for beta in (1.0, 0.3):
        scores = run(subject, asked, "dda", normalise=normalise, checkpoints=checkpoints, beta=beta)
        close(scores.values, smooth - beta * start)
        assert scores.unit == ("cosine" if normalise == "both" else "measurement per unit of loss weight")
        assert scores.notes[1] == f"less {beta:g} x the start of training"


def test_without_start_and_smoothing_it_is_the_gradient_product(world: World):
    subject = world.subject()
    for behaviour in (contrast(), loss()):
        plain = run(subject, behaviour, "gradient_dot")
        close(run(subject, behaviour, "dda", beta=0.0, checkpoints="final").values, plain.values)
    close(
        run(subject, contrast(), "dda", beta=0.0, checkpoints="final", normalise="both").values,
        run(subject, contrast(), "gradient_cosine").values,
    )


def test_a_model_that_did_not_move_has_learnt_nothing(world: World):
    subject = world.subject(checkpoints=(world.base, world.base))
    found = run(subject, contrast(), "dda")
    assert np.abs(run(subject, contrast(), "dda", beta=0.0).values).max() > 1
    np.testing.assert_allclose(found.values, 0, atol=1e-6)


def test_what_is_missing_is_named(world: World):
    with pytest.raises(InputError, match="checkpoints = 'all': the subject has none"):
        run(world.subject(checkpoints=()), contrast(), "dda")
    with pytest.raises(InputError, match="start of .* training is not known"):
        run(world.subject(base=None), contrast(), "dda")
    assert run(world.subject(base=None), contrast(), "dda", beta=0.0).values.shape == (3, 8)
