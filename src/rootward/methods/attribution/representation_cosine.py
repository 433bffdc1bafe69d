"""Representation similarity (RepSim; Hanawa et al., 2021, arXiv:2006.04528): whose pooled states point the same way?

The cosine between the mean over tokens of the model's own last hidden states for the query (prompt with the wanted
answer) and for the document, after the mean over documents is taken out of both (without that, all states of a language
model point much the same way). Forward passes only. For a model without hidden states of its own (not a transformers
model) the output of the last module before the head is taken. Documents like the answer raise a contrast and lower a
loss: for a loss the score is minus the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rootward.capture.inputs import MethodInputs
from rootward.capture.run import run_pass
from rootward.capture.sinks import PooledActivations
from rootward.core.errors import ArtefactError, InputError
from rootward.core.registry import Card, MethodConfig, register
from rootward.core.scores import Scores
from rootward.subject.encode import Example

CARD = Card(
    key="representation_cosine",
    label="embedding similarity (the model's own states)",
    question="attribution",
    paper="Evaluation of Similarity-based Explanations",
    reference="arXiv:2006.04528",
    needs=("activations",),
    cost="1 forward per document",
    unit="cosine",
    aliases=("embedding", "repsim"),
    baseline=True,
)


class Config(MethodConfig):
    """Which module's output is pooled, and whether the documents' mean is taken out."""

    module: str | None = None
    centre: bool = True


def default_module(model: nn.Module) -> str:
    """The module that gives the last hidden state: a decoder's final norm, else the last but one with weights."""
    names = {id(module): name for name, module in model.named_modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with_parameters = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False)) and m is not head]
    if head is None:
        with_parameters = with_parameters[:-1]
    candidates = [m for m in with_parameters if "lora_" not in names[id(m)]]
    if not candidates:
        raise ArtefactError("representation_cosine: the model has no module before its head; name one: module = ...")
    return names[id(candidates[-1])]


def _pooled(inputs: MethodInputs, module: str, examples: Sequence[Example], task: str) -> Tensor:
    sink = PooledActivations(module, len(examples))
    run_pass(
        inputs.subject.model,
        inputs.subject.objective,
        examples,
        [sink],
        token_budget=inputs.token_budget,
        progress=inputs.progress,
        task=task,
    )
    assert sink.pooled is not None
    return sink.pooled


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Cosine of every usable document with each query."""
    if inputs.behaviour.kind == "scalar":
        raise InputError("representation_cosine: a scalar behaviour has no text to embed")
    encoded = inputs.subject.encoded
    module = config.module or default_module(inputs.subject.model)
    documents = _pooled(inputs, module, encoded, "embeddings")
    wanted = [query.content(True) for query in inputs.behaviour.queries]
    queries = _pooled(inputs, module, [inputs.subject.objective.encode_one(c) for c in wanted], "query embeddings")
    if config.centre:
        middle = documents.mean(0)
        documents, queries = documents - middle, queries - middle
    unit = nn.functional.normalize
    values = inputs.likeness * (unit(queries, dim=1) @ unit(documents, dim=1).T)
    return Scores(
        values=values.to(torch.float32).numpy(),
        queries=inputs.query_names,
        document_ids=encoded.ids,
        rows=encoded.rows,
        method=CARD.key,
        unit=CARD.unit,
        behaviour=inputs.behaviour.name,
        goal=inputs.behaviour.goal,
        coverage=inputs.coverage(gradients=False),
        notes=(f"states of {module}",),
    )
