"""Flags over file over defaults; what a file may hold; what is written down."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from rootward.cli.config import config_text, parse_options, resolve, toml_value
from rootward.core.errors import InputError
from rootward.core.expected import nearest
from tests.cli.conftest import World, assert_short, done, rootward

TRACE = 'model = "m"\ndocuments = "d.jsonl"\nbehaviour = "q.jsonl"\nout = "runs/x"\n'


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_go_before_the_file_and_it_before_defaults(tmp_path: Path):
    file = write(tmp_path / "c" / "t.toml", TRACE + "tokens = 7\ntop = 3\n[options.bm25]\nk1 = 1.0\nb = 0.5\n")
    found = resolve("trace", {"tokens": 9, "limit": None, "methods": [], "options": {"bm25": {"k1": 2.0}}}, file)
    assert (found.tokens, found.top, found.split_seed) == (9, 3, 0)
    assert found.options == {"bm25": {"k1": 2.0, "b": 0.5}}
    assert found.methods == ["gradient_dot", "gradient_cosine"]


def test_paths_are_relative_to_where_they_were_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "c" / "t.toml", TRACE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = resolve("trace", {"out": Path("mine")}, Path("../c/t.toml"))
    assert found.model == tmp_path / "c" / "m"
    assert found.documents == tmp_path / "c" / "d.jsonl"
    assert found.out == tmp_path / "here" / "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TRACE + "methds = []\n", ["unknown key 'methds'", "did you mean 'methods'", "known keys"]),
        (TRACE + "hold-out = 0.5\n", ["unknown key 'hold-out'", "did you mean 'hold_out'"]),
        (TRACE + "tokens = -1\n", ["tokens", "--tokens", "greater than or equal to 0"]),
        (TRACE + 'methods = "bm25"\n', ["methods", "list"]),
        ('model = "m"\n', ["documents is missing", "--documents", "out is missing"]),
        ("model = \n", ["not TOML", "line 1"]),
        ('command = "index"\n' + TRACE, ["`rootward trace`", "`rootward index`"]),
        (TRACE + "[trace]\ntopp = 3\n", ["[trace]", "unknown key 'topp'", "did you mean 'top'"]),
        (TRACE + "[verify]\nseed = 3\n", ["[verify]", "did you mean 'seeds'"]),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, words: list[str]):
    file = write(tmp_path / "t.toml", text)
    with pytest.raises(InputError) as caught:
        resolve("trace", {}, file)
    for word in ["t.toml", *words]:
        assert word in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path):
    assert_short(rootward("trace", "--config", tmp_path / "no.toml"), 2, "no.toml", "no such config file")
    (tmp_path / "b.toml").write_bytes(b"a = '\xff'")
    assert_short(rootward("trace", "--config", tmp_path / "b.toml"), 2, "b.toml", "UTF-8")


def test_one_file_for_all_commands(tmp_path: Path):
    text = 'documents = "d.jsonl"\n[train]\nbase = "b"\nout = "m"\n[train.recipe]\nlr = 0.1\n[trace]\nmodel = "m"\n'
    text += 'behaviour = "q.jsonl"\nout = "r"\n[verify]\nrun = "r"\ncount = 5\n'
    file = write(tmp_path / "all.toml", text)
    assert resolve("train", {}, file).recipe == {"lr": 0.1}
    assert resolve("trace", {}, file).documents == resolve("train", {}, file).documents == tmp_path / "d.jsonl"
    assert resolve("verify", {}, file).count == 5
    with pytest.raises(InputError, match="model is missing"):
        resolve("index", {}, file)


@pytest.mark.parametrize("command", ["index", "trace", "verify"])
def test_what_is_written_reads_back(tmp_path: Path, command: str):
    text = {
        "index": 'model = "m"\ndocuments = "d"\nout = "o"\nrank = "none"\n',
        "trace": TRACE,
        "verify": 'run = "r"\ncount = "7%"\n',
    }
    first = resolve(command, {}, write(tmp_path / "a.toml", text[command]))
    again = resolve(command, {}, write(tmp_path / "elsewhere" / "b.toml", config_text(command, first)))
    assert again == first


def test_print_config_shows_everything_and_does_nothing(world: World, tmp_path: Path):
    found = tomllib.loads(done(*world.trace(tmp_path / "o"), "--print-config").out)
    assert (found["command"], found["token_budget"], found["split_seed"]) == ("trace", 512, 0)
    found = tomllib.loads(done(*world.train(tmp_path / "o"), "--print-config").out)
    assert (found["recipe"]["lr"], found["recipe"]["optimiser"]) == (5e-3, "adamw")
    document = done("verify", "r", "--print-config", "--json").document
    assert document["config"]["seeds"] == [0, 1, 2]
    assert not (tmp_path / "o").exists()


def test_values_of_options():
    assert toml_value("1.5") == 1.5
    assert toml_value("true") is True
    assert toml_value("[1, 2]") == [1, 2]
    assert toml_value("mean") == "mean"
    assert parse_options(["a.b=1", "a.c=x", "d.e=[]"], "--option", depth=2) == {"a": {"b": 1, "c": "x"}, "d": {"e": []}}
    assert parse_options(["lora.rank=2", "lr=1e-3"], "--recipe", depth=1) == {"lora": {"rank": 2}, "lr": 1e-3}
    assert parse_options(None, "--option", depth=2) is None
    assert nearest("tokns", ["tokens", "top"]) == "; did you mean 'tokens'?"
    assert nearest("zzz", ["tokens"]) == ""
    assert resolve("verify", {"run": Path("r"), "seeds": "4,5", "count": "20"}, None).seeds == [4, 5]


def test_seeds_and_counts_that_are_none():
    assert_short(rootward("verify", "r", "--seeds", "a,b"), 2, "--seeds")
    assert_short(rootward("verify", "r", "--seeds", ","), 2, "--seeds")
    assert_short(rootward("verify", "r", "--measure", "median"), 2, "--measure", "'rate' or 'mean'")
