"""What every attribution method promises, whatever it computes (see `tests.methods.contract`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from rootward.core import registry
from rootward.core.errors import InputError, NumericalError
from rootward.subject.subject import Subject
from tests.methods.contract import (
    GRADIENT,
    LINEAR,
    NAMES,
    ROWS,
    SIGNED,
    World,
    close,
    column,
    contrast,
    loss,
    run,
    scalar,
)

OWN_WEIGHTS = [n for n in NAMES if not {"start", "all"} & set(registry.get(n)[1].values())]
"""Methods that read the subject's weights and no others."""
FORWARD = [n for n in OWN_WEIGHTS if set(registry.get(n)[0].card.needs) & {"gradients", "activations"}]


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(world: World, name: str):
    subject, asked = world.subject(), contrast()
    whole = run(subject, asked, name, token_budget=10**6)
    for budget in (1, 130):
        close(run(subject, asked, name, token_budget=budget).values, whole.values)
    assert np.ptp(whole.mean) > 0


@pytest.mark.parametrize("name", NAMES)
def test_reordering_documents_permutes_columns(world: World, name: str):
    order = np.random.default_rng(0).permutation(len(ROWS))
    first = run(world.subject(), contrast(), name)
    other = run(world.subject([ROWS[n] for n in order]), contrast(), name)
    assert other.document_ids != first.document_ids
    assert sorted(other.document_ids) == sorted(first.document_ids)
    close(other.aligned(first.document_ids), first.values)


@pytest.mark.parametrize("name", NAMES)
def test_copies_have_the_same_score(world: World, name: str):
    rows = [ROWS[1], *ROWS, {**ROWS[1], "planted": "copy"}]
    own_run = "training" in registry.get(name)[0].card.needs
    found = run(world.trained(rows) if own_run else world.subject(rows), contrast(), name)
    copies = [n for n, i in enumerate(found.document_ids) if i == found.document_ids[0]]
    assert len(copies) == 3
    close(found.values[:, copies], found.values[:, [copies[0]] * 3])
    assert found.coverage is not None
    assert found.coverage.duplicates == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_bytes(world: World, name: str):
    first, second = (run(world.subject(), contrast(), name) for _ in range(2))
    assert first.values.dtype == np.float32
    assert first.values.tobytes() == second.values.tobytes()


@pytest.mark.parametrize(
    ("name", "kind"), [(name, "contrast") for name in NAMES] + [(name, "scalar") for name in GRADIENT]
)
def test_the_model_is_left_as_it_was(world: World, name: str, kind: str):
    model = world.model
    with restored(model):
        model.train()
        model.model.layers[0].eval()
        parameters = list(model.parameters())
        for p in parameters[::3]:
            p.requires_grad_(False)
        parameters[1].grad = torch.ones_like(parameters[1])
        before, state = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
        run(world.subject(), contrast() if kind == "contrast" else scalar(), name)
        assert fingerprint(model) == before
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))


