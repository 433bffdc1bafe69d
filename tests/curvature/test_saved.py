"""A curvature on disk: equal by name after a round trip, refused where it does not fit, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rootward.core.errors import ArtefactError, StorageError
from rootward.core.layout import ParamLayout
from rootward.curvature import saved
from rootward.curvature.base import Damping
from rootward.curvature.kronecker import KroneckerBlock, KroneckerCurvature
from rootward.curvature.saved import has_curvature, load_curvature, save_curvature

LAYOUT = ParamLayout(("q.weight", "k.weight", "q.bias", "conv"), ((5, 4), (3, 4), (5,), (2, 3, 2, 2)))
KEY = {"model": "abc", "documents": ["d0", "d1"], "fit.kind": "ekfac", "fit.seed": 0}
RECORD = {"documents": 7, "agreement": 0.98, "dead": []}


def orthogonal(d: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0].to(dtype).contiguous()


def curvature(dtype: torch.dtype = torch.float64) -> KroneckerCurvature:
    """Queries and keys share their input's side; a vector and a side are not rotated."""
    generator = torch.Generator().manual_seed(7)

    def values(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shared = orthogonal(4, 1, dtype)
    blocks = {
        "q.weight": KroneckerBlock((orthogonal(5, 0, dtype), shared), values(5, 4)),
        "k.weight": KroneckerBlock((orthogonal(3, 2, dtype), shared), values(3, 4)),
        "q.bias": KroneckerBlock((None, orthogonal(5, 3, dtype)), values(1, 5)),
        "conv": KroneckerBlock((None, None), values(2, 12)),
    }
    return KroneckerCurvature(LAYOUT, "ekfac", blocks, Damping(0.3, 0.01, "whole"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_trip_is_equal_by_name_and_to_the_bit(tmp_path: Path, dtype: torch.dtype):
    before = curvature(dtype)
    save_curvature(tmp_path / "new" / "folder", before, KEY, RECORD)
    after, record = load_curvature(tmp_path / "new" / "folder", KEY)
    assert (after.layout, after.kind, after.damping, record) == (LAYOUT, "ekfac", before.damping, RECORD)
    for name in LAYOUT.names:
        assert torch.equal(after.blocks[name].eigenvalues, before.blocks[name].eigenvalues)
        assert after.blocks[name].eigenvalues.dtype == dtype
        for mine, theirs in zip(after.blocks[name].basis, before.blocks[name].basis, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or theirs is None or torch.equal(mine, theirs)
    x = {n: torch.ones(2, *LAYOUT.shape(n), dtype=dtype) for n in LAYOUT.names}
    for name, value in before.apply(x).items():
        assert torch.equal(after.apply(x)[name], value)


def test_a_shared_side_is_written_once_and_shared_again(tmp_path: Path):
    save_curvature(tmp_path, curvature(), KEY, RECORD)
    tensors = load_file(tmp_path / "curvature.safetensors")
    assert sorted(n for n in tensors if n.startswith("vectors")) == [f"vectors.{k}" for k in range(4)]
    assert len(tensors) == 4 + 4
    after, _ = load_curvature(tmp_path)
    assert after.blocks["q.weight"].basis[1] is after.blocks["k.weight"].basis[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curvature.json", "curvature.safetensors"]


def test_another_model_or_other_settings_are_refused_with_the_difference(tmp_path: Path):
    save_curvature(tmp_path, curvature(), KEY, RECORD)
    with pytest.raises(ArtefactError, match="another model, other documents or other settings") as caught:
        load_curvature(tmp_path, {**KEY, "model": "xyz", "fit.seed": 3})
    for text in (str(tmp_path), "model: 'abc' -> 'xyz'", "fit.seed: 0 -> 3", "give another folder, or remove this one"):
        assert text in str(caught.value)
    assert "fit.kind" not in str(caught.value)
    load_curvature(tmp_path)  # any will do


def edited(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "curvature.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


DAMAGE: dict[str, tuple[Any, str]] = {
    "no json": (lambda f: (f / "curvature.json").unlink(), "expected a curvature in .*found none"),
    "no tensors": (lambda f: (f / "curvature.safetensors").unlink(), "expected a curvature in .*curvature.safetensors"),
    "cut json": (lambda f: (f / "curvature.json").write_text('{"schema'), "damaged curvature .*remove the folder"),
    "no object": (lambda f: (f / "curvature.json").write_text("[1]"), "damaged curvature"),
    "bytes": (lambda f: (f / "curvature.json").write_bytes(b"\xff\xfe\x00"), "damaged curvature"),
    "cut tensors": (
        lambda f: (f / "curvature.safetensors").write_bytes((f / "curvature.safetensors").read_bytes()[:200]),
        "damaged curvature",
    ),
    "a missing block": (edited(blocks={}), "expected blocks of 4 parameters, got 0"),
    "another version": (edited(schema_version=99), "expected version 1, got 99; fit it again"),
    "a side that is not there": (edited(blocks={n: ["vectors.9", None] for n in LAYOUT.names}), "damaged .*vectors.9"),
    "a damping that cannot be": (edited(damping=[0.1, 0.0]), "damaged curvature"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str):
    save_curvature(tmp_path, curvature(), KEY, RECORD)
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        load_curvature(tmp_path, KEY)


@pytest.mark.parametrize("at", ["save", "write_text"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_write_that_is_interrupted_leaves_no_curvature(
    tmp_path: Path, at: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    for before in (False, True):
        folder = tmp_path / str(before)
        if before:  # an older one is not left beside newer tensors
            save_curvature(folder, curvature(), KEY, RECORD)
        with monkeypatch.context() as patch:
            patch.setattr(saved, at, broken)
            with pytest.raises((KeyboardInterrupt, StorageError, OSError)):
                save_curvature(folder, curvature(), KEY, RECORD)
        assert not has_curvature(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        save_curvature(folder, curvature(), KEY, RECORD)  # the same command again
        assert has_curvature(folder)
        load_curvature(folder, KEY)


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        save_curvature(tmp_path / "file", curvature(), KEY, RECORD)
