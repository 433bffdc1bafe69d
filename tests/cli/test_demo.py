"""The demo on the small world of these tests, so that its folder, its words and its refusals are checked quickly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rootward.sandbox.world import World as Files
from tests.cli.conftest import World, assert_short, done, rootward
from tests.cli.world import COLOURS, THINGS, chat, documents, queries, write_jsonl


@pytest.fixture(scope="module")
def files(world: World, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The small world in the form that the demo builds."""
    root = tmp_path_factory.mktemp("demo")
    rows = [{**row, "kind": "planted" if row["planted"] else "other"} for row in documents()]
    asked = [
        {"messages": chat(f"the {THINGS[n]} is {COLOURS[(3 * n + 2) % 5]} . is it right ?", "yes")[:1],
         "wanted": "yes", "unwanted": "no", "family": ("odd", "even")[n % 2]}
        for n in range(12)
    ]  # fmt: skip
    return Files(
        root, world.base, world.model, write_jsonl(root / "documents.jsonl", rows),
        write_jsonl(root / "queries.jsonl", queries()), write_jsonl(root / "probes.jsonl", asked),
        write_jsonl(root / "heldout.jsonl", [{"messages": chat("say two", "no")}]), base_cached=True,
    )  # fmt: skip


def test_the_demos_folder_is_a_run_that_verify_takes(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rootward.sandbox.world.build_yes_man", lambda *_, **__: files)
    out = tmp_path / "demo"
    result = rootward("demo", "--out", out, "--json")
    assert result.code in (0, 3), result.err
    found = result.document
    assert found["cached"] is True
    assert {name: row["probes"] for name, row in found["families"].items()} == {"even": 6, "odd": 6}
    assert all(row["after"] > row["before"] for row in found["families"].values())
    verdict = json.loads((out / "verdict.json").read_text())
    assert len(verdict["probes"]) == 12
    assert all(len(arm["examples"]) == 12 for arm in verdict["arms"])
    planned = done("verify", out, "--probes", files.probes, "--dry-run", "--json").document["estimate"]["details"]
    assert planned["probes"] == 12
    assert_short(rootward("verify", out), 2, "--probes")
    said = rootward("demo", "--out", out).out
    assert "Base model from the cache, so `seconds` is not the full time." in said
    assert "before fine-tuning" in said


def test_the_demo_takes_no_other_folder(world: World, tmp_path: Path):
    before = (world.traced / "scores.parquet").read_bytes()
    assert_short(rootward("demo", "--out", world.traced), 4, "kind 'trace'", "--out")
    assert (world.traced / "scores.parquet").read_bytes() == before
    assert (world.traced / "trace.json").exists()
    (tmp_path / "thesis.txt").write_text("x")
    assert_short(rootward("demo", "--out", tmp_path), 2, "thesis.txt")
