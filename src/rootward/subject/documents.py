"""Documents: what a model was trained on, read from JSONL, Parquet, a `datasets` folder or memory.

A document has exactly one form. Where a row holds the fields of several, the first of this table counts and
the others become metadata (so that rows with both ``prompt`` and ``messages`` mean their chat):

    chat          {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    completion    {"prompt": "...", "completion": "..."}
    text          {"text": "..."}
    supervised    {"x": array-like, "y": ...}                                     in memory only

A row that cannot be used is an `InputError` that names the file and the line; nothing is left out in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from rootward.core.errors import InputError
from rootward.core.hashing import digest, document_id
from rootward.core.records import write_text
from rootward.subject.reading import FORMS, SUFFIXES, read_folder, read_jsonl, read_parquet, read_rows

TEXT_FIELDS = ("messages", "prompt", "completion", "text")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Document:
    """One document. Equal content means equal ``id``, and documents are equal if their ids are.

    ``content`` has one of the forms above and is all that the model is trained on; ``source`` says where it
    came from ("sft.jsonl:12"); ``meta`` holds every other field of the row.
    """

    id: str
    content: dict[str, Any] = field(compare=False)
    source: str = field(default="", compare=False)
    meta: dict[str, Any] = field(default_factory=dict[str, Any], compare=False)

    @property
    def text(self) -> str:
        """The document as text, for people and word-based methods: turns joined by newlines, no template."""
        if "messages" in self.content:
            return "\n".join(f"{m['role']}: {m['content']}" for m in self.content["messages"])
        if "prompt" in self.content:
            return self.content["prompt"] + self.content["completion"]
        return self.content.get("text", "")

    @property
    def response(self) -> str:
        """What is trained on: assistant turns, completion, or the whole text."""
        if "messages" in self.content:
            return "\n".join(m["content"] for m in self.content["messages"] if m["role"] == "assistant")
        return self.content.get("completion", self.content.get("text", ""))


class Documents(Sequence[Document]):
    """Documents in order. ``skipped`` counts what was passed over while reading, by reason."""

    def __init__(self, documents: Iterable[Document], skipped: Mapping[str, int] | None = None) -> None:
        self._documents = tuple(documents)
        self.skipped = dict(skipped or {})

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> Document | Documents:
        return Documents(self._documents[index]) if isinstance(index, slice) else self._documents[index]

    def __iter__(self) -> Iterator[Document]:
        return iter(self._documents)

    def __repr__(self) -> str:
        return f"Documents({len(self)}, hash={self.hash[:8]})"

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Content hashes in order; duplicates repeat."""
        return tuple(document.id for document in self._documents)

    @cached_property
    def hash(self) -> str:
        """Hash of the ids in their order."""
        return digest("\n".join(self.ids))

    @cached_property
    def duplicates(self) -> int:
        """How many documents repeat an earlier one."""
        return len(self) - len(set(self.ids))

    def subset(self, rows: Iterable[int]) -> Documents:
        """The documents at these rows, in the order given; a row that does not exist is an `InputError`."""
        chosen = [int(row) for row in rows]
        wrong = [row for row in chosen if not 0 <= row < len(self)]
        if wrong:
            raise InputError(f"expected rows from 0 to {len(self) - 1}, got {wrong[0]}")
        return Documents(self._documents[row] for row in chosen)


