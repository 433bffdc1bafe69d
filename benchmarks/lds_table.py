"""The table behind the benchmarks of linear datamodeling scores: every method tuned alike, ours and the peers'.

The ground truth (`Retrained`) holds reporting and tuning queries, and reporting and tuning subsets. A setting is chosen
where both are the tuning ones, and figures come from where both are the reporting ones, so that no figure was chosen by
itself. The whole table goes to a JSON file that documentation can be made from.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.figures import Figure
from benchmarks.peers.exchange import PYTHON, run_peer, write_task
from rootward.api import attribute
from rootward.capture.inputs import MethodInputs, plain_pass_seconds
from rootward.core import registry
from rootward.core.records import Interval, machine, versions, write_text
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification.lds import LDS, lds, margin, noise_ceiling, tune
from rootward.verification.subsets import Retrained

HERE = Path(__file__).resolve().parent
RESULTS, CACHE = HERE / "results", HERE / ".cache"
CURVE_RESAMPLES = 200
"""For the curves; what is reported has the full number."""
RUNS, ENOUGH = 3, 10.0
"""Timed runs of a method: so many, or fewer once they took so many seconds."""


@dataclass(frozen=True)
class Ours:
    """A registered method or preset. ``tuned`` is the option (or several) that takes each of ``values`` in turn."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tuned: str = ""
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Peer:
    """A peer's adapter and its variant; ``values`` are the dampings."""

    name: str
    adapter: str
    variant: str
    values: tuple[float, ...]
    kind: str = "relative"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tuned: str = "damping"


@dataclass(frozen=True)
class Row:
    """A line of the table. ``tuning`` is the LDS of the chosen setting on the tuning part, ``report`` on the other."""

    entry: Ours | Peer
    chosen: Any
    at_edge: bool
    tuning: Interval
    report: LDS
    seconds: float
    cost: float
    curve: tuple[tuple[str, Interval, Interval], ...]
    notes: tuple[str, ...]

    @property
    def peer(self) -> bool:
        """Whether it is another library's."""
        return isinstance(self.entry, Peer)

    def document(self) -> dict[str, Any]:
        """As it is written."""
        entry = self.entry
        peer = isinstance(entry, Peer)
        tuned = entry.tuned if self.curve else None
        notes = [*self.notes, *([f"{tuned} at the end of its range"] if self.at_edge else [])]
        if tuned is not None and tuned != "damping":
            notes.append(f"{tuned}: " + ", ".join(f"{setting} {there.value:.3f}" for setting, _, there in self.curve))
        return {
            "lds": _interval(self.report.score),
            "cost_ratio": round(self.cost, 2),
            "options": dict(entry.options) | ({entry.tuned: self.chosen} if tuned else {}),
            "damping_curve": [[float(setting), round(there.value, 4)] for setting, _, there in self.curve]
            if tuned == "damping"
            else None,
            "note": "; ".join(([f"peer, {entry.variant or 'its default'}"] if peer else []) + notes),
            "peer": entry.adapter if peer else None,
            "seconds": round(self.seconds, 3),
            "null": _interval(self.report.null),
            "unranked_queries": self.report.unranked,
            "tuned": tuned,
            "lds_on_tuning_part": _interval(self.tuning),
            "tuning_curve": [[setting, round(here.value, 4)] for setting, here, _ in self.curve] or None,
        }


def _interval(found: Interval) -> dict[str, float]:
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4), "n": found.n}


class PeerError(Exception):
    """A peer gave nothing that can be ranked."""


