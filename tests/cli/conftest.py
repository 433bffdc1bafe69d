"""The command line called in this process, and a small world made once."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rootward.cli.main import main
from tests.cli.world import build


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document."""
        return json.loads(self.out)


def rootward(*argv: str | Path) -> Result:
    """``rootward ARGV`` in this process; a traceback on stderr fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(part) for part in argv])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Result(code, out.getvalue(), err.getvalue())


def done(*argv: str | Path) -> Result:
    """The same, and it must have worked."""
    result = rootward(*argv)
    assert result.code == 0, result.err
    return result


@dataclass(frozen=True)
class World:
    """Paths of the small world."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def documents(self) -> Path:
        return self.root / "documents.jsonl"

    @property
    def queries(self) -> Path:
        return self.root / "queries.jsonl"

    @property
    def model(self) -> Path:
        return self.root / "tuned"

    @property
    def traced(self) -> Path:
        return self.root / "runs" / "traced"

    @property
    def indexed(self) -> Path:
        return self.root / "index"

    def train(self, out: Path, *more: str | Path) -> list[str | Path]:
        recipe = ["--epochs", "4", "--lr", "5e-3", "--batch-size", "8", "--checkpoints", "2"]
        return ["train", "--base", self.base, "--documents", self.documents, "--out", out, *recipe, *more]

    def index(self, out: Path, *more: str | Path) -> list[str | Path]:
        small = ["--rank", "4", "--shard-documents", "16", "--token-budget", "512"]
        return ["index", self.model, "--documents", self.documents, "--out", out, *small, *more]

    def trace(self, out: Path, *more: str | Path) -> list[str | Path]:
        given = ["--documents", self.documents, "--behaviour", self.queries, "--out", out, "--tokens", "3"]
        return ["trace", self.model, *given, "--token-budget", "512", *more]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Base, tuned model, index and trace; tests do not write into them."""
    made = World(build(tmp_path_factory.mktemp("cli")))
    done(*made.train(made.model))
    done(*made.index(made.indexed))
    done(*made.trace(made.traced, "--planted", "planted=true"))
    return made


def shards(folder: Path) -> dict[str, bytes]:
    """The files of an index that must be the same, whoever built it."""
    return {path.name: path.read_bytes() for path in [*sorted(folder.glob("*.safetensors")), folder / "manifest.jsonl"]}


def assert_short(result: Result, code: int, *words: str) -> None:
    """An error in one short block that says what matters."""
    assert result.code == code, (result.code, result.err)
    for word in words:
        assert word in result.err, (word, result.err)
    assert len(result.err.splitlines()) <= 16, result.err


Argv = Sequence[str | Path]
