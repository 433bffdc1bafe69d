"""Checkpoints kept in memory, and the optimiser's state beside every checkpoint, by parameter name.

What an optimiser remembers of a parameter is found by the parameter itself and stored under its name, with the
parameter's own orientation: neither the order of the parameters, nor parameter groups, nor a module that keeps its
weight transposed (Conv1D) can mix them up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rootward.core.errors import ArtefactError, StorageError
from rootward.subject.plan import Recipe

OPTIMISER = "optimiser.safetensors"
FIRST, SECOND = "first.", "second."


@dataclass(frozen=True)
class Moments:
    """What the optimiser remembers after ``step`` steps, for every trained parameter by its name, on the CPU.

    ``first`` is Adam's ``exp_avg`` or the momentum buffer of SGD, ``second`` Adam's ``exp_avg_sq`` (empty for SGD),
    neither corrected for bias, each of the parameter's shape. A parameter that never had a gradient has zeros.
    """

    step: int
    betas: tuple[float, float]
    eps: float
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]

    @property
    def values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``(exp_avg, exp_avg_sq)`` by name; `ArtefactError` where the optimiser has no second moments (SGD)."""
        if not self.second:
            raise ArtefactError(
                "the checkpoint was trained with SGD, which has no second moments; train with optimiser = 'adamw'"
            )
        return {name: (self.first[name], self.second[name]) for name in self.first}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the model's ``state`` dict after ``step`` steps and the optimiser's moments, if any."""

    step: int
    state: Mapping[str, Tensor]
    moments: Moments | None = None


def checkpoint_of(model: nn.Module, step: int, moments: Moments | None) -> Checkpoint:
    """A copy of the model as it is now, on the CPU."""
    return Checkpoint(step, {name: _copy(value) for name, value in model.state_dict().items()}, moments)


def moments_of(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], recipe: Recipe, step: int
) -> Moments | None:
    """A copy of the optimiser's state of these parameters; None where it keeps none (SGD without momentum)."""
    adam = recipe.optimiser == "adamw"
    if not adam and not recipe.momentum:
        return None

    def slot(key: str) -> dict[str, Tensor]:
        found = {name: optimiser.state.get(p, {}).get(key) for name, p in parameters.items()}
        return {
            name: torch.zeros(parameters[name].shape, dtype=parameters[name].dtype) if v is None else _copy(v)
            for name, v in found.items()
        }

    first = slot("exp_avg" if adam else "momentum_buffer")
    return Moments(step, recipe.betas, recipe.eps, first, slot("exp_avg_sq") if adam else {})


def _copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone().contiguous()


def save_moments(moments: Moments, folder: Path) -> None:
    """Write ``optimiser.safetensors`` beside a checkpoint's model; `StorageError` if the disk refuses."""
    from safetensors.torch import save_file

    tensors = {f"{FIRST}{name}": value for name, value in moments.first.items()}
    tensors |= {f"{SECOND}{name}": value for name, value in moments.second.items()}
    # one entry: the file's bytes count (`Subject.origin`), and several would come in any order
    about = json.dumps({"step": moments.step, "betas": moments.betas, "eps": moments.eps})
    try:
        save_file(tensors, folder / OPTIMISER, metadata={"moments": about})
    except OSError as error:
        raise StorageError(
            f"could not write {folder / OPTIMISER}: {error.strerror or error}; free space and run the same command "
            "again"
        ) from error


def read_moments(folder: Path) -> Moments | None:
    """The optimiser's state of a checkpoint folder, None if it has none; a damaged one is an `ArtefactError`."""
    from safetensors import SafetensorError, safe_open

    path = folder / OPTIMISER
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # type: ignore[no-untyped-call]
            about: dict[str, Any] = json.loads(file.metadata()["moments"])
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        first, second = (
            {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
            for part in (FIRST, SECOND)
        )
        return Moments(int(about["step"]), (about["betas"][0], about["betas"][1]), float(about["eps"]), first, second)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtefactError(
            f"{path} is damaged: {type(error).__name__}: {error}; train again, or remove the file to go without "
            "the optimiser's state"
        ) from error


def check_moments(moments: Moments, model: nn.Module, where: str) -> Moments:
    """The moments, if each belongs to a parameter of the model by name and shape; `ArtefactError` otherwise."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, value in [*moments.first.items(), *moments.second.items()]:
        if shapes.get(name) != tuple(value.shape):
            raise ArtefactError(
                f"{where}: the optimiser's state of {name} has shape {tuple(value.shape)}, the model's parameter "
                f"{shapes.get(name, 'is not there')}; give the checkpoint of this model"
            )
    if moments.second and set(moments.first) != set(moments.second):
        raise ArtefactError(f"{where}: expected first and second moments of the same parameters; train again")
    return moments
