"""An index that is stopped, broken or meets a full disk is continued by the same command, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rootward.capture import store
from tests.cli.conftest import World, assert_short, done, rootward, shards


def after(count: int, function: Any, act: Any) -> Any:
    """``function``, but from the ``count``-th call on ``act`` comes first."""
    calls = [0]

    def wrapped(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > count:
            act()
        return function(*args, **named)

    return wrapped


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("what", "count", "act", "code", "words"),
    [
        ("_write_bytes", 4, full, 5, ["No space left", "finished shards are kept"]),
        ("run_pass", 2, interrupt, 130, ["Ctrl-C", "same command again"]),
        ("run_pass", 2, terminate, 5, ["SIGTERM", "same command again"]),
    ],
)
def test_an_index_continues(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, count: int, act: Any, code: int, words: list[str],
):  # fmt: skip
    out = tmp_path / "i"
    with monkeypatch.context() as patch:
        patch.setattr(store, what, after(count, getattr(store, what), act))
        assert_short(rootward(*world.index(out)), code, *words)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
    assert len(kept) == 2
    assert [row["status"] for row in done("runs", tmp_path, "--json").document["runs"]] == ["stopped"]
    assert_short(rootward(*world.trace(tmp_path / "r", "--index", out)), 4, "shards are missing", "rootward index")
    done(*world.index(out))
    assert shards(out) == shards(world.indexed)
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())


def test_a_damaged_shard_is_named_and_rebuilt(world: World, tmp_path: Path):
    out = tmp_path / "i"
    shutil.copytree(world.indexed, out)
    damaged = out / "shard-00002.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 0xFF
    damaged.write_bytes(bytes(data))
    assert_short(rootward(*world.trace(tmp_path / "r", "--index", out)), 4, "shard-00002.safetensors", "rootward index")
    done(*world.index(out))
    assert shards(out) == shards(world.indexed)


def test_an_index_of_something_else_is_refused(world: World, tmp_path: Path):
    out = tmp_path / "i"
    shutil.copytree(world.indexed, out)
    assert_short(rootward(*world.index(out, "--rank", "5")), 4, "rank", "4", "5", "--overwrite")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in world.documents.read_text().splitlines()[:30]))
    assert_short(rootward(*world.index(out, "--documents", few)), 4, "documents: 60 -> 30")
    assert_short(rootward(*world.trace(tmp_path / "r", "--index", out, "--documents", few)), 4, "documents")
    other = world.index(out)
    other[1] = world.base
    assert_short(rootward(*other), 4, "fingerprint.model")
    assert_short(rootward(*world.trace(tmp_path / "r", "--index", out, "--max-tokens", "32")), 4, "objective")
    assert_short(rootward(*world.trace(tmp_path / "r", "--index", tmp_path / "none")), 4, "rootward index")
    assert not (tmp_path / "r").exists()
    assert shards(out) == shards(world.indexed)
    done(*world.index(out, "--rank", "none", "--overwrite"))


def test_a_stopped_trace_says_so_and_begins_anew(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr("rootward.api.write_documents", after(0, None, interrupt))
        assert_short(rootward(*world.trace(out)), 130, "Ctrl-C")
    assert json.loads((out / "record.json").read_text())["status"] == "stopped"
    assert_short(rootward("verify", out), 4, "stopped")
    done(*world.trace(out, "--no-report"))
    assert json.loads((out / "record.json").read_text())["status"] == "done"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_leaves_what_it_finished(
    world: World, tmp_path: Path, kind: signal.Signals
):
    rows = [json.loads(line) for line in world.documents.read_text().splitlines()]
    many = tmp_path / "many.jsonl"
    first = {k: {"role": "user", "content": f"say {k}"} for k in ("one", "two")}
    many.write_text("".join(json.dumps({**row, "messages": [first[k], *row["messages"]]}) + "\n"
                            for k in ("one", "two") for row in rows))  # fmt: skip
    argv = [
        str(part) for part in world.index(tmp_path / "i", "--documents", many, "--shard-documents", "1", "--rank", "2")
    ]
    process = subprocess.Popen([sys.executable, "-m", "rootward", *argv], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(list((tmp_path / "i").glob("shard-*.safetensors"))) < 3 and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    kept = len(list((tmp_path / "i").glob("shard-*.safetensors")))
    assert 3 <= kept < 120
    if kind == signal.SIGINT:
        assert process.returncode == 130, said
        assert "finished shards are kept" in said
        assert "Traceback" not in said
    done(*argv)
    argv[argv.index("--out") + 1] = str(tmp_path / "whole")
    done(*argv)
    assert shards(tmp_path / "i") == shards(tmp_path / "whole")
