"""The training loop: `train` changes a model in place."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from rootward.core.errors import InputError, NumericalError
from rootward.core.hashing import digest
from rootward.core.progress import Progress, silent
from rootward.core.records import machine, versions
from rootward.subject.checkpoints import Moments, moments_of
from rootward.subject.encode import Example
from rootward.subject.loading import model_hash
from rootward.subject.objectives import Objective
from rootward.subject.plan import Recipe, TrainingRecord, order

_CHECK_EVERY = 16
"""Steps between looks at the losses on an accelerator, where a look waits for it; on a CPU it is 1."""


@contextmanager
def deterministic(seed: int, threads: int, device: torch.device) -> Iterator[None]:
    """Seeded, with ``threads`` threads and deterministic kernels; everything global is put back."""
    before = torch.get_num_threads()
    strict, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
            # On CUDA, cuBLAS is deterministic only with CUBLAS_WORKSPACE_CONFIG, the caller's to set.
            torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def trained_parameters(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient and whose name the pattern finds; `InputError` if there are none."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and re.search(pattern, n)}
    if not found:
        raise InputError(f"recipe.parameters = {pattern!r} matches no parameter that requires a gradient")
    return found


def make_optimiser(recipe: Recipe, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimiser, without a state yet; every step sets its rate."""
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, foreach=True
        )
    return torch.optim.AdamW(
        parameters,
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


class FiniteLosses:
    """Watches the steps' losses and raises `NumericalError` for the first that is not finite."""

    def __init__(self, device: torch.device) -> None:
        self.every = 1 if device.type == "cpu" else _CHECK_EVERY
        self.pending: list[tuple[int, Tensor, Sequence[Example]]] = []

    def add(self, step: int, loss: Tensor, batch: Sequence[Example]) -> None:
        """Note a step's loss; looks at those noted every few steps."""
        self.pending.append((step, loss, batch))
        if len(self.pending) >= self.every:
            self.check()

    def check(self) -> None:
        """Look at the losses noted."""
        values = torch.stack([loss for _, loss, _ in self.pending]).tolist() if self.pending else []
        for value, (step, _, batch) in zip(values, self.pending, strict=True):
            if not math.isfinite(value):
                names = ", ".join(f"{example.id} (row {example.row})" for example in batch)
                raise NumericalError(
                    f"training: the loss of step {step + 1} is {value}; documents of its batch: {names}; try a lower lr"
                )
        self.pending.clear()


def train(
    model: nn.Module,
    examples: Sequence[Example],
    objective: Objective,
    recipe: Recipe,
    *,
    weights: Mapping[int, float] | None = None,
    progress: Progress = silent,
    on_checkpoint: Callable[[int, nn.Module, Moments | None], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    base: str | Path | None = None,
    documents_hash: str | None = None,
) -> TrainingRecord:
    """Train ``model`` in place: the same model, examples and recipe give the same bits.

    Args:
        model: its parameters change; whether it is in training mode does not.
        examples: what to train on.
        objective: gives their losses.
        recipe: everything else that counts.
        weights: factor of a document's loss by its row; 1 for the others. The divisor of a step's loss does
            not change with it, so a step's gradient is linear in the weights. Weight 0 leaves the batches as
            they are; removal does not.
        progress: told after every step.
        on_checkpoint: called with the number of finished steps, the model and a copy of what the optimiser
            remembers (None: nothing), at `Recipe.checkpoint_steps`.
        should_stop: asked before every step; True ends the training there and marks the record ``stopped``.
        base: the folder that the model came from, for the record.
        documents_hash: hash of all documents, for the record; by default that of the examples' ids.

    Raises:
        NumericalError: a loss or, at the end, a parameter that is not finite; names the step and its
            documents.
    """
    parameters = trained_parameters(model, recipe.parameters)
    device = next(iter(parameters.values())).device
    base_hash, started = model_hash(model), time.perf_counter()
    ids = [example.id for example in examples]
    total, done, stopped = recipe.steps(len(examples)), 0, False
    stops, finite = set(recipe.checkpoint_steps(total)), FiniteLosses(device)
    losses: dict[int, list[Tensor]] = {}
    optimiser = make_optimiser(recipe, list(parameters.values()))
    with only_training(model, parameters), deterministic(recipe.seed, recipe.threads, device):
        for epoch, rows in step_batches(recipe, ids):
            if should_stop is not None and should_stop():
                stopped = True
                break
            batch = [examples[n] for n in rows]
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(done, total)
            loss = take_step(model, batch, objective, recipe, optimiser, list(parameters.values()), weights)
            losses.setdefault(epoch, []).append(loss)
            finite.add(done, loss, batch)
            done += 1
            progress("train", done, total)
            if on_checkpoint is not None and done in stops:
                model.eval()
                on_checkpoint(done, model, moments_of(optimiser, parameters, recipe, done))
                model.train()
        finite.check()
    broken = [name for name, parameter in parameters.items() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise NumericalError(f"training: after step {done} the parameter {broken[0]} is not finite; try a lower lr")
    return TrainingRecord(
        recipe=recipe,
        base=str(base) if base is not None else None,
        base_hash=base_hash,
        objective=objective.describe(),
        documents_hash=documents_hash or digest("\n".join(ids)),
        documents=len(examples),
        steps=done,
        stopped=stopped,
        seconds=time.perf_counter() - started,
        losses=[float(torch.stack(seen).double().mean()) for seen in losses.values()],
        final_hash=model_hash(model),
        versions=versions(),
        machine=machine(),
    )


def step_batches(recipe: Recipe, ids: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
    """Epoch and positions of each step's documents: consecutive slices of `order`."""
    for epoch in range(recipe.epochs):
        ranking = order(recipe.seed, epoch, ids)
        for start in range(0, len(ranking), recipe.batch_size):
            yield epoch, ranking[start : start + recipe.batch_size]


@contextmanager
def only_training(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """In training mode, with gradients for these parameters only; all put back, and no gradient left behind."""
    frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in parameters]
    training = model.training
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train()
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for parameter in frozen:
            parameter.requires_grad_(True)


def take_step(
    model: nn.Module,
    batch: Sequence[Example],
    objective: Objective,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    weights: Mapping[int, float] | None,
) -> Tensor:
    """One optimiser step; the step's loss, detached and still on the device."""
    loss = step_loss(model, batch, objective, recipe, weights)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(parameters, recipe.clip, foreach=True)
    optimiser.step()
    return loss.detach()


def step_loss(
    model: nn.Module,
    batch: Sequence[Example],
    objective: Objective,
    recipe: Recipe,
    weights: Mapping[int, float] | None = None,
) -> Tensor:
    """The scalar that a step differentiates: weighted losses over the batch's trained tokens or documents."""
    device = next(model.parameters()).device
    losses = objective.losses(model, objective.collate(batch, device))
    factors = [example.weight * (1.0 if weights is None else weights.get(example.row, 1.0)) for example in batch]
    if any(factor != 1.0 for factor in factors):
        losses = losses * torch.tensor(factors, dtype=losses.dtype, device=device)
    return losses.sum() / step_divisor(batch, recipe)


def step_divisor(batch: Sequence[Example], recipe: Recipe) -> int:
    """What a step's summed losses are divided by: the batch's trained tokens or documents, whatever their weights."""
    return len(batch) if recipe.reduction == "document" else sum(example.targets for example in batch)
