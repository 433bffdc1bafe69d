"""What a run keeps of its documents for the page: a table with their losses, and token scores of some."""

from __future__ import annotations

import json
from typing import Any

from rootward.capture.inputs import MethodInputs
from rootward.capture.sinks import Losses
from rootward.core.records import TokenScores
from rootward.core.registry import Method
from rootward.core.runfolder import RunFolder
from rootward.core.scores import Scores
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


def token_records(inputs: MethodInputs, method: Method, config: Any, scores: Scores, count: int) -> list[TokenScores]:
    """Token scores of ``count`` documents at each end of the ranking; none where the method has no such scores."""
    if method.tokens is None or count < 1:
        return []
    order = scores.order()
    positions = [int(n) for n in dict.fromkeys([*order[:count], *order[::-1][:count]])]
    found = method.tokens(inputs, config, positions)
    encoded, objective = inputs.subject.encoded, inputs.subject.objective
    return [
        TokenScores(
            id=encoded[n].id,
            query=-1,
            tokens=objective.tokens(encoded[n]),
            scores=[float(v) for v in found[n]],
            trained=[bool(v) for v in encoded[n].trained],
        )
        for n in positions
    ]
