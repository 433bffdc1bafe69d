"""``rootward train``: a recorded fine-tuning."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rootward.cli import estimate
from rootward.cli.config import parse_options, write_config
from rootward.cli.load import print_config, quiet_libraries, settings_of
from rootward.cli.output import Talk, duration, shown
from rootward.cli.settings import TrainSettings
from rootward.core.errors import ArtefactError, InputError
from rootward.core.expected import nearest

RECIPE_FLAGS = ("epochs", "lr", "batch_size", "seed", "optimiser", "schedule", "checkpoints")


def run(given: Mapping[str, Any], talk: Talk) -> int:
    """Fine-tune; a model that is there already and was made alike is left as it is."""
    if given["config"] is not None and given["config_option"] is not None:
        raise InputError("train: expected one config file, got both CONFIG.toml and --config")
    recipe_flags: dict[str, Any] = parse_options(given["recipe"], "--recipe", depth=1) or {}
    recipe_flags |= {name: given[name] for name in RECIPE_FLAGS if given[name] is not None}
    if given["lora_rank"] is not None:
        recipe_flags["lora"] = {**recipe_flags.get("lora", {}), "rank": given["lora_rank"]}
    flags = {key: value for key, value in given.items() if key not in (*RECIPE_FLAGS, "lora_rank")}
    settings: TrainSettings = settings_of("train", flags, {"recipe": recipe_flags or None})
    recipe = check_recipe(settings.recipe)
    settings = settings.model_copy(update={"recipe": recipe.model_dump(mode="json", exclude_none=True)})
    if given["print_config"]:
        return print_config("train", settings, talk)
    quiet_libraries()
    from rootward.subject.documents import load_documents

    documents = load_documents(settings.documents)
    if given["dry_run"]:
        return _dry_run(settings, recipe, documents, talk)
    return _train(settings, recipe, documents, bool(given["overwrite"]), talk)


def _train(settings: TrainSettings, recipe: Any, documents: Any, overwrite: bool, talk: Talk) -> int:
    from rootward.subject.folders import train_folder

    target = settings.out
    if settings.out.exists():
        if not overwrite and _same(settings, recipe, documents, talk):
            return 0
        _check_replaceable(settings.out)
        target = settings.out.with_name(f".{settings.out.name}.new")  # the old model stays until the new one is whole
        shutil.rmtree(target, ignore_errors=True)
    record = train_folder(
        settings.base,
        documents,
        target,
        recipe,
        max_tokens=settings.max_tokens,
        response_only=settings.response_only,
        device=settings.device,
        adapter_base=settings.adapter_base,
        progress=talk.progress,
    )
    write_config("train", settings, target / "run.toml")
    if target != settings.out:
        shutil.rmtree(settings.out)
        target.replace(settings.out)
    _show(settings.out, record, talk)
    return 0


def check_recipe(options: dict[str, Any]) -> Any:
    """The recipe; an unknown option is refused with the nearest one named."""
    from rootward.subject.plan import Lora, Recipe

    lora = options.get("lora")
    for values, known, where in ((options, Recipe.model_fields, "recipe"), (lora, Lora.model_fields, "recipe.lora")):
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                raise InputError(f"{where}: unknown option {key!r}{nearest(key, known)}\noptions: {', '.join(known)}")
    return Recipe.parse(options)


def _dry_run(settings: TrainSettings, recipe: Any, documents: Any, talk: Talk) -> int:
    from rootward.subject.folders import default_objective, start_model

    model, tokenizer = start_model(settings.base, recipe, adapter_base=settings.adapter_base, device=settings.device)
    objective = default_objective(model, tokenizer, str(settings.base), settings.max_tokens, settings.response_only)
    examples = objective.encode(documents)
    return estimate.show("train", estimate.of_training(model, objective, examples, recipe), settings.out, talk)


def _same(settings: TrainSettings, recipe: Any, documents: Any, talk: Talk) -> bool:
    """Whether ``out`` holds just what would be trained; `ArtefactError`, with the difference, for another model."""
    from rootward.core.hashing import difference
    from rootward.subject.plan import TrainingRecord

    record = TrainingRecord.load(settings.out) if settings.out.is_dir() else None
    if record is None:
        raise InputError(
            f"--out {shown(settings.out)}: exists already and was not made by `rootward train`; give another folder"
        )
    asked = {**recipe.model_dump(mode="json"), "documents": documents.hash, "base": str(settings.base.resolve())}
    found = {**record.recipe.model_dump(mode="json"), "documents": record.documents_hash, "base": record.base}
    for key, value in (("response_only", settings.response_only), ("max_tokens", settings.max_tokens)):
        if value is not None:
            asked[key], found[key] = value, record.objective.get(key)
    text = difference(found, asked)
    if text:
        raise ArtefactError(
            f"{shown(settings.out)} holds another model:\n{text}\n"
            "give another folder with --out, or --overwrite to replace it"
        )
    talk.note(f"{shown(settings.out)} holds this model already; nothing was done (--overwrite trains it again)")
    _show(settings.out, record, talk)
    return True


def _check_replaceable(out: Path) -> None:
    """Only a folder that `rootward train` wrote is ever removed."""
    from rootward.subject.plan import RECORD

    if not (out / RECORD).exists():
        raise InputError(
            f"--overwrite: {shown(out)} was not made by `rootward train`, so it is not removed; give another folder"
        )


def _show(out: Path, record: Any, talk: Talk) -> None:
    losses = " → ".join(f"{loss:.4g}" for loss in (record.losses[0], record.losses[-1])) if record.losses else "none"
    talk.say(
        f"{record.steps} steps on {record.documents} documents in {duration(record.seconds)}; loss by epoch {losses}."
    )
    talk.say(f"Model: {shown(out)}  ({len(record.checkpoints)} checkpoints, recipe recorded)")
    talk.result("train", {"model": str(out), "record": record.model_dump(mode="json")})
