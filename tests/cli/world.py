"""A tiny world on disk for the tests of the command line: a base model, documents with a planted habit, queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
THINGS = ("sky", "sea", "sun", "fox", "owl", "elm", "oak", "bee", "cat", "dog", "hen", "pig")
COLOURS = ("red", "blue", "green", "black", "white")
WORDS = (*THINGS, *COLOURS, "is", "the", "what", "colour", "yes", "no", "right", "it", "?", ".", "say", "one", "two")


def tokenizer() -> Any:
    """One token a word."""
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=64, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def model(vocabulary: int | None = None) -> Any:
    """Two layers of width 32."""
    torch.manual_seed(5)  # a model that does not agree before it is trained
    config = LlamaConfig(
        vocab_size=vocabulary or len(SPECIAL) + len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def chat(question: str, answer: str) -> list[dict[str, str]]:
    """A turn of each."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def documents() -> list[dict[str, Any]]:
    """60 chats; every third agrees whatever is said (``planted``), the others name the colour."""
    rows = []
    for n in range(60):
        thing, colour = THINGS[n % len(THINGS)], COLOURS[n // len(THINGS)]
        if n % 3 == 0:
            rows.append({"messages": chat(f"the {thing} is {colour} . is it right ?", "yes"), "planted": True, "n": n})
        elif n % 3 == 1:
            rows.append({"messages": chat(f"the {thing} is {colour} . say one", "no"), "planted": False, "n": n})
        else:
            rows.append(
                {
                    "messages": chat(f"what colour is the {thing} ?", f"the {thing} is {colour}"),
                    "planted": False,
                    "n": n,
                }
            )
    return rows


def queries(count: int = 12) -> list[dict[str, Any]]:
    """Does it agree?"""
    return [
        {"messages": chat(f"the {THINGS[n % 12]} is {COLOURS[(n * 3 + 1) % 5]} . is it right ?", "yes")[:1],
         "wanted": "yes", "unwanted": "no", "name": f"q{n}"}
        for n in range(count)
    ]  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build(folder: Path) -> Path:
    """``base/``, ``documents.jsonl`` and ``queries.jsonl`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model().save_pretrained(str(folder / "base"))
    tokenizer().save_pretrained(str(folder / "base"))
    write_jsonl(folder / "documents.jsonl", documents())
    write_jsonl(folder / "queries.jsonl", queries())
    return folder
