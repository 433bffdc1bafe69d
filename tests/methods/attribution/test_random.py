"""The null control is uniform, and belongs to the document, not to its place."""

from __future__ import annotations

import numpy as np
from scipy import stats

from rootward.verification.stats import auroc
from tests.methods.contract import World, contrast, run

ROWS = [{"text": f"document {n}"} for n in range(60)]


def test_uniform_over_documents_and_seeds(world: World):
    subject = world.subject(ROWS)
    values = np.stack([run(subject, contrast(), "random", seed=s).values[0] for s in range(40)])
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values.ravel(), "uniform").pvalue > 0.01
    # seeds are independent of one another: no document is lucky
    assert stats.kstest(np.sqrt(12 * 40) * (values.mean(0) - 0.5), "norm").pvalue > 0.01


def test_no_better_than_chance_at_finding_any_set(world: World):
    subject = world.subject(ROWS)
    truth = np.arange(60) < 15
    found = [auroc(run(subject, contrast(), "random", seed=s).mean, truth, resamples=1).value for s in range(60)]
    spread = np.sqrt(61 / (12 * 15 * 45))  # of the AUROC under the null
    assert abs(np.mean(found) - 0.5) < 3 * spread / np.sqrt(60)
    assert 0.7 * spread < np.std(found) < 1.3 * spread


def test_another_seed_is_another_order(world: World):
    subject = world.subject(ROWS)
    first, other = (run(subject, contrast(), "random", seed=s) for s in (0, 1))
    assert first.top(5) != other.top(5)
