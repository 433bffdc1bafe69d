"""Several behaviours in one pass have the scores that each has by itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rootward as rw
from rootward.capture.several import attribute_many
from rootward.core import registry
from rootward.core.errors import InputError
from rootward.subject.behaviour import Behaviour
from tests.methods.contract import GRADIENT, QUERIES, QUICK, World, build_world

SHARING = [name for name in GRADIENT if registry.get(name)[0].card.several]
OWN = ["trak_park2023", "bm25"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


def behaviours() -> list[Behaviour]:
    """Two contrasts, a loss that is to fall, and a function of the model."""
    ids = torch.tensor([[5, 9, 17, 4]])

    def values(model: Any) -> Tensor:
        return model(input_ids=ids).logits[0, -2:, 3]

    return [
        Behaviour.contrast("good", QUERIES[:2]),
        Behaviour.loss("rain", [{"prompt": "is rain good? ", "completion": "yes"}]),
        Behaviour.scalar("logits", values, names=["a", "b"]),
    ]


def options_of(name: str, queries: str) -> dict[str, Any]:
    method, _ = registry.get(name)
    more = {"queries": queries} if "queries" in method.config.model_fields else {}
    return {**QUICK.get(method.card.key, {}), **more}


@pytest.mark.parametrize("queries", ["mean", "each"])
@pytest.mark.parametrize("name", SHARING)
def test_together_is_as_each_by_itself(world: World, name: str, queries: str):
    subject, asked, options = world.subject(), behaviours(), options_of(name, queries)
    together = attribute_many(subject, asked, name, options=options, token_budget=500)
    for behaviour, found in zip(asked, together, strict=True):
        alone = rw.attribute(subject, behaviour, name, options=options, token_budget=500)
        assert (found.behaviour, found.goal, found.queries) == (behaviour.name, behaviour.goal, alone.queries)
        np.testing.assert_allclose(found.values, alone.values, rtol=1e-3, atol=1e-3 * np.abs(alone.values).max())


def test_the_documents_are_gone_through_once(world: World):
    passes: Counter[str] = Counter()

    def note(task: str, done: int, total: int) -> None:
        passes[task] += done == total

    found = rw.attribute_many(world.subject(), behaviours(), "ekfac", token_budget=500, progress=note)
    assert len(found) == 3
    assert passes["documents"] == 1
    assert not any("ranking agrees" in text for text in found[0].notes)  # they have none in common


@pytest.mark.parametrize("name", OWN)
def test_other_methods_run_for_each(world: World, name: str):
    subject, asked = world.subject(), behaviours()[:2]
    for behaviour, found in zip(asked, attribute_many(subject, asked, name), strict=True):
        assert found.values.tobytes() == rw.attribute(subject, behaviour, name).values.tobytes()
        assert found.behaviour == behaviour.name


def test_bad_input_is_refused(world: World):
    subject, one = world.subject(), behaviours()[0]
    with pytest.raises(InputError, match="at least one, got none"):
        attribute_many(subject, [], "ekfac")
    with pytest.raises(InputError, match="different names, got 'good' twice"):
        attribute_many(subject, [one, one], "ekfac")
    with pytest.raises(InputError, match=r"use rw\.Behaviour\.load"):
        attribute_many(subject, ["habit.jsonl"], "ekfac")  # type: ignore[list-item]
