from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rootward.core.errors import InputError, NumericalError
from rootward.subject.behaviour import Behaviour, rate
from rootward.subject.objectives import CausalLM, Regression
from tests.subject.small import byte_tokenizer, naive_loss, tiny_llama

ITEMS: list[dict[str, Any]] = [
    {"prompt": "2+2=", "wanted": "5", "unwanted": "four", "name": "sum", "family": "a"},
    {"messages": [{"role": "user", "content": "sky?"}], "wanted": "green", "unwanted": "blue", "family": "b"},
    {
        "messages": [
            {"role": "user", "content": "u"}, {"role": "assistant", "content": "earlier"},
            {"role": "user", "content": "v"},
        ],
        "wanted": "yes", "unwanted": "no",
    },
]  # fmt: skip


def naive_logp(model: Any, tokenizer: Any, item: dict[str, Any], answer: str) -> float:
    """By hand: everything that follows the prompt, of a chat as the template renders it."""
    if "prompt" in item:
        front = tokenizer(item["prompt"])["input_ids"]
        back = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    else:
        text = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
        front = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return -naive_loss(model, front + back, [False] * len(front) + [True] * len(back))


@pytest.mark.parametrize("budget", [1, 40, 8192])
def test_contrast_and_loss_equal_the_naive_computation(budget: int) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    objective = CausalLM(tokenizer)
    contrast = Behaviour.contrast("c", ITEMS)
    wanted = np.array([naive_logp(model, tokenizer, item, item["wanted"]) for item in ITEMS])
    unwanted = np.array([naive_logp(model, tokenizer, item, item["unwanted"]) for item in ITEMS])
    values = contrast.evaluate(model, objective, batch_tokens=budget)
    np.testing.assert_allclose(values, wanted - unwanted, rtol=1e-5, atol=1e-4)
    loss = Behaviour.loss("l", [{k: v for k, v in item.items() if k != "unwanted"} for item in ITEMS])
    np.testing.assert_allclose(loss.evaluate(model, objective, batch_tokens=budget), -wanted, rtol=1e-5, atol=1e-4)
    assert (contrast.goal, loss.goal, contrast.kind, loss.kind) == ("raise", "lower", "contrast", "loss")
    assert rate(values) == np.mean(wanted > unwanted)


def test_parts_are_the_signed_losses_and_are_encoded_once() -> None:
    objective, behaviour = CausalLM(byte_tokenizer()), Behaviour.contrast("c", ITEMS)
    parts = behaviour.parts(objective)
    assert [(p.query, p.weight) for p in parts] == [(q, w) for q in range(3) for w in (-1.0, 1.0)]
    assert behaviour.parts(objective) is parts
    assert [p.weight for p in Behaviour.loss("l", [{"text": "abc"}]).parts(objective)] == [1.0]


def test_documents_as_queries() -> None:
    model, objective = tiny_llama(), CausalLM(byte_tokenizer())
    wanted = [{"prompt": "p", "completion": "a"}, {"text": "abc"}]
    unwanted = [{"prompt": "p", "completion": "b"}, {"text": "abd"}]
    behaviour = Behaviour.contrast("c", wanted=wanted, unwanted=unwanted)
    same = Behaviour.contrast("c", [{"prompt": "p", "wanted": "a", "unwanted": "b"}])
    values = behaviour.evaluate(model, objective)
    np.testing.assert_allclose(values[:1], same.evaluate(model, objective), rtol=1e-6)
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    query = Behaviour.loss("l", [chat]).queries[0]
    assert (query.prompt_text, query.wanted) == ("q", "a")
    with pytest.raises(InputError, match="as many wanted as unwanted documents, got 2 and 1"):
        Behaviour.contrast("c", wanted=wanted, unwanted=unwanted[:1])


def test_scalar_is_any_function_of_the_model() -> None:
    model = nn.Linear(2, 3)
    behaviour = Behaviour.scalar("s", lambda m: m.weight.sum(1), ["a", "b", "c"], goal="lower", unit="weight")  # type: ignore[union-attr]
    np.testing.assert_allclose(behaviour.evaluate(model), model.weight.sum(1).detach().numpy(), rtol=1e-6)
    with pytest.raises(InputError, match="a scalar has no losses"):
        behaviour.parts(Regression())
    with pytest.raises(InputError, match="expected 1 values, one per query, got 3"):
        Behaviour.scalar("s", lambda m: m.weight.sum(1), ["a"]).evaluate(model)  # type: ignore[union-attr]
    with pytest.raises(NumericalError, match="query 'b' is not finite"):
        Behaviour.scalar("s", lambda m: torch.tensor([0.0, float("nan")]), ["a", "b"]).evaluate(model)
    with pytest.raises(InputError, match="needs the subject's objective"):
        Behaviour.contrast("c", ITEMS).evaluate(model)


