"""The world of facts: what is said of its documents and queries holds, and its models are what they are called."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rootward.core.errors import InputError
from rootward.sandbox import facts as made
from rootward.sandbox.facts import RECIPE, SMOOTH, asked, build_tokenizer, facts, facts_subject, smooth_subject, start
from rootward.subject.loading import model_hash


def test_every_fact_is_told_and_none_in_the_wording_of_its_query():
    world = facts()
    told = {f"{d['prompt']}{d['completion'].rsplit(' ', 1)[0]} " for d in world.documents}
    assert not told & {query["prompt"] for query in world.queries}
    counts = Counter(f"{d['name']} {d['relation']}" for d in world.documents)
    assert set(counts) == {query["name"] for query in world.queries}
    assert set(counts.values()) == {2, 3, 4, 5}


def test_wrong_values_are_as_many_as_said_and_differ_from_the_right_one():
    world = facts()
    right = {query["name"]: query["wanted"] for query in world.queries}
    for d in world.documents:
        assert (d["completion"].split()[-1] == right[f"{d['name']} {d['relation']}"]) == d["right"]
    assert abs(sum(not d["right"] for d in world.documents) / len(world.documents) - made.WRONG) < 0.05


def test_the_seed_decides_and_words_are_all_known():
    assert facts(0) == facts(0) != facts(1)
    tokenizer = build_tokenizer()
    for d in facts(3).documents:
        ids = tokenizer(d["prompt"] + d["completion"])["input_ids"]
        assert tokenizer.pad_token_id not in ids
    with pytest.raises(InputError, match="people"):
        facts(people=0)


def test_the_model_learns_facts_in_wordings_that_it_was_not_told_them_in():
    world = facts(people=8)
    subject = facts_subject(world, RECIPE.model_copy(update={"epochs": 40, "batch_size": 16, "weight_decay": 0.1}))
    behaviour = asked(world.queries)
    after = behaviour.evaluate(subject.model, subject.objective)
    before = behaviour.evaluate(start(), subject.objective)
    assert after.mean() < 1.6 < 2.08 < before.mean()  # 2.08: one of eight values
    assert model_hash(subject.start_model()) == model_hash(start())
    assert subject.encoded.trained_tokens > 4 * len(subject.encoded)


def test_the_smooth_model_starts_from_the_pretrained_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(made, "PRETRAINING_SEEDS", (1,))
    made._pretrained.cache_clear()
    try:
        subject = smooth_subject(facts(people=2), SMOOTH.model_copy(update={"epochs": 2}))
        begun = subject.start_model()
        assert next(begun.parameters()).dtype == torch.float64
        assert model_hash(begun) == model_hash(subject.start_model()) != model_hash(start().double())
        assert subject.record is not None
        assert subject.record.steps == 2
    finally:
        made._pretrained.cache_clear()
