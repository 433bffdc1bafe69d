"""Small models, documents, and the naive twin: plain autograd, one document at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rootward.capture.run import run_pass
from rootward.capture.sinks import BaseSink, WeightedSum
from rootward.capture.sites import Tracked
from rootward.core.block import Factor, total_gradient
from rootward.core.layout import ParamLayout
from rootward.subject.encode import Example
from rootward.subject.objectives import CausalLM, Objective

VOCABULARY = 40


class Tokens:
    """As much of a tokenizer as an objective asks for when documents are tokens already."""

    model_max_length = 64
    pad_token_id = 0
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY)}


def causal(**options: bool) -> CausalLM:
    return CausalLM(Tokens(), **options)


def documents(lengths: Sequence[int], seed: int = 0, share: float = 0.7) -> list[Example]:
    """Random documents of these lengths, about ``share`` of the tokens trained on (at least one)."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for n, t in enumerate(lengths):
        ids = torch.randint(1, VOCABULARY, (t,), generator=generator)
        trained = torch.rand(t, generator=generator) < share
        trained[0], trained[1] = False, True
        result.append(Example(f"d{n}", n, ids, trained))
    return result


def pairs(x: Tensor, y: Tensor) -> list[Example]:
    """Supervised documents."""
    one = torch.ones(1, dtype=torch.bool)
    return [
        Example(f"d{n}", n, torch.zeros(1, dtype=torch.int64), one, x=x[n], y=y[n], targets=1) for n in range(len(x))
    ]


def llama(dtype: torch.dtype = torch.float64, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(settings | options))).to(dtype).eval()
    return scattered(model)


def qwen3(dtype: torch.dtype = torch.float64, **options: object) -> Qwen3ForCausalLM:
    """Its norms of queries and keys see heads: ``[n, t, heads, width]``."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    return scattered(Qwen3ForCausalLM(Qwen3Config(**(settings | options))).to(dtype).eval())


def gpt2(dtype: torch.dtype = torch.float64, **options: object) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return scattered(GPT2LMHeadModel(GPT2Config(**(settings | options))).to(dtype).eval())


M = TypeVar("M", bound=nn.Module)


def scattered(model: M) -> M:
    """Move every parameter off its special starting value (zero biases, unit scales)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return model


def naive(
    model: nn.Module, objective: Objective, examples: Sequence[Example], names: Sequence[str]
) -> dict[str, Tensor]:
    """``[n, *shape]`` per parameter by autograd, one document at a time and alone in its batch."""
    model.eval()
    params = dict(model.named_parameters())
    flags = {name: params[name].requires_grad for name in names}
    for name in names:
        params[name].requires_grad_(True)
    rows: list[dict[str, Tensor]] = []
    for example in examples:
        loss = objective.losses(model, objective.collate([example])).sum()
        found = torch.autograd.grad(loss, [params[n] for n in names], allow_unused=True)
        rows.append({n: torch.zeros_like(params[n]) if g is None else g for n, g in zip(names, found, strict=True)})
    for name in names:
        params[name].requires_grad_(flags[name])
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """``[n, size]`` of gradients per parameter."""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


class Collect(BaseSink):
    """Keeps every document's dense gradient and the factors of the last block."""

    def __init__(self, layout: ParamLayout, count: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(layout)
        shapes = zip(layout.names, layout.shapes, strict=True)
        self.dense = {name: torch.full((count, *shape), torch.nan, dtype=dtype) for name, shape in shapes}
        self.factors: dict[str, list[Factor]] = {}
        self.blocks = 0

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        assert self.block is not None
        self.factors[name] = list(factors)
        dense = total_gradient({name: factors})[name]
        self.dense[name][self.block.index] = dense.reshape(-1, *self.layout.shape(name)).to(self.dense[name].dtype)

    def end(self) -> None:
        self.blocks += 1
        super().end()


def captured(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    token_budget: int = 30,
    *,
    packing: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """``[n, *shape]`` per parameter from a pass with identity weights."""
    eye = torch.eye(len(examples), dtype=dtype)
    sink = WeightedSum(tracked.layout, eye, dtype)
    run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=token_budget, packing=packing)
    return sink.result()


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def digits_cnn(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Strides, padding, dilation, batch norm and in-place ReLU, as in a classifier of 8 x 8 digits."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False), nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, (2, 4), padding="same", dilation=(2, 1)), nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 2, padding="valid"), nn.Flatten(), nn.Linear(81, 6), nn.BatchNorm1d(6),
        nn.ReLU(inplace=True), nn.Linear(6, 3),
    ).to(dtype)  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return scattered(model).eval()


def images(count: int = 5, dtype: torch.dtype = torch.float64) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return pairs(x, torch.arange(count) % 3)


def vectors(count: int = 6) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    return pairs(torch.randn(count, 5, generator=generator), torch.arange(count) % 3)
