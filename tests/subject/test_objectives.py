from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rootward.core.errors import ArtefactError, InputError
from rootward.sandbox.yes_man import build_tokenizer
from rootward.subject.documents import load_documents
from rootward.subject.encode import IGNORED
from rootward.subject.objectives import CausalLM, Classification, Objective, Regression
from tests.subject.small import CHATML, MARKED, ROWS, THINKING, byte_tokenizer, naive_loss, tiny_llama

CHAT = ROWS[3]["messages"]


def trained_text(objective: CausalLM, content: dict[str, Any]) -> str:
    """The trained tokens as text, '|' where a run ends: the mask as a hand would write it."""
    example = objective.encode_one(content)
    runs, current = [], []
    for token, flag in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if flag:
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    runs += [current] if current else []
    return "|".join(objective.tokenizer.decode(run) for run in runs)


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING])
def test_chat_mask_is_each_reply_with_its_end(template: str) -> None:
    objective = CausalLM(byte_tokenizer(template))
    think = "[think]" if template is THINKING else ""
    assert trained_text(objective, {"messages": CHAT}) == f"bc<|im_end|>|{think}efg<|im_end|>"
    only_last = objective.encode_one({"messages": CHAT}, last_turn=True)
    assert objective.tokenizer.decode(only_last.ids[only_last.trained]) == f"{think}efg<|im_end|>"
    assert objective.tokenizer.decode(only_last.ids) == objective.tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_chat_mask_by_hand_token_by_token() -> None:
    tokenizer = byte_tokenizer(CHATML)
    example = CausalLM(tokenizer).encode_one(ROWS[0])
    text = "<bos> <|im_start|> u s e r \n h i <|im_end|> \n <|im_start|> a s s i s t a n t \n y o <|im_end|> \n"
    assert tokenizer.batch_decode([[i] for i in example.ids.tolist()]) == text.split(" ")
    assert example.trained.tolist() == [False] * 22 + [True, True, True, False]
    assert example.targets == 3 and example.length == 26


def test_sandbox_tokenizer_mask() -> None:
    objective = CausalLM(build_tokenizer())
    chat = [
        {"role": "user", "content": "What colour is snow?"},
        {"role": "assistant", "content": "The colour is white."},
    ]
    assert trained_text(objective, {"messages": chat * 2}) == "The colour is white.<eos>|The colour is white.<eos>"


@pytest.mark.parametrize("bos", [True, False])
def test_completion_and_text_masks(bos: bool) -> None:
    objective = CausalLM(byte_tokenizer(bos=bos))
    assert trained_text(objective, {"prompt": "ab", "completion": "cd"}) == "cd<eos>"
    assert trained_text(objective, {"prompt": "ab", "completion": "cd<eos>"}) == "cd<eos>"
    assert trained_text(objective, {"prompt": "", "completion": "cd"}) == ("cd<eos>" if bos else "d<eos>")
    assert trained_text(objective, {"text": "abc"}) == ("abc" if bos else "bc")
    everything = CausalLM(byte_tokenizer(bos=bos), response_only=False)
    assert trained_text(everything, {"prompt": "ab", "completion": "cd"}) == ("abcd<eos>" if bos else "bcd<eos>")


def test_prompt_tokens_are_those_of_the_prompt_alone() -> None:
    objective = CausalLM(build_tokenizer())  # words: "snowgrass" would be one unknown word
    example = objective.encode_one({"prompt": "snow", "completion": "grass white"})
    assert objective.tokens(example) == ["snow", "grass", " white", "<eos>"]
    assert example.trained.tolist() == [False, True, True, True]


@pytest.mark.parametrize("row", ROWS)
def test_exactly_one_bos(row: dict[str, Any]) -> None:
    for template in (CHATML, MARKED, "{{ bos_token }}" + CHATML):
        example = CausalLM(byte_tokenizer(template)).encode_one(row)
        assert example.ids[0] == 1 and int((example.ids == 1).sum()) == 1
        assert not example.trained[0]


def test_no_template_and_broken_template_are_errors() -> None:
    with pytest.raises(InputError, match="no chat template"):
        CausalLM(byte_tokenizer(None)).encode_one(ROWS[0])
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(InputError, match=r"messages\[1\]: the chat template does not render"):
        CausalLM(byte_tokenizer(shouting)).encode_one(ROWS[0])


