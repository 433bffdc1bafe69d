"""The documents of a run with their losses under its subject: a table for the page."""

from __future__ import annotations

import json
from typing import Any

from rootward.capture.inputs import MethodInputs
from rootward.capture.sinks import Losses
from rootward.core.runfolder import RunFolder
from rootward.subject.subject import Subject


def write_documents(subject: Subject, run: RunFolder, inputs: MethodInputs) -> None:
    """``documents.parquet``: every document that was used, with its loss under the subject."""
    sink = Losses(len(subject.encoded))
    inputs.feed([sink], subject.encoded, "losses")
    rows: list[dict[str, Any]] = []
    for n, example in enumerate(subject.encoded):
        document = subject.documents[example.row]
        rows.append(
            {
                "row": example.row,
                "id": example.id,
                "text": document.text,
                "response": document.response,
                "source": document.source,
                "tokens": example.length,
                "trained": example.targets,
                "truncated": example.truncated,
                "loss": float(sink.losses[n]),
                "meta": json.dumps(document.meta, ensure_ascii=False, default=str),
            }
        )
    run.write_documents(rows)
