"""Does the gradient find documents of the query's kind in text that nobody here wrote?

A small language model with its own byte-pair tokenizer is trained on 1,000 sums of GSM8K, 1,000 passages of
Shakespeare and the seed tasks of ``ROOTWARD_DATA`` (163 of 175: twelve are kept out as queries). 12 held-out queries of
each kind; mean average precision of finding documents of the query's own kind, with BM25, the model's own embeddings
and random order beside.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure

KINDS, PER_KIND, QUERIES = ("gsm8k", "shakespeare", "seed_tasks"), 1000, 12
TOKENS, VOCABULARY = 256, 2048


def texts(folder: Path) -> dict[str, list[str]]:
    """Texts by kind, in the files' order."""
    sums = [json.loads(line) for line in (folder / "gsm8k_train_2000.jsonl").read_text().splitlines()]
    plays = (folder / "tinyshakespeare.txt").read_text()
    tasks = [json.loads(line) for line in (folder / "seed_tasks.jsonl").read_text().splitlines()]
    return {
        "gsm8k": [f"{row['question']}\n{row['answer']}" for row in sums],
        "shakespeare": [plays[start : start + 300] for start in range(0, len(plays) - 300, 300)],
        "seed_tasks": [_task(row) for row in tasks],
    }


def _task(row: dict[str, Any]) -> str:
    instance = row["instances"][0]
    return "\n".join(piece for piece in (row["instruction"], instance["input"], instance["output"]) if piece)


def average_precision(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Mean of the precision at every positive document's rank."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive, scores))


def tokenizer_of(corpus: Sequence[str]) -> Any:
    """A byte-pair tokenizer trained on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=TOKENS
    )


def fitting(pool: Sequence[str], tokenizer: Any) -> list[str]:
    """The first texts of a shuffled pool; a query that is longer than the context is cut where the context ends."""
    ids = [tokenizer(text, truncation=True, max_length=TOKENS - 1)["input_ids"] for text in pool[:QUERIES]]
    return [tokenizer.decode(row) for row in ids]


def subject_on(documents: Sequence[dict[str, str]], tokenizer: Any) -> Any:
    """A small Llama trained on the documents."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rootward.subject.documents import load_documents
    from rootward.subject.objectives import CausalLM
    from rootward.subject.plan import Recipe
    from rootward.subject.subject import Subject
    from rootward.subject.training import train

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=384,
            vocab_size=len(tokenizer),
            max_position_embeddings=TOKENS,
            tie_word_embeddings=False,
        )
    )
    objective = CausalLM(tokenizer, TOKENS)
    loaded = load_documents(list(documents))
    recipe = Recipe(lr=2e-3, epochs=3, batch_size=32, schedule="linear", warmup_steps=20, clip=1.0, threads=2)
    train(model, objective.encode(loaded), objective, recipe)
    return Subject(model, loaded, objective, recipe=recipe)


def run() -> dict[str, Figure]:
    """Train, ask 36 queries, rank, and score each ranking by the query's kind."""
    import numpy as np
    import torch

    from rootward.api import attribute
    from rootward.subject.behaviour import Behaviour

    torch.set_num_threads(2)
    folder = Path(os.environ.get("ROOTWARD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"real_text needs the data of ROOTWARD_DATA; {folder} is not there")
    found = texts(folder)
    rng = random.Random(0)
    documents: list[dict[str, str]] = []
    pools: dict[str, list[str]] = {}
    for kind in KINDS:
        pool = list(dict.fromkeys(found[kind]))
        # all 175 seed tasks are either document or query: twelve are kept out of the training
        count = min(PER_KIND, len(pool) - QUERIES)
        rng.shuffle(pool)
        train, held = pool[:count], pool[count:]
        documents += [{"text": text, "kind": kind} for text in train]
        pools[kind] = held
    tokenizer = tokenizer_of([row["text"] for row in documents])
    queries = [{"text": text, "kind": kind} for kind in KINDS for text in fitting(pools[kind], tokenizer)]
    subject = subject_on(documents, tokenizer)
    kinds = np.array([subject.documents[e.row].meta["kind"] for e in subject.encoded])
    asked = Behaviour.loss("text of a kind", [{"text": row["text"]} for row in queries])
    figures: dict[str, Figure] = {}
    for name, method, bar in (
        ("map_gradient", "gradient_cosine", ">= 0.90"),
        ("map_gradient_dot", "gradient_dot", ""),
        ("map_bm25", "bm25", ""),
        ("map_embedding", "representation_cosine", ""),
        ("map_random", "random", ""),
    ):
        scores = attribute(subject, asked, method, token_budget=4096)
        # the measurement is a loss: what lowers it most comes first
        values = np.broadcast_to(-scores.values, (len(queries), len(kinds)))
        precisions = [
            average_precision(v.tolist(), (kinds == q["kind"]).tolist()) for v, q in zip(values, queries, strict=True)
        ]
        half = 1.96 * float(np.std(precisions, ddof=1)) / len(precisions) ** 0.5
        mean = float(np.mean(precisions))
        figures[name] = Figure(mean, mean - half, mean + half, len(precisions), bar)
    return figures
