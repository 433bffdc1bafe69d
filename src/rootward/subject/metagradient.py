"""Exact derivatives of a trained model in the weights of its training documents (metagradients).

`replay` carries out a training run again and keeps the state of every ``every``-th step; `Trajectory.metagradients`
goes back through the steps and pulls the gradient of a measurement at the trained weights back to the documents'
weights. This is REPLAY (Engstrom et al., 2025, arXiv:2503.13751, section 3) with two levels, so that the square root
of the number of steps has to be kept at once and every step is carried out twice, instead of a tree of logarithmic
depth.

A step takes the state ``s = (theta, m, v)`` of weights and optimiser to ``h(s, w)``, w being the weights of its
documents. With the adjoint ``l_T = (d measurement / d theta_T, 0, 0)`` the sweep is

    dw += (dh/dw)^T l_{t+1},    l_t = (dh/ds)^T l_{t+1}

and as the optimiser works on each entry by itself, all of it that needs the model is one product of the second
derivatives of the step's loss with a vector: autograd through autograd. The steps themselves are those of
`rootward.subject.training` and no imitation of them, so the run that is differentiated is the run that took place.

It stands beside the training loop because it is its derivative: same order, optimiser, schedule, clipping and
reduction. It needs no hooks and no factored gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.progress import Progress, silent
from rootward.subject.encode import Example
from rootward.subject.objectives import Objective
from rootward.subject.plan import Recipe
from rootward.subject.training import (
    FiniteLosses,
    deterministic,
    make_optimiser,
    only_training,
    step_batches,
    step_divisor,
    step_loss,
    take_step,
    trained_parameters,
)

Slots = dict[str, Tensor]
"""What the optimiser keeps of one parameter; empty before its first step."""


@dataclass(frozen=True)
class _State:
    """Copies of the trained parameters and of the optimiser's memory of each, in the parameters' order."""

    parameters: list[Tensor]
    slots: list[Slots]


@dataclass(frozen=True)
class _Adjoint:
    """Derivatives of ``q`` measurements ``[q, *shape]`` in the weights and in both slots of the optimiser."""

    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


class Trajectory:
    """A training run that can be differentiated; made by `replay`. The model holds the trained weights.

    ``states[k]`` is the state before step ``k * every``.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        objective: Objective,
        recipe: Recipe,
        weights: Mapping[int, float],
        every: int,
    ) -> None:
        self.model, self.examples, self.objective, self.recipe = model, examples, objective, recipe
        self.weights, self.every = weights, every
        self.parameters = trained_parameters(model, recipe.parameters)
        self.steps = [rows for _, rows in step_batches(recipe, [example.id for example in examples])]
        self.states: list[_State] = []
        self._leaves = list(self.parameters.values())
        self._optimiser = make_optimiser(recipe, self._leaves)

    # --- forward -------------------------------------------------------------------------------------------------

    def run(self, progress: Progress) -> None:
        """Train, keeping states."""
        device, total = self._leaves[0].device, len(self.steps)
        finite = FiniteLosses(device)
        with only_training(self.model, self.parameters), deterministic(self.recipe.seed, self.recipe.threads, device):
            _refuse_randomness(self.model, self._batch(0), self.objective, self.recipe)
            for t in range(total):
                if t % self.every == 0:
                    self.states.append(self._read())
                finite.add(t, self._step(t), self._batch(t))
                progress("replay", t + 1, total)
            finite.check()

    def _batch(self, t: int) -> list[Example]:
        return [self.examples[n] for n in self.steps[t]]

    def _step(self, t: int) -> Tensor:
        for group in self._optimiser.param_groups:
            group["lr"] = self.recipe.rate(t, len(self.steps))
        return take_step(
            self.model, self._batch(t), self.objective, self.recipe, self._optimiser, self._leaves, self.weights
        )

    def _read(self) -> _State:
        memory = [self._optimiser.state.get(p, {}) for p in self._leaves]
        return _State(
            [p.detach().clone() for p in self._leaves],
            [{k: v.clone() for k, v in slots.items() if isinstance(v, Tensor)} for slots in memory],
        )

    def _write(self, state: _State) -> None:
        """Put the model and the optimiser back to a state."""
        with torch.no_grad():
            for p, value in zip(self._leaves, state.parameters, strict=True):
                p.copy_(value)
        self._optimiser.state.clear()
        for p, slots in zip(self._leaves, state.slots, strict=True):
            if slots:
                self._optimiser.state[p] = {key: value.clone() for key, value in slots.items()}

    # --- backward ------------------------------------------------------------------------------------------------

    def metagradients(self, gradients: Mapping[str, Tensor], progress: Progress = silent) -> Tensor:
        """``[q, n]``: derivative of every measurement in the loss weight of every example.

        Args:
            gradients: of each measurement in the trained weights, ``[q, *shape]`` for every trained parameter by name.
            progress: told after every step.

        The model holds the trained weights before and after, and nothing else of it changes.

        Raises:
            LayoutMismatch: the gradients are not those of the trained parameters.
            NumericalError: a derivative is not finite; names the step.
        """
        adjoint = self._first_adjoint(gradients)
        device, total = self._leaves[0].device, len(self.steps)
        result = torch.zeros(len(adjoint.parameters[0]), len(self.examples), dtype=torch.float64)
        end = self._read()
        try:
            with (
                only_training(self.model, self.parameters),
                deterministic(self.recipe.seed, self.recipe.threads, device),
            ):
                for k in reversed(range(len(self.states))):
                    start, stop = k * self.every, min((k + 1) * self.every, total)
                    for t, state in reversed(list(self._segment(k, start, stop))):
                        adjoint, weights = self._back(t, state, adjoint)
                        if not bool(torch.isfinite(weights).all()):
                            raise NumericalError(
                                f"metagradient: the derivative through step {t + 1} of {total} is not finite; the run "
                                "is too rough to differentiate: lower its lr, or take larger batches"
                            )
                        result[:, self.steps[t]] += weights.double().cpu()
                        progress("metagradient", total - t, total)
        finally:
            self._write(end)
        return result

    def _first_adjoint(self, gradients: Mapping[str, Tensor]) -> _Adjoint:
        if set(gradients) != set(self.parameters):
            raise LayoutMismatch(
                f"metagradient: expected the gradients of {len(self.parameters)} trained parameters, got "
                f"{len(gradients)}; first that differs: {sorted(set(gradients) ^ set(self.parameters))[0]}"
            )
        for name, p in self.parameters.items():
            if gradients[name].shape[1:] != p.shape:
                raise LayoutMismatch(
                    f"metagradient: expected gradients [q, {', '.join(map(str, p.shape))}] of {name}, got "
                    f"{tuple(gradients[name].shape)}"
                )
        first = [gradients[name].detach().to(p) for name, p in self.parameters.items()]
        return _Adjoint(first, [torch.zeros_like(g) for g in first], [torch.zeros_like(g) for g in first])

    def _segment(self, k: int, start: int, stop: int) -> Iterator[tuple[int, _State]]:
        """The states before steps ``start .. stop - 1``: the first is kept, the others are computed again."""
        yield start, self.states[k]
        if stop - start > 1:
            self._write(self.states[k])
            for t in range(start, stop - 1):
                self._step(t)
                yield t + 1, self._read()

    def _back(self, t: int, state: _State, after: _Adjoint) -> tuple[_Adjoint, Tensor]:
        """The adjoint before step t, and the derivatives ``[q, b]`` in the weights of its documents."""
        with torch.no_grad():
            for p, value in zip(self._leaves, state.parameters, strict=True):
                p.copy_(value)
        batch = self._batch(t)
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention cannot be differentiated twice
            losses = self.objective.losses(self.model, self.objective.collate(batch, self._leaves[0].device))
        factors = [example.weight * self.weights.get(example.row, 1.0) for example in batch]
        own = torch.tensor([example.weight for example in batch], dtype=losses.dtype, device=losses.device)
        weights = torch.tensor(factors, dtype=losses.dtype, device=losses.device).requires_grad_(True)
        loss = (losses * weights).sum() / step_divisor(batch, self.recipe)
        found = torch.autograd.grad(loss, self._leaves, create_graph=True, allow_unused=True)
        reached = [i for i, g in enumerate(found) if g is not None]  # the optimiser passes over the others
        gradients = [g for g in found if g is not None]
        update = _Update(self.recipe, self.recipe.rate(t, len(self.steps)), state, reached, gradients)
        before = _Adjoint(
            *([value.clone() for value in part] for part in (after.parameters, after.first, after.second))
        )
        rows: list[Tensor] = []
        for q in range(len(after.parameters[0])):
            pulled = update.pull(
                [[part[i][q] for i in reached] for part in (after.parameters, after.first, after.second)]
            )
            second = torch.autograd.grad(
                gradients, [*self._leaves, weights], grad_outputs=pulled.gradients, retain_graph=True, allow_unused=True
            )
            for place, i in enumerate(reached):
                before.parameters[i][q] = pulled.parameters[place]
                before.first[i][q], before.second[i][q] = pulled.first[place], pulled.second[place]
            for i, value in enumerate(second[:-1]):
                if value is not None:
                    before.parameters[i][q] += value
            assert second[-1] is not None
            rows.append(second[-1] * own)
        return before, torch.stack(rows)


