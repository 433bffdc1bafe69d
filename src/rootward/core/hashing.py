"""Content hashes: how documents, models, configs and runs are recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest(data: bytes | str) -> str:
    """SHA-256 of bytes or UTF-8 text, as 64 hex digits."""
    return hashlib.sha256(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data).hexdigest()


def digest_json(value: Any) -> str:
    """Hash of a JSON-able value that does not depend on the order of keys."""
    return digest(json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False))


def document_id(content: Mapping[str, Any]) -> str:
    """``DocumentId``: 16 hex digits of the hash of what the model is trained on (metadata excluded).

    Equal documents have equal ids, so a result is joined by id and never by row number.
    """
    return digest_json(content)[:16]


def difference(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str:
    """The keys in which two flat mappings differ, one ``key: expected -> got`` a line."""
    lines: list[str] = []
    for key in sorted(set(expected) | set(got)):
        if expected.get(key) != got.get(key):
            lines.append(f"  {key}: {expected.get(key)!r} -> {got.get(key)!r}")
    return "\n".join(lines)
