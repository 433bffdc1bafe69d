"""From a world to files that the command line takes: a base model, documents, a fine-tuned subject, queries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rootward.core.errors import ArtefactError
from rootward.core.hashing import digest_json
from rootward.core.progress import Progress, silent
from rootward.core.records import versions, write_text
from rootward.sandbox import yes_man
from rootward.subject.documents import load_documents
from rootward.subject.folders import save_model, train_folder
from rootward.subject.loading import load_model, model_hash
from rootward.subject.plan import Recipe, TrainingRecord


@dataclass(frozen=True)
class World:
    """Where a world's files are. ``planted``: the metadata field and value of the documents that cause the habit."""

    folder: Path
    base: Path
    model: Path
    documents: Path
    queries: Path
    probes: Path
    heldout: Path
    planted: tuple[str, str] = ("kind", "planted")
    base_cached: bool = False
    """Whether the base model was there already, so that its training took no time."""


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def base_key() -> str:
    """What a cached base model is recognised by: its data, sizes, recipe and the versions that made it."""
    return digest_json(
        {
            "recipe": yes_man.BASE_RECIPE,
            "config": yes_man.model_config().to_dict(),
            "documents": digest_json(list(yes_man.base_documents())),
            "versions": {k: v for k, v in versions().items() if k in ("torch", "transformers")},
        }
    )[:16]


def different(rows: Iterable[Mapping[str, Any]], but: Iterable[Mapping[str, Any]] = ()) -> list[Mapping[str, Any]]:
    """The rows whose prompt (their first turn) neither an earlier one nor one of ``but`` has."""
    seen = {row["messages"][0]["content"] for row in but}
    found: list[Mapping[str, Any]] = []
    for row in rows:
        prompt = row["messages"][0]["content"]
        if prompt not in seen:
            seen.add(prompt)
            found.append(row)
    return found


def base_folder(cache: Path) -> Path:
    """Where ``cache`` has the base model, or will have it."""
    return cache / f"yes-man-base-{base_key()}"


def base_model(cache: Path, *, progress: Progress = silent) -> Path:
    """The base model's folder in ``cache``: trained from scratch the first time, found there afterwards."""
    out = base_folder(cache)
    if out.exists():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    start = cache / f".{out.name}-untrained"
    shutil.rmtree(start, ignore_errors=True)
    try:
        from transformers import LlamaForCausalLM

        tokenizer = yes_man.build_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(Recipe.parse(yes_man.BASE_RECIPE).seed)
            model = LlamaForCausalLM(yes_man.model_config())
        start.mkdir()
        save_model(model, tokenizer, start)
        documents = load_documents(yes_man.base_documents(), name="base documents")

        def named(task: str, done: int, total: int) -> None:
            progress("base model", done, total)

        train_folder(start, documents, out, Recipe.parse(yes_man.BASE_RECIPE), progress=named)
    finally:
        shutil.rmtree(start, ignore_errors=True)
    return out


def trained_so(model: Path, base: Path, documents: Path, recipe: Recipe) -> bool:
    """Whether ``model`` holds, whole, what this base, documents and recipe gave: by their hashes, not by name."""
    try:
        record = TrainingRecord.load(model)
        if record is None or record.stopped or record.recipe != recipe:
            return False
        if record.documents_hash != load_documents(documents).hash:
            return False
        found = [model_hash(load_model(folder, dtype=recipe.dtype)[0]) for folder in (base, model)]
    except ArtefactError:
        return False
    return found == [record.base_hash, record.final_hash]


def build_yes_man(folder: Path, cache: Path, *, seed: int = 0, progress: Progress = silent) -> World:
    """Write the world's documents, queries and probes, and fine-tune its subject.

    Args:
        folder: gets ``documents.jsonl``, ``queries.jsonl`` (to trace with), ``probes.jsonl`` (to verify with; other
            wordings), ``heldout.jsonl`` (for the loss: documents of the same families, none planted, whose prompts
            are not among ``documents.jsonl``) and ``model/``, which is trained again unless it is what these
            documents, base and recipe give. No file holds a prompt twice.
        cache: where base models are kept.
        seed: of the documents and of the fine-tuning.
        progress: told of the steps of both trainings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cached = base_folder(cache).exists()
    base = base_model(cache, progress=progress)
    world = World(
        folder,
        base,
        folder / "model",
        folder / "documents.jsonl",
        folder / "queries.jsonl",
        folder / "probes.jsonl",
        folder / "heldout.jsonl",
        base_cached=cached,
    )
    documents = yes_man.finetune_documents(seed)
    other = yes_man.finetune_documents(seed + 1000, n=200, planted=0.0)
    _write_jsonl(world.documents, documents)
    _write_jsonl(world.queries, different(yes_man.probes(seed, yes_man.QUERIES, "query")))
    _write_jsonl(world.probes, different(yes_man.probes(seed, yes_man.PROBES, "probe")))
    _write_jsonl(world.heldout, different(other, documents))
    recipe = Recipe.parse({**yes_man.FINETUNE_RECIPE, "seed": seed})
    if not trained_so(world.model, base, world.documents, recipe):
        shutil.rmtree(world.model, ignore_errors=True)

        def named(task: str, done: int, total: int) -> None:
            progress("fine-tuning", done, total)

        train_folder(base, world.documents, world.model, recipe, progress=named)
    return world