@dataclass(frozen=True)
class _Pulled:
    parameters: list[Tensor]
    gradients: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


class _Update:
    """The optimiser's step on the parameters that have a gradient, as a function whose adjoint can be asked for."""

    def __init__(
        self, recipe: Recipe, rate: float, state: _State, reached: Sequence[int], gradients: Sequence[Tensor]
    ) -> None:
        self.parameters = [state.parameters[i].clone().requires_grad_(True) for i in reached]
        self.gradients = [g.detach().clone().requires_grad_(True) for g in gradients]
        keys = ("exp_avg", "exp_avg_sq") if recipe.optimiser == "adamw" else ("momentum_buffer", "")
        slots = [state.slots[i] for i in reached]
        self.first, self.second = (
            [
                s.get(key, torch.zeros_like(p)).detach().clone().requires_grad_(True)
                for s, p in zip(slots, self.parameters, strict=True)
            ]
            for key in keys
        )
        steps = [float(s["step"]) + 1 if "step" in s else 1.0 for s in slots]
        with torch.enable_grad():
            clipped = _clipped(self.gradients, recipe.clip)
            leaves = zip(self.parameters, clipped, self.first, self.second, steps, strict=True)
            one_step = _adamw if recipe.optimiser == "adamw" else _sgd
            self.results = [one_step(recipe, rate, p, g, m, v, step) for p, g, m, v, step in leaves]

    def pull(self, adjoint: Sequence[Sequence[Tensor]]) -> _Pulled:
        """Adjoints of the inputs from those of the results ``(weights, first, second)``."""
        outputs = [value for part in range(3) for value in (result[part] for result in self.results)]
        cotangents = [value for part in adjoint for value in part]
        places = [i for i, value in enumerate(outputs) if value.requires_grad]
        inputs = [*self.parameters, *self.gradients, *self.first, *self.second]
        found = torch.autograd.grad(
            [outputs[i] for i in places], inputs, [cotangents[i] for i in places], retain_graph=True, allow_unused=True
        )
        n = len(self.parameters)
        whole = [torch.zeros_like(x) if f is None else f for f, x in zip(found, inputs, strict=True)]
        return _Pulled(whole[:n], whole[n : 2 * n], whole[2 * n : 3 * n], whole[3 * n :])


