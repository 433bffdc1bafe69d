"""What is written is whole, what is read is checked."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rootward.core import records
from rootward.core.errors import ArtefactError, NumericalError, StorageError
from rootward.core.records import Cost, Interval, RunRecord, machine, now, read_model, versions, write_model, write_text


def record(**changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "kind": "trace", "name": "ü", "key": "k", "started": now(), "config": {"a": [1, None, "ß\u2028"]},
        "versions": versions(), "machine": machine(), "cost": Cost(seconds=1.5),
    }  # fmt: skip
    return RunRecord(**(fields | changes))


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_round_trip(tmp_path: Path):
    write_model(tmp_path / "deep" / "record.json", record())
    assert read_model(RunRecord, tmp_path / "deep" / "record.json") == record(started=json.loads(
        (tmp_path / "deep" / "record.json").read_text(encoding="utf-8"))["started"])  # fmt: skip
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["record.json"]


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_schema_version_is_refused(tmp_path: Path, version: Any):
    write_model(tmp_path / "record.json", record())
    raw = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    (tmp_path / "record.json").write_text(json.dumps(raw | {"schema_version": version}))
    with pytest.raises(ArtefactError, match=f"expected schema version 1, found {version}"):
        read_model(RunRecord, tmp_path / "record.json")


@pytest.mark.parametrize("data", [b"", b'{"schema_version": 1, "ki', b"\xff\xfe", b"[1, 2]", b"3"])
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "record.json").write_bytes(data)
    with pytest.raises(ArtefactError, match="record.json"):
        read_model(RunRecord, tmp_path / "record.json")


def test_missing_fields_and_unknown_ones_are_refused(tmp_path: Path):
    write_text(tmp_path / "a.json", '{"value": 1.0, "low": 0.0, "high": 2.0}')
    write_text(tmp_path / "b.json", '{"value": 1.0, "low": 0.0, "high": 2.0, "n": 3, "more": 4}')
    for name, field in (("a.json", "n"), ("b.json", "more")):
        with pytest.raises(ArtefactError, match=rf"does not hold a Interval(.|\n)*{field}"):
            read_model(Interval, tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(ArtefactError, match="no such file"):
        read_model(RunRecord, tmp_path / "none.json")
    with pytest.raises(ArtefactError, match="is damaged"):
        read_model(RunRecord, tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    write_text(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr(*((records.os, "fsync") if step == "fsync" else (Path, "replace")), full_disk)
        with pytest.raises(StorageError, match="No space left on device; free space"):
            write_text(tmp_path / "a.txt", "new")
        with pytest.raises(StorageError, match="b.txt"):
            write_text(tmp_path / "b.txt", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_write_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not write"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path):
    with pytest.raises(NumericalError, match="not finite"):
        write_model(tmp_path / "a.json", Cost(seconds=float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_records_come_without_torch():
    code = "import sys, rootward.core.records, rootward.core.runfolder as r; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_a_costs_memory_says_that_it_is_the_processes():
    assert "the whole process's peak" in " ".join((Cost.__doc__ or "").split())
