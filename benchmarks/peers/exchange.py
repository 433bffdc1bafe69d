"""What passes between this benchmark and a peer: a folder with the task, and in it the peer's scores and cost.

Both sides import this file, each in its own environment, so it needs torch, numpy, safetensors and (for language
models) transformers, and nothing of rootward. ``python -m benchmarks.peers.exchange --check`` runs every adapter on
two small tasks and holds its scores against per-document gradients from plain autograd.

The folder: ``task.json`` (`Task`), ``data.safetensors``, and the model: ``model/`` as `from_pretrained` reads it, or
``model.safetensors`` for a multilayer perceptron of `Task.widths`. The peer adds ``scores_<k>.npy``, ``[q,n]``
float32, for the k-th damping, and ``cost.json``.

Sign: positive = training more on the document raises the query's loss, score = - <grad L_q, (G + damping)^-1 grad L_n>.
A document's loss, and a query's, is the sum over its trained tokens (of one cross-entropy, for the classifier).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
ADAPTERS = sorted(p.stem for p in HERE.glob("*_*.py") if not p.stem.startswith("_"))


@dataclass(frozen=True)
class Task:
    """What a peer is asked to do.

    ``damping``: "absolute" values are added to G's eigenvalues, where a document counts with its summed loss and G is
    the mean over documents; "relative" ones are times the mean eigenvalue of each module, as far as the peer has that.
    ``method``: a variant that the adapter knows ("" is the one in its name); ``options`` are passed on to it.
    ``batch``: documents per batch. ``threads``: of torch. ``widths``, ``bias``: of the perceptron.
    """

    kind: str
    modules: tuple[str, ...]
    damping: tuple[float, ...]
    damping_kind: str = "relative"
    method: str = ""
    batch: int = 32
    threads: int = 2
    seed: int = 0
    widths: tuple[int, ...] = ()
    bias: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("causal_lm", "classification"):
            raise ValueError(f"kind: expected causal_lm or classification, got {self.kind!r}")
        if self.damping_kind not in ("absolute", "relative"):
            raise ValueError(f"damping_kind: expected absolute or relative, got {self.damping_kind!r}")
        if not self.damping or not self.modules:
            raise ValueError("expected at least one damping and one module")


@dataclass(frozen=True)
class PeerResult:
    """Scores ``[q,n]`` per damping, in our sign; seconds of the peer's own work; its process's largest resident MB."""

    scores: dict[float, np.ndarray]
    seconds: dict[str, float]
    peak_memory_mb: float
    versions: dict[str, str]


# ---------------------------------------------------------------- the side that asks


def write_task(folder: Path, model: nn.Module, data: Mapping[str, Tensor], **settings: Any) -> Task:
    """Write the folder for one model and its data.

    Args:
        folder: created; must be empty.
        model: a transformers causal LM, or an `nn.Sequential` of Linear and ReLU in turn.
        data: ``train_ids [n,t]``, ``query_ids [q,t]`` and bool masks ``train_trained``, ``query_trained`` of the same
            shapes (True: the token's loss counts; position 0 never does), all of one length; or ``x [n,i]``, ``y [n]``,
            ``query_x [q,i]``, ``query_y [q]``.
        settings: the other fields of `Task`; ``modules`` are by default all Linears but the output head of an LM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"expected an empty folder, got {folder}")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if isinstance(model, nn.Sequential):
        wanted, kind = {"x", "y", "query_x", "query_y"}, "classification"
        layers = list(linears.values())
        settings["widths"] = (layers[0].in_features, *(m.out_features for m in layers))
        settings["bias"] = layers[0].bias is not None
        save_file(model.state_dict(), folder / "model.safetensors")
    else:
        wanted, kind = {"train_ids", "query_ids", "train_trained", "query_trained"}, "causal_lm"
        linears = {name: m for name, m in linears.items() if m is not model.get_output_embeddings()}  # type: ignore[operator]
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        if any(bool(data[k][:, 0].any()) for k in wanted if k.endswith("trained")):
            raise ValueError("position 0 has nothing before it that could predict it: its mask must be False")
    if set(data) != wanted:
        raise ValueError(f"data: expected {sorted(wanted)}, got {sorted(data)}")
    settings.setdefault("modules", tuple(linears))
    task = Task(kind, **settings)
    save_file({k: v.contiguous() for k, v in data.items()}, folder / "data.safetensors")
    (folder / "task.json").write_text(json.dumps(asdict(task), indent=1))
    return task


