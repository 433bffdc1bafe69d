"""Finished parts of a fit on disk, so that one that was stopped goes on, and parts of several workers are merged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rootward.capture.moments import CovarianceSums, SecondMoments
from rootward.core.errors import ArtefactError, StorageError
from rootward.core.records import whole_or_absent


@dataclass(frozen=True)
class Parts:
    """Finished sums under ``key``, the hash of model, documents and config. Another key's parts are ignored."""

    folder: Path
    key: str
    device: str = "cpu"
    """Where finished sums are read to: they are added to those of the passes that are left."""

    def save_covariances(self, name: str, sums: CovarianceSums) -> None:
        """Write finished sums of inputs or outputs."""
        meta = {each: dict(getattr(sums, each)) for each in ("left", "right", "tokens", "documents")}
        self._write(f"covariances-{name}", sums.sums, meta)

    def load_covariances(self, name: str, sums: CovarianceSums) -> bool:
        """Fill the sums if they were finished before."""
        found = self._read(f"covariances-{name}")
        if found is None:
            return False
        tensors, meta = found
        sums.sums.update(tensors)
        for each in ("left", "right", "tokens", "documents"):
            getattr(sums, each).update(meta[each])
        return True

    def save_moments(self, part: SecondMoments, first: int, last: int, name: str = "moments") -> None:
        """Write the finished squares of sampled documents first to last."""
        self._write(f"{name}-{first}-{last}", part.sums, {"documents": part.documents.tolist()})

    def load_moments(self, part: SecondMoments, first: int, last: int, name: str = "moments") -> bool:
        """Fill the squares of these sampled documents if they were finished before."""
        found = self._read(f"{name}-{first}-{last}")
        if found is None:
            return False
        tensors, meta = found
        part.sums.update(tensors)
        part.documents += part.documents.new_tensor(meta["documents"])
        return True

    def clear(self) -> None:
        """Remove the parts: the fit is finished and saved elsewhere."""
        for path in self.folder.glob("*.part.safetensors"):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.part.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        path = self._path(name)
        flat = {key: value.cpu().contiguous() for key, value in tensors.items()}
        text = {"key": self.key, "meta": json.dumps(meta)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_absent(path) as temporary:
                temporary.write_bytes(save(flat, metadata=text))
        except OSError as error:
            raise StorageError(
                f"could not write {path}: {error.strerror or error}; free space and run the same command again"
            ) from error

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt", self.device) as handle:
                text = handle.metadata() or {}
                if text.get("key") != self.key:
                    return None
                return {key: handle.get_tensor(key) for key in handle.keys()}, json.loads(text["meta"])  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ArtefactError(f"{path}: damaged ({error}); remove it and run the same command again") from error
