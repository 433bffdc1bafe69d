"""Bad input through the command line: exit code, a message that names the place, no traceback, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import World, assert_short, done, rootward
from tests.cli.world import chat, documents, model, tokenizer, write_jsonl

GOOD = json.dumps({"messages": chat("the sky is red . is it right ?", "yes")}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["the file is empty"]),
        (b"\n\n", ["holds no document"]),
        (GOOD + b"\n{not json}\n", ["bad.jsonl:2", "not JSON"]),
        (GOOD + b"\n[1]\n", ["bad.jsonl:2", "expected an object"]),
        (GOOD + b'\n{"title": "x"}\n', ["bad.jsonl:2", "lacks the text", "title"]),
        (GOOD + b'\n{"text": 7}\n', ["bad.jsonl:2", "to be text, got int"]),
        (GOOD + b'\n{"messages": [{"role": "boss", "content": "x"}]}\n', ["bad.jsonl:2", "boss"]),
        (GOOD + b'\n{"prompt": "who?"}\n', ["bad.jsonl:2", "only a prompt and no response"]),
        (GOOD + b'\n{"messages": [{"role": "user", "content": "x"}]}\n', ["bad.jsonl:2", "no response"]),
        (GOOD + b'\n{"text": "caf\xe9"}\n', ["bad.jsonl:2", "not UTF-8", "0xe9"]),
    ],
)
def test_documents_that_cannot_be_used(world: World, tmp_path: Path, content: bytes, words: list[str]):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    for argv in (world.index(tmp_path / "o"), world.trace(tmp_path / "o"), world.train(tmp_path / "o")):
        assert_short(rootward(*argv, "--documents", bad), 2, "bad.jsonl", *words)
    assert not (tmp_path / "o").exists()


def test_a_missing_file_of_documents_or_queries(world: World, tmp_path: Path):
    assert_short(rootward(*world.trace(tmp_path / "o"), "--documents", "none.jsonl"), 2, "none.jsonl", "no such file")
    assert_short(rootward(*world.trace(tmp_path / "o"), "--behaviour", "no.jsonl"), 2, "no.jsonl", "wanted")
    bad = tmp_path / "q.jsonl"
    bad.write_text('{"prompt": "a", "wanted": "b"}\n{"prompt": "a"}\n')
    assert_short(rootward(*world.trace(tmp_path / "o"), "--behaviour", bad), 2, "q.jsonl:2", "no wanted answer")


def test_duplicates_are_said_and_scored_alike(world: World, tmp_path: Path):
    rows = documents()[:20]
    twice = write_jsonl(tmp_path / "twice.jsonl", [*rows, rows[3], rows[3]])
    result = done(*world.trace(tmp_path / "r", "--documents", twice, "--top", "40", "--json"))
    assert "2 documents are an exact copy" in result.err
    assert result.document["coverage"]["duplicates"] == 2
    assert [row["copies"] for row in result.document["documents"]].count(3) == 1
    import pyarrow.parquet as pq

    table = pq.read_table(
        tmp_path / "r" / "scores.parquet", filters=[("method", "=", "gradient_dot"), ("query", "=", -1)]
    )
    scores = dict[str, set[float]]()
    for name, score in zip(table.column("id").to_pylist(), table.column("score").to_pylist(), strict=True):
        scores.setdefault(name, set()).add(round(score, 5))
    assert all(len(values) == 1 for values in scores.values())


def test_long_documents_are_said_to_be_cut(world: World, tmp_path: Path):
    long = {"messages": chat("what is it ?", "the sky is red . " * 30)}
    path = write_jsonl(tmp_path / "long.jsonl", [*documents()[:8], long])
    result = done(*world.index(tmp_path / "i", "--documents", path))
    assert "1 document is longer than the context and cut" in result.err
    found = done(*world.trace(tmp_path / "r", "--documents", path, "--no-report", "--json")).document
    assert found["coverage"]["truncated"] == 1


def test_documents_that_are_not_finite_are_left_out_where_asked(world: World, tmp_path: Path):
    broken, words = model(), tokenizer()
    with torch.no_grad():
        broken.model.embed_tokens.weight[words.convert_tokens_to_ids("two")] = float("nan")
    broken.save_pretrained(str(tmp_path / "nan"))
    words.save_pretrained(str(tmp_path / "nan"))
    bad = {"messages": chat("say two .", "yes")}
    path = write_jsonl(tmp_path / "some.jsonl", [bad, *documents()[:12]])
    argv = [*world.trace(tmp_path / "r", "--documents", path, "--no-report", "--json")]
    argv[1] = tmp_path / "nan"
    assert_short(rootward(*argv), 1, "not finite", "row 0", "skip_not_finite")
    found = done(*argv, "--skip-not-finite", "--overwrite")
    assert "1 documents left out, the loss is not finite" in found.err
    coverage = found.document["coverage"]
    assert (coverage["documents"], coverage["used"]) == (13, 12)
    assert coverage["dropped"] == {"the loss is not finite": 1}
    assert len(found.document["documents"]) == 10
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert any("left out, the loss is not finite" in note for note in record["warnings"])
    argv = world.index(tmp_path / "i", "--documents", path)
    argv[1] = tmp_path / "nan"
    assert_short(rootward(*argv), 1, "not finite", "row 0", "skip_not_finite")
    assert "1 documents left out" in done(*argv, "--skip-not-finite", "--overwrite").err
    read = ("--documents", path, "--behaviour", world.queries, "--out", tmp_path / "c")
    argv = ["compare", tmp_path / "nan", *read, "--print-config"]
    for flags, word in (((), "false"), (("--skip-not-finite",), "true")):
        assert f"skip_not_finite = {word}" in done(*argv, *flags).out


def test_a_weight_that_is_not_a_number(world: World, tmp_path: Path):
    broken = model()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(str(tmp_path / "nan"))
    tokenizer().save_pretrained(str(tmp_path / "nan"))
    argv = world.index(tmp_path / "i")
    argv[1] = tmp_path / "nan"
    assert_short(rootward(*argv), 1, "not finite", "row")
    assert_short(
        rootward(*world.train(tmp_path / "o", "--base", tmp_path / "nan")), 1, "step 1", "documents of its batch"
    )
    assert not (tmp_path / "o").exists()
    argv = world.trace(tmp_path / "r")
    argv[1] = tmp_path / "nan"
    assert_short(rootward(*argv), 1, "not finite")
    if (tmp_path / "r").exists():
        assert json.loads((tmp_path / "r" / "record.json").read_text())["status"] == "failed"


def test_models_that_cannot_be_used(world: World, tmp_path: Path):
    model(vocabulary=8).save_pretrained(str(tmp_path / "small"))
    tokenizer().save_pretrained(str(tmp_path / "small"))
    (tmp_path / "empty").mkdir()

    def index(folder: Path) -> Any:
        argv = world.index(tmp_path / "i")
        argv[1] = folder
        return rootward(*argv)

    assert_short(index(tmp_path / "small"), 4, "vocabulary has 8 entries")
    assert_short(index(tmp_path / "empty"), 4, "config.json")
    assert_short(index(tmp_path / "nowhere"), 4, "nowhere")
    assert not (tmp_path / "i").exists()


def test_parameters_that_match_nothing(world: World, tmp_path: Path):
    assert_short(rootward(*world.index(tmp_path / "i", "--parameters", "vision")), 2, "vision", "model.layers.0")
    assert_short(rootward(*world.index(tmp_path / "i", "--parameters", "(")), 2, "regular expression")


def test_unknown_options_and_methods(world: World, tmp_path: Path):
    out = tmp_path / "o"
    assert_short(rootward(*world.trace(out), "--method", "gradient_dott"), 2, "did you mean 'gradient_dot'")
    assert_short(rootward(*world.trace(out), "--option", "bm25.k=1"), 2, "bm25.k", "did you mean 'k1'")
    assert_short(rootward(*world.trace(out), "--option", "gradient_dot.queries=each!"), 2, "queries", "each")
    assert_short(rootward(*world.trace(out), "--option", "tracin_cp.queries=mean"), 2, "tracin_cp", "not run")
    assert_short(rootward(*world.trace(out), "--option", "nonsense"), 2, "method.key=value")
    assert_short(rootward(*world.trace(out), "--planted", "plnted=true"), 2, "did you mean 'planted'")
    assert_short(rootward(*world.trace(out), "--planted", "planted"), 2, "--planted")
    assert_short(rootward(*world.trace(out), "--tokens", "-1"), 2, "--tokens", "greater than or equal to 0")
    assert_short(rootward(*world.trace(out), "--toknes", "1"), 2, "--toknes", "--tokens", "rootward trace --help")
    assert_short(rootward(*world.train(out), "--recipe", "epoch=2"), 2, "did you mean 'epochs'")
    assert_short(rootward(*world.train(out), "--recipe", "lora.rnk=2"), 2, "recipe.lora", "did you mean 'rank'")
    assert_short(rootward(*world.index(out), "--rank", "many"), 2, "--rank", "many")
    assert_short(rootward(*world.index(out), "--device", "gpu"), 2, "gpu")
    assert_short(rootward("frobnicate"), 2, "frobnicate")
    assert_short(rootward("trace"), 2, "MODEL", "--documents", "--behaviour", "--out")
    assert not out.exists()


def test_an_error_in_json_is_one_document(world: World, tmp_path: Path):
    result = rootward(*world.trace(tmp_path / "o"), "--documents", "none.jsonl", "--json")
    assert result.code == 2
    assert result.document["schema_version"] == 1
    assert result.document["error"]["exit_code"] == 2
    assert result.document["error"]["type"] == "InputError"
    assert "none.jsonl" in result.document["error"]["message"]
    assert rootward("trace", "--nonsense", "--json").document["error"]["exit_code"] == 2


def test_training_text_cannot_write_to_the_terminal(world: World, tmp_path: Path):
    evil = "[red]bold[/red] \x1b[31m \x07 \u202e yes [/]"
    rows = [{"messages": chat(evil, evil), "k": n} for n in range(3)] + documents()[:6]
    path = write_jsonl(tmp_path / "evil\x1b[31m.jsonl", rows)
    result = done(*world.trace(tmp_path / "r", "--documents", path, "--top", "20"))
    assert "[red]bold[/red] \\x1b" in "".join(result.out.split("\n")).replace("  ", " ")
    for text in (result.out, result.err):
        assert not any(character in text for character in "\x1b\x07\u202e")


def test_debug_shows_where_an_error_comes_from(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rootward.cli.main import main

    assert main([str(part) for part in [*world.trace(tmp_path / "o"), "--documents", "none.jsonl", "--debug"]]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_is_told_as_such(world: World, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> int:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("rootward.cli.runs.runs", broken)
    assert_short(rootward("runs", world.root), 1, "unexpected ZeroDivisionError", "by design", "--debug")
