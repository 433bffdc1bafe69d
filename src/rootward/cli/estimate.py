"""What a command will need: seconds from a timed probe, memory and disk from shapes. Estimates, said as such."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.cli.output import Talk, duration, size

if TYPE_CHECKING:
    from rootward.capture.sites import Tracked
    from rootward.core.registry import Method, MethodConfig, Need
    from rootward.subject.subject import Subject

FORWARD = 1 / 3
"""A forward pass as a share of forward and backward together."""
PASS = 1.2
"""A method's pass over the plain one that is timed."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of work (None: not known), peak bytes of memory beyond the libraries' own, bytes on disk.

    ``at_most``: the seconds hold an upper bound of a part of the work.
    """

    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    details: dict[str, Any]
    at_most: bool = False


def show(command: str, estimate: Estimate, place: Path, talk: Talk) -> int:
    """Print an estimate; nothing has been written."""
    free = _free_disk(place)
    time = ("time", "unknown", "the retrain command's own")
    if estimate.seconds is not None:
        time = ("time", said(estimate.seconds, estimate.at_most), "from a timed probe")
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


def said(seconds: float, at_most: bool) -> str:
    """``about 12 s``; ``at most 12 s`` for an upper bound."""
    return f"{'at most' if at_most else 'about'} {duration(seconds)}"


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
    return Estimate(PASS * plain, memory, expected_bytes(width, count, settings.dtype), details)


def of_method(subject: Subject, parameters: int, queries: int, method: Method, configs: Sequence[MethodConfig]) -> Need:
    """What a method takes with each of these configs in turn: the passes of all, the memory of the largest."""
    from rootward.core.registry import Work

    recipe, encoded = subject.recipe, subject.encoded
    work = Work(
        documents=len(encoded),
        tokens=encoded.tokens / len(encoded),
        queries=queries,
        parameters=parameters,
        checkpoints=len(subject.checkpoints),
        start=subject.has_start,
        training=1 if recipe is None else recipe.epochs,
    )
    found = [method.needed(config, work) for config in configs]
    most = max(one.memory_bytes for one in found)
    return replace(found[0], passes=sum(one.passes for one in found), memory_bytes=most)


def method_times(needs: Mapping[str, Need], plain: float) -> dict[str, str]:
    """A line for each method that reads gradients, where there are several."""
    found = {f"time of {name}": said(PASS * plain * n.passes, n.at_most) for name, n in needs.items() if n.passes}
    return found if len(found) > 1 else {}


def of_trace(
    subject: Subject, settings: Any, queries: int, methods: Mapping[str, tuple[Method, MethodConfig]], each: bool
) -> Estimate:
    """What the configured methods say that they need; forwards for the baselines.

    The forwards: the baselines loss, representation and (where a start is known) loss at the start, and the page's.
    """
    tracked, budget, plain = measured(subject, settings.token_budget)
    size = tracked.layout.size
    needs = {name: of_method(subject, size, queries, m, [config]) for name, (m, config) in methods.items()}
    passes = sum(need.passes for need in needs.values())
    seconds = plain * (PASS * passes + (3 + (subject.base is not None)) * FORWARD)
    own = max((need.memory_bytes for need in needs.values()), default=0)
    memory = pass_memory(subject, budget) + 4 * size * (queries if each else 1) + own
    text = sum(len(document.text) for document in subject.documents)
    disk = 2 * text + 8 * len(subject.encoded) * (queries + 1) * (len(settings.methods) + 4) + 10**6
    details = {
        "documents": len(subject.encoded),
        "queries": queries,
        "gradient passes": math.ceil(passes),
        "token budget": budget,
        **method_times(needs, plain),
    }
    return Estimate(seconds, memory, disk, details, any(need.at_most for need in needs.values()))


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
