"""What methods say that they will take, against what they take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from rootward.api import attribute
from rootward.capture.hvp import CurvatureProducts
from rootward.capture.inputs import MethodInputs
from rootward.capture.sketch import Whole
from rootward.core import registry
from rootward.core.layout import ParamLayout
from rootward.core.registry import Need, Work
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Regression
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject

N = 12
SETTINGS: dict[str, Any] = {"optimiser": "sgd", "lr": 1e-2, "batch_size": 4, "epochs": 2, "checkpoints": 3}
RECIPE = Recipe(dtype="float64", **SETTINGS)
WORK = Work(documents=100, tokens=10.0, queries=4, parameters=20_000, checkpoints=3, start=True, training=2)


def needed(name: str, work: Work = WORK, **options: Any) -> Need:
    method, preset = registry.get(name)
    return method.needed(method.configure(preset | options), work)


def start() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def subject() -> Subject:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(N, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    rows = [{"x": a.tolist(), "y": b.tolist()} for a, b in zip(x, y, strict=True)]
    return Subject.trained(start, rows, Regression(), RECIPE, parameters=".*")


QUERIES = Behaviour.loss("asked", [{"x": [1.0, 2.0, 3.0], "y": [0.0, 1.0]}, {"x": [0.0, 1.0, 0.0], "y": [1.0, 1.0]}])


@pytest.mark.parametrize(
    "name",
    ["gradient_dot", "tracin_cp", "ekfac", "kfac_influence", "diagonal_influence", "ekfac_checkpoints", "ekfac_joint",
     "source"],
)  # fmt: skip
def test_passes_are_those_that_are_run(name: str):
    """Documents that were passed over, counted; the labels are the data's, so that no seed is tried twice."""
    seen = Counter[str]()

    def note(task: str, done: int, total: int) -> None:
        seen[task] += total if done == total else 0

    fits = {} if name in ("gradient_dot", "tracin_cp") else {"fit_labels": "data"}
    inputs = MethodInputs(subject(), QUERIES, 500, progress=note)
    attribute(inputs.subject, QUERIES, name, options=fits, inputs=inputs)
    seen.pop("queries", None)
    work = Work(N, 1.0, 2, 8, 3, start=inputs.subject.has_start, training=2)
    assert seen.total() / N == needed(name, work, **fits).passes


@pytest.mark.parametrize("queries", ["mean", "each"])
def test_conjugate_gradients_take_no_more_than_is_said(queries: str, monkeypatch: pytest.MonkeyPatch):
    calls = Counter[str]()
    real = CurvatureProducts.__call__

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        calls["products"] += 1
        return real(self, *args, **options)

    monkeypatch.setattr(CurvatureProducts, "__call__", counted)
    options = {"steps": 3, "tolerance": 1e-12, "queries": queries}
    attribute(subject(), QUERIES, "exact_influence", options=options)
    said = needed("exact_influence", Work(N, 1.0, 2, 8, 3, True, 2), **options)
    count = 1 if queries == "mean" else 2
    assert said == Need(1 + 3 * (2 + count), at_most=True)
    assert 3 <= calls["products"] <= 3 + 1  # a step is a product, and one more may tell the residual


def test_what_grows_with_what():
    assert needed("exact_influence").passes == 1 + 100 * 3
    assert needed("exact_influence", queries="each").passes == 1 + 100 * 6
    assert needed("exact_influence", documents=50).passes == 1 + 50 * 3
    lissa = needed("exact_influence", solver="lissa", scale=1.0, depth=200, batch=10, repeats=2)
    assert lissa == Need(1 + 200 * 2 * 0.1 * 3)
    assert needed("exact_influence", solver="gram").memory_bytes == 8 * WORK.parameters * WORK.documents
    assert needed("arnoldi").passes == 1 + 3 * 200
    assert needed("arnoldi", documents=10).passes == 1 + 3 * 20
    assert needed("magic", queries="mean").passes == 2 * 5
    assert needed("magic").passes == 2 * (5 + 2 * 3)
    assert needed("bm25").passes == 0
    assert needed("tracin_cp").passes == 4  # the start too


def test_the_projection_of_less_is_counted():
    """Its matrix in bytes, as it is kept; the time in proportion to the dimension."""
    layout = ParamLayout(("weight",), ((30, 20),))
    work = Work(100, 10.0, 4, layout.size, 3, True, 2)
    sketch = Whole(layout, 64, "rademacher")
    kept = sum(m.numel() * m.element_size() for m in sketch._matrices.values())
    said = needed("less", work, dimension=64)
    assert said.memory_bytes == kept
    assert said.at_most
    more = needed("less", work, dimension=128)
    assert more.passes - said.passes == pytest.approx(3 * 64 / (3 * 10.0))
    whole = needed("less", work)
    assert (whole.memory_bytes, whole.at_most) == (0, False)  # the gradient is shorter than the default dimension
    assert needed("less", Work(100, 10.0, 4, 10**6, 3, True, 2)).memory_bytes < 10**7  # hashed: no matrix is kept


def test_random_signs_are_what_they_were():
    """The matrix of whole numbers that was scaled afterwards, to the bit."""
    layout = ParamLayout(("weight",), ((30, 20),))
    found = Whole(layout, 64, "rademacher", 7)._matrices["weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.abs(), torch.full((600, 64), 1 / 8), rtol=0, atol=0)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    whole = torch.randint(0, 2, (600, 64), generator=generators[0]).mul_(2).sub_(1).float()
    direct = torch.randint(0, 2, (600, 64), generator=generators[1], dtype=torch.float32).mul_(2).sub_(1)
    assert torch.equal(whole, direct)
