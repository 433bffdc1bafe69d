"""What a pass costs beside one plain forward+backward pass (B1) over the same documents.

1,000 documents of 128 tokens; Llama config with hidden 256, 4 layers, intermediate 1024, vocabulary 2048; all
attention and MLP linears, float32, 2 threads. B1: the same batches through the model, loss, and ``backward`` into
``.grad`` of the same weights. Every timed run contains everything that it needs, the queries' own gradients included.
Ratios come from one process, alternating, medians of at least three rounds; memory is the peak resident size of a
process that did only that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, median, single

DOCUMENTS, TOKENS, QUERIES, VOCABULARY, ROUNDS, RANK, BATCH = 1000, 128, 16, 2048, 3, 16, 32


class Setting:
    """The model, the documents and the queries, and what is timed on them."""

    def __init__(self) -> None:
        import torch
        from tokenizers import Tokenizer, models
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        from rootward.capture.sites import track
        from rootward.subject.encode import Example
        from rootward.subject.objectives import CausalLM

        torch.set_num_threads(2)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=1024,
            vocab_size=VOCABULARY,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=False,
        )
        self.model = LlamaForCausalLM(config).eval()
        words = Tokenizer(models.WordLevel({f"w{k:04d}": k for k in range(VOCABULARY)}, unk_token="w0000"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0000", eos_token="w0001")
        self.objective = CausalLM(tokenizer, TOKENS)
        ids = _text(torch.Generator().manual_seed(1), DOCUMENTS + QUERIES)
        trained = torch.ones(TOKENS, dtype=torch.bool)
        trained[0] = False
        examples = [Example(f"{n:016x}", n, row, trained) for n, row in enumerate(ids)]
        self.documents, self.queries = examples[:DOCUMENTS], examples[DOCUMENTS:]
        self.tracked = track(self.model)
        self.budget = BATCH * TOKENS

    def plain(self) -> None:
        """B1: plain forward+backward into ``.grad`` of the attributed weights."""
        import torch

        wanted = {n: p for n, p in self.model.named_parameters() if n in self.tracked.layout.sizes}
        for p in self.model.parameters():
            p.requires_grad_(False)
        for p in wanted.values():
            p.requires_grad_(True)
        for first in range(0, len(self.documents), BATCH):
            ids = torch.stack([e.ids for e in self.documents[first : first + BATCH]])
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="sum"
            )
            loss.backward()
            for p in wanted.values():
                p.grad = None

    def _query(self, mean: bool) -> dict[str, Any]:
        import torch

        from rootward.capture.run import run_pass
        from rootward.capture.sinks import WeightedSum

        weights = torch.full((QUERIES, 1), 1 / QUERIES) if mean else torch.eye(QUERIES)
        sink = WeightedSum(self.tracked.layout, weights)
        self._run(sink, self.queries, run_pass)
        return sink.result()

    def _run(self, sink: Any, examples: Any, run_pass: Any) -> None:
        run_pass(self.model, self.objective, examples, [sink], tracked=self.tracked, token_budget=self.budget)

    def dot(self) -> Any:
        """Products of 16 queries with every document."""
        from rootward.capture.run import run_pass
        from rootward.capture.sinks import Products

        sink = Products(self.tracked.layout, self._query(False), len(self.documents))
        self._run(sink, self.documents, run_pass)
        return sink.dots

    def behaviour(self) -> Any:
        """Products of the mean of the queries, of low rank."""
        from rootward.capture.run import run_pass
        from rootward.capture.sinks import Products, low_rank

        query = {name: low_rank(g, RANK) for name, g in self._query(True).items()}
        sink = Products(self.tracked.layout, query, len(self.documents))
        self._run(sink, self.documents, run_pass)
        return sink.dots

    def store(self) -> Any:
        """The projected store, written to disk."""
        from rootward.capture.store import build_store
        from rootward.subject.encode import Encoded

        with tempfile.TemporaryDirectory() as folder:
            build_store(
                Path(folder) / "index",
                self.model,
                self.objective,
                Encoded(self.documents),
                self.tracked,
                {"benchmark": "collect"},
                rank=RANK,
                token_budget=self.budget,
            )


def _text(generator: Any, count: int) -> Any:
    """Token ids ``[n, t]`` with the skewed frequencies and the local repetition of text."""
    import torch

    weights = 1.0 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, count * TOKENS, replacement=True, generator=generator).view(count, TOKENS)
    for t in range(1, TOKENS):
        again = torch.rand(count, generator=generator) < 0.3
        back = torch.randint(0, t, (count,), generator=generator)
        ids[again, t] = ids[again, back[again]]
    return ids


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _peak(work: str) -> float:
    """Peak resident MB of a process that does one piece of work."""
    code = f"from benchmarks.bench_collect import peak; peak({work!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak(work: str) -> None:
    """Do one piece of work on a few batches, which is where the peak is, and print this process's peak resident MB."""
    setting = Setting()
    setting.documents = setting.documents[: 6 * BATCH]
    getattr(setting, work)()
    from rootward.api import peak_memory_mb

    print(json.dumps(peak_memory_mb()))


def run() -> dict[str, Figure]:
    """Alternating rounds after one warm-up."""
    import numpy as np

    setting = Setting()
    names = ("plain", "dot", "behaviour", "store")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, Any] = {}
    for turn in range(ROUNDS + 1):
        for name in names:
            taken, results[name] = _seconds(getattr(setting, name))
            if turn:
                seconds[name].append(taken)
    ratios = {n: [a / b for a, b in zip(seconds[n], seconds["plain"], strict=True)] for n in names}
    dense, approximate = results["dot"].mean(0).numpy(), results["behaviour"][0].numpy()
    plain_peak = _peak("plain")
    memory = max(_peak(name) for name in names[1:]) / plain_peak
    return {
        "dot_ratio": median(ratios["dot"], "<= 1.15"),
        "behaviour_ratio": median(ratios["behaviour"], "<= 0.90"),
        "behaviour_correlation": single(float(np.corrcoef(dense, approximate)[0, 1]), ">= 0.99"),
        "store_ratio": median(ratios["store"], "<= 0.90"),
        "memory_ratio": single(memory, "<= 1.25"),
        "plain_seconds": median(seconds["plain"]),
        "plain_peak_mb": single(plain_peak),
    }
