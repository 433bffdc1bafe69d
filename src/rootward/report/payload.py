"""The data of the page: one JSON object, made to fit a size by steps that the page names."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rootward.core.records import TokenScores, Verdict, now
from rootward.report.folder import Document, Folder
from rootward.report.numbers import count, mean_interval, significant
from rootward.report.sample import Sample, choose, is_planted, ranking
from rootward.report.summary import badge, reserve

DATA_BYTES = 4_800_000
"""What the data may take, so that the whole page stays below 5 MB."""
META_CHARACTERS = 400
CONFIG_CHARACTERS = 40_000
HALF_LARGEST = 60_000.0


@dataclass(frozen=True)
class Fit:
    """How much of a run the page holds; `STEPS` are tried in order until the page is small enough."""

    text: int  # characters of one document
    tokens: int  # tokens of one heatmap
    heatmaps: int  # documents with a heatmap
    queries: str  # "all", "main" or "none": methods that keep their scores for single queries
    share: float = 1.0  # of the documents asked for


STEPS = (
    Fit(20_000, 4000, 400, "all"),
    Fit(20_000, 4000, 400, "main"),
    Fit(5000, 2000, 200, "main"),
    Fit(2000, 1000, 100, "main"),
    Fit(2000, 1000, 100, "none"),
    Fit(1000, 500, 50, "none"),
    Fit(500, 300, 20, "none", 0.5),
    Fit(300, 200, 10, "none", 0.1),
    Fit(200, 100, 0, "none", 0.02),
)


def payload(folder: Folder, max_documents: int) -> str:
    """The page's data as JSON text without ``<``, hence safe inside a script element.

    Args:
        folder: the run.
        max_documents: largest number of documents on the page.
    """
    text = ""
    for step in STEPS:
        text = _encode(_data(folder, choose(folder, max(10, int(max_documents * step.share))), step))
        if len(text.encode()) <= DATA_BYTES:
            break
    return text


def _encode(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone half of a surrogate pair can come in from JSON and cannot be written as UTF-8.
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode("utf-8")


def _data(folder: Folder, sample: Sample, fit: Fit) -> dict[str, Any]:
    trace, verdict = folder.trace, folder.verdict
    ids = list(sample.ids)
    documents = folder.documents(ids)
    rows = [documents.get(name) or _unknown(name, folder) for name in ids]
    heatmaps, left_out = _heatmaps(folder, set(ids), fit)
    methods = _method_order(folder)
    cut = sum(len(row.text) > fit.text for row in rows)
    limits = [sample.rule] if sample.rule else []
    if cut:
        limits.append(
            f"Long texts ({count(cut)}) are cut to their first {count(fit.text)} characters;"
            " documents.parquet holds the whole."
        )
    if left_out:
        limits.append(
            f"Token scores of {count(left_out)} further documents are in trace.json only, to keep the page small."
        )
    if fit.queries != "all" and len(methods) > 1:
        kept = "the main method only" if fit.queries == "main" else "no method"
        limits.append(
            f"Scores for single queries are on the page for {kept}, to keep it small; scores.parquet holds all."
        )
    return {
        "version": 1,
        "generated": now(),
        "badge": badge(verdict, folder.comparison),
        "run": _run(folder),
        "trace": trace.model_dump(mode="json", exclude={"tokens"}) if trace else None,
        "verdict": _verdict(verdict) if verdict else None,
        "comparison": folder.comparison.model_dump(mode="json") if folder.comparison else None,
        "reserve": reserve(trace) if trace else None,
        "limits": limits,
        "documents": _documents(rows, folder, sample, fit),
        "scores": [_scores(folder, method, ids) for method in methods],
        "queries": _queries(folder, methods, ids, fit),
        "queries_kept": fit.queries,
        "tokens": heatmaps,
    }


def _unknown(name: str, folder: Folder) -> Document:
    return Document(name, "", "", "", 0, 0, False, None, folder.metas[name], folder.copies[name])


def _run(folder: Folder) -> dict[str, Any]:
    run = folder.record.model_dump(mode="json")
    text = json.dumps(run["config"], indent=2, ensure_ascii=False)
    run["config"] = (
        text if len(text) <= CONFIG_CHARACTERS else f"{text[:CONFIG_CHARACTERS]}\n… cut; record.json holds the whole"
    )
    run["folder"] = str(folder.path)
    return _finite(run)


def _finite(value: Any) -> Any:
    """JSON has no infinity: a number that is not finite is shown as its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _verdict(verdict: Verdict) -> dict[str, Any]:
    data = verdict.model_dump(mode="json")
    for arm in data["arms"]:
        mean, low, high = mean_interval(arm["values"]) if arm["values"] else (None, None, None)
        arm["mean"], arm["low"], arm["high"] = mean, low, high
    return data