def _clipped(gradients: list[Tensor], clip: float | None) -> list[Tensor]:
    """As `torch.nn.utils.clip_grad_norm_`."""
    if clip is None:
        return gradients
    norm = torch.stack([g.norm() for g in gradients]).norm()
    factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
    return [g * factor for g in gradients]


def _sgd(
    recipe: Recipe, rate: float, p: Tensor, g: Tensor, buffer: Tensor, unused: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    g = g + recipe.weight_decay * p
    buffer = recipe.momentum * buffer + g
    return p - rate * buffer, buffer, unused


def _adamw(
    recipe: Recipe, rate: float, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    b1, b2 = recipe.betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    # where no gradient ever was, the root's slope is infinite and what it is multiplied with is zero
    none = v == 0
    root = torch.where(none, 0.0, torch.where(none, 1.0, v).sqrt())
    size = root / math.sqrt(1 - b2**step) + recipe.eps
    return p * (1 - rate * recipe.weight_decay) - rate / (1 - b1**step) * m / size, m, v


def replay(
    model: nn.Module,
    examples: Sequence[Example],
    objective: Objective,
    recipe: Recipe,
    *,
    weights: Mapping[int, float] | None = None,
    every: int | None = None,
    progress: Progress = silent,
) -> Trajectory:
    """Train ``model`` in place, exactly as `train` does, keeping what is needed to differentiate the run.

    Args:
        model: as it was before training; afterwards it has the trained weights.
        examples: what to train on.
        objective: gives their losses.
        recipe: how.
        weights: of documents by their row, 1 for the others: where the derivative is taken.
        every: keep the state of every so many steps; by default the square root of their number. A state is the
            trained parameters and what the optimiser keeps of them.
        progress: told after every step.

    Raises:
        InputError: a step's loss is random (dropout), changes buffers (batch norm), or is not of float32 or float64.
        NumericalError: a loss is not finite.
    """
    if every is not None and every < 1:
        raise InputError(f"every: expected at least 1 step between two kept states, got {every}")
    total = recipe.steps(len(examples))
    found = Trajectory(model, examples, objective, recipe, weights or {}, every or math.ceil(math.sqrt(total)))
    narrow = [name for name, p in found.parameters.items() if p.dtype not in (torch.float32, torch.float64)]
    if narrow:
        raise InputError(
            f"metagradient: expected parameters of float32 or float64, got {found.parameters[narrow[0]].dtype} "
            f"({narrow[0]}); train with dtype float32"
        )
    found.run(progress)
    return found


def _refuse_randomness(model: nn.Module, batch: Sequence[Example], objective: Objective, recipe: Recipe) -> None:
    """A step's loss must be a function of weights and documents: the same under any seed, without a trace left."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = step_loss(model, batch, objective, recipe)
        torch.manual_seed(2)
        second = step_loss(model, batch, objective, recipe)
        changed = [name for name, value in model.named_buffers() if not torch.equal(value, buffers[name])]
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    if changed:
        raise InputError(
            f"metagradient: training changes the buffer {changed[0]} (running statistics of a batch norm), which is "
            "outside of the weights; use a model without them"
        )
    if not torch.equal(first, second):
        raise InputError(
            f"metagradient: the loss of a step is random ({_dropout(model)}); train with dropout 0, as the run has to "
            "be a function of the documents' weights"
        )


def _dropout(model: nn.Module) -> str:
    """The places where the model drops entries, by name."""
    found = [
        f"{name}: p = {module.p}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    for name, module in model.named_modules():
        rates = {k: v for k, v in vars(module).items() if "dropout" in k and isinstance(v, float) and v > 0}
        found += [f"{name}: {key} = {value}" for key, value in rates.items()]
    return ", ".join(found[:3]) or "no dropout module was found"
