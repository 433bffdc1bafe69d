"""Representation similarity (RepSim; Hanawa et al., 2021, arXiv:2006.04528): whose pooled states point the same way?

The cosine between the mean over tokens of the model's own last hidden states for the query (prompt with the wanted
answer) and for the document, after the mean over documents is taken out of both (without that, all states of a language
model point much the same way). ``layer`` or ``module`` take other states, ``pooling = "last"`` those of the last token.
Forward passes only. For a model without hidden states of its own (not a transformers model) the output of the last
module before the head is taken. Documents like the answer raise a contrast and lower a loss: for a loss the score is
minus the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from rootward.capture.inputs import MethodInputs
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
    """Which states are pooled and how, and whether the documents' mean is taken out."""

    module: str | None = Field(default=None, description="the module whose output is taken; default: the last states")
    layer: int | None = Field(default=None, description="in place of module: a block of the model; -1 is the last")
    pooling: Literal["mean", "last"] = Field(default="mean", description="over a text's tokens, or its last token")
    centre: bool = Field(default=True, description="take the documents' mean out first")


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


def module_of_layer(model: nn.Module, layer: int) -> str:
    """The block with this number: of the largest list of modules in the model, as transformers stack theirs."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise InputError("representation_cosine: layer: the model has no list of blocks; name a module: module = ...")
    name, blocks = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    if not -len(blocks) <= layer < len(blocks):
        raise InputError(f"representation_cosine: layer: expected one of {len(blocks)} blocks of {name}, got {layer}")
    return f"{name}.{layer % len(blocks)}"


def _module(inputs: MethodInputs, config: Config) -> str:
    model = inputs.subject.model
    if config.layer is None:
        return config.module or default_module(model)
    if config.module is not None:
        raise InputError("representation_cosine: expected a module or a layer, got both")
    return module_of_layer(model, config.layer)


def _pooled(inputs: MethodInputs, module: str, last: bool, examples: Sequence[Example], task: str) -> Tensor:
    sink = PooledActivations(module, len(examples), last=last)
    inputs.feed([sink], examples, task)
    assert sink.pooled is not None
    return sink.pooled


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Cosine of every usable document with each query."""
    if inputs.behaviour.kind == "scalar":
        raise InputError("representation_cosine: a scalar behaviour has no text to embed")
    encoded = inputs.subject.encoded
    module, last = _module(inputs, config), config.pooling == "last"
    documents = _pooled(inputs, module, last, encoded, "embeddings")
    wanted = [query.content(True) for query in inputs.behaviour.queries]
    answers = [inputs.subject.objective.encode_one(content) for content in wanted]
    queries = _pooled(inputs, module, last, answers, "query embeddings")
    if config.centre:
        middle = documents.mean(0)
        documents, queries = documents - middle, queries - middle
    unit = nn.functional.normalize
    values = inputs.likeness * (unit(queries, dim=1) @ unit(documents, dim=1).T)
    return inputs.scored(CARD, values, gradients=False, notes=(f"states of {module}{', last token' * last}",))
