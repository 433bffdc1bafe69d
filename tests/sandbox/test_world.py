"""The world's files: which are made again, and that what is held out is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rootward.sandbox import world as made
from rootward.sandbox import yes_man
from rootward.sandbox.world import World, build_yes_man


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and a fine-tuning of seconds."""
    whole_base, whole = yes_man.base_documents, yes_man.finetune_documents
    monkeypatch.setattr(yes_man, "base_documents", lambda *_: whole_base(0, 48))

    def fewer(seed: int = 0, n: int = 32, **options: Any) -> Any:
        return whole(seed, n, **options)

    monkeypatch.setattr(yes_man, "finetune_documents", fewer)
    monkeypatch.setattr(yes_man, "FINETUNE_RECIPE", {**yes_man.FINETUNE_RECIPE, "epochs": 1, "checkpoints": 0})


def built(folder: Path, seed: int = 0) -> tuple[World, str, int]:
    world = build_yes_man(folder / "world", folder / "cache", seed=seed)
    record = world.model / "rootward_training.json"
    return world, json.loads(record.read_text())["final_hash"], record.stat().st_mtime_ns


@pytest.mark.usefixtures("small")
def test_a_model_is_kept_only_where_it_is_what_would_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, final, written = built(tmp_path)
    assert not first.base_cached
    again, same, when = built(tmp_path)
    assert again.base_cached
    assert (same, when) == (final, written)
    other = built(tmp_path, seed=1)  # other documents
    assert other[1] != final
    assert built(tmp_path)[1] == final
    with monkeypatch.context() as patch:  # another recipe
        patch.setattr(yes_man, "FINETUNE_RECIPE", {**yes_man.FINETUNE_RECIPE, "lr": 1e-3})
        assert built(tmp_path)[1] not in (final, other[1])
    with monkeypatch.context() as patch:  # another base
        patch.setattr(yes_man, "BASE_RECIPE", {**yes_man.BASE_RECIPE, "lr": 1e-3})
        moved = built(tmp_path)
        assert not moved[0].base_cached
        assert moved[1] != final
    weights = first.model / "model.safetensors"
    assert built(tmp_path)[1] == final
    weights.write_bytes(weights.read_bytes()[:-8] + b"damaged!")  # other weights beside the same record
    whole = built(tmp_path)
    assert whole[1] == final
    assert not weights.read_bytes().endswith(b"damaged!")


@pytest.mark.parametrize("seed", [0, 3])
def test_no_file_holds_a_prompt_twice_or_one_that_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr(made, "base_folder", lambda cache: cache)
    monkeypatch.setattr(made, "base_model", lambda cache, **_: cache)
    monkeypatch.setattr(made, "trained_so", lambda *_: True)
    world = build_yes_man(tmp_path / "world", tmp_path, seed=seed)

    def prompts(path: Path) -> list[str]:
        return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]

    trained = set(prompts(world.documents))
    files = [prompts(path) for path in (world.queries, world.probes, world.heldout)]
    assert [len(found) >= least for found, least in zip(files, (200, 400, 150), strict=True)] == [True] * 3
    for found in files:
        assert len(set(found)) == len(found)
        assert not trained & set(found)
    assert not set(files[0]) & set(files[1])