def _check_text(value: Any, what: str, source: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError(f"{source}: expected {what} to be text, got {type(value).__name__}")
    if not value and not empty:
        raise InputError(f"{source}: {what} is empty; give it text or take the row out")
    return value


def check_messages(value: Any, source: str, *, answered: bool = True) -> list[dict[str, Any]]:
    """Checked chat turns; keys besides ``role`` and ``content`` stay for the template, empty ones (null) go.

    A turn of the assistant that is not the last may have no content (null, as beside tool calls): it is empty text.
    Raises `InputError` on a wrong type, an unknown role, or, if ``answered``, where the assistant says nothing.
    """
    if not isinstance(value, list | tuple) or not value:
        raise InputError(
            f"{source}: expected messages to be a list of turns, got {json.dumps(value, default=str)[:60]}"
        )
    turns: list[dict[str, Any]] = []
    for number, turn in enumerate(value):
        where = f"{source}: messages[{number}]"
        if not isinstance(turn, Mapping):
            raise InputError(f'{where}: expected {{"role": ..., "content": ...}}, got {type(turn).__name__}')
        if turn.get("role") not in ROLES:
            raise InputError(f"{where}: expected a role among {', '.join(ROLES)}, got {turn.get('role')!r}")
        content = turn.get("content")
        if content is None and turn["role"] == "assistant" and number < len(value) - 1:
            content = ""  # the assistant called a tool and said nothing
        _check_text(content, "content", where, empty=True)
        turns.append({**{str(key): part for key, part in turn.items() if part is not None}, "content": content})
    if answered and not any(turn["role"] == "assistant" and turn["content"] for turn in turns):
        raise InputError(
            f"{source}: only a prompt and no response: no turn of the assistant has text; add one or take the row out"
        )
    return turns


def _content(row: Mapping[str, Any], source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row's content and the keys that it used."""
    if row.get("messages") is not None:
        return {"messages": check_messages(row["messages"], source)}, ("messages",)
    if row.get("completion") is not None:
        if row.get("prompt") is None:
            raise InputError(
                f"{source}: has a completion and no prompt; add one (it may be empty), or name the field text"
            )
        prompt = _check_text(row["prompt"], "prompt", source, empty=True)
        return {"prompt": prompt, "completion": _check_text(row["completion"], "completion", source)}, (
            "prompt",
            "completion",
        )
    if row.get("text") is not None:
        return {"text": _check_text(row["text"], "text", source)}, ("text",)
    if row.get("prompt") is not None:
        raise InputError(f"{source}: only a prompt and no response; add a completion or take the row out")
    raise InputError(
        f"{source}: lacks the text: expected {FORMS}, found the fields {', '.join(map(repr, row)) or 'none'}"
    )


def _supervised(row: Mapping[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """``x`` and ``y`` as tensors, and the document's id: a hash of their types, shapes and bytes."""
    parts: dict[str, Tensor] = {}
    for key in ("x", "y"):
        try:
            parts[key] = torch.as_tensor(row[key])
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{source}: expected {key} to be a number or an array, got {type(row[key]).__name__}"
            ) from error
        if parts[key].is_floating_point() and not bool(torch.isfinite(parts[key]).all()):
            raise InputError(f"{source}: {key} holds NaN or infinity")
    described = {
        key: [
            str(part.dtype),
            list(part.shape),
            digest(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
        ]
        for key, part in parts.items()
    }
    return dict(parts), document_id(described)


def _plain(value: Any) -> Any:
    """A JSON-able stand-in for values that Parquet and memory can hold and JSON cannot."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def make_document(row: Mapping[str, Any], source: str = "memory") -> Document:
    """One row of any form to a `Document`; `InputError` says what is wrong with it."""
    if not isinstance(row, Mapping):
        raise InputError(f"{source}: expected an object {FORMS}, got {type(row).__name__}")
    if "x" in row and "y" in row and all(row.get(key) is None for key in TEXT_FIELDS):
        supervised, identity = _supervised(row, source)
        return Document(identity, supervised, source, plain_meta({k: v for k, v in row.items() if k not in ("x", "y")}))
    content, used = _content(row, source)
    meta = plain_meta({key: value for key, value in row.items() if key not in used})
    check_json([content, meta], source)
    return Document(document_id(content), content, source, meta)


def content_id(content: Mapping[str, Any]) -> str:
    """The `DocumentId` of a content of any form, tensors included."""
    return _supervised(content, "memory")[1] if "x" in content else document_id(content)


def plain_meta(row: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are not trained on, as JSON can hold them."""
    return {str(key): _plain(value) for key, value in row.items()}


def check_json(value: Any, source: str) -> None:
    """`InputError` for what JSON in UTF-8 cannot hold, such as half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: holds half of a surrogate pair, which is no text; repair the row") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: holds a value that JSON cannot: {error}") from error


def load_documents(source: Any, *, limit: int | None = None, name: str = "documents") -> Documents:
    """Read documents from a JSONL or Parquet file, a `datasets` folder or object, or a sequence in memory.

    Args:
        source: a path, a `datasets.Dataset`, or rows (mappings or `Document`).
        limit: read at most this many.
        name: stands in ``Document.source`` for rows from memory.

    Raises:
        InputError: a file that is missing, empty, of unknown kind or not UTF-8, or a row that cannot be used,
            with its line.
    """
    if isinstance(source, Documents):
        return source if limit is None else source[:limit]
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1, got {limit}")
    skipped: dict[str, int] = {}
    if isinstance(source, str | Path):
        path = Path(source)
        name = str(path)
        if path.is_dir():
            rows = read_folder(path, limit)
        elif not path.exists():
            raise InputError(f"{path}: no such file; expected documents as {', '.join(SUFFIXES)} or a datasets folder")
        elif path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"{path}: expected a file {', '.join(SUFFIXES)} or a datasets folder, got "
                f"{path.suffix or 'no ending'!r}"
            )
        elif path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; expected one document a line: {FORMS}")
        else:
            rows = read_parquet(path, limit) if path.suffix.lower() == ".parquet" else read_jsonl(path, skipped, limit)
    else:
        rows = read_rows(source, name, limit)
    found = [row if isinstance(row, Document) else make_document(row, where) for row, where in rows]
    if not found:
        raise InputError(f"{name}: holds no document; expected {FORMS}")
    return Documents(found, skipped)


def save_jsonl(documents: Iterable[Document], path: str | Path) -> None:
    """Write documents so that `load_documents` gives them back: same ids, same metadata; atomically.

    Raises `InputError` for documents that live in memory only ({"x", "y"}).
    """
    lines: list[str] = []
    for document in documents:
        if "x" in document.content:
            raise InputError(
                f"document {document.id}: {{x, y}} documents live in memory and cannot be written as JSONL"
            )
        lines.append(json.dumps({**document.content, **document.meta}, ensure_ascii=False, allow_nan=False))
    write_text(Path(path), "\n".join(lines) + "\n")