def fingerprint(model: Any) -> list[Any]:
    """Modes, hooks, gradient flags and which gradients there are."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(n, m.training, [len(getattr(m, h)) for h in hooks]) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.grad is None, p._backward_hooks) for n, p in model.named_parameters()],
    ]


@contextmanager
def restored(model: Any) -> Iterator[None]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        yield
    finally:
        model.eval()
        model.load_state_dict(state)
        for p in model.parameters():
            p.requires_grad_(True)
            p.grad = None


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("place", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_broken_weight_is_a_named_error(world: World, name: str, place: str):
    with restored(world.model):
        dict(world.model.named_parameters())[place].data[0, 0] = torch.nan
        with pytest.raises(NumericalError, match=r"documents? .*not finite|not finite.*document \w{16}"):
            run(world.subject(), contrast(), name)


@pytest.mark.parametrize("name", NAMES)
def test_coverage_is_reported(world: World, name: str):
    found = run(world.subject(), contrast(), name).coverage
    assert found is not None
    assert (found.documents, found.used) == (len(ROWS), len(ROWS) - 1)
    assert list(found.dropped.values()) == [1]
    total = sum(p.numel() for p in world.model.parameters())
    assert found.parameters == total
    if name in GRADIENT:
        assert 0 < found.covered <= total
        assert found.covered + sum(found.uncovered.values()) == total
    else:
        assert found.covered == 0


@pytest.mark.parametrize("name", NAMES)
def test_scores_say_what_they_are(world: World, name: str):
    subject, method = world.subject(), registry.get(name)[0]
    found = run(subject, contrast(), name)
    assert found.method == method.card.key
    assert found.behaviour == "good"
    assert found.unit
    assert found.document_ids == subject.encoded.ids
    assert found.rows == subject.encoded.rows
    assert found.goal == "raise"
    assert run(subject, loss(), name).goal == "lower"
    assert found.queries in (("mean",), ("rain", "snow", "sun"))
    assert found.cost.seconds > 0
    assert (found.cost.peak_memory_mb or 0) > 0


@pytest.mark.parametrize("name", LINEAR)
def test_linear_in_the_measurement(world: World, name: str):
    subject = world.subject()
    each = {"queries": "each"} if "queries" in registry.get(name)[0].config.model_fields else {}
    single = run(subject, scalar(), name, **each).values.astype(np.float64)
    mixed = run(subject, scalar(((2.0, -3.0), (0.5, 0.0))), name, **each)
    close(mixed.values, np.array([[2.0, -3.0], [0.5, 0.0]]) @ single, rtol=1e-5)


@pytest.mark.parametrize("name", GRADIENT)
def test_helpful_and_harmful_documents_are_on_their_sides(world: World, name: str):
    subject, options = world.subject(), SIGNED.get(name, {})
    found = run(subject, contrast(), name, **options)
    assert column(subject, found, "helpful")[0] > 0 > column(subject, found, "harmful")[0]
    lowers = run(subject, loss(), name, **options)
    assert column(subject, lowers, "helpful")[0] < 0
    places = {id_: n for n, id_ in enumerate(lowers.top(len(ROWS) - 2))}
    helpful = next(d.id for d in subject.documents if d.meta.get("planted") == "helpful")
    assert places[helpful] < len(ROWS) // 2  # what lowers the loss causes the behaviour: it is at the top


@pytest.mark.parametrize("name", ["bm25", "representation_cosine", "document_length"])
def test_baselines_expect_likeness_to_raise_a_contrast_and_to_lower_a_loss(world: World, name: str):
    subject = world.subject()
    close(run(subject, loss(), name).values, -run(subject, contrast(), name).values)


@pytest.mark.parametrize("name", ["bm25", "representation_cosine"])
def test_methods_of_texts_refuse_a_behaviour_without_text(world: World, name: str):
    with pytest.raises(InputError, match=f"{name}: a scalar behaviour has no text"):
        run(world.subject(), scalar(), name)


@pytest.mark.parametrize("name", GRADIENT)
def test_a_behaviour_that_is_wrong_is_refused(world: World, name: str):
    from rootward.subject.behaviour import Behaviour

    subject: Subject = world.subject()
    short = Behaviour.scalar("short", scalar().function or (lambda m: m), ["only one"])
    with pytest.raises(InputError, match="expected 1 values, one per query, got 2"):
        run(subject, short, name)
    constant = Behaviour.scalar("constant", lambda model: torch.ones(1), ["one"])
    with pytest.raises(InputError, match="no attributed parameter"):
        run(subject, constant, name)
    broken = Behaviour.scalar("broken", lambda model: next(iter(model.parameters())).sum() * torch.nan, ["one"])
    with pytest.raises(NumericalError, match="'broken': expected finite values"):
        run(subject, broken, name)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_refused(world: World, name: str):
    with pytest.raises(InputError, match=r"nonsense: .*\(options: "):
        run(world.subject(), contrast(), name, nonsense=1)
