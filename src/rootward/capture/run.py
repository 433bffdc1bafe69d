"""One pass over documents feeds many sinks. Nobody else touches hooks.

For every batch: forward, then backward if a sink asks for it, and each parameter's factors (`core.block`) go to the
sinks while the backward pass is running, so that no more than one module's output gradients are alive at a time.

Parameters need no ``.grad``: their ``requires_grad`` is off during the pass, so autograd never multiplies output
gradients with activations for the whole batch (the weight-gradient half of a backward pass). The graph starts at the
first hooked module instead, which also leaves everything below it out of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rootward.capture.batching import automatic_budget, batches
from rootward.capture.packing import check_packing, collate_packed, pack, packed_losses
from rootward.capture.projection import Projection
from rootward.capture.recorder import Recorder, pick
from rootward.capture.sites import Tracked
from rootward.core.block import Block, Factor, widened
from rootward.core.errors import ArtefactError, InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.core.progress import Progress, silent
from rootward.subject.encode import Batch, Example
from rootward.subject.objectives import Objective
from rootward.subject.predictions import Labels, Predictions

DATA = Labels()
"""The documents' own labels."""


class Sink(Protocol):
    """Decides what to make of a block. ``backward`` False and no ``modules``: only losses are wanted.

    ``inputs`` without ``backward``: factors with inputs alone are wanted, from a forward pass (output gradients are
    zeros) unless another sink needs the backward pass. ``modules`` names modules whose outputs are wanted
    (``activation``). `consume` is called once per wanted parameter and block, with all of its factors.
    """

    backward: bool
    inputs: bool
    modules: tuple[str, ...]

    def wants(self, name: str) -> bool:
        """Whether this parameter's factors are wanted."""
        ...

    def begin(self, block: Block) -> None:
        """A block's losses are known; its factors follow."""
        ...

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """All factors of one parameter for the current block."""
        ...

    def activation(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Output ``[n,t,d]`` of a wanted module, before `begin`."""
        ...

    def end(self) -> None:
        """The block is complete."""
        ...


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients; both are put back as they were, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def predictions_of(model: nn.Module, objective: Objective, example: Example) -> Predictions:
    """What the model says of one document's targets, in evaluation mode and without gradients."""
    with _quiet(model), torch.no_grad():
        batch = objective.collate([example], next(model.parameters()).device)
        return objective.predictions(model, batch)


def _activation_hook(sinks: list[Sink], name: str, current: list[Batch]) -> Callable[..., None]:
    def forward(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]
        batch = current[0]
        if batch.unpack is not None:
            value = pick(value, batch.unpack, next(iter(batch.inputs.values())).shape[1])
        for sink in sinks:
            sink.activation(name, value.detach(), batch.mask)

    return forward


def _module_hooks(model: nn.Module, sinks: Sequence[Sink], current: list[Batch]) -> list[Any]:
    modules = dict(model.named_modules())
    names = sorted({name for sink in sinks for name in sink.modules})
    for name in names:
        if name not in modules:
            raise ArtefactError(f"expected a module {name!r} in the model, found none of that name")
    return [
        modules[name].register_forward_hook(_activation_hook([s for s in sinks if name in s.modules], name, current))
        for name in names
    ]


def _check(losses: Tensor, batch: Batch) -> None:
    if not bool(torch.isfinite(losses).all()):
        bad = [batch.ids[n] for n in (~torch.isfinite(losses)).nonzero().flatten().tolist()]
        rows = batch.rows[~torch.isfinite(losses)].tolist()
        raise NumericalError(
            f"the loss of {len(bad)} documents is not finite, first document {bad[0]} (row {rows[0]}); "
            "look at that document, load the model with dtype float32, or leave such documents out (skip_not_finite)"
        )


def _require(sinks: Sequence[Sink], tracked: Tracked | None) -> Tracked:
    """The tracked parameters, which must hold all that the sinks want."""
    if tracked is None:
        raise InputError("run_pass: a sink wants gradients; expected tracked = track(model, ...), got None")
    for sink in sinks:
        layout = getattr(sink, "layout", None)
        if isinstance(layout, ParamLayout):
            missing = [n for n in layout.names if n not in tracked.layout.sizes]
            if missing:
                raise LayoutMismatch(
                    f"run_pass: {type(sink).__name__} wants {len(missing)} parameters that are not tracked, "
                    f"first {missing[0]}"
                )
            same = ParamLayout(layout.names, tuple(tracked.layout.shape(n) for n in layout.names))
            layout.require(same, "run_pass")
    return tracked


def run_pass(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    sinks: Sequence[Sink],
    *,
    tracked: Tracked | None = None,
    token_budget: int | None = None,
    packing: bool = False,
    progress: Progress = silent,
    task: str = "pass",
    device: torch.device | None = None,
    refused: set[str] | None = None,
    labels: Labels = DATA,
    finite: bool = True,
) -> int:
    """Run the examples through the model once and give every sink each batch's block.

    Args:
        model: left exactly as it was: modes, ``requires_grad`` flags and hooks. It runs in evaluation mode, so
            transformers' gradient checkpointing is off during the pass.
        objective: makes batches and per-document losses.
        examples: what runs; batches are made by length, so sinks see them in another order and go by ``Block.index``
            (positions in ``examples``).
        sinks: see `Sink`.
        tracked: the parameters with factors; needed where a sink asks for backward.
        token_budget: padded tokens per batch; None measures what fits (`automatic_budget`).
        packing: put several documents in one row instead of padding (language models whose mask follows position ids;
            measured first).
        progress: told after every batch.
        task: the pass's name in progress reports.
        device: where batches go; by default where the parameters are.
        refused: where given, collects the parameters of modules without a per-document gradient instead of raising.
        labels: whose labels the losses are at. With "exact" and "sampled" every batch has one forward pass and as many
            backward passes as there are labels or draws, each of which is a block of its own to the sinks.
        finite: a loss that is not finite is an error; where False the sinks are given it.

    Returns:
        The token budget used.

    Raises:
        InputError: packing is asked of a model or objective that cannot; a sink wants gradients, ``tracked`` is None.
        NumericalError: a document's loss is not finite; the message names it.
        ArtefactError: a module has no per-document gradient, or the loss depends on no attributed parameter.
        LayoutMismatch: a sink wants parameters that are not tracked.
    """
    if device is None:
        first = next(model.parameters(), None)
        device = first.device if first is not None else torch.device("cpu")
    wanted, recorder = _recorded(sinks, tracked, refused)
    current: list[Batch] = []
    handles: list[Any] = []
    with _quiet(model):
        try:
            if token_budget is None:
                token_budget = automatic_budget(model, objective, examples, device)
            if packing:
                check_packing(model, objective, examples, device)
            handles += _module_hooks(model, sinks, current)
            if recorder is not None:
                handles += recorder.attach()
            done = 0
            every = _needs_every_logit(model, sinks, wanted, packing)
            if labels.kind != "data":
                _check_labels(recorder, packing)
            for index, batch, losses in _work(model, objective, examples, token_budget, packing, every, device):
                current[:] = [batch]
                if labels.kind == "data":
                    _one_batch(losses, batch, index, sinks, recorder, finite)
                else:
                    assert recorder is not None
                    _relabelled(model, objective, batch, index, sinks, recorder, labels)
                done += len(index)
                progress(task, done, len(examples))
        finally:
            for handle in handles:
                handle.remove()
            if recorder is not None:
                recorder.clear()
    return token_budget


def _recorded(
    sinks: Sequence[Sink], tracked: Tracked | None, refused: set[str] | None
) -> tuple[Tracked | None, Recorder | None]:
    """The parameters with factors and the hooks for them; None where losses and activations are all that is wanted."""
    backward = any(sink.backward for sink in sinks)
    consumers = [sink for sink in sinks if sink.backward or sink.inputs]
    if not consumers:
        return None, None
    wanted = _require(consumers, tracked).only(lambda name: any(s.wants(name) for s in consumers))

    def deliver(name: str, factors: list[Factor]) -> None:
        with torch.no_grad():
            for sink in consumers:
                if sink.wants(name):
                    sink.consume(name, factors)

    return wanted, Recorder(wanted, deliver, refused, forward=not backward)


def _needs_every_logit(model: nn.Module, sinks: Sequence[Sink], wanted: Tracked | None, packing: bool) -> bool:
    """Whether somebody looks at the head position by position: `Batch.keep` shows it the trained positions only."""
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    inside = set(head.modules()) if head is not None else set(model.modules())
    named = dict(model.named_modules())
    by_position = packing or any(getattr(sink, "positions", False) for sink in sinks)
    hooked = [site.module for site in wanted.sites] if wanted is not None and by_position else []
    return any(module in inside for module in [*hooked, *(named[name] for sink in sinks for name in sink.modules)])


def _work(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    token_budget: int,
    packing: bool,
    every: bool,
    device: torch.device,
) -> Iterator[tuple[Tensor, Batch, Callable[[], Tensor]]]:
    """Per batch: positions in the examples, the documents, and how to compute their losses."""
    if not packing:
        for positions in batches(examples, token_budget):
            batch = objective.collate([examples[n] for n in positions], device)
            batch = replace(batch, keep=None) if every else batch
            yield torch.tensor(positions), batch, partial(objective.losses, model, batch)
        return
    for rows in pack(examples, token_budget):
        inner, outer = collate_packed([[examples[n] for n in row] for row in rows], device)
        inner = replace(inner, keep=None) if every else inner
        positions = torch.tensor([n for row in rows for n in row])
        yield positions, outer, partial(packed_losses, objective, model, inner, outer)


def _one_batch(
    compute: Callable[[], Tensor],
    batch: Batch,
    index: Tensor,
    sinks: Sequence[Sink],
    recorder: Recorder | None,
    finite: bool,
) -> None:
    if recorder is not None:
        recorder.start(batch)
    with torch.set_grad_enabled(recorder is not None and not recorder.forward):
        losses = compute()
    if finite:
        _check(losses.detach(), batch)
    block = Block(index=index, ids=batch.ids, mask=batch.mask, losses=losses.detach(), trained=batch.trained)
    for sink in sinks:
        sink.begin(block)
    if recorder is not None:
        if not recorder.forward:
            if not losses.requires_grad:
                raise ArtefactError(
                    "the loss does not depend on any attributed parameter; choose others with `parameters`"
                )
            losses.sum().backward()
        recorder.finish()
    for sink in sinks:
        sink.end()


def _check_labels(recorder: Recorder | None, packing: bool) -> None:
    if recorder is None or recorder.forward or packing:
        raise InputError("labels: expected sinks that want gradients, and no packing, for labels other than the data's")


def _relabelled(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    index: Tensor,
    sinks: Sequence[Sink],
    recorder: Recorder,
    labels: Labels,
) -> None:
    """One forward pass, and a backward pass for each set of labels; the graph is kept until the last."""
    recorder.start(batch)
    with torch.enable_grad():
        predictions = objective.predictions(model, batch)
        pending = list(predictions.relabelled(labels, batch.ids))
    if not predictions.outputs.requires_grad:
        raise ArtefactError("the loss does not depend on any attributed parameter; choose others with `parameters`")
    for turn, losses in enumerate(pending):
        _check(losses.detach(), batch)
        detached = losses.detach()
        block = Block(index=index, ids=batch.ids, mask=batch.mask, losses=detached, trained=batch.trained, turn=turn)
        for sink in sinks:
            sink.begin(block)
        losses.sum().backward(retain_graph=turn + 1 < len(pending))
        recorder.finish()
        for sink in sinks:
            sink.end()


class _Check:
    """Sink for `probe`: projected gradients ``[documents, k]`` of every parameter, to compare with autograd's."""

    backward = True
    inputs = False
    modules: tuple[str, ...] = ()

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self.rows: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        return True

    def begin(self, block: Block) -> None:
        self.order = block.index.argsort()

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        total = sum(self.projection.project(name, widened(f)) for f in factors)
        assert isinstance(total, Tensor)
        self.rows[name] = total[self.order.to(total.device)].double().cpu()

    def activation(self, name: str, values: Tensor, mask: Tensor) -> None: ...

    def end(self) -> None: ...


def _autograd(
    model: nn.Module, objective: Objective, example: Example, projection: Projection, device: torch.device
) -> dict[str, Tensor]:
    """Projected gradients of one document by plain autograd; one parameter's ``.grad`` is alive at a time."""
    found: dict[str, Tensor] = {}
    params = {n: p for n, p in model.named_parameters() if n in projection.layout.sizes}
    handles: list[Any] = []

    def note(name: str, p: Tensor) -> None:
        assert p.grad is not None
        grad = p.grad if p.grad.dtype == torch.float64 else p.grad.float()
        found[name] = projection.project_one(name, grad.unsqueeze(0))[0].double().cpu()
        p.grad = None

    kept = {n: p.grad for n, p in params.items()}
    with _quiet(model):
        try:
            for name, p in params.items():
                p.grad = None
                p.requires_grad_(True)
                handles.append(p.register_post_accumulate_grad_hook(partial(note, name)))
            losses = objective.losses(model, objective.collate([example], device))
            if losses.requires_grad:
                losses.sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            for name, p in params.items():
                p.grad = kept[name]
    return found


def probe(model: nn.Module, objective: Objective, examples: Sequence[Example], tracked: Tracked) -> Tracked:
    """Run one small batch and move parameters without a true per-document gradient to ``uncovered``.

    This is what makes coverage a measurement: the factors of up to three short documents in one batch are compared
    (projected to a few numbers) with what autograd says of each document alone. A mixture-of-experts module that sees
    tokens of all documents mixed, a weight that is also used outside its module, and a module that the objective does
    not use are found here and reported.
    """
    by_length = sorted(examples, key=lambda e: e.length)
    few = by_length[:2] + [e for e in by_length[2:] if e.length > by_length[1].length][:1]
    first = next(model.parameters())
    projection = Projection(tracked.layout, rank=2, seed=0, device=str(first.device))
    check, refused = _Check(projection), set[str]()
    run_pass(model, objective, few, [check], tracked=tracked, token_budget=2**62, refused=refused)
    truth = [_autograd(model, objective, e, projection, first.device) for e in few]
    loose = {torch.float64: 1e-5, torch.float32: 1e-2}.get(first.dtype, 0.5)
    largest = max((float(v.norm()) for row in truth for v in row.values()), default=0.0)
    missing: dict[str, int] = {}
    for name, size in tracked.layout.sizes.items():
        rows = check.rows.get(name)
        good = rows is not None and name not in refused
        for n, row in enumerate(truth):
            if rows is not None and good:
                true = row.get(name, torch.zeros_like(rows[n]))
                # rounding alone makes a gradient that is exactly zero in theory (a key bias) differ
                good = float((rows[n] - true).norm()) <= loose * (float(true.norm()) + 1e-3 * largest)
        if not good:
            missing[name] = size
    if len(missing) == len(tracked.layout.names):
        raise ArtefactError(
            f"none of {len(missing)} parameters has a per-document gradient in this model, first {next(iter(missing))}"
        )
    rest = tracked.only(lambda name: name not in missing)
    return Tracked(rest.layout, rest.sites, {**tracked.uncovered, **missing}, tracked.total)
