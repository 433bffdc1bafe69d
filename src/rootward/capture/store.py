"""`GradientStore`: projected gradients of all documents, as immutable safetensors shards with a manifest.

    index.json          what it was built from (fingerprint), its columns, shard size and token budget
    shard-00000.safetensors, ...    ``g [rows, width]`` and ``loss [rows]`` of consecutive documents
    manifest.jsonl      one line a shard: rows, bytes, SHA-256. A shard counts only if its line and its bytes agree

Every shard is computed from its own documents alone and written to a temporary name, flushed and renamed. So a build
that is killed at any moment continues with the same call, rebuilds what is missing or damaged, and ends with the
same bytes as one that was not interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rootward.capture.batching import automatic_budget
from rootward.capture.projection import Projection
from rootward.capture.run import run_pass
from rootward.capture.sinks import ProjectedRows
from rootward.capture.sites import Tracked
from rootward.core.errors import ArtefactError, InputError, NumericalError, StorageError
from rootward.core.hashing import difference
from rootward.core.layout import ParamLayout
from rootward.core.progress import Progress, silent
from rootward.core.records import write_text
from rootward.subject.encode import Encoded
from rootward.subject.objectives import Objective

SCHEMA = 1
META = ("fingerprint", "projection", "layout", "width", "dtype", "documents", "shard_documents", "token_budget")
LINE = ("shard", "first", "rows", "bytes", "sha256")
SHARD_BYTES = 64 * 2**20
"""Default size of a shard; a shard also holds no fewer than 256 documents, so that batches by length fill up."""


class GradientStore:
    """Read access to a store that is whole; `build_store` makes one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise ArtefactError(f"expected an index at {self.folder}, found no index.json; run `rootward index` first")
        self.meta = meta
        self.fingerprint: dict[str, str] = meta["fingerprint"]
        self.documents: int = meta["documents"]
        self.width: int = meta["width"]
        self.shards = _shards(meta)
        manifest = _read_manifest(self.folder)
        missing = [name for name, _, _ in self.shards if not _is_whole(self.folder, name, manifest, deep=False)]
        if missing:
            raise ArtefactError(
                f"index {self.folder}: {len(missing)} of {len(self.shards)} shards are missing or damaged, "
                f"first {missing[0]}; run the same `rootward index` command again to rebuild them"
            )
        self._manifest = manifest

    @property
    def projection(self) -> Projection:
        """The projection its rows were made with."""
        names, shapes = self.meta["layout"]["names"], self.meta["layout"]["shapes"]
        layout = ParamLayout(tuple(names), tuple(tuple(s) for s in shapes))
        return Projection(layout, self.meta["projection"]["rank"], self.meta["projection"]["seed"])

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(p.stat().st_size for p in self.folder.iterdir() if p.is_file())

    def require(self, fingerprint: Mapping[str, str]) -> None:
        """Raise `ArtefactError`, with the difference, unless the index was built from this model, data and settings."""
        if dict(fingerprint) != self.fingerprint:
            raise ArtefactError(
                f"index {self.folder} was built from something else:\n{difference(self.fingerprint, fingerprint)}\n"
                f"give another index, or rebuild this one: `rootward index ... --out {self.folder} --overwrite`"
            )

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first document, rows ``[n, width]``) shard by shard, checksums verified."""
        for name, first, _ in self.shards:
            yield first, self._checked(name, "g")

    def _checked(self, name: str, tensor: str) -> Tensor:
        if not _is_whole(self.folder, name, self._manifest, deep=True):
            raise ArtefactError(
                f"{self.folder / name} is damaged (checksum differs); run `rootward index` again to rebuild it"
            )
        with safe_open(self.folder / name, framework="pt") as handle:
            return handle.get_tensor(tensor)

    def losses(self) -> Tensor:
        """Loss of every document ``[n]`` in float64."""
        return torch.cat([self._checked(name, "loss") for name, _, _ in self.shards])


def build_store(
    folder: str | Path,
    model: nn.Module,
    objective: Objective,
    encoded: Encoded,
    tracked: Tracked,
    fingerprint: Mapping[str, str],
    *,
    rank: int | None = 16,
    seed: int = 0,
    dtype: str = "float32",
    shard_documents: int | None = None,
    token_budget: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> GradientStore:
    """Build, continue or repair the store in ``folder``.

    Args:
        folder: created if absent. An index of another fingerprint or other settings in it is refused.
        model: gives the gradients, with ``objective``.
        objective: how documents become losses.
        encoded: the documents, a row each.
        tracked: the parameters whose gradients are kept.
        fingerprint: hashes of all that decides the rows (`Subject.fingerprint`).
        rank: side of the Kronecker random projection of each matrix; None keeps whole gradients (small models).
        seed: of the projection.
        dtype: of the stored rows, "float32" or "float16".
        shard_documents: rows of a shard; None makes shards of about `SHARD_BYTES`.
        token_budget: padded tokens per batch; None measures what fits, and the index remembers it.
        overwrite: take away what is there first.
        progress: told of every batch.

    Raises:
        ArtefactError: the folder holds an index of something else; the difference is shown.
        StorageError: the disk refuses; finished shards stay, and the same call continues.
    """
    folder = Path(folder)
    if dtype not in ("float32", "float16"):
        raise InputError(f"index dtype: expected float32 or float16, got {dtype!r}")
    device = next(model.parameters()).device
    projection = Projection(tracked.layout, rank, seed, str(device))
    with _storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        existing = None if overwrite else _read_meta(folder)
        if existing is None:
            with _storage(folder):
                _clear(folder)
            meta = _meta(projection, encoded, fingerprint, dtype, shard_documents)
            meta["token_budget"] = token_budget or automatic_budget(model, objective, encoded, device)
            write_text(folder / "index.json", json.dumps(meta, indent=1) + "\n")
        else:
            meta = existing
            _refuse_other(folder, meta, _meta(projection, encoded, fingerprint, dtype, shard_documents), token_budget)
        _fill(folder, meta, model, objective, encoded, tracked, projection, progress)
    return GradientStore(folder)


def _fill(
    folder: Path,
    meta: dict[str, Any],
    model: nn.Module,
    objective: Objective,
    encoded: Encoded,
    tracked: Tracked,
    projection: Projection,
    progress: Progress,
) -> None:
    for leftover in folder.glob("*.part"):
        leftover.unlink()
    manifest = _read_manifest(folder)
    shards = _shards(meta)
    todo = [shard for shard in shards if not _is_whole(folder, shard[0], manifest, deep=True)]
    done = len(encoded) - sum(rows for _, _, rows in todo)
    progress("index", done, len(encoded))
    for name, first, rows in todo:
        examples = [encoded[n] for n in range(first, first + rows)]
        sink = ProjectedRows(projection, rows, torch.float32)
        before = done

        def step(task: str, count: int, total: int, before: int = before) -> None:
            progress(task, before + count, len(encoded))

        budget = meta["token_budget"]
        run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=budget, progress=step, task="index")
        if not bool(torch.isfinite(sink.rows).all()):
            bad = int((~torch.isfinite(sink.rows)).any(1).nonzero()[0])
            raise NumericalError(f"the gradient of document {examples[bad].id} (row {examples[bad].row}) is not finite")
        stored = sink.rows.to(getattr(torch, meta["dtype"]))
        if not bool(torch.isfinite(stored).all()):
            bad = int((~torch.isfinite(stored)).any(1).nonzero()[0])
            raise NumericalError(
                f"the gradient of document {examples[bad].id} (row {examples[bad].row}) is too large for "
                f"{meta['dtype']}; build the index with --dtype float32"
            )
        # one entry only: safetensors writes several in no fixed order, and the bytes must not depend on chance
        about = {"documents": json.dumps({"first": first, "ids": [e.id for e in examples]})}
        data = save({"g": stored, "loss": sink.losses}, about)
        checksum = hashlib.sha256(data).hexdigest()
        line = {"shard": name, "first": first, "rows": rows, "bytes": len(data), "sha256": checksum}
        with _storage(folder):
            _write_bytes(folder / name, data)
            manifest[name] = line
            _write_manifest(folder, manifest, shards)
        done += rows
    with _storage(folder):
        _write_manifest(folder, manifest, shards)


def _meta(
    projection: Projection, encoded: Encoded, fingerprint: Mapping[str, str], dtype: str, shard_documents: int | None
) -> dict[str, Any]:
    size = 4 if dtype == "float32" else 2
    per_shard = shard_documents or max(256, SHARD_BYTES // max(projection.width * size, 1))
    return {
        "schema": SCHEMA,
        "fingerprint": dict(fingerprint),
        "projection": projection.describe(),
        "layout": {"names": list(projection.layout.names), "shapes": [list(s) for s in projection.layout.shapes]},
        "width": projection.width,
        "dtype": dtype,
        "documents": len(encoded),
        "shard_documents": per_shard,
    }


def _refuse_other(folder: Path, found: dict[str, Any], asked: dict[str, Any], token_budget: int | None) -> None:
    asked = {**asked, "token_budget": token_budget or found["token_budget"]}
    flat_found = {**found, **{f"fingerprint.{k}": v for k, v in found["fingerprint"].items()}}
    flat_asked = {**asked, **{f"fingerprint.{k}": v for k, v in asked["fingerprint"].items()}}
    for flat in (flat_found, flat_asked):
        del flat["fingerprint"], flat["layout"]
    text = difference(flat_found, flat_asked)
    if text:
        raise ArtefactError(
            f"index {folder} was built from another model, other documents or other settings:\n{text}\n"
            "use another folder, or --overwrite to build it anew"
        )


def _shards(meta: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    total, size = meta["documents"], meta["shard_documents"]
    starts = enumerate(range(0, total, size))
    return [(f"shard-{k:05d}.safetensors", first, min(size, total - first)) for k, first in starts]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    path = folder / "index.json"
    if not path.exists():
        if folder.is_dir() and any(folder.glob("shard-*")):
            raise ArtefactError(f"{folder} holds shards but no index.json; rebuild it with --overwrite")
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); rebuild the index with --overwrite") from error
    schema = meta.get("schema") if isinstance(meta, dict) else None
    if schema != SCHEMA:
        raise ArtefactError(f"{path}: expected index schema {SCHEMA}, found {schema}; rebuild it with --overwrite")
    absent = [key for key in META if key not in meta]
    if absent:
        raise ArtefactError(f"{path} is damaged (no {', '.join(absent)}); rebuild the index with --overwrite")
    return meta


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "manifest.jsonl"
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            found[entry["shard"]] = {key: entry[key] for key in LINE}
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a torn line counts as a shard that is not there: it is rebuilt
    return found


def _write_manifest(folder: Path, manifest: Mapping[str, Any], shards: list[tuple[str, int, int]]) -> None:
    """The lines of the shards there are, in order; nothing is written where the file holds just that."""
    path = folder / "manifest.jsonl"
    data = "".join(json.dumps(manifest[name]) + "\n" for name, _, _ in shards if name in manifest).encode()
    if not path.exists() or path.read_bytes() != data:
        _write_bytes(path, data)


def _is_whole(folder: Path, name: str, manifest: Mapping[str, dict[str, Any]], *, deep: bool) -> bool:
    path, line = folder / name, manifest.get(name)
    if line is None or not path.exists() or path.stat().st_size != line["bytes"]:
        return False
    if not deep:
        return True
    with path.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != line["sha256"]:
            return False
    try:
        with safe_open(path, framework="pt") as opened:
            return "g" in opened.keys()  # noqa: SIM118 - not a dict
    except SafetensorError:
        return False


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"could not write to {folder}: {error.strerror or error}; finished shards are kept: "
            "free some space and run the same command again"
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with _storage(folder):
        handle = (folder / ".lock").open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtefactError(f"another process is writing to {folder}; wait for it or use another folder") from error
        yield


def _clear(folder: Path) -> None:
    """Remove an index (and only that) so that another can take its place."""
    for pattern in ("shard-*.safetensors", "manifest.jsonl", "index.json", "*.part"):
        for path in folder.glob(pattern):
            path.unlink()


def expected_bytes(width: int, documents: int, dtype: str) -> int:
    """Disk that a store will take, for estimates and for the check before it is begun."""
    return documents * (width * (4 if dtype == "float32" else 2) + 8)


def require_space(folder: Path, needed: int) -> None:
    """Raise `StorageError` before the expensive part where the disk has less free than the store will take."""
    place: Path = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"the index needs {needed / 1e6:.0f} MB at {folder}, {free / 1e6:.0f} MB are free; choose a lower rank or "
            "another disk"
        )
