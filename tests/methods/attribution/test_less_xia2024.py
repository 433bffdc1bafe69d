"""LESS against plain loops: one document at a time, Adam's own step, dense projections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rootward.api import attribute
from rootward.capture.inputs import MethodInputs, tracked_of
from rootward.capture.sketch import Whole
from rootward.core.errors import InputError
from rootward.core.layout import ParamLayout
from rootward.methods.attribution.less_xia2024 import AdamCosines
from rootward.subject.behaviour import Behaviour
from rootward.subject.checkpoints import Checkpoint, Moments
from rootward.subject.objectives import CausalLM, Regression
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from tests.methods.contract import ROWS, World, close, contrast, loss, naive_queries, run
from tests.subject.small import byte_tokenizer
from tests.subject.test_checkpoints import tiny_gpt2

RECIPE = Recipe(dtype="float64", checkpoints=2, batch_size=2, epochs=2, lr=2e-3, schedule="linear", warmup_steps=1)


def adam_steps(subject: Subject, moments: Moments, names: tuple[str, ...], scale: str) -> Tensor:
    """``[n, p]``: how far torch's AdamW moves the weights on one document alone, over minus its rate."""
    model, rows = subject.model, []
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    for example in subject.encoded:
        optimiser = torch.optim.AdamW(named.values(), lr=1e-3, betas=moments.betas, eps=moments.eps, weight_decay=0.0)
        for name, p in named.items():
            first, second = moments.values[name]
            step = torch.tensor(float(moments.step))
            optimiser.state[p] = {"step": step, "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
        value = subject.objective.losses(model, subject.objective.collate([example])).sum()
        model.zero_grad()
        (value / (example.targets if scale == "token" else 1)).backward()
        optimiser.step()
        rows.append(torch.cat([(before[n] - named[n].detach()).flatten() / 1e-3 for n in names]))
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(before[name])
    model.zero_grad()
    return torch.stack(rows)


def naive(subject: Subject, behaviour: Behaviour, shares: list[float], scale: str = "token") -> np.ndarray[Any, Any]:
    names = tracked_of(subject).layout.names
    total: Any = 0.0
    for index, share in enumerate(shares):
        moments = subject.moments(index)
        assert moments is not None
        with subject.at_checkpoint(index):
            queries, steps = naive_queries(subject, behaviour, names), adam_steps(subject, moments, names, scale)
        cosines = nn.functional.cosine_similarity(queries[:, None], steps[None], dim=-1)
        total = total - share * cosines.numpy()
    return total


def shares_of(recipe: Recipe, steps: int) -> list[float]:
    first, last = recipe.checkpoint_steps(steps)
    means = [np.mean([recipe.rate(s, steps) for s in span]) for span in (range(first), range(first, last))]
    return [float(m / sum(means)) for m in means]


def subject_of(world: World, **changes: Any) -> Subject:
    recipe = RECIPE.model_copy(update=changes)
    return Subject.trained(world.start, ROWS, world.objective, recipe, parameters=r"layers\.\d\.(mlp|self_attn)")


@pytest.mark.parametrize("reduction", ["token", "document"])
def test_against_adams_own_step_on_one_document(world: World, reduction: str):
    subject = subject_of(world, reduction=reduction)
    shares = shares_of(RECIPE, 8)
    assert 0.5 < shares[0] < 1
    for behaviour in (contrast(), loss()):
        found = run(subject, behaviour, "less", projection="none")
        close(found.values, naive(subject, behaviour, shares, reduction), rtol=1e-5)
        assert found.unit == "cosine"


def test_square_conv1d_weights_are_not_turned_over():
    rows: list[dict[str, Any]] = [{"text": "abcdefgh"}, {"prompt": "2+2=", "completion": "4"}, {"text": "xyz"}]
    subject = Subject.trained(tiny_gpt2, rows, CausalLM(byte_tokenizer()), RECIPE, parameters=r"c_proj\.weight")
    behaviour = Behaviour.loss("own", [{"prompt": "1+1=", "wanted": "2"}])
    found = run(subject, behaviour, "less", projection="none")
    close(found.values, naive(subject, behaviour, shares_of(RECIPE, RECIPE.steps(3))), rtol=1e-5)


def test_a_projection_keeps_the_cosines(world: World):
    subject = subject_of(world)
    whole = run(subject, contrast(), "less", projection="none").values
    size = tracked_of(subject).layout.size
    assert 1024 < size < 8192
    for kind in ("rademacher", "sjlt"):
        errors = [
            np.abs(run(subject, contrast(), "less", projection=kind, dimension=d).values - whole).max()
            for d in (64, 4096)
        ]
        assert errors[1] < 0.08  # the spread of a projected cosine is about 1 / sqrt(4096)
        assert errors[1] < errors[0]
    auto = run(subject, contrast(), "less")
    assert auto.values.tobytes() == whole.tobytes()  # fewer numbers than the dimension: nothing to project
    assert auto.notes == (f"2 checkpoints, {size} dimensions",)
    small = [run(subject, contrast(), "less", dimension=64, projection=p).values for p in ("auto", "rademacher")]
    assert small[0].tobytes() == small[1].tobytes()


def test_adams_first_step_is_the_sign_of_the_gradient():
    layout = ParamLayout(("weight",), ((2, 3),))
    zero = {"weight": torch.zeros(2, 3, dtype=torch.float64)}
    queries = torch.ones(1, 4, dtype=torch.float64)
    sink = AdamCosines(Whole(layout, 4, "gaussian"), queries, Moments(0, (0.9, 0.999), 0.0, zero, zero), [1])
    gradient = torch.tensor([[[3.0, -0.2, 7.0], [-1e-3, 5.0, -8.0]]], dtype=torch.float64)
    torch.testing.assert_close(sink.direction("weight", gradient), gradient.sign())


def test_momentum_draws_all_documents_together(world: World):
    subject = subject_of(world)
    kept, left = (run(subject, contrast(), "less", momentum=m).values for m in (True, False))
    assert np.ptp(kept) < np.ptp(left)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def test_a_subject_without_moments_is_refused():
    rows = [{"x": [float(n), 1.0, -1.0], "y": [1.0, float(n)]} for n in range(4)]
    asked = Behaviour.loss("own", rows[:1])
    recipe = Recipe(optimiser="sgd", lr=0.01, momentum=0.5, batch_size=2, checkpoints=1, dtype="float64")
    none = "expected the optimiser's second moments beside checkpoint 0, found none; train with optimiser = 'adamw'"
    with pytest.raises(InputError, match="less: checkpoints: the subject has none"):
        attribute(Subject(plain(), rows, Regression()), asked, "less")
    with pytest.raises(InputError, match=none):
        attribute(Subject.trained(plain, rows, Regression(), recipe), asked, "less")
    adam = recipe.model_copy(update={"optimiser": "adamw", "parameters": "bias"})
    subject = Subject.trained(plain, rows, Regression(), adam, parameters=".*")
    with pytest.raises(InputError, match="no second moments of 1 attributed parameters, first weight: they were"):
        attribute(subject, asked, "less")
    kept = subject.checkpoints[0]
    assert isinstance(kept, Checkpoint)
    subject.checkpoints = (Checkpoint(kept.step, kept.state),)
    with pytest.raises(InputError, match=none):
        attribute(subject, asked, "less")


def test_rates_are_the_mean_since_the_checkpoint_before(world: World):
    inputs = MethodInputs(subject_of(world), contrast())
    rates = [RECIPE.rate(step, 8) for step in range(8)]
    means = inputs.checkpoint_rates("x", average=True)
    np.testing.assert_allclose(means, [np.mean(rates[:4]), np.mean(rates[4:])])
    assert inputs.checkpoint_rates("x") == [rates[3], rates[7]]