@dataclass
class Table:
    """What all methods are given, and the rows so far.

    Args:
        subject: the trained model.
        asked: all queries, the reporting ones first.
        reported: how many of them are reported; the rest is for tuning.
        truth: of those queries on reporting subsets and, after these, tuning ones.
        subsets: how many of the subsets are reported.
        peer_data: for `write_task`: training and query tensors, the queries as in ``asked``.
    """

    subject: Subject
    asked: Behaviour
    reported: int
    truth: Retrained
    subsets: int
    token_budget: int | None = None
    peer_data: Mapping[str, Tensor] | None = None
    query_keys: tuple[str, ...] = ()
    rows: dict[str, Row] = field(default_factory=dict[str, Row])
    refused: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        queries, subsets = len(self.asked), len(self.truth.kept)
        self.tuning_queries = list(range(self.reported, queries))
        self.tuning_subsets = list(range(self.subsets, subsets))
        self.here = self.truth.select(queries=self.tuning_queries, subsets=self.tuning_subsets)
        self.there = self.truth.select(queries=range(self.reported), subsets=range(self.subsets))
        self.reporting = Behaviour(
            self.asked.name, self.asked.kind, self.asked.queries[: self.reported], goal=self.asked.goal
        )
        tracked = self._inputs(self.asked).tracked
        budget, whole = self.token_budget or 4096, len(self.subject.encoded)
        self.plain = statistics.median(plain_pass_seconds(self.subject, tracked, budget, whole) for _ in range(5))

    def _inputs(self, asked: Behaviour) -> MethodInputs:
        return MethodInputs(self.subject, asked, self.token_budget)

    def add(self, entry: Ours | Peer) -> Row:
        """Tune, report and time one method."""
        run = self._ours if isinstance(entry, Ours) else self._peer
        by_setting, timed = run(entry)  # type: ignore[arg-type]
        names = list(by_setting)
        curve: tuple[tuple[str, Interval, Interval], ...] = ()
        if len(names) > 1:
            found = tune(by_setting, self.truth, queries=self.tuning_queries, subsets=self.tuning_subsets,
                         resamples=CURVE_RESAMPLES)  # fmt: skip
            name, at_edge = found.chosen, found.at_edge
            curve = tuple((point.setting, point.tuning, point.reported) for point in found.curve)
        else:
            name, at_edge = names[0], False
        chosen = next((value for value in entry.values if str(value) == name), None)
        tuning = lds(by_setting[name], self.here, resamples=CURVE_RESAMPLES, permutations=1, allow_few=True).score
        seconds = timed(chosen)
        row = Row(entry, chosen, at_edge, tuning, lds(by_setting[name], self.there), seconds, seconds / self.plain,
                  curve, by_setting[name].notes)  # fmt: skip
        self.rows[entry.name] = row
        _say(entry.name, row)
        return row

    def add_peer(self, entry: Peer) -> None:
        """`add`; a peer that fails is noted with its last words, and the others go on."""
        try:
            self.add(entry)
        except (PeerError, RuntimeError) as error:
            self.refuse(entry.name, str(error).strip().splitlines()[-1][:300])

    def refuse(self, name: str, reason: str) -> None:
        """Note a method that does not apply here."""
        self.refused[name] = reason

    def _options(self, entry: Ours, value: Any) -> dict[str, Any]:
        """With a score for every query, and without what is only said in notes."""
        method, preset = registry.get(entry.method)
        always = {"queries": "each", "sensitivity": False}
        found = {k: v for k, v in always.items() if k in method.config.model_fields} | preset | dict(entry.options)
        return found if value is None else found | {entry.tuned: value}

    def _ours(self, entry: Ours) -> tuple[dict[str, Scores], Callable[[Any], float]]:
        method = registry.get(entry.method)[0].card.key
        inputs = self._inputs(self.asked)

        def of(value: Any, given: MethodInputs) -> Scores:
            return attribute(given.subject, given.behaviour, method, options=self._options(entry, value), inputs=given)

        def timed(value: Any) -> float:
            seconds: list[float] = []
            while len(seconds) < RUNS and sum(seconds) < ENOUGH:
                seconds.append(of(value, self._inputs(self.reporting)).cost.seconds)
            return statistics.median(seconds)

        return {str(value): of(value, inputs) for value in (entry.values or (None,))}, timed

    def _peer(self, entry: Peer) -> tuple[dict[str, Scores], Callable[[Any], float]]:
        assert self.peer_data is not None
        model = self.subject.model
        found = self._run_peer(entry, model, self.peer_data, entry.values)
        ids, names = self.subject.encoded.ids, tuple(query.name for query in self.asked.queries)
        finite = {value: scores for value, scores in found.scores.items() if np.isfinite(scores).all()}
        if not finite:
            raise PeerError(f"{entry.name}: no damping of {entry.values} gave finite scores")
        lost = [value for value in found.scores if value not in finite]
        notes = (f"scores not finite at {entry.tuned} {lost}",) if lost else ()
        by_setting = {
            str(value): Scores(scores, names, ids, entry.name, "peer", notes=notes) for value, scores in finite.items()
        }

        def timed(value: Any) -> float:
            assert self.peer_data is not None
            fewer = {k: v[: self.reported] if k in self.query_keys else v for k, v in self.peer_data.items()}
            return self._run_peer(entry, model, fewer, (value,)).seconds["total"]

        return by_setting, timed

    def _run_peer(self, entry: Peer, model: nn.Module, data: Mapping[str, Tensor], values: Sequence[float]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task"
            write_task(path, model, data, damping=tuple(values), damping_kind=entry.kind, method=entry.variant,
                       threads=torch.get_num_threads(), options=dict(entry.options))  # fmt: skip
            return run_peer(entry.adapter, path)

    def figure(self, name: str, bar: str = "") -> Figure:
        """The LDS of a row."""
        score = self.rows[name].report.score
        return Figure(score.value, score.low, score.high, score.n, bar)

    def margin(self, ours: str, theirs: str, bar: str = "") -> Figure:
        """LDS of one row less that of another, on the same resamples."""
        found = margin(self.rows[ours].report, self.rows[theirs].report)
        return Figure(found.value, found.low, found.high, found.n, bar)

    def best(self, peers: bool, most_cost: float = float("inf")) -> str:
        """The row with the highest LDS on the tuning part, ours or the peers', at most so dear."""
        kind = Peer if peers else Ours
        names = [n for n, row in self.rows.items() if isinstance(row.entry, kind) and row.cost <= most_cost]
        return max(names, key=lambda name: self.rows[name].tuning.value)

    def strongest(self, names: Iterable[str]) -> str:
        """The one of these rows with the highest reported LDS."""
        return max(names, key=lambda name: self.rows[name].report.score.value)

    def write(self, name: str, world: Mapping[str, Any]) -> Path:
        """The whole table as JSON under ``results``."""
        ceiling = noise_ceiling(self.there)
        document = {
            "benchmark": name,
            "world": dict(world),
            "queries": self.reported,
            "subsets": self.subsets,
            "tuning_queries": len(self.tuning_queries),
            "tuning_subsets": len(self.tuning_subsets),
            "seeds": len(self.truth.seeds),
            "noise_ceiling": None if ceiling is None else _interval(ceiling.ceiling),
            "reliability": None if ceiling is None else _interval(ceiling.reliability),
            "plain_pass_seconds": round(self.plain, 4),
            "retraining_seconds": self.truth.seconds,
            "methods": {name: row.document() for name, row in self.rows.items()},
            "not_applicable": self.refused,
            "machine": machine(),
            "versions": versions(),
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        write_text(path, json.dumps(document, indent=1) + "\n")
        return path


def peers_here() -> bool:
    """Whether the peers' environment is built."""
    return PYTHON.exists()


def _say(name: str, row: Row) -> None:
    score = row.report.score
    curve = "  ".join(f"{setting}: {here.value:.3f} / {there.value:.3f}" for setting, here, there in row.curve)
    print(
        f"{name:24}{score.value:7.3f} [{score.low:.3f}, {score.high:.3f}]  cost {row.cost:8.1f}  "
        f"{'' if row.chosen is None else row.chosen}{' (edge)' if row.at_edge else ''}  {curve}",
        file=sys.stderr,
        flush=True,
    )


def ceiling_figure(table: Table) -> Figure:
    """Noise ceiling of the reporting part."""
    found = noise_ceiling(table.there)
    assert found is not None
    c = found.ceiling
    return Figure(c.value, c.low, c.high, c.n)