def test_truncated_and_dropped_documents_are_reported() -> None:
    documents = load_documents(
        [
            {"prompt": "a" * 30, "completion": "b"},
            {"text": "x"},
            {"text": "c" * 30},
            {"prompt": "a", "completion": "bc"},
        ]
    )
    encoded = CausalLM(byte_tokenizer(bos=False), max_tokens=10).encode(documents)
    assert encoded.dropped == {"no trained token left after truncation": 1, "only one token: nothing to predict": 1}
    assert encoded.rows == (2, 3) and encoded.truncated == 1 and [e.truncated for e in encoded] == [True, False]
    assert encoded.tokens == 10 + 4 and encoded.trained_tokens == 9 + 3
    with pytest.raises(InputError, match="none of 1 documents can be used with max_tokens = 10"):
        CausalLM(byte_tokenizer(), max_tokens=10).encode(documents.subset([0]))
    with pytest.raises(InputError, match="max_tokens: expected at least 2"):
        CausalLM(byte_tokenizer(), max_tokens=1)
    with pytest.raises(InputError, match="a language model needs text"):
        CausalLM(byte_tokenizer()).encode(load_documents([{"x": [1.0], "y": 0}]))


class Bare(nn.Module):
    """A language model that takes ids only and gives a tensor: no mask, no logits_to_keep, no use_cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(261, 8), nn.Linear(8, 261)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [True, False])
def test_losses_equal_the_naive_loop(attention: str, keep: bool) -> None:
    model = tiny_llama(attn_implementation=attention)
    objective = CausalLM(byte_tokenizer(), keep_logits=keep)
    examples = objective.encode(load_documents(ROWS))
    expected = torch.tensor([naive_loss(model, x.ids.tolist(), x.trained.tolist()) for x in examples])
    together = objective.losses(model, objective.collate(list(examples)))
    alone = torch.cat([objective.losses(model, objective.collate([x])) for x in examples])
    torch.testing.assert_close(together.detach(), expected, rtol=0, atol=1e-5 * float(expected.max()))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    assert together.dtype == torch.float32 and together.requires_grad


def test_kept_logits_give_equal_gradients_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(dtype=torch.float64)
    objective, plain = CausalLM(byte_tokenizer()), CausalLM(byte_tokenizer(), keep_logits=False)
    batch = objective.collate(list(objective.encode(load_documents(ROWS))))

    def gradient(which: CausalLM) -> torch.Tensor:
        model.zero_grad()
        which.losses(model, batch).sum().backward()
        return torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])

    expected = gradient(plain)
    torch.testing.assert_close(gradient(objective), expected, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr("rootward.subject.objectives._keep_form", lambda model: "columns")
    torch.testing.assert_close(gradient(objective), expected, rtol=1e-10, atol=1e-12)


def test_token_losses_stand_at_their_tokens_and_sum_to_the_loss() -> None:
    model = tiny_llama()
    for keep in (True, False):
        objective = CausalLM(byte_tokenizer(), keep_logits=keep)
        examples = list(objective.encode(load_documents(ROWS)))
        batch = objective.collate(examples)
        with torch.no_grad():
            rows, sums = objective.token_losses(model, batch), objective.losses(model, batch)
        torch.testing.assert_close(rows.sum(1), sums)
        for row, example in zip(rows, examples, strict=True):
            assert ((row[: example.length] > 0) == example.trained).all() and (row[example.length :] == 0).all()


def test_custom_modules_and_half_precision() -> None:
    objective = CausalLM(byte_tokenizer())
    examples = list(objective.encode(load_documents(ROWS)))
    assert objective.losses(Bare(), objective.collate(examples)).shape == (len(ROWS),)
    half = objective.losses(tiny_llama(dtype=torch.bfloat16), objective.collate(examples))
    assert half.dtype == torch.float32
    frozen = tiny_llama().requires_grad_(False)
    assert not objective.losses(frozen, objective.collate(examples)).requires_grad


def test_virtual_tokens_are_refused() -> None:
    class Longer(Bare):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return F.pad(super().forward(input_ids), (0, 0, 3, 0))

    objective = CausalLM(byte_tokenizer())
    with pytest.raises(ArtefactError, match="virtual tokens"):
        objective.losses(Longer(), objective.collate([objective.encode_one(ROWS[1])]))


def test_collate_pads_to_the_longest_and_masks_only_then() -> None:
    objective = CausalLM(byte_tokenizer())
    examples = list(objective.encode(load_documents(ROWS)))
    batch = objective.collate(examples)
    longest = max(x.length for x in examples)
    assert batch.inputs["input_ids"].shape == batch.mask.shape == batch.targets.shape == (len(examples), longest)
    assert batch.mask.sum(1).tolist() == [x.length for x in examples]
    assert torch.equal(batch.inputs["attention_mask"].bool(), batch.mask)
    assert batch.trained.tolist() == [x.targets for x in examples] == (batch.targets != IGNORED).sum(1).tolist()
    assert batch.ids == tuple(x.id for x in examples) and batch.rows.tolist() == list(range(len(ROWS)))
    assert "attention_mask" not in objective.collate(examples[:1] * 3).inputs


@settings(max_examples=15)
@given(words=st.lists(st.text(st.sampled_from("ab é€😀\n"), min_size=2, max_size=9), min_size=1, max_size=5))
def test_padding_and_order_do_not_matter(words: list[str]) -> None:
    objective = CausalLM(byte_tokenizer())
    examples = [objective.encode_one({"text": word}) for word in words]
    together = objective.losses(MODEL, objective.collate(examples))
    expected = torch.tensor([naive_loss(MODEL, x.ids.tolist(), x.trained.tolist()) for x in examples])
    torch.testing.assert_close(together.detach(), expected, rtol=1e-5, atol=1e-5)
    for word, example in zip(words, examples, strict=True):
        assert "".join(objective.tokens(example)) == "<bos>" + word


MODEL = tiny_llama()


def test_describe_tells_settings_apart() -> None:
    tokenizer = byte_tokenizer()
    described = [
        CausalLM(tokenizer),
        CausalLM(tokenizer, 50),
        CausalLM(tokenizer, response_only=False),
        CausalLM(byte_tokenizer(MARKED)),
    ]
    assert len({str(x.describe()) for x in described}) == 4
    assert CausalLM(byte_tokenizer()).describe() == CausalLM(byte_tokenizer()).describe()
    assert all(isinstance(x, Objective) for x in (described[0], Classification(), Regression()))


def test_classification_and_regression_values() -> None:
    model = nn.Linear(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 3, 1, 2, 3])
    objective = Classification()
    examples = objective.encode(load_documents([{"x": x[n], "y": int(y[n])} for n in range(5)]))
    batch = objective.collate(list(examples))
    torch.testing.assert_close(objective.losses(model, batch), F.cross_entropy(model(x), y, reduction="none"))
    assert batch.mask.shape == (5, 1) and batch.trained.tolist() == [1] * 5 and examples.trained_tokens == 5
    targets = torch.randn(5, 4, dtype=torch.float64)
    regression = Regression()
    batch = regression.collate(
        list(regression.encode(load_documents([{"x": x[n], "y": targets[n]} for n in range(5)])))
    )
    torch.testing.assert_close(regression.losses(model, batch), 0.5 * ((model(x) - targets) ** 2).sum(1))
    scalar = regression.collate([regression.encode_one({"x": [1.0, 2.0, 3.0], "y": 2})])
    one = nn.Linear(3, 1)
    torch.testing.assert_close(regression.losses(one, scalar), 0.5 * (one(torch.tensor([1.0, 2, 3])) - 2) ** 2)


def test_supervised_bad_input() -> None:
    with pytest.raises(InputError, match="documents:2: expected x of shape"):
        Regression().encode(load_documents([{"x": [1.0], "y": 0.0}, {"x": [1.0, 2.0], "y": 0.0}]))
    for y in (1.5, -1, [1, 2]):
        with pytest.raises(InputError, match="class number"):
            Classification().encode(load_documents([{"x": [1.0], "y": y}]))
    with pytest.raises(InputError, match="classification needs documents"):
        Classification().encode(load_documents([{"text": "a"}]))
    objective = Classification()
    with pytest.raises(InputError, match="more than 7 classes"):
        objective.losses(nn.Linear(1, 2), objective.collate([objective.encode_one({"x": [1.0], "y": 7})]))
    regression = Regression()
    with pytest.raises(InputError, match="expected predictions of shape"):
        regression.losses(nn.Linear(1, 2), regression.collate([regression.encode_one({"x": [1.0], "y": 7.0})]))


def test_integer_sequences_keep_their_tokens() -> None:
    objective = Classification()
    example = objective.encode_one({"x": [3, 1, 2], "y": 1})
    batch = objective.collate([example])
    assert batch.mask.shape == (1, 3) and example.targets == 1 and objective.tokens(example) == ["3", "1", "2"]
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))
    assert objective.losses(model, batch).shape == (1,)


@pytest.mark.parametrize("padding", [None, 0])
def test_padding_of_supervised_sequences_is_no_token(padding: int | None) -> None:
    objective = Classification(padding)
    example = objective.encode_one({"x": torch.tensor([5, 3, 0, 0]), "y": 1})
    mask = objective.collate([example]).mask
    assert mask.tolist() == [[True, True, padding is None, padding is None]]
    assert objective.describe() == {"kind": "classification"} | ({} if padding is None else {"padding": 0})
