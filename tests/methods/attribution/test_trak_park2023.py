"""TRAK against its formula on dense gradients by autograd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from rootward.capture.inputs import tracked_of
from rootward.capture.projection import Projection, sketch_dense
from rootward.capture.sketch import Whole
from rootward.capture.store import build_store
from rootward.core.errors import ArtefactError, InputError
from rootward.subject.subject import Subject
from tests.methods.contract import ROWS, World, close, contrast, loss, naive_gradients, naive_queries, run, scalar

BEHAVIOURS = {"contrast": contrast, "loss": loss, "scalar": scalar}


def losses_of(subject: Subject) -> torch.Tensor:
    found = [subject.objective.losses(subject.model, subject.objective.collate([e])) for e in subject.encoded]
    return torch.cat(found).detach()


def naive(
    g: torch.Tensor, q: torch.Tensor, losses: torch.Tensor, tokens: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's formula word for word, with ``Phi^T Phi / N`` as a matrix: the kernel part and Q's diagonal."""
    p = torch.exp(-losses / tokens)
    phi = -g / (1 - p).unsqueeze(1)
    kernel = phi.T @ phi / len(phi)
    kernel = kernel + damping * float(kernel.diagonal().mean()) * torch.eye(len(kernel), dtype=kernel.dtype)
    return q @ torch.linalg.pinv(kernel, rtol=1e-12, hermitian=True) @ phi.T, 1 - p


@pytest.mark.parametrize("kind", BEHAVIOURS)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_without_projection_it_is_the_formula(world: World, kind: str, damping: float):
    subject, behaviour = world.subject(parameters=r"layers\.1\.(mlp\.gate|.*norm)"), BEHAVIOURS[kind]()
    names = tracked_of(subject).layout.names
    assert len(names) >= 3
    tokens = torch.tensor([e.targets for e in subject.encoded])
    documents, queries = naive_gradients(subject, subject.encoded, names), naive_queries(subject, behaviour, names)
    products, doubt = naive(documents, queries, losses_of(subject), tokens, damping)
    found = run(subject, behaviour, "trak", projection="none", damping=damping)
    close(found.values, products * doubt, rtol=1e-5)
    assert any("can fit each of them" in note for note in found.notes) == (damping == 0)


@pytest.mark.parametrize("projection", ["kronecker", "gaussian", "rademacher", "sjlt"])
def test_projected_it_is_the_formula_of_projected_gradients(world: World, projection: str):
    subject = world.subject()
    tracked = tracked_of(subject)
    names, tokens = tracked.layout.names, torch.tensor([e.targets for e in subject.encoded])
    dense = naive_gradients(subject, subject.encoded, names), naive_queries(subject, contrast(), names)
    size = {"rank": 2} if projection == "kronecker" else {"dimension": 30}
    found = run(subject, contrast(), "trak", projection=projection, seed=3, damping=0.5, **size)
    kronecker = Projection(tracked.layout, 2, 3)
    sketch = kronecker if projection == "kronecker" else Whole(tracked.layout, 30, projection, 3)
    rows = [sketch_dense(sketch, tracked.layout.unflatten(part)) for part in dense]
    products, doubt = naive(rows[0], rows[1], losses_of(subject), tokens, 0.5)
    close(found.values, products * doubt, rtol=1e-5)


@pytest.mark.parametrize(
    ("projection", "idle"),
    [("kronecker", "dimension"), ("gaussian", "rank"), ("sjlt", "rank"), ("none", "rank"), ("none", "seed")],
)
def test_options_that_a_projection_does_not_read_are_refused(projection: str, idle: str, world: World):
    with pytest.raises(InputError, match=f"projection = '{projection}' does not read {idle}; leave that out"):
        run(world.subject(), contrast(), "trak", projection=projection, **{idle: 8})


def test_checkpoints_average_the_kernel_part_and_the_weights_apart(world: World):
    subject = world.subject(parameters=r"layers\.1\.mlp\.gate")
    names, tokens = tracked_of(subject).layout.names, torch.tensor([e.targets for e in subject.encoded])
    parts = []
    for k in range(2):
        with subject.at_checkpoint(k):
            g, q = naive_gradients(subject, subject.encoded, names), naive_queries(subject, contrast(), names)
            parts.append(naive(g, q, losses_of(subject), tokens, 0.1))
    expected = (parts[0][0] + parts[1][0]) / 2 * (parts[0][1] + parts[1][1]) / 2
    apart = sum(a * b for a, b in parts) / 2
    found = run(subject, contrast(), "trak_checkpoints", projection="none", damping=0.1).values
    close(found, expected, rtol=1e-5)
    assert not np.allclose(found, apart, rtol=1e-3)


def test_large_damping_ranks_as_the_gradient_product(world: World):
    subject = world.subject()
    found = run(subject, contrast(), "trak", projection="none", damping=1e9).values
    plain = run(subject, contrast(), "gradient_dot").values
    for mine, theirs in zip(found, plain, strict=True):
        assert spearmanr(mine, theirs).statistic == pytest.approx(1)


def test_an_index_gives_what_a_pass_gives(world: World, tmp_path: Path):
    subject = world.subject()
    store = build_store(
        tmp_path / "index", subject.model, subject.objective, subject.encoded, tracked_of(subject),
        subject.fingerprint(), rank=3, seed=5,
    )  # fmt: skip
    stored = run(subject, contrast(), "trak", source="index", index=store, damping=0.1)
    close(stored.values, run(subject, contrast(), "trak", rank=3, seed=5, damping=0.1).values, rtol=1e-4)
    assert "projected to rank 3" in stored.notes[0]
    with pytest.raises(InputError, match="leave out rank"):
        run(subject, contrast(), "trak", source="index", index=store, rank=3)
    with pytest.raises(InputError, match="use checkpoints = 'final'"):
        run(subject, contrast(), "trak_checkpoints", source="index", index=store)
    with pytest.raises(InputError, match="no index was given"):
        run(subject, contrast(), "trak", source="index")
    with pytest.raises(ArtefactError, match="built from something else"):
        run(world.subject(ROWS[:4]), contrast(), "trak", source="index", index=store)
