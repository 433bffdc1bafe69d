"""The gradient store: the same bytes whatever happens on the way, and nothing of another model is ever read."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rootward.capture import store as room
from rootward.capture.run import run_pass
from rootward.capture.sinks import ProjectedRows
from rootward.capture.sites import track
from rootward.capture.store import GradientStore, build_store, expected_bytes, require_space
from rootward.core.errors import ArtefactError, InputError, NumericalError, StorageError
from rootward.subject.encode import Encoded, Example
from rootward.subject.objectives import Classification

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS, SHARD = 11, 4
FINGERPRINT = {"model": "m1", "documents": "d1", "objective": "o1"}
SETTINGS: dict[str, Any] = {"rank": 3, "shard_documents": SHARD, "token_budget": 2}


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def documents(scale: float = 1.0) -> Encoded:
    x = scale * torch.randn(DOCUMENTS, 5, generator=torch.Generator().manual_seed(4))
    one, zero = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    return Encoded(
        [Example(f"d{n}", 100 + n, zero, one, x=x[n], y=torch.tensor(n % 3), targets=1) for n in range(DOCUMENTS)]
    )


def build(folder: Path, encoded: Encoded | None = None, **changes: Any) -> GradientStore:
    found = model()
    fingerprint = changes.pop("fingerprint", FINGERPRINT)
    return build_store(
        folder, found, Classification(), encoded or documents(), track(found, ".*"), fingerprint, **(SETTINGS | changes)
    )


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the lock."""
    files = [p for p in folder.iterdir() if p.is_file() and p.name != ".lock"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows_of(store: GradientStore) -> Tensor:
    return torch.cat([rows for _, rows in store.blocks()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was built without interruption; tests do not write into it."""
    folder = tmp_path_factory.mktemp("whole")
    build(folder)
    return folder


# --- what it holds ------------------------------------------------------------------------------------------


def test_round_trip(whole: Path):
    store = GradientStore(whole)
    assert (store.documents, store.fingerprint, len(store.shards)) == (DOCUMENTS, FINGERPRINT, 3)
    assert [(first, len(rows)) for first, rows in store.blocks()] == [(0, 4), (4, 4), (8, 3)]
    found = model()
    sink = ProjectedRows(store.projection, DOCUMENTS)
    run_pass(found, Classification(), documents(), [sink], tracked=track(found, ".*"), token_budget=100)
    assert store.width == store.projection.width == sink.rows.shape[1]
    torch.testing.assert_close(rows_of(store), sink.rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(store.losses(), sink.losses, rtol=1e-5, atol=1e-6)
    assert sum(store.losses() > 0) == DOCUMENTS
    assert store.bytes >= expected_bytes(store.width, DOCUMENTS, "float32")


@pytest.mark.parametrize("size", [1, 3, 11, 50])
def test_any_shard_size_gives_the_same_rows(whole: Path, tmp_path: Path, size: int):
    store = build(tmp_path, shard_documents=size)
    assert len(store.shards) == -(-DOCUMENTS // size)
    torch.testing.assert_close(rows_of(store), rows_of(GradientStore(whole)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(store.losses(), GradientStore(whole).losses(), rtol=1e-5, atol=1e-6)


def test_two_builds_have_the_same_bytes_and_a_second_call_writes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for k in range(4):  # what is left to chance shows within a few builds
        build(tmp_path / str(k))
        assert hashes(tmp_path / str(k)) == hashes(whole)
    monkeypatch.setattr(room, "_write_bytes", lambda *args: pytest.fail("a whole store was written to"))
    monkeypatch.setattr(room, "run_pass", lambda *args, **options: pytest.fail("a whole store was computed again"))
    build(tmp_path / "0")


def test_half_precision_takes_half_the_space(whole: Path, tmp_path: Path):
    store = build(tmp_path, dtype="float16")
    rows = rows_of(store)
    assert rows.dtype == torch.float16
    torch.testing.assert_close(rows.float(), rows_of(GradientStore(whole)), rtol=2e-3, atol=1e-4)
    assert expected_bytes(10, 3, "float16") == 84


def test_rank_none_keeps_whole_gradients(tmp_path: Path):
    store = build(tmp_path, rank=None)
    assert store.width == sum(p.numel() for p in model().parameters())
    assert store.projection.rank is None


# --- stopped at any moment ----------------------------------------------------------------------------------

Stop = Callable[[Path, bytes], None]


def stop_before(path: Path, data: bytes) -> None:
    raise KeyboardInterrupt


def stop_half(path: Path, data: bytes) -> None:
    path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
    raise KeyboardInterrupt


WRITE = room._write_bytes


def stop_after(path: Path, data: bytes) -> None:
    WRITE(path, data)
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [stop_before, stop_half, stop_after])
@pytest.mark.parametrize("write", range(6))  # three shards, each with its manifest
def test_stopped_at_any_write(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int, stop: Stop):
    count = 0

    def counting(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        (stop if count == write + 1 else WRITE)(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(room, "_write_bytes", counting)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    if write < 5 or stop is not stop_after:
        with pytest.raises(ArtefactError, match="shards are missing or damaged, first shard-.*run the same"):
            GradientStore(tmp_path)
    build(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


def test_stopped_in_any_batch_and_finished_shards_are_not_computed_again(whole: Path, tmp_path: Path):
    steps: list[int] = []

    for _ in range(30):
        steps.clear()

        def progress(task: str, done: int, total: int) -> None:
            steps.append(done)
            if len(steps) == 5:
                raise KeyboardInterrupt

        try:
            build(tmp_path, progress=progress)
            break
        except KeyboardInterrupt:
            continue
    assert steps[0] > 0
    assert hashes(tmp_path) == hashes(whole)


def test_killed_in_the_middle_of_a_write(whole: Path, tmp_path: Path):
    code = f"""
import os, signal
from pathlib import Path
import tests.capture.test_store as t
write, count = t.room._write_bytes, 0
def kill(path, data):
    global count
    count += 1
    if count == 3:
        with path.with_name(path.name + ".part").open("wb") as handle:
            handle.write(data[:100])
            handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
t.room._write_bytes = kill
t.torch.set_num_threads(1)
t.build(Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "shard-00001.safetensors.part").exists()
    build(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


def test_a_full_disk_keeps_finished_shards_and_continues(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sync, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > 4:  # index.json, a shard, its manifest, a second shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(room.os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device; finished shards are kept"):
            build(tmp_path)
    assert sorted(hashes(tmp_path)) == [
        "index.json", "manifest.jsonl", "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip
    first = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    build(tmp_path)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert hashes(tmp_path) == hashes(whole)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not write"):
        build(tmp_path / "file" / "index")
    (tmp_path / "folder" / ".lock").mkdir(parents=True)
    with pytest.raises(StorageError, match="could not write"):
        build(tmp_path / "folder")


# --- damage -------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("shard", [0, 2])
def test_a_damaged_shard_is_found_and_rebuilt(whole: Path, tmp_path: Path, damage: Callable[[Path], None], shard: int):
    build(tmp_path)
    damage(tmp_path / f"shard-{shard:05d}.safetensors")
    with pytest.raises(ArtefactError, match=rf"shard-{shard:05d}.*run .*`?rootward index`? .*again"):
        list(GradientStore(tmp_path).blocks())
    with pytest.raises(ArtefactError, match=f"shard-{shard:05d}"):
        GradientStore(tmp_path).losses()
    build(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


@pytest.mark.parametrize("torn", ["half", "empty", "extra", "list", "keys", "gone"])
def test_a_damaged_manifest_is_mended(whole: Path, tmp_path: Path, torn: str):
    build(tmp_path)
    path = tmp_path / "manifest.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if torn == "gone":
        path.unlink()
    else:
        last = {
            "half": lines[2][:30], "empty": "\n", "extra": lines[2] + '{"shard": "sha', "list": "[1]\n",
            "keys": '{"shard": "shard-00002.safetensors"}\n',
        }  # fmt: skip
        path.write_text("".join(lines[:2]) + last[torn])
    if torn != "extra":
        with pytest.raises(ArtefactError, match="missing or damaged"):
            GradientStore(tmp_path)
    build(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


@pytest.mark.parametrize("text", ["", "{torn", "[]", '{"schema": 2}', '{"schema": 1}', "\xff"])
def test_a_damaged_index_file_is_refused_until_overwritten(whole: Path, tmp_path: Path, text: str):
    build(tmp_path)
    (tmp_path / "index.json").write_text(text, encoding="latin-1")
    for call in (GradientStore, build):
        with pytest.raises(ArtefactError, match=r"index.json.*--overwrite"):
            call(tmp_path)
    build(tmp_path, overwrite=True)
    assert hashes(tmp_path) == hashes(whole)


def test_shards_without_an_index_are_not_taken_over(tmp_path: Path):
    build(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ArtefactError, match="shards but no index.json"):
        build(tmp_path)


def test_no_index_is_an_error_that_says_what_to_run(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtefactError, match="run `rootward index` first"):
            GradientStore(folder)


# --- of something else --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fingerprint": {**FINGERPRINT, "model": "m2"}}, "  fingerprint.model: 'm1' -> 'm2'"),
        ({"fingerprint": {**FINGERPRINT, "documents": "d2"}}, "  fingerprint.documents: 'd1' -> 'd2'"),
        ({"dtype": "float16"}, "  dtype: 'float32' -> 'float16'"),
        ({"shard_documents": 5}, "  shard_documents: 4 -> 5"),
        ({"token_budget": 3}, "  token_budget: 2 -> 3"),
        ({"rank": 2}, "'rank': 3"),
        ({"seed": 1}, "'seed': 1"),
        ({"encoded": Encoded(documents()[:6])}, "  documents: 11 -> 6"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_another_model_other_documents_or_settings_are_refused(
    whole: Path, tmp_path: Path, changes: dict[str, Any], line: str
):
    build(tmp_path)
    with pytest.raises(ArtefactError, match="--overwrite") as caught:
        build(tmp_path, **changes)
    assert line in str(caught.value)
    assert hashes(tmp_path) == hashes(whole)
    build(tmp_path, **changes, overwrite=True)
    assert hashes(tmp_path) != hashes(whole)
    build(tmp_path, overwrite=True)
    assert hashes(tmp_path) == hashes(whole)


def test_require_shows_the_difference(whole: Path):
    store = GradientStore(whole)
    store.require(dict(FINGERPRINT))
    with pytest.raises(ArtefactError, match=r"\n  model: 'm1' -> 'm2'\n"):
        store.require({**FINGERPRINT, "model": "m2"})


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    build(tmp_path)
    build(tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_builders_at_once_are_refused(whole: Path, tmp_path: Path, overwrite: bool):
    build(tmp_path)
    with (tmp_path / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ArtefactError, match="another process is writing"):
            build(tmp_path, overwrite=overwrite)
    assert hashes(tmp_path) == hashes(whole)
    build(tmp_path, overwrite=overwrite)


def test_what_another_builder_finished_meanwhile_is_not_overwritten(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lock = room._lock

    def late(folder: Path) -> Any:
        monkeypatch.setattr(room, "_lock", lock)
        build(folder)
        return lock(folder)

    monkeypatch.setattr(room, "_lock", late)
    with pytest.raises(ArtefactError, match="fingerprint.model"):
        build(tmp_path, fingerprint={**FINGERPRINT, "model": "m2"})
    assert hashes(tmp_path) == hashes(whole)


# --- numbers and space --------------------------------------------------------------------------------------


def test_a_gradient_too_large_for_half_precision_names_its_document(tmp_path: Path):
    large = list(documents())
    x = large[6].x * 1e7
    wrong = model()(x).argmin()  # the class that such a document teaches most about
    large[6] = Example("big", 106, large[6].ids, large[6].trained, x=x, y=wrong, targets=1)
    with pytest.raises(NumericalError, match=r"document big \(row 106\) is too large for float16.*float32"):
        build(tmp_path, Encoded(large), dtype="float16")


def test_a_document_without_a_finite_loss_is_named(tmp_path: Path):
    broken = list(documents())
    fifth = broken[5]
    broken[5] = Example("nan", 105, fifth.ids, fifth.trained, x=fifth.x * torch.nan, y=fifth.y, targets=1)
    with pytest.raises(NumericalError, match=r"document nan \(row 105\)"):
        build(tmp_path, Encoded(broken))
    assert "shard-00000.safetensors" in hashes(tmp_path)


def test_unknown_dtypes_and_ranks_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="float32 or float16, got 'int8'"):
        build(tmp_path / "a", dtype="int8")
    with pytest.raises(InputError, match="rank: expected at least 1"):
        build(tmp_path / "a", rank=0)
    assert not (tmp_path / "a").exists()


def test_space_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage(10, 0, 5_000_000))
    require_space(tmp_path / "not" / "there", 5_000_000)
    with pytest.raises(StorageError, match=r"needs 6 MB at .*, 5 MB are free; choose a lower rank"):
        require_space(tmp_path / "not" / "there", 6_000_000)
