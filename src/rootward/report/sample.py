"""Which documents the page holds when there are more than it can hold, and the sentence that says so."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from rootward.report.folder import Folder
from rootward.report.numbers import count

TOP, BOTTOM, PLANTED = 0.40, 0.20, 0.20
"""Shares of the page's documents; the rest is drawn at random, so that the middle of the ranking is there too."""

_PLANTED_VALUES = frozenset({"planted", "true", "yes", "1"})


@dataclass(frozen=True)
class Sample:
    """The documents on the page, in the order of the file; ``rule`` is empty where nothing was left out."""

    ids: tuple[str, ...]
    total: int
    rule: str


def is_planted(meta: dict[str, Any], planted_field: str | None) -> bool:
    """Whether a document was planted: its field is true or "planted"; "field=value" names another value."""
    if not planted_field:
        return False
    name, _, wanted = planted_field.partition("=")
    value = meta.get(name)
    return str(value) == wanted if wanted else str(value).lower() in _PLANTED_VALUES


def ranking(scores: dict[str, float], goal: str = "raise") -> list[str]:
    """Ids from those that move the measurement most towards the goal to those that move it most away."""
    sign = -1.0 if goal == "lower" else 1.0
    return sorted(scores, key=lambda name: -sign * scores[name])


def choose(folder: Folder, limit: int) -> Sample:
    """At most ``limit`` documents: the top and bottom by the main method, planted ones, and a random rest.

    Args:
        folder: the run.
        limit: largest number of documents on the page, at least 10.

    Returns:
        The same sample for the same run and limit.
    """
    ids = folder.ids
    if len(ids) <= limit:
        return Sample(tuple(ids), len(ids), "")
    scores = folder.means.get(folder.main_method, {})
    ranked = ranking(scores, folder.goal)
    planted_field = folder.planted_field
    top, bottom = ranked[: int(TOP * limit)], ranked[::-1][: int(BOTTOM * limit)]
    chosen = dict.fromkeys([*top, *bottom])
    order = ranked if ranked else ids
    extra = [name for name in order if name not in chosen and is_planted(folder.metas[name], planted_field)]
    planted = extra[: int(PLANTED * limit)]
    chosen.update(dict.fromkeys(planted))
    rest = [name for name in ids if name not in chosen]
    drawn = random.Random(folder.record.key).sample(rest, limit - len(chosen))
    chosen.update(dict.fromkeys(drawn))
    kinds = [
        (top, "at the top"),
        (bottom, "at the bottom"),
        (planted, "more that were planted"),
        (drawn, "drawn at random"),
    ]
    parts = ", ".join(f"{count(len(names))} {words}" for names, words in kinds if names)
    rule = (
        f"The page shows {count(limit)} of {count(len(ids))} documents: {parts}. Ranks are those among all documents."
    )
    return Sample(tuple(name for name in ids if name in chosen), len(ids), rule)
