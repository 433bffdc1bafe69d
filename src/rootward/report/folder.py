"""Reading a run folder: what is there is checked, what is not there is None or empty."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rootward.core.records import (
    DOCUMENT_COLUMNS,
    SCORE_COLUMNS,
    ArtefactError,  # through the one module that this room may know
    Comparison,
    RunRecord,
    Trace,
    Verdict,
    read_model,
)

MEAN_QUERY = -1


@dataclass(frozen=True)
class Document:
    """One row of ``documents.parquet``; ``copies`` counts the rows that share its id."""

    id: str
    text: str
    response: str
    source: str
    tokens: int
    trained: int
    truncated: bool
    loss: float | None
    meta: dict[str, Any]
    copies: int = 1


@dataclass(frozen=True)
class Folder:
    """A run folder in memory, except for texts and single-query scores, which are read for chosen documents only.

    ``means`` maps method to document id to the mean score over queries.
    """

    path: Path
    record: RunRecord
    trace: Trace | None
    verdict: Verdict | None
    metas: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    copies: dict[str, int] = field(default_factory=dict[str, int])
    means: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    comparison: Comparison | None = None

    @property
    def goal(self) -> str:
        """Which direction of the measurement is more of the behaviour."""
        told = self.trace or self.comparison
        return told.goal if told else "raise"

    @property
    def main_method(self) -> str:
        """The method whose ranking is shown first: the trace's main one, or the comparison's best; "" without any."""
        if self.trace is not None:
            return self.trace.main_method
        if self.comparison is None:
            return ""
        return self.comparison.recommended or self.comparison.methods[0].method

    @property
    def planted_field(self) -> str | None:
        """What marks the documents that were planted, where that is known."""
        told = self.trace or self.comparison
        return told.planted_field if told else None

    @property
    def ids(self) -> list[str]:
        """Every document once, in the order of the file."""
        return list(self.metas)

    def documents(self, ids: Iterable[str]) -> dict[str, Document]:
        """The chosen documents with their text."""
        path = self.path / "documents.parquet"
        wanted = list(ids)
        if not path.exists() or not wanted:
            return {}
        table = _read(path, list(DOCUMENT_COLUMNS), pc.field("id").isin(wanted))
        found: dict[str, Document] = {}
        for row in table.to_pylist():
            name = str(row["id"])
            if name not in found:
                found[name] = _document(row, self.metas[name], self.copies[name])
        return found

    def query_scores(self, method: str, ids: Iterable[str]) -> dict[int, dict[str, float]]:
        """Scores of one method for each single query: query -> id -> score."""
        path = self.path / "scores.parquet"
        if not path.exists():
            return {}
        chosen = (pc.field("method") == method) & (pc.field("query") != MEAN_QUERY) & pc.field("id").isin(list(ids))
        table = _read(path, ["query", "id", "score"], chosen)
        found: dict[int, dict[str, float]] = {}
        columns = (table.column(name).to_pylist() for name in ("query", "id", "score"))
        for query, name, score in zip(*columns, strict=True):
            found.setdefault(int(query), {})[name] = math.nan if score is None else float(score)
        return dict(sorted(found.items()))


def read_folder(path: Path) -> Folder:
    """Read a run folder.

    Args:
        path: the folder; ``record.json`` must be in it, every other file may be missing.

    Raises:
        ArtefactError: the record is missing, or a file is damaged or of another schema.
    """
    record = read_model(RunRecord, path / "record.json")
    trace = read_model(Trace, path / "trace.json") if (path / "trace.json").exists() else None
    verdict = read_model(Verdict, path / "verdict.json") if (path / "verdict.json").exists() else None
    compared = path / "compare.json"
    comparison = read_model(Comparison, compared) if compared.exists() else None
    metas, copies = _metas(path / "documents.parquet")
    means = _means(path / "scores.parquet")
    for scored in means.values():  # scores without a documents table still make a ranking of ids
        for name in scored:
            if name not in metas:
                metas[name], copies[name] = {}, 1
    return Folder(path, record, trace, verdict, metas, copies, means, comparison)


def _read(path: Path, columns: list[str], where: pc.Expression | None = None) -> pa.Table:
    try:
        found = pq.read_schema(path).names
        missing = [name for name in columns if name not in found]
        if missing:
            raise ArtefactError(
                f"{path}: expected columns {columns}, found {found}; run the command that made it again"
            )
        return pq.read_table(path, columns=columns, filters=where)
    except (pa.ArrowException, OSError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); run the command that made it again") from error


def _metas(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    metas: dict[str, dict[str, Any]] = {}
    copies: dict[str, int] = {}
    if not path.exists():
        return metas, copies
    table = _read(path, ["id", "meta"])
    for name, meta in zip(table.column("id").to_pylist(), table.column("meta").to_pylist(), strict=True):
        copies[name] = copies.get(name, 0) + 1
        if name not in metas:
            metas[name] = _meta(meta, name, path)
    return metas, copies


def _meta(text: str | None, name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ArtefactError(f"{path}: the meta of document {name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: expected the meta of document {name} to be an object, got {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


def _means(path: Path) -> dict[str, dict[str, float]]:
    """Mean scores; a method that has rows for single queries only gets their mean."""
    means: dict[str, dict[str, float]] = {}
    if not path.exists():
        return means
    table = _read(path, list(SCORE_COLUMNS), pc.field("query") == MEAN_QUERY)
    _fill(means, table)
    listed = _read(path, ["method"]).column("method")
    rest = [method for method in listed.unique().to_pylist() if method not in means]
    if rest:
        table = _read(path, list(SCORE_COLUMNS), pc.field("method").isin(rest))
        grouped = table.group_by(["method", "id"], use_threads=False).aggregate([("score", "mean")])
        _fill(means, grouped.rename_columns(["method", "id", "score"]))
    return means


def _fill(means: dict[str, dict[str, float]], table: pa.Table) -> None:
    columns = (table.column(name).to_pylist() for name in ("method", "id", "score"))
    for method, name, score in zip(*columns, strict=True):
        if score is not None and math.isfinite(score):
            means.setdefault(str(method), {})[str(name)] = float(score)


def _document(row: dict[str, Any], meta: dict[str, Any], copies: int) -> Document:
    return Document(
        id=str(row["id"]),
        text=str(row["text"] or ""),
        response=str(row["response"] or ""),
        source=str(row["source"] or ""),
        tokens=int(row["tokens"] or 0),
        trained=int(row["trained"] or 0),
        truncated=bool(row["truncated"]),
        loss=row["loss"],
        meta=meta,
        copies=copies,
    )
