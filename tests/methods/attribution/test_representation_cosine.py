"""Pooled states against a loop without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rootward.api import attribute
from rootward.core.errors import ArtefactError, InputError
from rootward.methods.attribution.representation_cosine import default_module, module_of_layer
from rootward.subject.behaviour import Behaviour
from rootward.subject.encode import Example
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject
from tests.methods.contract import World, close, contrast, run


def pooled(world: World, examples: list[Example]) -> torch.Tensor:
    """Mean of the last hidden states, one document at a time and without padding."""
    with torch.no_grad():
        states = [
            world.model(input_ids=e.ids[None], output_hidden_states=True).hidden_states[-1][0].mean(0) for e in examples
        ]
    return torch.stack(states)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_against_a_loop_without_padding(world: World, centre: bool, budget: int):
    subject = world.subject()
    documents = pooled(world, list(subject.encoded))
    queries = pooled(world, [subject.objective.encode_one(q.content(True)) for q in contrast().queries])
    middle = documents.mean(0) if centre else 0
    expected = nn.functional.cosine_similarity((queries - middle)[:, None], (documents - middle)[None], dim=-1)
    found = run(subject, contrast(), "repsim", centre=centre, token_budget=budget)
    close(found.values, expected)
    assert np.abs(found.values).max() <= 1 + 1e-6
    assert found.notes == ("states of model.norm",)


def test_the_same_text_is_most_alike(world: World):
    subject = world.subject()
    found = run(subject, contrast(), "representation_cosine")
    assert found.values[0].argmax() == 1  # the document is the query with the wanted answer
    assert found.values[0, 1] == pytest.approx(1, abs=1e-5)


def test_another_module_may_be_named(world: World):
    subject = world.subject()
    found = run(subject, contrast(), "embedding", module="model.layers.0")
    assert found.notes == ("states of model.layers.0",)
    assert not np.allclose(found.values, run(subject, contrast(), "embedding").values, atol=0.01)
    with pytest.raises(ArtefactError, match="expected a module 'nowhere'"):
        run(subject, contrast(), "embedding", module="nowhere")


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_last_token_of_a_layer_against_a_loop_without_padding(world: World, budget: int):
    subject = world.subject()

    def last(examples: list[Example]) -> torch.Tensor:
        with torch.no_grad():
            # entry 0 are the embeddings, entry 1 what the first block gives
            states = [world.model(input_ids=e.ids[None], output_hidden_states=True).hidden_states[1] for e in examples]
        return torch.stack([state[0, -1] for state in states])

    documents = last(list(subject.encoded))
    queries = last([subject.objective.encode_one(q.content(True)) for q in contrast().queries])
    middle = documents.mean(0)
    expected = nn.functional.cosine_similarity((queries - middle)[:, None], (documents - middle)[None], dim=-1)
    for layer in (0, -2):
        found = run(subject, contrast(), "repsim", layer=layer, pooling="last", token_budget=budget)
        close(found.values, expected)
        assert found.notes == ("states of model.layers.0, last token",)


def test_a_layer_that_is_not_there_is_refused(world: World):
    subject = world.subject()
    with pytest.raises(InputError, match=r"layer: expected one of 2 blocks of model.layers, got 2"):
        run(subject, contrast(), "repsim", layer=2)
    with pytest.raises(InputError, match="expected a module or a layer, got both"):
        run(subject, contrast(), "repsim", layer=0, module="model.norm")
    with pytest.raises(InputError, match="no list of blocks; name a module"):
        module_of_layer(nn.Linear(2, 2), 0)


def test_models_without_hidden_states_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    assert default_module(model) == "2"
    with pytest.raises(ArtefactError, match="no module before its head; name one"):
        default_module(nn.Linear(2, 2))
    rows = [{"x": torch.randn(4), "y": n % 2} for n in range(6)]
    subject = Subject(model, rows, Classification())
    found = attribute(subject, Behaviour.loss("x", rows[:2]), "representation_cosine")
    states = model[:3](torch.stack([row["x"] for row in rows]).double()).detach()
    centred = nn.functional.normalize(states - states.mean(0), dim=1)
    close(found.values, -(centred[:2] @ centred.T))
