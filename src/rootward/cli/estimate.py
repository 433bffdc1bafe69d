"""What a command will need: seconds from a timed probe, memory and disk from shapes. Estimates, said as such."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.cli.output import Talk, duration, size

if TYPE_CHECKING:
    from rootward.capture.sites import Tracked
    from rootward.subject.subject import Subject

FORWARD = 1 / 3
"""A forward pass as a share of forward and backward together."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of work (None: not known), peak bytes of memory beyond the libraries' own, bytes on disk."""

    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    details: dict[str, Any]


def show(command: str, estimate: Estimate, place: Path, talk: Talk) -> int:
    """Print an estimate; nothing has been written."""
    free = _free_disk(place)
    time = ("time", "unknown", "the retrain command's own")
    if estimate.seconds is not None:
        time = ("time", f"about {duration(estimate.seconds)}", "from a timed probe")
    rows = [
        time,
        ("memory", f"about {size(estimate.memory_bytes)}", "beside the libraries"),
        ("disk", f"about {size(estimate.disk_bytes)}", f"{size(free)} free"),
    ]
    rows += [(name, str(value), "") for name, value in estimate.details.items()]
    talk.table([("needs", "left"), ("estimate", "right"), ("", "left")], rows)
    talk.say("Nothing was written (--dry-run).")
    talk.result(command, {"dry_run": True, "estimate": {**asdict(estimate), "disk_free_bytes": free}})
    return 0


def _free_disk(place: Path) -> int:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def parameter_bytes(model: Any) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def pass_memory(subject: Subject, budget: int) -> int:
    """Bytes of the weights and of what autograd keeps of one batch."""
    from rootward.capture.batching import bytes_per_token

    longest = max(subject.encoded, key=lambda e: e.length)
    per_token = bytes_per_token(subject.model, subject.objective, longest, subject.device)
    return parameter_bytes(subject.model) + int(per_token * max(budget, longest.length))


def measured(subject: Subject, token_budget: int | None) -> tuple[Tracked, int, float]:
    """(what is attributed, the token budget, seconds of one plain forward and backward pass over the documents)."""
    from rootward.capture.batching import automatic_budget
    from rootward.capture.inputs import plain_pass_seconds, tracked_of

    tracked = tracked_of(subject)
    budget = token_budget or automatic_budget(subject.model, subject.objective, subject.encoded, subject.device)
    return tracked, budget, plain_pass_seconds(subject, tracked, budget)


def of_index(subject: Subject, settings: Any) -> Estimate:
    """One pass, and the rows of all documents."""
    from rootward.capture.projection import Projection
    from rootward.capture.store import SHARD_BYTES, expected_bytes

    tracked, budget, plain = measured(subject, settings.token_budget)
    rank = None if settings.rank == "none" else settings.rank
    width = Projection(tracked.layout, rank, settings.seed).width
    count = len(subject.encoded)
    one = 4 if settings.dtype == "float32" else 2
    shard = settings.shard_documents or max(256, SHARD_BYTES // max(width * one, 1))
    memory = pass_memory(subject, budget) + 2 * 4 * width * min(shard, count)
    details = {"documents": count, "width": width, "shards": -(-count // shard), "token budget": budget}
    return Estimate(1.2 * plain, memory, expected_bytes(width, count, settings.dtype), details)


def of_trace(subject: Subject, settings: Any, queries: int, checkpoints: Sequence[int], each: bool) -> Estimate:
    """A gradient pass for each entry of ``checkpoints`` (how often a method runs one); forwards for the baselines.

    The forwards: the baselines loss, representation and (where a start is known) loss at the start, and the page's.
    """
    tracked, budget, plain = measured(subject, settings.token_budget)
    passes = sum(checkpoints)
    seconds = plain * (1.2 * passes + (3 + (subject.base is not None)) * FORWARD)
    memory = pass_memory(subject, budget) + 4 * tracked.layout.size * (queries if each else 1)
    text = sum(len(document.text) for document in subject.documents)
    disk = 2 * text + 8 * len(subject.encoded) * (queries + 1) * (len(settings.methods) + 4) + 10**6
    details = {"documents": len(subject.encoded), "queries": queries, "gradient passes": passes, "token budget": budget}
    return Estimate(seconds, memory, disk, details)


def of_training(model: Any, objective: Any, examples: Any, recipe: Any) -> Estimate:
    """Steps times one timed step's loss and gradient; Adam keeps two more copies of what is trained."""
    import time

    import torch

    from rootward.capture.batching import bytes_per_token
    from rootward.subject.training import step_loss, trained_parameters

    trained = trained_parameters(model, recipe.parameters)
    entries = sum(p.numel() for p in trained.values())
    by_length = sorted(examples, key=lambda e: e.length)
    middle = by_length[:: max(1, len(by_length) // recipe.batch_size)][: recipe.batch_size]
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        torch.autograd.grad(step_loss(model, middle, objective, recipe), list(trained.values()), allow_unused=True)
        seconds = time.perf_counter() - start
    steps = recipe.steps(len(examples))
    device = next(model.parameters()).device
    kept = bytes_per_token(model, objective, by_length[-1], device) * by_length[-1].length * recipe.batch_size
    copies = 3 if recipe.optimiser == "adamw" else 2
    weights = parameter_bytes(model)
    written = 4 * entries if recipe.lora is not None else weights
    details = {"documents": len(examples), "steps": steps, "trained parameters": entries}
    return Estimate(
        1.3 * seconds * steps,
        int(weights + 4 * copies * entries + kept),
        written * (1 + len(recipe.checkpoint_shares)),
        details,
    )
