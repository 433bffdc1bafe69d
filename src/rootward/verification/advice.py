"""Which method to take, in words, from a comparison's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rootward.core.records import ComparedMethod, Interval

FREE = 0.1
"""Below this many plain passes a method "costs next to nothing"."""


class Advice(NamedTuple):
    """The method to take (None: cannot tell), cheaper ones that cannot be told from it, and both in words.

    With few subsets the first is the highest so far and nothing to rely on.
    """

    recommended: str | None
    as_good: list[str]
    summary: str


def advise(methods: Sequence[ComparedMethod], subsets: int, seeds: int, *, few: bool = False) -> Advice:
    """What to take of ``methods``, which stand by LDS, the highest first, with their margins to the first.

    The first one that beats random is taken, and every cheaper one whose margin to it has 0 in its interval is named:
    baselines before methods, since they cost least. ``few``: too few subsets to decide, so it is only named.
    """
    able = [one for one in methods if one.beats_random and one.method != "random"]
    if not able:
        first = next((one for one in methods if one.method != "random"), methods[0])
        made = f"{subsets} subsets and {seeds} training seed{'s' if seeds > 1 else ''}"
        return Advice(
            None,
            [],
            f"Cannot tell: with {made} no method predicts retraining better than a random order does; the highest LDS "
            f"is that of {first.method}, {lds_text(first.lds)}. More subsets, more seeds or more queries can tell.",
        )
    best = able[0]
    cheaper = [one for one in methods if one is not best and one.method != "random" and _price(one) < _price(best)]
    as_good = [one for one in cheaper if one.behind_best is not None and one.behind_best.low <= 0]
    lead = f"Too few subsets to decide; highest so far: {best.method}, " if few else f"Take {best.method}: "
    said = f"{lead}LDS {lds_text(best.lds)}, {cost_text(best)}"
    if best.baseline:
        others = [one for one in methods if not one.baseline]
        said += ". It is a baseline, and no method does better" if others else ""
    proven = [one for one in as_good if one.beats_random]
    for one in _shown(proven):
        said += f"; {one.method} does as well (difference {lds_text(one.behind_best)}) and {_verb(one)}"
    unproven = [one.method for one in as_good if not one.beats_random]
    if unproven:
        said += (
            f"; the retrainings are too few to tell it from {', '.join(unproven)}, which may be no better than chance"
        )
    return Advice(best.method, [one.method for one in as_good], f"{said}.")


def lds_text(found: Interval | None) -> str:
    """``0.41 [0.30, 0.52]``."""
    if found is None:
        return "not known"
    value, low, high = (f"{round(number, 2) + 0.0:.2f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]".replace("-", "\u2212")


def cost_text(one: ComparedMethod) -> str:
    """What it costs, after a comma."""
    ratio = one.cost.ratio
    if ratio is None:
        return f"in {one.cost.seconds:.3g} s"
    if ratio < FREE:
        return "for next to nothing"
    return f"for {_number(ratio)} times one plain pass over the documents"


def _verb(one: ComparedMethod) -> str:
    ratio = one.cost.ratio
    if ratio is None:
        return f"takes {one.cost.seconds:.3g} s"
    return "costs next to nothing" if ratio < FREE else f"costs {_number(ratio)} plain passes"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _price(one: ComparedMethod) -> float:
    return one.cost.seconds


def _shown(found: Sequence[ComparedMethod]) -> list[ComparedMethod]:
    """The best baseline and the cheapest method: a sentence with all of them would say less."""
    baselines = [one for one in found if one.baseline]
    methods = sorted((one for one in found if not one.baseline), key=_price)
    return [*baselines[:1], *methods[:1]]
