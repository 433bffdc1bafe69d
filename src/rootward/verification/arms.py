"""The arms of a removal test: which rows each keeps under each seed, and what is predicted for it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rootward.core import registry
from rootward.core.errors import InputError, RootwardError
from rootward.core.scores import Scores, parse_count
from rootward.interventions.data import Drop, Intervention, Keep, find_rows
from rootward.subject.subject import Subject

Kind = Literal["full", "method", "random", "baseline", "truth", "base"]
Action = Literal["none", "drop", "keep"]


@dataclass(frozen=True)
class ArmPlan:
    """One arm: ``rows`` are the documents it trains on, by seed; ``documents`` is the number dropped (or kept)."""

    name: str
    label: str
    kind: Kind
    action: Action
    documents: int
    rows: Mapping[int, tuple[int, ...]]

    @property
    def trains(self) -> bool:
        """False for the start model."""
        return self.kind != "base"


def mean_scores(scores: Scores, ids: Sequence[str], goal: str) -> NDArray[np.float64]:
    """Mean score by row, joined by id, positive where the document makes *more* of the behaviour.

    A document without a score (it could not be used for training) has 0. `InputError` if none has one.
    """
    known = dict(zip(scores.document_ids, scores.mean.astype(np.float64).tolist(), strict=True))
    if not any(name in known for name in ids):
        raise InputError(f"{scores.method}: its scores are of other documents than the subject's: no id is in both")
    sign = -1.0 if goal == "lower" else 1.0
    return np.array([sign * known.get(name, 0.0) for name in ids])


def top_rows(scores: NDArray[np.float64], usable: Sequence[int], count: int) -> tuple[int, ...]:
    """Rows of the ``count`` usable documents with the highest score; ties keep the documents' order."""
    rows = np.asarray(usable)
    return tuple(sorted(int(row) for row in rows[np.argsort(-scores[rows], kind="stable")[:count]]))


def random_rows(usable: Sequence[int], count: int, seed: int) -> tuple[int, ...]:
    """``count`` usable rows, every set as likely; the same for the same seed, whatever is tested."""
    generator = random.Random(f"rootward random control {seed} {len(usable)} {count}")
    return tuple(sorted(generator.sample(list(usable), count)))


class Builder:
    """Makes arms for one subject and set of seeds."""

    def __init__(self, subject: Subject, seeds: Sequence[int]) -> None:
        self.documents, self.seeds = subject.documents, tuple(seeds)
        self.total = len(subject.documents)
        self.usable = subject.encoded.rows

    def full(self) -> ArmPlan:
        """All documents."""
        rows = tuple(range(self.total))
        return ArmPlan("full", "All documents", "full", "none", self.total, dict.fromkeys(self.seeds, rows))

    def base(self) -> ArmPlan:
        """The model before training."""
        return ArmPlan("base", "Before training", "base", "none", 0, {self.seeds[0]: ()})

    def without(self, name: str, label: str, kind: Kind, gone: Sequence[int]) -> ArmPlan:
        """All but these rows."""
        out = set(gone)
        stay = tuple(row for row in range(self.total) if row not in out)
        return ArmPlan(name, label, kind, "drop", len(out), dict.fromkeys(self.seeds, stay))

    def only(self, name: str, label: str, kind: Kind, stay: Sequence[int]) -> ArmPlan:
        """These rows only."""
        return ArmPlan(name, label, kind, "keep", len(stay), dict.fromkeys(self.seeds, tuple(sorted(stay))))

    def random(self, action: Literal["drop", "keep"], count: int) -> ArmPlan:
        """The control of equal size: another draw of the usable documents for each seed."""
        drawn = {seed: random_rows(self.usable, count, seed) for seed in self.seeds}
        if action == "keep":
            return ArmPlan("keep_random", f"Only {count:,} random documents", "random", "keep", count, drawn)
        everything = range(self.total)
        rows = {s: tuple(r for r in everything if r not in set(out)) for s, out in drawn.items()}
        return ArmPlan("random", f"Without {count:,} random documents", "random", "drop", count, rows)


