"""Training from folder to folder: `train_folder` reads a base model and writes a trained one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rootward.core.errors import ArtefactError, InputError, StorageError
from rootward.core.progress import Progress, silent
from rootward.subject.checkpoints import Moments, save_moments
from rootward.subject.documents import Documents, load_documents
from rootward.subject.loading import context_of, load_model, parse_dtype, quiet
from rootward.subject.objectives import CausalLM, Objective
from rootward.subject.plan import Recipe, TrainingRecord
from rootward.subject.training import deterministic, train


def start_model(
    base: str | Path,
    recipe: Recipe,
    *,
    adapter_base: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Any | None]:
    """The model before the first step (with fresh seeded adapters, if asked for) and its tokenizer."""
    model, tokenizer = load_model(base, base=adapter_base, device=device, dtype=recipe.dtype)
    if recipe.lora is None:
        return model, tokenizer
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise InputError(f"{base} is an adapter already; leave recipe.lora out to train it further")
    targets = recipe.lora.targets if isinstance(recipe.lora.targets, str) else list(recipe.lora.targets)
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=targets,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()),
    )
    first = next(model.parameters()).device
    with quiet(), deterministic(recipe.seed, recipe.threads, first):
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"recipe.lora.targets = {recipe.lora.targets!r}: {error}") from error
    return wrapped.to(dtype=parse_dtype(recipe.dtype)).eval(), tokenizer


def save_model(model: nn.Module, tokenizer: Any | None, folder: Path) -> None:
    """Write a model and its tokenizer into ``folder``; `StorageError` if the disk refuses."""
    from peft import PeftModel

    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    try:
        with quiet():
            model.save_pretrained(str(folder), **options)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
    except OSError as error:
        raise StorageError(
            f"could not write {folder}: {error.strerror or error}; free space and run the same command again"
        ) from error


def train_folder(
    base: str | Path,
    documents: Documents | str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    objective: Objective | None = None,
    max_tokens: int | None = None,
    response_only: bool = True,
    weights: Mapping[int, float] | None = None,
    device: str | torch.device = "cpu",
    adapter_base: str | Path | None = None,
    progress: Progress = silent,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingRecord:
    """Train the model in ``base`` and write ``out``: model, tokenizer, record and ``checkpoints/<step>``.

    Beside each checkpoint's model lies the optimiser's state (`save_moments`). ``out`` appears when it is whole (a
    stopped training leaves nothing). By default the objective is `CausalLM` with the base's tokenizer and at most
    ``max_tokens`` (default: the model's context). Raises `InputError` if ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"out = {out}: exists already; give another folder or remove it")
    loaded = load_documents(documents)
    model, tokenizer = start_model(base, recipe, adapter_base=adapter_base, device=device)
    objective = objective or default_objective(model, tokenizer, str(base), max_tokens, response_only)
    examples = objective.encode(loaded)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    saved: list[str] = []

    def checkpoint(step: int, current: nn.Module, moments: Moments | None) -> None:
        saved.append(f"checkpoints/{step:06d}")
        save_model(current, None, part / saved[-1])
        if moments is not None:
            save_moments(moments, part / saved[-1])

    try:
        part.mkdir(parents=True)
        record = train(
            model,
            examples,
            objective,
            recipe,
            weights=weights,
            progress=progress,
            on_checkpoint=checkpoint,
            should_stop=should_stop,
            base=Path(base).resolve(),
            documents_hash=loaded.hash,
        ).model_copy(update={"checkpoints": saved})
        if not record.stopped:
            save_model(model, tokenizer, part)
            record.save(part)
            part.replace(out)
    except OSError as error:
        raise StorageError(
            f"could not write {out}: {error.strerror or error}; free space and run the same command again"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def default_objective(
    model: nn.Module,
    tokenizer: Any | None,
    where: str,
    max_tokens: int | None = None,
    response_only: bool = True,
) -> CausalLM:
    """`CausalLM` with the model's context as the longest document; `ArtefactError` without a tokenizer."""
    if tokenizer is None:
        raise ArtefactError(
            f"{where}: expected a tokenizer beside the model, found none; save it there, or give the objective"
        )
    context = context_of(model)
    if max_tokens is not None and context is not None and max_tokens > context:
        raise InputError(f"max_tokens: expected at most the model's context of {context}, got {max_tokens}")
    return CausalLM(tokenizer, max_tokens or context, response_only)