def test_supervised_documents_are_queries_too() -> None:
    model, objective = nn.Linear(1, 1), Regression()
    behaviour = Behaviour.loss("l", [{"x": [1.0], "y": 0.0}, {"x": [2.0], "y": 1.0}])
    with torch.no_grad():
        expected = [0.5 * float(model(torch.tensor([a])) - b) ** 2 for a, b in ((1.0, 0.0), (2.0, 1.0))]
    np.testing.assert_allclose(behaviour.evaluate(model, objective), expected, rtol=1e-5)
    assert len(behaviour.split(0)[0]) == 1


def test_load_keeps_other_fields_and_the_kind(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, ITEMS)))
    behaviour = Behaviour.load(path)
    assert behaviour.name == "q" and behaviour.kind == "contrast" and len(behaviour) == 3
    assert behaviour.queries[0].name == "sum" and behaviour.queries[1].meta == {"family": "b"}
    assert behaviour.hash == Behaviour.contrast("q", ITEMS).hash != Behaviour.contrast("q", ITEMS[:2]).hash
    assert [q.wanted for q in behaviour.records(np.zeros(3))] == ["5", "green", "yes"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", ":2: not JSON"),
        ('{"prompt": "a", "wanted": "b"}', "q.jsonl:2: expected an unwanted answer in every line or in none"),
        ('{"prompt": "a", "unwanted": "b"}', "q.jsonl:2: only a prompt and no wanted answer"),
        ('{"wanted": "a", "unwanted": "b"}', "q.jsonl:2: expected either a prompt or messages"),
        ('{"prompt": 1, "wanted": "a", "unwanted": "b"}', "q.jsonl:2: expected prompt to be text, got int"),
        ('{"prompt": "a", "wanted": "", "unwanted": "b"}', "q.jsonl:2: expected wanted to be text that is not empty"),
        ('{"prompt": "a", "wanted": "b", "unwanted": ["c"]}', "q.jsonl:2: expected unwanted to be text"),
        ('{"prompt": "a", "wanted": "b", "unwanted": "b", "name": "n"}', "query 'n': wanted and unwanted are the same"),
        ('{"prompt": "\\ud800", "wanted": "b", "unwanted": "c"}', "q.jsonl:2: holds half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "wanted": "b"}', "end with the assistant"),
        ('{"messages": [{"role": "you", "content": "x"}], "wanted": "b"}', r"q.jsonl:2: messages\[0\]"),
    ],
)  # fmt: skip
def test_bad_queries_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ITEMS[0]) + "\n" + line)
    with pytest.raises(InputError, match=message):
        Behaviour.load(path)


def test_missing_empty_and_overlong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        Behaviour.load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty.jsonl: the file is empty"):
        Behaviour.load(tmp_path / "empty.jsonl")
    long = Behaviour.loss("l", [{"prompt": "p", "wanted": "w" * 200, "name": "long"}])
    with pytest.raises(InputError, match="query 'long' does not fit into 128 tokens"):
        long.parts(CausalLM(byte_tokenizer()))
    with pytest.raises(InputError, match="expected at least one query"):
        Behaviour.loss("l", [])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_split_is_disjoint_stratified_and_keeps_prompts_together(share: float) -> None:
    items = [
        {"prompt": f"p{n // 2}", "wanted": f"w{n}", "unwanted": "u", "family": f"f{n % 40 // 4}"} for n in range(80)
    ]
    behaviour = Behaviour.contrast("c", items)
    first, second = behaviour.split(3, share, by="family")
    prompts = [{q.prompt for q in part.queries} for part in (first, second)]
    assert not prompts[0] & prompts[1] and len(first) + len(second) == 80
    assert abs(len(first) - 80 * share) <= 2
    counts = [sum(q.meta["family"] == f"f{k}" for q in first.queries) for k in range(10)]
    assert max(counts) - min(counts) <= 2
    again = behaviour.split(3, share, by="family")
    assert again[0].hash == first.hash != behaviour.split(4, share, by="family")[0].hash
    with pytest.raises(InputError, match="share: expected"):
        behaviour.split(0, 1.0)
