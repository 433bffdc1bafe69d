"""Length-bucketed batches under a token budget, and the budget that fits in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from rootward.core.errors import InputError
from rootward.subject.objectives import Example, Objective

DEFAULT_TOKENS = 4096
"""Padded tokens in a batch where memory is no limit: larger batches did not run faster on two cores."""


class Sized(Protocol):
    """Anything with a length in tokens."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        ...


def batches(examples: Sequence[Sized], token_budget: int) -> list[list[int]]:
    """Positions grouped by length so that ``documents x longest`` stays within the budget.

    Longest first, so that a batch that does not fit fails at once. Ties keep the given order: the batches depend on
    the lengths alone. A single document longer than the budget is a batch of its own.
    """
    if token_budget < 1:
        raise InputError(f"token budget: expected at least 1, got {token_budget}")
    order = sorted(range(len(examples)), key=lambda n: (-examples[n].length, n))
    result: list[list[int]] = []
    for n in order:
        longest = examples[result[-1][0]].length if result else 0
        if result and (len(result[-1]) + 1) * longest <= token_budget:
            result[-1].append(n)
        else:
            result.append([n])
    return result


def bytes_per_token(model: nn.Module, objective: Objective, example: Example, device: torch.device) -> float:
    """Bytes that autograd keeps per token, from one forward pass of one document: at least what a pass keeps."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = objective.collate([example], device)
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            losses = objective.losses(model, batch)  # alive until here, so that no storage is counted for another
        del losses
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return max(sum(kept.values()), 1) / max(example.length, 1)


def automatic_budget(model: nn.Module, objective: Objective, examples: Sequence[Example], device: torch.device) -> int:
    """Padded tokens per batch that use at most 40 % of free memory, at most `DEFAULT_TOKENS` on a CPU.

    Measured on the longest document (attention may need memory by the square of the length), which always gets a batch,
    whatever the budget. A power of two, so that small changes of free memory leave the batches as they are.
    """
    if not examples:
        return DEFAULT_TOKENS
    need = bytes_per_token(model, objective, max(examples, key=lambda e: e.length), device)
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], 16 * DEFAULT_TOKENS
    else:
        import psutil

        free, most = psutil.virtual_memory().available, DEFAULT_TOKENS
    return 2 ** int(math.log2(max(64, min(most, 0.4 * free / need))))