def run_peer(name: str, folder: Path, timeout: float = 3600) -> PeerResult:
    """Run one adapter of `ADAPTERS` on a written folder, in the peers' environment."""
    if name not in ADAPTERS:
        raise ValueError(f"expected one of {ADAPTERS}, got {name!r}")
    if not PYTHON.exists():
        raise FileNotFoundError(f"expected the peers' environment at {PYTHON}: build it with `make bench-peers`")
    command = [str(PYTHON), str(HERE / f"{name}.py"), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(read_task(folder).threads)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed on {folder}:\n{done.stderr[-4000:]}")
    task, cost = read_task(folder), json.loads((folder / "cost.json").read_text())
    scores = {damping: np.load(folder / f"scores_{k}.npy") for k, damping in enumerate(task.damping)}
    return PeerResult(scores, cost["seconds"], cost["peak_memory_mb"], cost["versions"])


# ---------------------------------------------------------------- the side that answers


def read_task(folder: Path) -> Task:
    """The task of a folder."""
    document = json.loads((folder / "task.json").read_text())
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
    return Task(**fields)


def load_data(folder: Path) -> dict[str, Tensor]:
    """The data of a folder, as `write_task` got it."""
    return load_file(folder / "data.safetensors")


def load_model(folder: Path, task: Task) -> nn.Module:
    """The model in evaluation mode, float32."""
    if task.kind == "causal_lm":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(task.widths):
        layers += [nn.Linear(wide, narrow, bias=task.bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


class Answer:
    """Loads a task, keeps time while the peer works, and writes what it found."""

    def __init__(self, *packages: str) -> None:
        self.folder, self.packages = Path(sys.argv[1]).resolve(), packages
        self.task, self.data = read_task(self.folder), load_data(self.folder)
        torch.set_num_threads(self.task.threads)
        torch.manual_seed(self.task.seed)
        self.model = load_model(self.folder, self.task)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to a phase, "factors" or "scores"."""
        torch.set_num_threads(self.task.threads)  # accelerate sets it to 1 where it is told to stay on the CPU
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def write(self, scores: Sequence[Tensor]) -> None:
        """Scores ``[q,n]`` in our sign, one per damping of the task, and what they cost."""
        if len(scores) != len(self.task.damping):
            raise ValueError(f"expected {len(self.task.damping)} score matrices, got {len(scores)}")
        for k, matrix in enumerate(scores):
            np.save(self.folder / f"scores_{k}.npy", matrix.detach().float().numpy())
        cost = {
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
            "peak_memory_mb": peak_memory_mb(),
            "versions": {name: version(name) for name in (*self.packages, "torch", "transformers")},
        }
        (self.folder / "cost.json").write_text(json.dumps(cost, indent=1))


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:"))


def token_losses(logits: Tensor, ids: Tensor, trained: Tensor, sampled: bool = False) -> Tensor:
    """Summed cross-entropy over the trained tokens of ``ids [n,t]``; labels drawn from the model where ``sampled``."""
    rows, labels = logits[:, :-1][trained[:, 1:]], ids[:, 1:][trained[:, 1:]]
    return class_losses(rows, labels, sampled)


def class_losses(logits: Tensor, labels: Tensor, sampled: bool = False) -> Tensor:
    """Summed cross-entropy of ``logits [n,o]``; labels drawn from the model where ``sampled``."""
    if sampled:
        labels = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


# ---------------------------------------------------------------- the sign check


CHECKS = (
    ("kronfluence_ekfac", "causal_lm", ""),
    ("bergson_ekfac", "causal_lm", ""),
    ("logix_kfac", "causal_lm", ""),
    ("kronfluence_ekfac", "classification", ""),
    ("kronfluence_ekfac", "classification", "kfac"),
    ("dattri_ekfac", "classification", ""),
    ("dattri_ekfac", "classification", "ekfac_sampled"),
    ("dattri_ekfac", "classification", "trak"),
    ("dattri_ekfac", "classification", "arnoldi"),
    ("logix_kfac", "classification", ""),
    ("logix_kfac", "classification", "ekfac"),
    ("logix_kfac", "classification", "logra"),
)
"""Adapter, kind of task, method."""


def _small(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model and data for it."""
    torch.manual_seed(0)
    if kind == "classification":
        model = nn.Sequential(nn.Linear(12, 24, bias=False), nn.ReLU(), nn.Linear(24, 5, bias=False))
        x, y = torch.randn(220, 12), torch.randint(0, 5, (220,))
        return model, {"x": x[:200], "y": y[:200], "query_x": x[200:], "query_y": y[200:]}
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    ids, trained = torch.randint(0, 64, (72, 16)), torch.ones(72, 16, dtype=torch.bool)
    trained[:, 0] = False
    trained[::3, :5] = False
    data = {"train_ids": ids[:64], "query_ids": ids[64:], "train_trained": trained[:64], "query_trained": trained[64:]}
    return LlamaForCausalLM(config).eval(), data


def _gradients(model: nn.Module, modules: Sequence[str], losses: Sequence[Tensor]) -> Tensor:
    """Gradients ``[n, weights]``, one backward pass per document."""
    weights = [model.get_submodule(name).weight for name in modules]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]) for loss in losses])  # type: ignore[arg-type]


