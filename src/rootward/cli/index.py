"""``rootward index``: the gradients of all documents on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rootward.cli import estimate
from rootward.cli.config import write_config
from rootward.cli.load import check_folder, load_subject, print_config, settings_of
from rootward.cli.output import Talk, shown, size
from rootward.cli.settings import IndexSettings


def run(given: Mapping[str, Any], talk: Talk) -> int:
    """Build, continue or repair an index."""
    settings: IndexSettings = settings_of("index", given)
    if given["print_config"]:
        return print_config("index", settings, talk)
    marks = ("index.json", "manifest.jsonl", "run.toml", "shard-*.safetensors", "shard-*.safetensors.part")
    check_folder(settings.out, marks, "index")
    subject = load_subject(settings, talk)
    need = estimate.of_index(subject, settings) if given["dry_run"] else None
    if need is not None:
        return estimate.show("index", need, settings.out, talk)
    store = _build(settings, subject, bool(given["overwrite"]), talk)
    values = {
        "index": str(settings.out),
        "documents": store.documents,
        "width": store.width,
        "shards": len(store.shards),
        "bytes": store.bytes,
        "parameters": store.projection.layout.size,
        "fingerprint": store.fingerprint,
    }
    talk.say(
        f"Index of {store.documents} documents: {store.width} numbers each, {len(store.shards)} shards, "
        f"{size(store.bytes)}."
    )
    talk.say(f"Index: {shown(settings.out)}")
    talk.result("index", values)
    return 0


def _build(settings: IndexSettings, subject: Any, overwrite: bool, talk: Talk) -> Any:
    from rootward.capture.inputs import tracked_of
    from rootward.capture.projection import Projection
    from rootward.capture.store import build_store, expected_bytes, require_space

    tracked = tracked_of(subject)
    rank = None if settings.rank == "none" else settings.rank
    width = Projection(tracked.layout, rank, settings.seed).width
    needed = expected_bytes(width, len(subject.encoded), settings.dtype)
    require_space(settings.out, max(0, needed - _held(settings.out)))
    store = build_store(
        settings.out,
        subject.model,
        subject.objective,
        subject.encoded,
        tracked,
        subject.fingerprint(),
        rank=rank,
        seed=settings.seed,
        dtype=settings.dtype,
        shard_documents=settings.shard_documents,
        token_budget=settings.token_budget,
        overwrite=overwrite,
        progress=talk.progress,
    )
    write_config("index", settings, settings.out / "run.toml")
    return store


def _held(folder: Path) -> int:
    """Bytes of shards that are there already."""
    return sum(path.stat().st_size for path in folder.glob("shard-*")) if folder.is_dir() else 0