def _method_order(folder: Folder) -> list[str]:
    """Main method first, then as the trace lists them, then scores that no trace names."""
    told = folder.trace or folder.comparison
    listed = [folder.main_method, *(result.method for result in told.methods)] if told else []
    return [name for name in dict.fromkeys([*listed, *folder.means]) if name in folder.means]


def _scores(folder: Folder, method: str, ids: list[str]) -> dict[str, Any]:
    means = folder.means[method]
    ranks = {name: place for place, name in enumerate(ranking(means, folder.goal), 1)}
    return {
        "method": method,
        "mean": [significant(means.get(name)) for name in ids],
        "rank": [ranks.get(name) for name in ids],
        "scored": len(means),
    }


def _queries(folder: Folder, methods: list[str], ids: list[str], fit: Fit) -> dict[str, dict[str, Any]]:
    """Scores for single queries as half-precision numbers (three digits) in base64, a fifth of the size of JSON."""
    kept = methods if fit.queries == "all" else methods[:1] if fit.queries == "main" else []
    found: dict[str, dict[str, Any]] = {}
    for method in kept:
        by_query = folder.query_scores(method, ids)
        if len(by_query) > 1:  # one query alone is the mean
            found[method] = {
                str(query): _half([scores.get(name, math.nan) for name in ids]) for query, scores in by_query.items()
            }
    return found


def _half(values: list[float]) -> dict[str, Any]:
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    scale = largest / HALF_LARGEST
    scaled = [value / scale if math.isfinite(value) else math.nan for value in values]
    return {"scale": scale, "data": base64.b64encode(struct.pack(f"<{len(scaled)}e", *scaled)).decode()}


def _documents(rows: list[Document], folder: Folder, sample: Sample, fit: Fit) -> dict[str, Any]:
    planted_field = folder.planted_field

    def column(pick: Callable[[Document], Any]) -> list[Any]:
        return [pick(row) for row in rows]

    return {
        "total": sample.total,
        "sampled": bool(sample.rule),
        "text_limit": fit.text,
        "ids": column(lambda row: row.id),
        "text": column(lambda row: row.text[: fit.text]),
        "response": column(lambda row: _response(row, fit)),
        "characters": column(lambda row: len(row.text)),
        "source": column(lambda row: row.source[:META_CHARACTERS]),
        "tokens": column(lambda row: row.tokens),
        "trained": column(lambda row: row.trained),
        "truncated": column(lambda row: row.truncated),
        "loss": column(lambda row: significant(row.loss)),
        "copies": column(lambda row: row.copies),
        "planted": column(lambda row: is_planted(row.meta, planted_field)) if planted_field else None,
        "meta": column(lambda row: _short_meta(row.meta)),
    }


def _response(row: Document, fit: Fit) -> str | int:
    """The response; where the text ends with it, only the place where it begins, so that it is not held twice."""
    response = row.response
    if response and len(row.text) <= fit.text and row.text.endswith(response):
        # JavaScript counts UTF-16 units.
        return len(row.text[: len(row.text) - len(response)].encode("utf-16-le", "surrogatepass")) // 2
    return response[: fit.text]


def _short_meta(meta: dict[str, Any]) -> dict[str, Any]:
    short: dict[str, Any] = {}
    for key, value in list(meta.items())[:24]:
        if isinstance(value, bool | int) or value is None or (isinstance(value, float) and math.isfinite(value)):
            short[key[:80]] = value
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        short[key[:80]] = text if len(text) <= META_CHARACTERS else f"{text[:META_CHARACTERS]}…"
    return short


def _heatmaps(folder: Folder, ids: set[str], fit: Fit) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Token scores of shown documents, those of the furthest ranks first, and how many documents go without."""
    if folder.trace is None:
        return {}, 0
    grouped: dict[str, list[TokenScores]] = {}
    for entry in folder.trace.tokens:
        if entry.id in ids:
            grouped.setdefault(entry.id, []).append(entry)
    means = folder.means.get(folder.trace.main_method, {})
    order = sorted(grouped, key=lambda name: -abs(means.get(name, 0.0)))
    kept = order[: fit.heatmaps]
    return {name: [_tokens(entry, fit) for entry in grouped[name]] for name in kept}, len(order) - len(kept)


def _tokens(entry: TokenScores, fit: Fit) -> dict[str, Any]:
    return {
        "query": entry.query,
        "tokens": [token[: fit.text] for token in entry.tokens[: fit.tokens]],
        "scores": [significant(score, 4) or 0.0 for score in entry.scores[: fit.tokens]],
        "trained": [int(trained) for trained in entry.trained[: fit.tokens]],
        "sum": significant(math.fsum(score for score in entry.scores if math.isfinite(score)), 6),
        "length": len(entry.tokens),
    }
