"""A Kronecker curvature on disk: one safetensors file and a JSON with what it was fitted to.

curvature.json          key fields (model, documents, config, ...), record of the fit, which side each block uses
curvature.safetensors   ``vectors.<k>`` (sides that several blocks share are written once), ``eigenvalues.<name>``
joint-<K>.safetensors   K entries taken jointly: ``entries.<name>``, ``eigenvalues``, ``vectors``; its key in the header
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save  # type: ignore[reportUnknownVariableType]
from torch import Tensor

from rootward.core.errors import ArtefactError, StorageError
from rootward.core.hashing import difference
from rootward.core.layout import ParamLayout
from rootward.core.records import whole_or_absent, write_text
from rootward.curvature.base import Damping
from rootward.curvature.joint import JointCurvature
from rootward.curvature.kronecker import KroneckerBlock, KroneckerCurvature

SCHEMA = 1


def save_curvature(
    folder: Path, curvature: KroneckerCurvature, key: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Write a curvature so that it is either whole or not there; the JSON comes last."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, str] = {}
    blocks: dict[str, Any] = {}

    def side(vectors: Tensor | None) -> str | None:
        if vectors is None:
            return None
        if id(vectors) not in numbers:
            numbers[id(vectors)] = f"vectors.{len(numbers)}"
            tensors[numbers[id(vectors)]] = vectors.cpu().contiguous()
        return numbers[id(vectors)]

    for name in curvature.layout.names:
        block = curvature.blocks[name]
        blocks[name] = [side(block.basis[0]), side(block.basis[1])]
        tensors[f"eigenvalues.{name}"] = block.eigenvalues.cpu().contiguous()
    meta = {
        "schema_version": SCHEMA,
        "key": dict(key),
        "kind": curvature.kind,
        "layout": [[n, list(curvature.layout.shape(n))] for n in curvature.layout.names],
        "damping": [curvature.damping.relative, curvature.damping.absolute, curvature.damping.scope],
        "blocks": blocks,
        "record": dict(record),
    }
    path = folder / "curvature.safetensors"
    with _writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "curvature.json").unlink(missing_ok=True)  # an older one must not stand beside new tensors
        with whole_or_absent(path) as temporary:
            temporary.write_bytes(save(tensors))
    write_text(folder / "curvature.json", json.dumps(meta, indent=1))


def save_joint(folder: Path, joint: JointCurvature, key: str) -> None:
    """Write the entries that are taken jointly beside their base, which is saved by itself."""
    tensors = {f"entries.{name}": places.cpu().contiguous() for name, places in joint.entries.items()}
    tensors |= {"eigenvalues": joint.eigenvalues.cpu().contiguous(), "vectors": joint.vectors.cpu().contiguous()}
    path = folder / f"joint-{len(joint.eigenvalues)}.safetensors"
    text = {"key": key, "notes": json.dumps(joint.notes)}
    with _writing(path), whole_or_absent(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=text))


def load_joint(folder: Path, base: KroneckerCurvature, key: str) -> JointCurvature | None:
    """The joint entries that were saved under this key beside the base; None where there are none."""
    for path in sorted(folder.glob("joint-*.safetensors")):
        with _damage(folder):
            text = _header(path)
            if text.get("key") == key:
                tensors: dict[str, Tensor] = load_file(path)
                entries = {name: tensors[f"entries.{name}"] for name in base.layout.names}
                notes = tuple(json.loads(text["notes"]))
                return JointCurvature(base, entries, tensors["eigenvalues"], tensors["vectors"], notes)
    return None


def _header(path: Path) -> dict[str, str]:
    with cast(Any, safe_open(path, "pt")) as handle:
        return dict(handle.metadata() or {})


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"could not write {path}: {error.strerror or error}; free space and run the same command again"
        ) from error


def has_curvature(folder: Path) -> bool:
    """Whether a whole one lies there."""
    return (folder / "curvature.json").is_file()


def _meta(folder: Path, key: Mapping[str, Any] | None) -> dict[str, Any]:
    place = folder / "curvature.json"
    meta: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    if meta["schema_version"] != SCHEMA:
        raise ArtefactError(f"{place}: expected version {SCHEMA}, got {meta['schema_version']}; fit it again")
    if key is not None and meta["key"] != dict(key):
        raise ArtefactError(
            f"{folder}: holds a curvature of another model, other documents or other settings (there -> asked for):"
            f"\n{difference(meta['key'], key)}\ngive another folder, or remove this one to fit it anew"
        )
    return meta


@contextmanager
def _damage(folder: Path) -> Generator[None]:
    """What reading a damaged folder raises, as an `ArtefactError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtefactError(f"expected a curvature in {folder}, found none ({error.filename or error})") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ArtefactError(f"{folder}: a damaged curvature ({error}); remove the folder to fit it anew") from error


def check_curvature(folder: Path, key: Mapping[str, Any]) -> None:
    """`ArtefactError`, with the difference, unless the folder's curvature was fitted to this; no tensor is read."""
    with _damage(folder):
        _meta(folder, key)


def load_curvature(folder: Path, key: Mapping[str, Any] | None = None) -> tuple[KroneckerCurvature, dict[str, Any]]:
    """The curvature in a folder, and the record of its fit.

    Args:
        folder: where `save_curvature` wrote it.
        key: what it must have been fitted to; None takes any.

    Raises:
        ArtefactError: there is none, it is damaged, or it is of another model, other documents or other settings; the
            message shows the difference.
    """
    with _damage(folder):
        meta = _meta(folder, key)
        tensors: dict[str, Tensor] = load_file(folder / "curvature.safetensors")
        layout = ParamLayout(tuple(n for n, _ in meta["layout"]), tuple(tuple(s) for _, s in meta["layout"]))
        blocks = {
            name: KroneckerBlock(
                (tensors[left] if left else None, tensors[right] if right else None), tensors[f"eigenvalues.{name}"]
            )
            for name, (left, right) in meta["blocks"].items()
        }
        relative, absolute, scope = meta["damping"]
        return KroneckerCurvature(layout, meta["kind"], blocks, Damping(relative, absolute, scope)), meta["record"]