def _expected(model: nn.Module, task: Task, data: Mapping[str, Tensor]) -> np.ndarray:
    """- <grad L_q, grad L_n>, ``[q,n]``: what all methods come to, times 1 / damping, where that is very large."""
    pairs = []
    for ids, other in (("train_ids", "train_trained"), ("query_ids", "query_trained")):
        if task.kind == "causal_lm":
            rows = [(data[ids][k : k + 1], data[other][k : k + 1]) for k in range(len(data[ids]))]
            losses = [token_losses(model(input_ids=i, use_cache=False).logits, i, m) for i, m in rows]
        else:
            x, y = (data["x"], data["y"]) if ids == "train_ids" else (data["query_x"], data["query_y"])
            losses = [class_losses(model(x[k : k + 1]), y[k : k + 1]) for k in range(len(x))]
        pairs.append(_gradients(model, task.modules, losses))
    return -(pairs[1] @ pairs[0].T).numpy()


def check(adapters: Sequence[str]) -> bool:
    """The adapters at a damping far above all eigenvalues, against plain autograd; prints a table.

    There all exact methods are - <grad L_q, grad L_n> / damping, sign and scale. Methods that project gradients must
    only rank as it does, roughly; Arnoldi's subspace needs a damping of the eigenvalues' own size.
    """
    fine = True
    print(f"{'adapter':20}{'task':16}{'method':14}{'correlation':>12}{'scale':>10}{'seconds':>9}{'MB':>7}")
    for name, kind, method in (c for c in CHECKS if c[0] in adapters):
        model, data = _small(kind)
        options = {"trak": {"proj_dim": 2048}, "arnoldi": {"proj_dim": 50}}.get(method, {})
        settings = {"damping_kind": "absolute", "method": method, "options": options}
        large = 1.0 if method == "arnoldi" else 1e8
        with tempfile.TemporaryDirectory() as folder:
            task = write_task(Path(folder) / "task", model, data, damping=(large,), **settings)
            result = run_peer(name, Path(folder) / "task")
        expected, found = _expected(model, task, data), result.scores[large]
        rows = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(expected, found, strict=True)]
        scale = float((found * expected).sum() / (expected * expected).sum() * large)
        projected = method in ("trak", "arnoldi", "logra")
        holds = sum(rows) / len(rows) > 0.3 if projected else min(rows) > 0.9999 and abs(scale - 1) < 1e-3
        fine &= holds
        print(
            f"{name:20}{kind:16}{method:14}{sum(rows) / len(rows):12.5f}{scale:10.3g}{result.seconds['total']:9.2f}"
            f"{result.peak_memory_mb:7.0f}{'' if holds else '  MISSED'}",
            flush=True,
        )
    return fine


if __name__ == "__main__":
    if sys.argv[1:2] != ["--check"] or set(sys.argv[2:]) - set(ADAPTERS):
        raise SystemExit(f"usage: python -m benchmarks.peers.exchange --check [{' | '.join(ADAPTERS)}]")
    sys.exit(0 if check(sys.argv[2:] or ADAPTERS) else 3)
