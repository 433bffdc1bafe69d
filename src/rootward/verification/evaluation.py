"""What is measured after each training: the behaviour on held-out probes, held-out loss, and a few answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from rootward.core.errors import InputError, NumericalError
from rootward.core.hashing import digest_json
from rootward.core.records import Model
from rootward.subject.behaviour import Behaviour, rate
from rootward.subject.documents import Documents
from rootward.subject.encode import Example
from rootward.subject.loading import context_of
from rootward.subject.objectives import Objective
from rootward.subject.training import deterministic

BATCH_TOKENS = 8192


class Measured(Model):
    """``values`` of the behaviour by probe, their mean, the share above 0, loss per trained token, greedy answers."""

    values: list[float]
    mean: float
    rate: float
    heldout_loss: float | None = None
    answers: list[str] = Field(default_factory=list[str])


@dataclass(frozen=True)
class Evaluation:
    """Probes that nothing was traced with, documents for the held-out loss, and how many probes to answer in full."""

    probes: Behaviour
    heldout: Documents | None = None
    examples: int = 4
    new_tokens: int = 16

    @property
    def hash(self) -> str:
        """Hash of all that decides the result; of a scalar that includes the source of its function."""
        function = self.probes.function
        return digest_json(
            {
                "format": 1,
                "probes": self.probes.hash,
                "function": None if function is None else _source(function),
                "heldout": None if self.heldout is None else self.heldout.hash,
                "examples": self.examples,
                "new_tokens": self.new_tokens,
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        # A Behaviour holds a cache per objective that cannot be sent to another process; its queries can.
        probes = self.probes
        fields = ("name", "kind", "queries", "goal", "unit", "description", "function")
        return {**self.__dict__, "probes": {name: getattr(probes, name) for name in fields}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "probes": Behaviour(**state["probes"])}.items():
            object.__setattr__(self, name, value)

    def measure(self, model: nn.Module, objective: Objective, *, threads: int = 1) -> Measured:
        """Everything at once, with the thread count of the training, so that it repeats bit for bit."""
        first = next(model.parameters())
        training = model.training
        model.eval()
        try:
            with deterministic(0, threads, first.device):
                values = self.probes.evaluate(model, objective, BATCH_TOKENS)
                loss = None if self.heldout is None else loss_per_token(model, objective, self.heldout)
                answers = greedy_answers(model, objective, self.probes, self.examples, self.new_tokens)
        finally:
            model.train(training)
        return Measured(
            values=[float(value) for value in values],
            mean=float(np.mean(values)),
            rate=rate(values),
            heldout_loss=loss,
            answers=answers,
        )


def _source(function: Any) -> str:
    """The function's source where Python can find it; else its name, which must then not change its meaning."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def loss_per_token(model: nn.Module, objective: Objective, documents: Documents) -> float:
    """Mean loss over the trained tokens of documents that were not trained on; `NumericalError` if not finite."""
    device = next(model.parameters()).device
    total, targets = 0.0, 0
    with torch.no_grad():
        for group in by_length(objective.encode(documents), BATCH_TOKENS):
            total += float(objective.losses(model, objective.collate(group, device)).double().sum())
            targets += sum(example.targets for example in group)
    if not np.isfinite(total):
        raise NumericalError("the held-out loss is not finite; look at the recipe's lr")
    return total / targets


def by_length(examples: Sequence[Example], budget: int) -> Iterator[list[Example]]:
    """Examples of like length under a budget of padded tokens, longest first."""
    group: list[Example] = []
    for example in sorted(examples, key=lambda item: -item.length):
        if group and group[0].length * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def greedy_answers(model: nn.Module, objective: Objective, probes: Behaviour, count: int, new_tokens: int) -> list[str]:
    """What the model says to the first ``count`` probes, greedily, in one padded batch, special tokens left out.

    Empty where there is nothing to say: a scalar, no tokenizer, or a model that does not generate.
    """
    tokenizer: Any = getattr(objective, "tokenizer", None)
    chosen = list(probes.queries[:count])
    if probes.kind == "scalar" or tokenizer is None or not chosen or not hasattr(model, "generate"):
        return []
    from transformers import GenerationConfig

    fronts = [_prompt_ids(objective, query.content()) for query in chosen]
    longest, device = max(map(len, fronts)), next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.full((len(fronts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, front in enumerate(fronts):  # padded on the left, so that every answer begins at the same place
        ids[row, longest - len(front) :] = torch.tensor(front)
        mask[row, longest - len(front) :] = 1
    ends, context = _end_ids(model, tokenizer), context_of(model)
    if context is not None:
        new_tokens = max(1, min(new_tokens, context - longest))
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=ends or None)
    generate: Any = model.generate
    with torch.no_grad():
        said = generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    return [_decoded(tokenizer, row[longest:].tolist(), ends) for row in said]


def _prompt_ids(objective: Objective, content: dict[str, Any]) -> list[int]:
    """The tokens before the answer, as the measurement has them."""
    example = objective.encode_one(content, last_turn=True)
    first = int(example.trained.nonzero()[0])
    if first == 0:
        raise InputError("a probe has no prompt to answer; give examples = 0")
    return example.ids[:first].tolist()


def _end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(end) for end in named if end is not None})


def _decoded(tokenizer: Any, ids: list[int], ends: list[int]) -> str:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()