def main_rows(
    intervention: Intervention | int | str, scores: NDArray[np.float64], builder: Builder
) -> tuple[Literal["drop", "keep"], tuple[int, ...]]:
    """What the main arm does and to which rows; a number or share means: drop as many from the top."""
    if isinstance(intervention, Drop | Keep):
        action = "drop" if isinstance(intervention, Drop) else "keep"
        rows = find_rows(intervention.ids, builder.documents, action.capitalize())
    elif isinstance(intervention, int | str):
        count = parse_count(intervention, builder.total)
        action, rows = "drop", top_rows(scores, builder.usable, max(count, 0))
    else:
        raise InputError(
            f"intervention: expected Drop, Keep, a number of documents or a share such as '5%', got "
            f"{type(intervention).__name__}; a removal test takes documents out, it does not weigh them"
        )
    if not 0 < len(rows) < len(builder.usable):
        raise InputError(
            f"intervention: expected 1 to {len(builder.usable) - 1} of {len(builder.usable)} usable documents, got "
            f"{len(rows)}"
        )
    return action, rows


def spoken(name: str) -> str:
    """A method's label without what it has in brackets; a preset or a name that the registry has not is left."""
    try:
        card = registry.get(name)[0].card
    except RootwardError:
        return name
    return card.label.split(" (")[0] if name in (card.key, *card.aliases) else name


def build_arms(
    subject: Subject,
    scores: Mapping[str, NDArray[np.float64]],
    intervention: Intervention | int | str,
    *,
    main: str,
    baselines: Sequence[str],
    planted_ids: Sequence[str] | None,
    seeds: Sequence[int],
    retention: bool,
    with_base: bool,
) -> list[ArmPlan]:
    """All arms, the full set first and the main one second."""
    builder = Builder(subject, seeds)
    action, rows = main_rows(intervention, scores[main], builder)
    count, chosen = len(rows), isinstance(intervention, Drop | Keep)
    arms = [builder.full()]
    if action == "keep":
        text = f"Only the {count:,} documents given"
        arms += [builder.only(main, text, "method", rows), builder.random("keep", count)]
    else:
        text = f"Without the {count:,} documents " + ("given" if chosen else f"that {spoken(main)} puts first")
        arms += [builder.without(main, text, "method", rows), builder.random("drop", count)]
    for name, values in scores.items():
        if name != main:
            kind: Kind = "baseline" if name in baselines else "method"
            top = top_rows(values, builder.usable, count)
            make, word = (builder.only, "Only") if action == "keep" else (builder.without, "Without")
            arms.append(make(name, f"{word} the {count:,} documents that {spoken(name)} puts first", kind, top))
    if planted_ids is not None:
        planted = find_rows(planted_ids, subject.documents, "planted_ids")
        arms.append(builder.without("planted", f"Without all {len(planted):,} planted documents", "truth", planted))
    if retention and action == "drop":
        text = arms[1].label.replace("Without", "Only", 1)
        arms.append(builder.only(f"keep_{main}", text, "method", rows))
        arms.append(builder.random("keep", count))
    if with_base:
        arms.append(builder.base())
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        taken = next(name for name in names if names.count(name) > 1)
        raise InputError(f"scores: the name {taken!r} is one of the arms' own; give that method another name")
    return arms


def influence_share(scores: NDArray[np.float64], total: int, kept: Sequence[int]) -> float | None:
    """Share of all positive influence that lies on the documents *not* kept; None if no score is positive."""
    positive = np.maximum(scores, 0.0)
    whole = float(positive.sum())
    if whole == 0:
        return None
    gone = np.ones(total, dtype=bool)
    gone[list(kept)] = False
    return float(positive[gone].sum()) / whole
