"""Batches under a token budget, and the budget that fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootward.capture.batching import DEFAULT_TOKENS, automatic_budget, batches, bytes_per_token
from rootward.capture.packing import collate_packed, pack
from rootward.core.errors import InputError
from tests.capture import worlds as w

lengths = st.lists(st.integers(2, 30), min_size=1, max_size=25)


@given(lengths, st.integers(1, 200))
def test_every_document_once_within_the_budget(sizes: list[int], budget: int):
    examples = w.documents(sizes)
    plan = batches(examples, budget)
    assert sorted(n for batch in plan for n in batch) == list(range(len(sizes)))
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(sizes[n] for n in batch) <= budget
    longest = [max(sizes[n] for n in batch) for batch in plan]
    assert longest == sorted(longest, reverse=True)


@given(lengths, st.integers(1, 200))
def test_packed_rows_hold_every_document_once(sizes: list[int], budget: int):
    examples = w.documents(sizes)
    plan = pack(examples, budget)
    assert sorted(n for rows in plan for row in rows for n in row) == list(range(len(sizes)))
    width = max(sizes)
    for rows in plan:
        assert all(sum(sizes[n] for n in row) <= width for row in rows)
        assert len(rows) == 1 or len(rows) * width <= budget
    assert sum(len(rows) for rows in plan) <= len(sizes)
    for rows in plan:
        _, outer = collate_packed([[examples[n] for n in row] for row in rows], "cpu")
        flat = outer.inputs["input_ids"].flatten()
        for place, n in enumerate(n for row in rows for n in row):
            where = outer.unpack[place]
            assert torch.equal(flat[where[where >= 0]], examples[n].ids)
            assert torch.equal(outer.inputs["position_ids"].flatten()[where[where >= 0]], torch.arange(sizes[n]))


def test_a_budget_of_nothing_is_refused():
    for make in (batches, pack):
        with pytest.raises(InputError, match="at least 1, got 0"):
            make(w.documents((3,)), 0)
        assert make([], 5) == []


def test_the_automatic_budget_is_measured(monkeypatch: pytest.MonkeyPatch):
    import psutil

    model, objective, cpu = w.llama(torch.float32), w.causal(), torch.device("cpu")
    examples = w.documents((20, 30))
    for p in model.parameters():
        p.requires_grad_(False)
    need = bytes_per_token(model, objective, examples[1], cpu)
    # at least: the hidden state that each of two layers keeps, in float32
    assert 2 * 16 * 4 < need < 1e6
    assert not any(p.requires_grad for p in model.parameters())

    class Memory:
        available = need * 1000

    assert automatic_budget(model, objective, examples, cpu) == DEFAULT_TOKENS
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert automatic_budget(model, objective, examples, cpu) == 256  # 400 fit
    Memory.available = 1.0
    assert automatic_budget(model, objective, examples, cpu) == 64
    assert automatic_budget(model, objective, [], cpu) == DEFAULT_TOKENS
