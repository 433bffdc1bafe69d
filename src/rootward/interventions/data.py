"""Changes of the training data: `Drop`, `Keep` and `Reweight`.

Documents are named by content hash, never by row, and ``ids`` is a multiset: equal documents share an id, and dropping
an id that is listed once takes one copy, the earliest. Law: ``change.undo(change.apply(documents))`` is what
``documents`` was, bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from rootward.core.errors import InputError
from rootward.core.hashing import digest_json
from rootward.subject.documents import Document, Documents


@dataclass(frozen=True)
class Changed:
    """Documents after a change.

    ``rows`` are the rows of the original that stay, ascending; ``weights`` is the factor of a document's loss by its
    row in ``documents`` (as `rootward.subject.training.train` takes it), None if all are 1; ``removed`` are the
    documents taken out, by original row.
    """

    documents: Documents
    weights: Mapping[int, float] | None
    rows: tuple[int, ...]
    removed: Mapping[int, Document]


class Intervention(Protocol):
    """A change of documents that can be undone."""

    def apply(self, documents: Documents) -> Changed:
        """The documents after the change."""
        ...

    def undo(self, changed: Changed) -> Documents:
        """The documents before it, bit for bit."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able: ``target``, ``change``, ``dose`` (number of documents) and a hash of what is listed."""
        ...


def _checked_ids(ids: Iterable[str], what: str) -> tuple[str, ...]:
    listed = (ids,) if isinstance(ids, str) else tuple(ids)
    for name in listed:
        if not isinstance(name, str):
            raise InputError(
                f"{what}: expected document ids (text), got {name!r}; rows are not ids: use documents.ids[row]"
            )
    if not listed:
        raise InputError(f"{what}: expected at least one document id, got none")
    return listed


def find_rows(ids: Iterable[str], documents: Documents, what: str) -> tuple[int, ...]:
    """Rows of a multiset of ids, ascending: of each id its earliest copies, as many as are listed.

    Raises `InputError` with the number of ids (counting copies) that the documents do not have, and the first of them.
    """
    wanted = Counter(tuple(ids))  # a mapping given as it is would be taken for counts
    rows: list[int] = []
    for row, name in enumerate(documents.ids):
        if wanted.get(name, 0) > 0:
            wanted[name] -= 1
            rows.append(row)
    missing = +wanted
    if missing:
        first = next(iter(missing))
        has = documents.ids.count(first)
        detail = f"listed {has + missing[first]} times, there {has} times" if has else "not among them"
        raise InputError(
            f"{what}: {missing.total()} of {len(rows) + missing.total()} ids are not among the {len(documents)} "
            f"documents, first {first!r} ({detail}); are the ids from the same documents?"
        )
    return tuple(rows)


def _kept(documents: Documents, rows: tuple[int, ...]) -> Changed:
    if not rows:
        raise InputError(f"the change leaves none of {len(documents)} documents to train on")
    stay = set(rows)
    removed = {row: document for row, document in enumerate(documents) if row not in stay}
    left = Documents((documents[row] for row in rows), documents.skipped)
    return Changed(left, None, rows, MappingProxyType(removed))


def _restored(changed: Changed) -> Documents:
    places = dict(zip(changed.rows, changed.documents, strict=True)) | dict(changed.removed)
    return Documents((places[row] for row in range(len(places))), changed.documents.skipped)


@dataclass(frozen=True)
class Drop:
    """Train without these documents. ``ids`` is a multiset of content hashes."""

    ids: tuple[str, ...]

    def __init__(self, ids: Iterable[str]) -> None:
        object.__setattr__(self, "ids", _checked_ids(ids, "Drop"))

    def apply(self, documents: Documents) -> Changed:
        """The other documents in their order; `InputError` for ids that are not there, or if nothing is left."""
        gone = set(find_rows(self.ids, documents, "Drop"))
        return _kept(documents, tuple(row for row in range(len(documents)) if row not in gone))

    def undo(self, changed: Changed) -> Documents:
        """The documents before the change."""
        return _restored(changed)

    def describe(self) -> dict[str, Any]:
        """JSON-able summary."""
        return _described("drop", len(self.ids), sorted(self.ids))


@dataclass(frozen=True)
class Keep:
    """Train on these documents only. ``ids`` is a multiset of content hashes; the documents' order stays."""

    ids: tuple[str, ...]

    def __init__(self, ids: Iterable[str]) -> None:
        object.__setattr__(self, "ids", _checked_ids(ids, "Keep"))

    def apply(self, documents: Documents) -> Changed:
        """These documents in their order; `InputError` for ids that are not there."""
        return _kept(documents, find_rows(self.ids, documents, "Keep"))

    def undo(self, changed: Changed) -> Documents:
        """The documents before the change."""
        return _restored(changed)

    def describe(self) -> dict[str, Any]:
        """JSON-able summary."""
        return _described("keep", len(self.ids), sorted(self.ids))


@dataclass(frozen=True)
class Reweight:
    """Multiply the loss of documents: ``weights`` by content hash, at least 0; every copy gets its weight."""

    weights: Mapping[str, float]

    def __init__(self, weights: Mapping[str, float]) -> None:
        names = _checked_ids(weights, "Reweight")
        for name in names:
            if not math.isfinite(weights[name]) or weights[name] < 0:
                raise InputError(f"Reweight: expected a finite weight of at least 0 for {name!r}, got {weights[name]}")
        checked = {name: float(weights[name]) for name in names}
        object.__setattr__(self, "weights", MappingProxyType(checked))

    def apply(self, documents: Documents) -> Changed:
        """All documents, with the weights by row; `InputError` for ids that are not there."""
        find_rows(self.weights, documents, "Reweight")
        weights = {row: self.weights[name] for row, name in enumerate(documents.ids) if name in self.weights}
        return Changed(documents, weights, tuple(range(len(documents))), MappingProxyType({}))

    def undo(self, changed: Changed) -> Documents:
        """The documents, which the change left as they were."""
        return changed.documents

    def describe(self) -> dict[str, Any]:
        """JSON-able summary; the dose counts ids, whatever the number of their copies."""
        return _described("reweight", len(self.weights), dict(self.weights))


def _described(change: str, dose: int, listed: Any) -> dict[str, Any]:
    return {"target": "documents", "change": change, "dose": dose, "hash": digest_json(listed)[:16]}
