"""EK-FAC influence of 16 queries on 1,000 documents beside one plain pass (B1), kronfluence and bergson.

The setting is `bench_collect`'s: Llama config, hidden 256, 4 layers, intermediate 1024, vocabulary 2048; 128 tokens,
float32, 2 threads, all attention and MLP linears. Timed is ``attribute``, everything between documents and scores: the
queries' gradients, the factors with the method's own defaults, preconditioning, one pass over all documents.
``total_ratio_float32`` is without the factors' wide products in bfloat16. Rounds alternate plain pass, ours,
kronfluence, bergson, each peer in a process of its own and with its own work alone on the clock;
ratios are taken within a round, medians over rounds. Memory is the peak of a process that did that work alone.
Correlations are with kronfluence's EK-FAC on all documents, per query, at the same relative damping. Where the peers'
environment is not built, their figures are left out, and it says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench_collect import BATCH, Setting, _seconds
from benchmarks.figures import Figure, median, single
from benchmarks.peers.exchange import run_peer, write_task

ROUNDS = 2
DAMPING = 0.1
PEERS = ("kronfluence_ekfac", "bergson_ekfac")
"""Bars on rank and memory are for the first."""


class Ekfac:
    """Our side: ``attribute(subject, behaviour, "ekfac")`` on the benchmark's tokens, written out as words."""

    def __init__(self, setting: Setting | None = None) -> None:
        from tokenizers.pre_tokenizers import WhitespaceSplit

        from rootward.subject.behaviour import Behaviour
        from rootward.subject.subject import Subject

        self.setting = setting or Setting()
        self.record: Any = None
        tokenizer = self.setting.objective.tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[misc]
        documents, queries = (
            [{"text": " ".join(f"w{k:04d}" for k in example.ids.tolist())} for example in examples]
            for examples in (self.setting.documents, self.setting.queries)
        )
        self.subject = Subject(self.setting.model, documents, self.setting.objective)
        self.behaviour = Behaviour.loss("queries", queries)
        own = [example.ids.tolist() for example in self.subject.encoded]
        if own != [example.ids.tolist() for example in self.setting.documents]:
            raise AssertionError("expected the subject's tokens to be the peers'")

    def scores(self, **options: Any) -> Any:
        """Scores ``[q, n]``, positive where training more on the document raises the query's loss."""
        from rootward import attribute
        from rootward.capture.inputs import MethodInputs

        chosen = {"damping": DAMPING, "queries": "each", **options}
        inputs = MethodInputs(self.subject, self.behaviour, self.setting.budget)
        found = attribute(self.subject, self.behaviour, "ekfac", options=chosen, inputs=inputs)
        (self.record,) = [fitted.record for fitted in inputs.fits.values()]
        return found.values

    def ekfac(self) -> Any:
        """With the defaults."""
        return self.scores()

    def float32(self) -> Any:
        """Without products in bfloat16."""
        return self.scores(fit_bf16="never")


def correlations(a: Any, b: Any) -> list[float]:
    """Spearman per query."""
    from scipy.stats import spearmanr

    return [float(spearmanr(x, y).statistic) for x, y in zip(a, b, strict=True)]


def peak() -> None:
    """Do our work alone and print this process's peak resident MB."""
    from rootward.api import peak_memory_mb

    Ekfac().ekfac()
    print(json.dumps(peak_memory_mb()))


def write_setting(folder: Path, setting: Setting) -> None:
    """The very same model, documents and queries for the peers."""
    import torch

    def ids(examples: Any) -> torch.Tensor:
        return torch.stack([e.ids for e in examples])

    def trained(examples: Any) -> torch.Tensor:
        return torch.stack([e.trained for e in examples])

    data = {
        "train_ids": ids(setting.documents),
        "query_ids": ids(setting.queries),
        "train_trained": trained(setting.documents),
        "query_trained": trained(setting.queries),
    }
    write_task(folder, setting.model, data, damping=(DAMPING,), batch=BATCH, threads=2)


def run() -> dict[str, Figure]:
    """Alternating rounds after a warm-up of ours; peers start cold in every round, as their users do."""
    import numpy as np

    from benchmarks.lds_table import peers_here

    setting = Setting()
    ours = Ekfac(setting)
    plain: list[float] = []
    own: list[float] = []
    single_precision: list[float] = []
    peers: dict[str, list[float]] = {name: [] for name in PEERS} if peers_here() else {}
    if not peers:
        print(f"{', '.join(PEERS)}: left out, as .venv-peers is not built (make bench-peers)", file=sys.stderr)
    memory: dict[str, float] = {}
    found: dict[str, Any] = {}
    parts: dict[str, float] = {}
    record: Any = None
    _seconds(setting.plain)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            plain.append(_seconds(setting.plain)[0])
            taken, scores = _seconds(ours.ekfac)
            own.append(taken)
            record = ours.record
            found["ours"] = scores
            parts = {f"part_{k.replace(' ', '_')}": v / plain[-1] for k, v in record.seconds.items()}
            single_precision.append(_seconds(ours.float32)[0])
            for name, seconds in peers.items():
                place = Path(folder) / f"{name}-{turn}"
                write_setting(place, setting)
                result = run_peer(name, place)
                seconds.append(result.seconds["total"])
                memory[name] = result.peak_memory_mb
                found[name] = result.scores[DAMPING]
    peak_mb = _peak_of("benchmarks.bench_ekfac_speed")
    figures = {
        "total_ratio": median([a / b for a, b in zip(own, plain, strict=True)], "<= 2.2"),
        "total_ratio_float32": median([a / b for a, b in zip(single_precision, plain, strict=True)]),
    }
    for name, seconds in peers.items():
        short, first = name.removesuffix("_ekfac"), name == PEERS[0]
        correlated = correlations(found["ours"], found[name])
        figures |= {
            f"speedup_{short}": median([a / b for a, b in zip(seconds, own, strict=True)], ">= 2.5"),
            f"rank_correlation_{short}": median(correlated, ">= 0.95" if first else ""),
            f"{short}_ratio": median([a / b for a, b in zip(seconds, plain, strict=True)]),
            f"{short}_peak_mb": single(memory[name]),
        }
        if first:
            figures[f"memory_ratio_{short}"] = single(peak_mb / memory[name], "<= 1")
    return figures | {
        "plain_seconds": median(plain),
        "peak_mb": single(peak_mb),
        "eigenvalue_documents": single(float(record.documents)),
        "covariance_documents": single(float(record.covariance_documents)),
        "agreement_estimated": single(float(np.nan if record.agreement is None else record.agreement)),
        **{name: single(value) for name, value in parts.items()},
    }


def _peak_of(module: str) -> float:
    import subprocess

    code = f"from {module} import peak; peak()"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))
