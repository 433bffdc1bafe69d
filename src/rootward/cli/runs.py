"""``rootward report`` and ``rootward runs``: what is in folders that are there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rootward.cli.output import Talk, duration, shown
from rootward.core.errors import ArtefactError, InputError


def report(run: Path, out: Path | None, talk: Talk) -> int:
    """Write the page of a run."""
    if not run.is_dir():
        raise ArtefactError(
            f"{shown(run)}: expected the folder of a run, found none; `rootward runs` lists those there are"
        )
    from rootward.report import build
    from rootward.report.folder import read_folder
    from rootward.report.summary import headline

    page = build(run, out)
    folder = read_folder(run)
    sentences = headline(folder.record, folder.trace, folder.verdict, folder.comparison)
    for sentence in sentences:
        talk.say(sentence)
    talk.say(f"Page: {shown(page)}")
    talk.result("report", {"run": str(run), "report": str(page), "headline": sentences})
    return 0


def runs(folder: Path, talk: Talk) -> int:
    """List the runs, indexes and models below a folder, the newest first."""
    if not folder.is_dir():
        raise InputError(f"{shown(folder)}: no such folder; name the one that holds your runs")
    found = [row for place in sorted({folder, *_below(folder, 2)}) if (row := _describe(place, folder)) is not None]
    found.sort(key=lambda row: row["when"] or "", reverse=True)
    columns = [
        ("name", "left"),
        ("kind", "left"),
        ("status", "left"),
        ("when", "left"),
        ("time", "right"),
        ("verdict", "left"),
    ]
    rows = [
        (
            r["name"],
            r["kind"],
            r["status"],
            r["when"],
            "–" if r["seconds"] is None else duration(r["seconds"]),
            r["verdict"] or "–",
        )
        for r in found
    ]
    if rows:
        talk.table(columns, rows)
    else:
        talk.say(f"No run in {shown(folder)}.")
    talk.result("runs", {"folder": str(folder), "runs": found})
    return 0


def _below(folder: Path, depth: int) -> list[Path]:
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return inside + [deeper for path in inside for deeper in (_below(path, depth - 1) if depth > 1 else [])]


def _describe(path: Path, root: Path) -> dict[str, Any] | None:
    """One row, or None for a folder that is none of ours; a damaged record is shown as such."""
    name = str(path.relative_to(root)) if path != root else path.resolve().name
    row: dict[str, Any] = {"name": name, "path": str(path), "verdict": None, "seconds": None, "when": None}
    try:
        if (path / "record.json").exists():
            return row | _run(path)
        if (path / "rootward_training.json").exists():
            record = json.loads((path / "rootward_training.json").read_text(encoding="utf-8"))
            return row | {"kind": "train", "status": "done", "when": _when(path), "seconds": record["seconds"]}
        if (path / "index.json").exists():
            meta = json.loads((path / "index.json").read_text(encoding="utf-8"))
            shards = -(-meta["documents"] // meta["shard_documents"])
            whole = len(list(path.glob("shard-*.safetensors"))) >= shards
            return row | {"kind": "index", "status": "done" if whole else "stopped", "when": _when(path)}
    except (ArtefactError, ValueError, KeyError, TypeError) as error:
        return row | {"kind": "unknown", "status": "damaged", "error": str(error)}
    return None


def _run(path: Path) -> dict[str, Any]:
    from rootward.core.records import RunRecord, Verdict, read_model

    record = read_model(RunRecord, path / "record.json")
    verdict = None
    if (path / "verdict.json").exists():
        verdict = "holds" if read_model(Verdict, path / "verdict.json").holds else "does not hold"
    return {
        "kind": record.kind,
        "status": record.status,
        "when": record.started,
        "seconds": record.seconds,
        "verdict": verdict,
        "error": record.error,
    }


def _when(path: Path) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))
