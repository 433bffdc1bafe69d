"""A run's status is always true, and another run is never overwritten unasked."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rootward.core import records, runfolder
from rootward.core.errors import ArtefactError, InputError, StorageError
from rootward.core.records import Cost, Coverage, RunRecord, read_model
from rootward.core.runfolder import RESULTS, open_run, run_key

CONFIG, INPUTS = {"method": "bm25", "seeds": (1, 2)}, {"model": "m1", "documents": "d1"}


def status(path: Path) -> RunRecord:
    return read_model(RunRecord, path / "record.json")


def test_the_status_goes_from_running_to_done(tmp_path: Path):
    with open_run(tmp_path / "run", "trace", CONFIG, INPUTS, command="c", seeds=[3]) as run:
        assert status(run.path).status == "running"
        run.timing("one", 1.23456)
        run.timing("two", 2)
        run.warn("mind this")
        run.warn("mind this")
        assert status(run.path).timings == {"one": 1.235, "two": 2}
    found = status(tmp_path / "run")
    assert (found.status, found.warnings, found.seeds, found.command) == ("done", ["mind this"], [3], "c")
    assert found.seconds is not None
    assert found.key == run_key("trace", CONFIG, INPUTS)


def test_done_keeps_what_it_is_given(tmp_path: Path):
    coverage = Coverage(parameters=1, covered=1, documents=2, used=2)
    with open_run(tmp_path, "trace", CONFIG, INPUTS) as run:
        run.done(coverage=coverage, cost=Cost(seconds=2.0))
    assert status(tmp_path).coverage == coverage
    assert status(tmp_path).cost == Cost(seconds=2.0)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (KeyboardInterrupt(), "stopped", None),
        (InputError("no such thing"), "failed", "InputError: no such thing"),
        (SystemExit(3), "failed", "SystemExit: 3"),
    ],
)
def test_a_run_that_ends_early_says_so(tmp_path: Path, error: BaseException, expected: str, text: str | None):
    with pytest.raises(type(error)), open_run(tmp_path, "trace", CONFIG, INPUTS):
        raise error
    found = status(tmp_path)
    assert (found.status, found.error) == (expected, text)
    with open_run(tmp_path, "trace", CONFIG, INPUTS):
        pass
    assert (status(tmp_path).status, status(tmp_path).error) == ("done", None)


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="the reason"), open_run(tmp_path, "trace", CONFIG, INPUTS):
        monkeypatch.setattr(records.os, "fsync", full)
        raise InputError("the reason")


def test_another_config_or_input_is_refused_with_the_difference(tmp_path: Path):
    with open_run(tmp_path, "trace", CONFIG, INPUTS):
        pass
    before = (tmp_path / "record.json").read_bytes()
    asked: list[tuple[str, Any, Any, str]] = [
        ("trace", {**CONFIG, "method": "random"}, INPUTS, "  config.method: 'bm25' -> 'random'"),
        ("trace", {**CONFIG, "documents": "path"}, INPUTS, "  config.documents: None -> 'path'"),
        ("trace", CONFIG, {**INPUTS, "documents": "d2"}, "  inputs.documents: 'd1' -> 'd2'"),
        ("verify", CONFIG, INPUTS, "  kind: 'trace' -> 'verify'"),
    ]
    for kind, config, inputs, line in asked:
        with pytest.raises(ArtefactError) as caught, open_run(tmp_path, kind, config, inputs):
            pytest.fail("the run was opened")
        assert str(caught.value).splitlines()[1:-1] == [line]
        assert "--overwrite" in str(caught.value)
    assert (tmp_path / "record.json").read_bytes() == before


def test_overwriting_leaves_nothing_of_the_other_run(tmp_path: Path):
    with open_run(tmp_path, "trace", CONFIG, INPUTS):
        for name in (*RESULTS, "mine.txt"):
            (tmp_path / name).write_text("old")
    with open_run(tmp_path, "trace", CONFIG, INPUTS, overwrite=True):
        assert all((tmp_path / name).exists() for name in RESULTS)  # the same run: its results still hold
    with open_run(tmp_path, "trace", {"method": "random"}, INPUTS, overwrite=True):
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "record.json"]
    (tmp_path / "record.json").write_text("{torn")
    with pytest.raises(ArtefactError, match="damaged"), open_run(tmp_path, "trace", CONFIG, INPUTS):
        pass
    with open_run(tmp_path, "trace", CONFIG, INPUTS, overwrite=True):
        pass
    assert status(tmp_path).status == "done"


def test_the_key_does_not_depend_on_the_order_of_keys():
    key = run_key("trace", CONFIG, INPUTS)
    assert key == run_key("trace", dict(reversed(CONFIG.items())), dict(reversed(INPUTS.items())))
    assert key != run_key("trace", CONFIG, {**INPUTS, "model": "m2"})


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with open_run(tmp_path, "trace", CONFIG, INPUTS) as run:
        run.write_scores([("a", -1, ("x", "y"), np.array([1.0, 2.0], np.float32)), ("b", 0, ("x",), [0.5])])
        row = {"row": 0, "id": "x", "text": "t", "response": "r", "source": "s", "tokens": 3, "trained": 2}
        run.write_documents([{**row, "truncated": False, "loss": 1.5, "meta": "{}"}])
        found = pq.read_table(tmp_path / "scores.parquet").to_pylist()
        assert found[1] == {"method": "a", "query": -1, "id": "y", "score": 2.0}
        assert tuple(pq.read_schema(tmp_path / "scores.parquet").names) == records.SCORE_COLUMNS
        assert tuple(pq.read_schema(tmp_path / "documents.parquet").names) == records.DOCUMENT_COLUMNS

        def full(table: Any, path: Path, **options: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(runfolder.pq, "write_table", full)
        with pytest.raises(StorageError, match="scores.parquet.*No space left"):
            run.write_scores([("c", -1, ("x",), [0.0])])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["documents.parquet", "record.json", "scores.parquet"]
        assert len(pq.read_table(tmp_path / "scores.parquet")) == 3
