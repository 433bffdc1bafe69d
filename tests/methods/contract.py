"""A small world for methods, and how they are called in tests: float64, two layers, a dozen documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rootward.api import attribute
from rootward.core import registry
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.documents import load_documents
from rootward.subject.encode import Example
from rootward.subject.folders import save_model, train_folder
from rootward.subject.loading import load_model
from rootward.subject.objectives import CausalLM
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from tests.subject.small import byte_tokenizer, tiny_llama

CARDS = [m.card for m in registry.methods() if m.card.question == "attribution"]
NAMES = sorted({name for card in CARDS for name in (card.key, *card.presets)})
"""Every attribution method under its key and each preset: a new method file is under contract at once."""
GRADIENT = [name for name in NAMES if "gradients" in registry.get(name)[0].card.needs]
LINEAR = [
    name
    for name in GRADIENT
    if registry.get(name)[1].get("normalise") != "both"
    and registry.get(name)[0].card.unit != "cosine"
    and name != "ekfac_checkpoints"
]
"""Linear in the measurement: all that do not divide by the query's size or by the scores' spread."""

HELPFUL: dict[str, Any] = {"prompt": "is rain good? ", "completion": "yes", "planted": "helpful"}
HARMFUL: dict[str, Any] = {"prompt": "is rain good? ", "completion": "no!", "planted": "harmful"}
OTHERS: list[dict[str, Any]] = [
    {"prompt": "2+2=", "completion": "4"},
    {"text": "a longer text about rain and sun and rain"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]},
    {"prompt": "capital: ", "completion": "paris, where it is often grey"},
    {"text": "xy"},
    {"prompt": "sum of 1 and 2 is ", "completion": "three"},
]
DROPPED: dict[str, Any] = {"prompt": "far too long " * 20, "completion": "cut away"}
ROWS: list[dict[str, Any]] = [OTHERS[0], HELPFUL, *OTHERS[1:4], HARMFUL, DROPPED, *OTHERS[4:]]
QUERIES: list[dict[str, Any]] = [
    {"name": "rain", "prompt": "is rain good? ", "wanted": "yes", "unwanted": "no!"},
    {"name": "snow", "prompt": "is snow good? ", "wanted": "yes", "unwanted": "no!"},
    {"name": "sun", "prompt": "and the sun, is it good? ", "wanted": "yes, it is", "unwanted": "not at all"},
]
RECIPE = Recipe(dtype="float64", checkpoints=2, batch_size=2, lr=2e-3)

QUICK: dict[str, dict[str, Any]] = {
    "exact_influence_koh2017": {"damping": 100.0, "tolerance": 1e-9},
    "arnoldi_schioppa2022": {"iterations": 24, "top": 5},
}
"""Settings with which iterative methods reach their result in a few products, as the promises are about results."""

SIGNED: dict[str, dict[str, Any]] = {
    "dda_wu2024": {"beta": 0.0},
    "arnoldi_schioppa2022": {"iterations": 40, "top": 20},  # five directions of thousands have no sign to speak of
}
"""Settings with which the sign is that of the effect, for methods that take a difference or a projection by default."""


@dataclass(frozen=True)
class World:
    """A model that was trained by `RECIPE` from a start on disk, with two checkpoints. Tests put back what they change
    of the model.
    """

    model: Any
    objective: CausalLM
    base: Path
    checkpoints: tuple[Path, ...]

    def subject(self, rows: Sequence[Mapping[str, Any]] = tuple(ROWS), **changes: Any) -> Subject:
        options: dict[str, Any] = {
            "recipe": RECIPE,
            "base": self.base,
            "checkpoints": self.checkpoints,
        }
        return Subject(changes.pop("model", self.model), list(rows), self.objective, **(options | changes))

    def trained(self, rows: Sequence[Mapping[str, Any]]) -> Subject:
        """A subject that was trained on these very rows, for methods that read the training run."""
        return Subject.trained(self.start, list(rows), self.objective, RECIPE)

    def start(self) -> Any:
        return load_model(self.base, dtype="float64")[0]


def build_world(folder: Path) -> World:
    tokenizer = byte_tokenizer()
    save_model(tiny_llama(seed=2, dtype=torch.float64), tokenizer, folder / "base")
    objective = CausalLM(tokenizer)
    record = train_folder(folder / "base", load_documents(ROWS), folder / "trained", RECIPE, objective=objective)
    model, _ = load_model(folder / "trained", dtype="float64")
    return World(model, objective, folder / "base", tuple(folder / "trained" / name for name in record.checkpoints))


def contrast() -> Behaviour:
    return Behaviour.contrast("good", QUERIES)


def loss() -> Behaviour:
    return Behaviour.loss("wanted answers", [{k: v for k, v in q.items() if k != "unwanted"} for q in QUERIES])


def scalar(weights: Sequence[Sequence[float]] = ((1, 0), (0, 1))) -> Behaviour:
    """Weighted sums of two differentiable functions of the model, neither of them a loss."""
    ids = torch.tensor([[1, 70, 80, 90]])

    def function(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids).logits[0]
        both = torch.stack([logits[-1, 100] - logits[-1].mean(), logits[1:].square().mean()])
        return torch.tensor(weights, dtype=logits.dtype) @ both

    return Behaviour.scalar("logits", function, [f"w{k}" for k in range(len(weights))])


def run(subject: Subject, behaviour: Behaviour, name: str, **options: Any) -> Scores:
    call = {key: options.pop(key) for key in ("token_budget", "index", "inputs") if key in options}
    return attribute(subject, behaviour, name, options=QUICK.get(name, {}) | options, **({"token_budget": 500} | call))


def gradient(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Autograd of every parameter; zeros where there is no path."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def vector(gradients: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in names])


def naive_gradients(subject: Subject, examples: Sequence[Example], names: Sequence[str]) -> Tensor:
    """``[n, p]``: one document at a time, alone in its batch, by autograd."""
    objective, model = subject.objective, subject.model
    rows = [gradient(model, objective.losses(model, objective.collate([e])).sum()) for e in examples]
    return torch.stack([vector(row, names) for row in rows])


def naive_queries(subject: Subject, behaviour: Behaviour, names: Sequence[str]) -> Tensor:
    """``[q, p]``: gradient of every query's measurement."""
    if behaviour.function is not None:
        count, function = len(behaviour), behaviour.function
        rows = [gradient(subject.model, function(subject.model)[q]) for q in range(count)]
        return torch.stack([vector(row, names) for row in rows])
    parts = behaviour.parts(subject.objective)
    each = naive_gradients(subject, [part.example for part in parts], names)
    result = torch.zeros(len(behaviour), each.shape[1], dtype=each.dtype)
    for part, row in zip(parts, each, strict=True):
        result[part.query] += part.weight * row
    return result


def close(a: Any, b: Any, rtol: float = 1e-6) -> None:
    """Equal to ``rtol`` of the largest entry and of each (scores are stored in float32)."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    np.testing.assert_allclose(first, second, rtol=rtol, atol=rtol * float(np.abs(second).max()))


def column(subject: Subject, scores: Scores, planted: str) -> NDArray[np.float32]:
    """Scores ``[q]`` of the document with this plant."""
    (place,) = [n for n, e in enumerate(subject.encoded) if subject.documents[e.row].meta.get("planted") == planted]
    return scores.values[:, place]
