"""The loss baseline against a loop over documents, at the end and at the start of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rootward.core.errors import InputError
from tests.methods.contract import World, contrast, loss, run


def _naive(subject) -> np.ndarray:
    values = []
    with torch.no_grad():
        for example in subject.encoded:
            batch = subject.objective.collate([example])
            values.append(float(subject.objective.losses(subject.model, batch)[0]))
    return np.array(values)


@pytest.mark.parametrize("method", ["loss", "loss_at_start"])
def test_loss_is_that_of_each_document_alone(world: World, method: str):
    subject = world.subject()
    found = run(subject, contrast(), method).values[0]
    if method == "loss":
        expected = _naive(subject)
    else:
        with subject.at_start():
            expected = _naive(subject)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(run(subject, loss(), method).values[0], -expected, rtol=1e-5)


def test_the_two_differ_and_a_subject_without_a_start_is_told(world: World):
    subject = world.subject()
    assert not np.allclose(run(subject, contrast(), "loss").values, run(subject, contrast(), "loss_at_start").values)
    with pytest.raises(InputError, match="retrain"):
        run(world.subject(recipe=None, base=None, checkpoints=()), contrast(), "loss_at_start")
