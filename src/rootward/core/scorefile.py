"""Scores on disk: one Parquet file for each result, read back as the same `Scores`."""

# pyright: basic
# (pyarrow has no type stubs)

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rootward.core.errors import ArtefactError
from rootward.core.records import Cost, Coverage
from rootward.core.runfolder import write_table
from rootward.core.scores import Scores

_KEY = b"rootward scores"
_FORMAT = 1
_TEXTS = ("method", "unit", "behaviour", "goal")


def score_parts(scores: Mapping[str, Scores]) -> list[tuple[str, int, Sequence[str], Any]]:
    """Rows of a run folder's table of scores: of each method the mean over queries (number -1), then each query."""
    parts: list[tuple[str, int, Sequence[str], Any]] = []
    for name, found in scores.items():
        parts.append((name, -1, found.document_ids, found.mean))
        if len(found.queries) > 1:
            parts += [(name, q, found.document_ids, row) for q, row in enumerate(found.values)]
    return parts


def write_scores(path: Path, scores: Scores) -> None:
    """A column of ids, one of rows and one for each query; the rest as JSON in the schema. Whole or not there."""
    facts = {
        "format": _FORMAT,
        "queries": list(scores.queries),
        "notes": list(scores.notes),
        "cost": scores.cost.model_dump(mode="json"),
        "coverage": None if scores.coverage is None else scores.coverage.model_dump(mode="json"),
        "has_rows": bool(scores.rows),
        **{name: getattr(scores, name) for name in _TEXTS},
    }
    columns = {"id": pa.array(list(scores.document_ids), pa.string())}
    columns["row"] = pa.array(list(scores.rows) or [None] * len(scores.document_ids), pa.int64())
    columns |= {f"q{n}": pa.array(row, pa.float32()) for n, row in enumerate(scores.values)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, pa.table(columns).replace_schema_metadata({_KEY: json.dumps(facts).encode()}))


def read_scores(path: Path) -> Scores:
    """What `write_scores` wrote; a damaged file or another format is an `ArtefactError`."""
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[_KEY])
        if facts["format"] != _FORMAT:
            raise ArtefactError(f"{path}: expected format {_FORMAT}, found {facts['format']}; remove the file")
        values = np.stack([table.column(f"q{n}").to_numpy() for n in range(len(facts["queries"]))])
        return Scores(
            values=values.astype(np.float32),
            queries=tuple(facts["queries"]),
            document_ids=tuple(table.column("id").to_pylist()),
            rows=tuple(table.column("row").to_pylist()) if facts["has_rows"] else (),
            cost=Cost(**facts["cost"]),
            coverage=None if facts["coverage"] is None else Coverage(**facts["coverage"]),
            notes=tuple(facts["notes"]),
            **{name: facts[name] for name in _TEXTS},
        )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ArtefactError(f"{path} does not hold scores ({error}); remove the file and run again") from error
