"""Rows from files, each with where it stands: JSONL, Parquet, `datasets` folders, memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rootward.core.errors import InputError

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def read_jsonl(path: Path, skipped: dict[str, int], limit: int | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a JSONL file with their source ``name:line``.

    Lines end at byte 10 only: U+2028 and its like are text. Blank lines are counted in ``skipped``.
    """
    given = 0
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            if given == limit:
                return
            source = f"{path.name}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                raise InputError(f"{path}:{number}: not UTF-8: {bad}; save the file as UTF-8") from error
            if not line.strip(" \t\r\n"):
                skipped["blank line"] = skipped.get("blank line", 0) + 1
                continue
            try:
                row = json.loads(line, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: expected an object {FORMS}, got {type(row).__name__}")
            given += 1
            yield row, source


def read_parquet(path: Path, limit: int | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a Parquet file with their source ``name:row``, counted from 1."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, memory_map=True)
        rows = (table if limit is None else table.slice(0, limit)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {error}") from error
    for number, row in enumerate(rows, 1):
        yield row, f"{path.name}:{number}"


def read_folder(path: Path, limit: int | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a folder written by datasets' ``save_to_disk`` (of its one split)."""
    import datasets

    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if len(splits) != 1:
            raise InputError(
                f"{path}: holds the splits {', '.join(splits)}; give the folder of one, such as {path / splits[0]}"
            )
        path = path / splits[0]
    if not (path / "state.json").exists():
        raise InputError(
            f"{path}: expected a folder saved with datasets' save_to_disk, or a file {', '.join(SUFFIXES)}"
        )
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as a datasets folder: {error}") from error
    yield from read_rows(loaded, path.name, limit)


def read_rows(rows: Iterable[Any], name: str, limit: int | None) -> Iterator[tuple[Any, str]]:
    """Rows from memory with their source ``name:row``, counted from 1."""
    for number, row in enumerate(rows, 1):
        if limit is not None and number > limit:
            return
        yield row, f"{name}:{number}"
