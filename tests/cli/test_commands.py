"""Every command does its work, and says it for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rootward.core import registry
from tests.cli.conftest import World, assert_short, done, rootward, shards
from tests.cli.world import write_jsonl


def test_train_leaves_a_model_with_its_recipe(world: World):
    record = json.loads((world.model / "rootward_training.json").read_text())
    assert record["recipe"]["epochs"] == 4
    assert len(record["checkpoints"]) == 2
    assert tomllib.loads((world.model / "run.toml").read_text())["recipe"]["lr"] == 5e-3


def test_train_again_from_its_own_config_gives_the_same_bits(world: World, tmp_path: Path):
    again = done("train", world.model / "run.toml", "--out", tmp_path / "again", "--json").document
    first = json.loads((world.model / "rootward_training.json").read_text())
    assert again["record"]["final_hash"] == first["final_hash"]
    assert again["schema_version"] == 1


def test_train_that_was_done_is_not_done_again(world: World):
    before = (world.model / "model.safetensors").stat().st_mtime_ns
    result = done(*world.train(world.model))
    assert "already" in result.err
    assert (world.model / "model.safetensors").stat().st_mtime_ns == before


def test_train_into_another_model_is_refused_and_replaced_only_when_told(world: World, tmp_path: Path):
    out = tmp_path / "m"
    done(*world.train(out, "--epochs", "1"))
    assert_short(rootward(*world.train(out, "--epochs", "2")), 4, "epochs: 1 -> 2", "--overwrite")
    done(*world.train(out, "--epochs", "2", "--overwrite"))
    assert json.loads((out / "rootward_training.json").read_text())["recipe"]["epochs"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_overwrite_removes_no_strange_folder(world: World, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    assert_short(rootward(*world.train(tmp_path / "precious", "--overwrite")), 2, "not made by")
    assert_short(rootward(*world.trace(tmp_path / "precious", "--overwrite")), 2, "thesis.txt")
    assert_short(rootward(*world.index(tmp_path / "precious", "--overwrite")), 2, "thesis.txt")
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_index_is_whole_and_the_same_every_time(world: World, tmp_path: Path):
    result = done(*world.index(tmp_path / "i", "--json")).document
    assert result["documents"] == 60
    assert result["shards"] == 4
    assert shards(tmp_path / "i") == shards(world.indexed)


def test_trace_writes_a_run_and_its_page(world: World):
    for name in ("run.toml", "record.json", "trace.json", "scores.parquet", "documents.parquet", "report.html"):
        assert (world.traced / name).exists(), name
    record = json.loads((world.traced / "record.json").read_text())
    assert record["status"] == "done"
    trace = json.loads((world.traced / "trace.json").read_text())
    assert [m["method"] for m in trace["methods"]][:3] == ["gradient_dot", "gradient_cosine", "bm25"]
    assert trace["planted_field"] == "planted=True"
    assert record["cost"]["peak_memory_mb"] >= max(m["cost"]["peak_memory_mb"] for m in trace["methods"]) - 10


def test_trace_shown_again_is_not_computed_again(world: World):
    before = (world.traced / "scores.parquet").stat().st_mtime_ns
    result = done("trace", "--config", world.traced / "run.toml", "--top", "2")
    assert "already" in result.err
    assert result.out.count("2 checkpoints were kept") == 1  # the default method looks at the final weights
    assert "--method tracin_cp or ekfac_checkpoints" in result.out
    page = (world.traced / "report.html").read_text(encoding="utf-8").split("<script")[0]
    assert page.count("2 checkpoints were kept") == 1
    assert "documents.jsonl:" in result.out
    assert "report.html" in result.out
    assert (world.traced / "scores.parquet").stat().st_mtime_ns == before


def test_a_run_replays_from_its_config_into_another_folder(world: World, tmp_path: Path):
    found = done(
        "trace", "--config", world.traced / "run.toml", "--out", tmp_path / "r", "--no-report", "--json"
    ).document
    first = done("trace", "--config", world.traced / "run.toml", "--json").document
    assert found["documents"] == first["documents"]
    assert found["documents"][0]["rank"] == 1
    assert found["report"] is None
    assert not (tmp_path / "r" / "report.html").exists()


def test_trace_reads_an_index(world: World, tmp_path: Path):
    found = done(*world.trace(tmp_path / "r", "--index", world.indexed, "--method", "gradient_dot", "--json")).document
    assert any("from an index" in note for note in found["methods"][0]["notes"])


def test_another_run_is_refused_with_the_difference(world: World):
    result = rootward(*world.trace(world.traced, "--method", "gradient_cosine"))
    assert_short(result, 4, "another run", "methods", "--overwrite")
    assert json.loads((world.traced / "record.json").read_text())["status"] == "done"


def test_overwrite_replaces_a_run_and_its_verdict(world: World, tmp_path: Path):
    out = tmp_path / "r"
    done(*world.trace(out, "--no-report"))
    (out / "verdict.json").write_text("{}")
    done(*world.trace(out, "--no-report", "--method", "gradient_cosine", "--overwrite"))
    assert json.loads((out / "trace.json").read_text())["main_method"] == "gradient_cosine"
    assert not (out / "verdict.json").exists()


def test_verify_holds_for_the_planted_documents(world: World, tmp_path: Path):
    out = tmp_path / "r"
    done(*world.trace(out, "--method", "bm25", "--planted", "planted=true"))  # here the words give the habit away
    result = rootward("verify", out, "--count", "20", "--baseline", "document_length", "--workers", "0", "--json")
    assert result.code == 0, result.err
    assert result.document["holds"]
    assert (out / "verdict.json").exists()
    assert tomllib.loads((out / "verify.toml").read_text())["count"] == 20
    assert json.loads((out / "record.json").read_text())["seeds"] == [0, 1, 2]
    assert "verify" in json.loads((out / "record.json").read_text())["timings"]
    listed = done("runs", tmp_path, "--json").document["runs"]
    assert [row["verdict"] for row in listed] == ["holds"]
    weak = rootward("verify", out, "--count", "1", "--workers", "0", "--seeds", "0,1")
    assert weak.code == 3, weak.err
    assert "Not confirmed" in weak.out
    assert "held out" in weak.err


def test_verify_refuses_the_traced_queries_unless_told(world: World, tmp_path: Path):
    out = tmp_path / "r"
    done(*world.trace(out, "--hold-out", "0", "--no-report"))
    assert_short(rootward("verify", out), 2, "--probes", "--hold-out 0.5", "--same-queries")
    assert_short(rootward("verify", out, "--probes", world.queries), 2, "12 of 12 prompts were traced")
    told = done("verify", out, "--same-queries", "--dry-run")
    assert "optimistic" in told.err


def test_verify_asks_for_a_finished_trace(world: World, tmp_path: Path):
    assert_short(rootward("verify", tmp_path / "nothing"), 4, "nothing", "rootward trace")
    assert_short(rootward("verify", world.indexed), 4, "record.json")
    assert_short(rootward("verify", world.traced, "--baseline", "bm52"), 2, "bm52", "did you mean 'bm25'")
    assert_short(rootward("verify", world.traced, "--baseline", "random"), 2, "always run")


def test_verify_refuses_changed_documents(world: World, tmp_path: Path):
    rows = [json.loads(line) for line in world.documents.read_text().splitlines()]
    moved = write_jsonl(tmp_path / "d.jsonl", rows)
    done("trace", "--config", world.traced / "run.toml", "--documents", moved, "--out", tmp_path / "r", "--no-report")
    write_jsonl(moved, rows[1:])
    assert_short(rootward("verify", tmp_path / "r"), 4, "documents:", "trace again")


@pytest.mark.parametrize("command", ["train", "index", "trace", "verify"])
def test_dry_run_writes_nothing(world: World, tmp_path: Path, command: str):
    argv = {
        "train": world.train(tmp_path / "o"),
        "index": world.index(tmp_path / "o"),
        "trace": world.trace(tmp_path / "o"),
        "verify": ["verify", world.traced],
    }[command]
    before = sorted(world.root.rglob("*"))
    found = done(*argv, "--dry-run", "--json").document["estimate"]
    assert found["seconds"] > 0
    assert found["memory_bytes"] > 0
    assert found["disk_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert sorted(world.root.rglob("*")) == before


def test_the_estimate_of_an_index_is_near_its_size(world: World):
    estimate = done(*world.index(world.root / "never", "--dry-run", "--json")).document["estimate"]
    size = sum(path.stat().st_size for path in world.indexed.glob("shard-*"))
    assert 0.8 * size < estimate["disk_bytes"] < 1.2 * size


def test_report_builds_the_page_again(world: World, tmp_path: Path):
    result = done("report", world.traced, "--out", tmp_path / "page.html")
    assert "page.html" in result.out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert_short(rootward("report", tmp_path / "none"), 4, "none")


def test_runs_lists_everything(world: World, tmp_path: Path):
    rows = done("runs", world.root, "--json").document["runs"]
    assert {(row["name"], row["kind"], row["status"]) for row in rows} >= {
        ("tuned", "train", "done"), ("index", "index", "done"), ("runs/traced", "trace", "done"),
    }  # fmt: skip
    table = done("runs", world.root).out
    assert "traced" in table
    assert "done" in table
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text("{")
    assert done("runs", tmp_path, "--json").document["runs"][0]["status"] == "damaged"
    assert_short(rootward("runs", tmp_path / "none"), 2, "none")


def test_methods_are_listed_and_found():
    found = done("methods", "--json").document["methods"]
    assert {"tracin_pruthi2020", "bm25"} <= {method["name"] for method in found}
    assert [m["name"] for m in done("methods", "find", "2002.08484", "--json").document["methods"]] == [
        "tracin_pruthi2020"
    ]
    assert "tracin_pruthi2020" in done("methods", "find", "tracin").out
    assert_short(rootward("methods", "find", "perpetual", "motion"), 2, "perpetual motion")
    assert_short(rootward("methods", "bm25", "ekfac"), 2, "NAME", "find")


def test_a_method_is_shown_with_all_its_options_under_every_name():
    shown = done("methods", "ekfac")
    assert "2308.03296" in shown.out and "damping_scope" in shown.out and "0.1" in shown.out
    own, preset = (done("methods", name, "--json").document["method"] for name in ("EKFAC", "ekfac_joint"))
    assert own["name"] == preset["name"] == "ekfac_grosse2023"
    method = registry.get("ekfac")[0]
    assert [option["name"] for option in own["options"]] == list(method.config.model_fields)
    damping = {"default": 0.1, "expected": "a number of at least 0 or 'recipe'"}
    for found, value in ((own, 0.1), (preset, 10.0)):
        option = next(option for option in found["options"] if option["name"] == "damping")
        assert option == {"name": "damping", **damping, "default": value, "meaning": option["meaning"]}
        assert option["meaning"] == method.config.model_fields["damping"].description
    assert_short(rootward("methods", "ekfak"), 2, "did you mean 'ekfac'")


def test_quiet_leaves_the_result_and_nothing_else(world: World, tmp_path: Path):
    for command in (world.train(world.model, "-q"), world.trace(world.traced, "--planted", "planted=true", "-q")):
        quiet = done(*command)
        assert quiet.err == "" and quiet.out
    assert done(*world.train(world.model)).err  # the note that the model is there already


def test_doctor_finds_what_is_there_and_what_is_broken(monkeypatch: pytest.MonkeyPatch):
    found = done("doctor", "--json").document
    assert found["ok"]
    assert {"torch", "cpu", "free memory", "network"} <= {check["check"] for check in found["checks"]}
    monkeypatch.setattr("rootward.cli.doctor.NEEDED", ("torch", "no_such_package_of_ours"))
    result = rootward("doctor")
    assert result.code == 1
    assert "Broken: no_such_package_of_ours" in result.out


def test_lora_is_trained_traced_and_its_lost_base_is_missed(world: World, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    for path in world.base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    lora = tmp_path / "lora"
    done(
        "train",
        "--base",
        base,
        "--documents",
        world.documents,
        "--out",
        lora,
        "--lora-rank",
        "2",
        "--recipe",
        "lora.alpha=4",
    )
    given = ["--documents", world.documents, "--behaviour", world.queries, "--method", "gradient_dot", "--tokens", "0"]
    found = done("trace", lora, *given, "--out", tmp_path / "r", "--no-report", "--json").document
    assert 0 < found["coverage"]["covered"] < found["coverage"]["parameters"] / 2
    base.rename(tmp_path / "moved")
    assert_short(rootward("trace", lora, *given, "--out", tmp_path / "s"), 4, "base")
    done("trace", lora, *given, "--out", tmp_path / "s", "--base", tmp_path / "moved", "--no-report")


def test_the_program_starts_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rootward", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "rootward 0.1.0\n")
