"""Writing a run folder: one record whose status is always true, and files that are whole or not there."""

# pyright: basic
# (pyarrow has no type stubs)

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rootward.core.errors import ArtefactError, StorageError
from rootward.core.hashing import difference, digest_json
from rootward.core.records import (
    Cost,
    Coverage,
    RunRecord,
    machine,
    now,
    read_model,
    versions,
    whole_or_absent,
    write_model,
)

RESULTS = ("documents.parquet", "scores.parquet", "trace.json", "verdict.json", "compare.json", "report.html")
"""What a run leaves beside its record and config."""


def run_key(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What a run is recognised by: the hash of its kind, its resolved config and its inputs."""
    return digest_json({"kind": kind, "config": dict(config), "inputs": dict(inputs)})[:16]


class RunFolder:
    """A run folder being written; use `open_run`."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.record = record
        self._start = time.perf_counter()

    def update(self, **changes: Any) -> None:
        """Change fields of the record and write it."""
        self.record = self.record.model_copy(update=changes)
        write_model(self.path / "record.json", self.record)

    def timing(self, name: str, seconds: float) -> None:
        """Add a named stage's seconds."""
        self.update(timings={**self.record.timings, name: round(seconds, 3)})

    def warn(self, text: str) -> None:
        """Note something that the reader of the result must know."""
        if text not in self.record.warnings:
            self.update(warnings=[*self.record.warnings, text])

    def end(self, status: Literal["failed", "stopped"], error: str | None) -> None:
        """Note an end that is not whole; where the disk refuses even that, the reason of the end is what is told."""
        with suppress(StorageError):
            self.update(status=status, error=error, seconds=round(time.perf_counter() - self._start, 3))

    def done(self, *, coverage: Coverage | None = None, cost: Cost | None = None) -> None:
        """Mark the run as whole."""
        seconds = round(time.perf_counter() - self._start, 3)
        changes: dict[str, Any] = {"status": "done", "seconds": seconds, "error": None}
        if coverage is not None:
            changes["coverage"] = coverage
        if cost is not None:
            changes["cost"] = cost
        self.update(**changes)

    def write_documents(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """``documents.parquet`` with the columns of `core.records.DOCUMENT_COLUMNS`."""
        schema = pa.schema(
            [
                ("row", pa.int64()),
                ("id", pa.string()),
                ("text", pa.string()),
                ("response", pa.string()),
                ("source", pa.string()),
                ("tokens", pa.int64()),
                ("trained", pa.int64()),
                ("truncated", pa.bool_()),
                ("loss", pa.float64()),
                ("meta", pa.string()),
            ]
        )
        write_table(self.path / "documents.parquet", pa.Table.from_pylist([dict(r) for r in rows], schema=schema))

    def write_scores(self, parts: Sequence[tuple[str, int, Sequence[str], Any]]) -> None:
        """``scores.parquet`` from (method, query, document ids, scores) parts; query -1 is the mean."""
        tables = [
            pa.table(
                {
                    "method": pa.array([method] * len(ids), pa.string()),
                    "query": pa.array([query] * len(ids), pa.int64()),
                    "id": pa.array(list(ids), pa.string()),
                    "score": pa.array(scores, pa.float32()),
                }
            )
            for method, query, ids, scores in parts
        ]
        write_table(self.path / "scores.parquet", pa.concat_tables(tables))


def write_table(path: Path, table: pa.Table) -> None:
    """A Parquet file, atomically."""
    try:
        with whole_or_absent(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror or error}; free space and run again") from error


def _facts(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """What makes the key, flat and as it reads back from JSON, for `difference`."""
    named = [*((f"config.{k}", v) for k, v in config.items()), *((f"inputs.{k}", v) for k, v in inputs.items())]
    return json.loads(json.dumps({"kind": kind, **dict(named)}))


def _remove_results(path: Path, key: str) -> None:
    """Take away what another run left, so that no page joins its results with the new ones."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # a record that cannot be read is of another run
        if json.loads((path / "record.json").read_text(encoding="utf-8"))["key"] == key:
            return
    for name in RESULTS:
        (path / name).unlink(missing_ok=True)


@contextmanager
def open_run(
    path: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    command: str = "",
    seeds: Sequence[int] = (),
    overwrite: bool = False,
) -> Generator[RunFolder]:
    """Begin or continue a run in ``path``; its record says "running", then "done", "failed" or "stopped".

    Raises:
        ArtefactError: the folder holds a run of another config or other inputs (the difference is shown). With
            ``overwrite`` that run's results are taken away instead.
    """
    key = run_key(kind, config, inputs)
    if overwrite:
        _remove_results(path, key)
    elif (path / "record.json").exists():
        old = read_model(RunRecord, path / "record.json")
        if old.key != key:
            detail = difference(_facts(old.kind, old.config, old.inputs), _facts(kind, config, inputs))
            raise ArtefactError(
                f"{path} holds another run:\n{detail}\ngive another folder with --out, or --overwrite to replace it"
            )
    record = RunRecord(
        kind=kind,
        name=path.name,
        key=key,
        command=command,
        started=now(),
        config=dict(config),
        inputs=dict(inputs),
        seeds=list(seeds),
        versions=versions(),
        machine=machine(),
    )
    run = RunFolder(path, record)
    run.update()
    try:
        yield run
    except KeyboardInterrupt:
        run.end("stopped", None)
        raise
    except BaseException as error:
        run.end("failed", f"{type(error).__name__}: {error}")
        raise
    if run.record.status == "running":
        run.done()
