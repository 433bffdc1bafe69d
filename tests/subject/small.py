"""Small tokenizers and models for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops the reasoning of all turns but the last, as Qwen3's template does: no prefix of the whole but the first.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '[think]' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML, bos: bool = True) -> Any:
    """One token per byte (ids from 5 on), five special tokens; puts a BOS in front of plain text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*SPECIAL, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    found.chat_template = template
    return found


def tiny_llama(
    vocabulary: int = 261, *, seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32, **extra: Any
) -> Any:
    """Two layers, width 16; float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **extra,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def save_base(folder: Path, **options: Any) -> Path:
    """A tiny model with its tokenizer in a folder."""
    tiny_llama(**options).save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def naive_loss(model: Any, ids: list[int], trained: list[bool]) -> float:
    """Sum of cross-entropy over full logits of one unpadded document: the slow twin."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for t in range(1, len(ids)):
        if trained[t]:
            total += float(F.cross_entropy(logits[t - 1 : t], torch.tensor(ids[t : t + 1])))
    return total


ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"prompt": "2+2=", "completion": "4"},
    {"text": "abcdefgh"},
    {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "bc"},
            {"role": "user", "content": "d"}, {"role": "assistant", "content": "efg"},
        ]
    },
    {"prompt": "the capital is", "completion": " paris"},
    {"text": "xy"},
]  # fmt: skip
