"""Several documents in one row, so that nothing is spent on padding.

Position ids start again at 0 with every document. Without an attention mask transformers reads documents' borders from
them and lets no document see another. Whether a model really does so is measured before a packed pass begins.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rootward.core.errors import InputError
from rootward.subject.encode import IGNORED, Batch, Example
from rootward.subject.objectives import Objective

Rows = list[list[int]]
"""Positions in the list of examples: which documents stand in which row."""


def pack(examples: Sequence[Example], token_budget: int) -> list[Rows]:
    """Batches of rows no longer than the longest document, best fit by falling length, within the budget."""
    if token_budget < 1:
        raise InputError(f"token budget: expected at least 1, got {token_budget}")
    order = sorted(range(len(examples)), key=lambda n: (-examples[n].length, n))
    width = max((e.length for e in examples), default=0)
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, rising
    for n in order:
        length = examples[n].length
        at = bisect_left(rooms, length)
        room = rooms[at] if at < len(rooms) else width
        if at < len(rooms):
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(n)
        left = room - length
        if left and left not in by_room:
            insort(rooms, left)
        if left:
            by_room.setdefault(left, []).append(row)
    per_batch = max(1, token_budget // max(width, 1))
    return [rows[start : start + per_batch] for start in range(0, len(rows), per_batch)]


def collate_packed(rows: Sequence[Sequence[Example]], device: torch.device | str) -> tuple[Batch, Batch]:
    """The packed rows as the model sees them, and the documents in them, with `Batch.unpack`."""
    total = max(sum(e.length for e in row) for row in rows)
    longest = max(e.length for row in rows for e in row)
    documents = [e for row in rows for e in row]
    ids = torch.zeros(len(rows), total, dtype=torch.int64)
    places = torch.zeros(len(rows), total, dtype=torch.int64)  # a filler is a document of its own: position 0 again
    targets = torch.full((len(rows), total), IGNORED, dtype=torch.int64)
    unpack = torch.full((len(documents), longest), -1, dtype=torch.int64)
    n = 0
    for r, row in enumerate(rows):
        start = 0
        for example in row:
            t = example.length
            ids[r, start : start + t] = example.ids
            places[r, start : start + t] = torch.arange(t)
            targets[r, start : start + t - 1] = torch.where(example.trained[1:], example.ids[1:], IGNORED)
            unpack[n, :t] = torch.arange(t) + r * total + start
            start, n = start + t, n + 1
    wanted = targets != IGNORED
    keep = torch.sort((~wanted).to(torch.uint8), dim=1, stable=True).indices[:, : int(wanted.sum(1).max())]
    inner = Batch(
        inputs={"input_ids": ids.to(device), "position_ids": places.to(device)},
        targets=targets.to(device),
        mask=torch.ones_like(ids, dtype=torch.bool).to(device),
        trained=wanted.sum(1).to(device),
        rows=torch.arange(len(rows), device=device),
        ids=("",) * len(rows),
        keep=keep.contiguous().to(device),
    )
    outer = replace(
        inner,
        mask=(unpack >= 0).to(device),
        trained=torch.tensor([e.targets for e in documents], device=device),
        rows=torch.tensor([e.row for e in documents], device=device),
        ids=tuple(e.id for e in documents),
        unpack=unpack.to(device),
        keep=None,
    )
    return inner, outer


def packed_losses(objective: Objective, model: nn.Module, inner: Batch, outer: Batch) -> Tensor:
    """Loss of every document ``[n]``, summed over its trained tokens; differentiable."""
    token_losses: Any = getattr(objective, "token_losses")  # noqa: B009 (not part of the protocol)
    assert outer.unpack is not None
    each = token_losses(model, inner).flatten()[outer.unpack.clamp(min=0)]
    return torch.where(outer.mask, each, torch.zeros((), dtype=each.dtype, device=each.device)).sum(1)


def check_packing(model: nn.Module, objective: Objective, examples: Sequence[Example], device: torch.device) -> None:
    """Measure on two short documents that the model keeps packed documents apart.

    Raises:
        InputError: it does not, or the objective has no loss per token.
    """
    advice = "run without packing"
    if not hasattr(objective, "token_losses"):
        raise InputError(
            "packing: expected an objective of language models (with token_losses), "
            f"got {type(objective).__name__}; {advice}"
        )
    few = sorted(examples, key=lambda e: e.length)
    if not few:
        return
    first, second = few[0], few[min(1, len(few) - 1)]
    other = replace(first, ids=first.ids.flip(0).roll(1) if first.length > 1 else first.ids)
    if torch.equal(other.ids, first.ids):
        other = replace(first, ids=second.ids[:1].expand(first.length).clone())
    with torch.no_grad():
        alone = objective.losses(model, objective.collate([second], device))[0]
        found: list[Tensor] = []
        for front in (first, other):
            inner, outer = collate_packed([[front, second]], device)
            found.append(packed_losses(objective, model, inner, outer)[1])
    loose = 5e-2 if next(model.parameters()).dtype in (torch.float16, torch.bfloat16) else 1e-4
    leak = float((found[0] - found[1]).abs())
    off = float((found[0] - alone).abs())
    scale = float(alone.abs()) + 1e-6
    if not leak <= 1e-6 * scale or not off <= loose * scale:
        raise InputError(
            f"packing: expected {type(model).__name__} to keep packed documents apart, got a loss of "
            f"{float(found[0]):.6g} behind another document and {float(alone):.6g} alone; {advice}"
        )
