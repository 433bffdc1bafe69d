"""What is said beside the numbers: gradients at the final weights only, and two truths that disagree."""

from types import SimpleNamespace
from typing import Any

import pytest

from rootward.core import registry
from rootward.core.records import ComparedMethod, Cost, Interval
from rootward.verification.words import final_weights_notes, opposite_notes


def notes(kept: int, *names: str, **options: Any) -> list[str]:
    """Of a subject with so many checkpoints; ``options`` are the main method's."""
    chosen = {}
    for place, name in enumerate(names):
        method, preset = registry.get(name)
        chosen[name] = (method, method.configure({**preset, **({} if place else options)}))
    subject: Any = SimpleNamespace(checkpoints=tuple(range(kept)))
    return final_weights_notes(subject, chosen)


def test_final_weights_beside_kept_checkpoints_are_said_once_however_many_methods_look_at_them():
    assert notes(4, "gradient_dot", "gradient_cosine", "ekfac") == [
        "gradient_dot looks at the final weights only, and 4 checkpoints were kept: what a document taught is often "
        "learnt by the end, and then hardly shows there; compare with --method tracin_cp or ekfac_checkpoints."
    ]
    assert "1 checkpoint was kept" in notes(1, "trak")[0]


@pytest.mark.parametrize("name", ["tracin_cp", "ekfac_checkpoints", "gradient_dot_at_start", "less", "source", "dda"])
def test_a_method_that_looks_at_training_needs_no_such_note_and_is_named_where_it_is_in_the_run(name: str):
    assert notes(4, name, "gradient_dot") == []
    assert notes(4, "gradient_dot", name)[0].endswith(f"compare with {name}, also in this run.")


def test_the_note_goes_by_the_options_and_needs_checkpoints_and_gradients():
    assert notes(4, "gradient_dot", checkpoints="all") == []
    assert len(notes(4, "tracin_cp", checkpoints="final")) == 1
    assert notes(0, "gradient_dot") == []
    assert notes(4, "bm25") == []


def near(value: float) -> Interval:
    return Interval(value=value, low=value - 0.1, high=value + 0.1, n=9)


def one(place: int, lds: float, step: float | None) -> ComparedMethod:
    return ComparedMethod(
        method=f"m{place}", label="", unit="1", baseline=False, cost=Cost(seconds=1.0), lds=near(lds), null=near(0.0),
        unranked=0, per_query=True, tail_patch_beyond_random=None if step is None else near(step),
    )  # fmt: skip


def ordered(steps: list[float | None]) -> list[str]:
    """Notes on methods whose LDS falls from one to the next."""
    return opposite_notes([one(place, 0.9 - 0.1 * place, step) for place, step in enumerate(steps)])


def test_lds_and_tail_patch_in_opposite_order_are_said_to_be():
    (said,) = ordered([-3.0, -2.0, None, 1.0, 5.0])  # None: random, which is stepped on for all
    assert said.startswith("LDS and tail patch order the 4 methods oppositely (Spearman −1.00)")
    assert said.endswith("The recommendation is by LDS.")


@pytest.mark.parametrize(
    "steps",
    [
        [4.0, 3.0, 2.0, 1.0],  # the same order
        [2.0, 4.0, 1.0, 3.0],  # no order: Spearman 0
        [1.0, 2.0, 3.0],  # too few to say
        [1.0, 1.0, 1.0, 1.0],  # no ranking
        [None, None, None, None],
    ],
)
def test_nothing_is_said_of_orders_that_agree_or_rank_nothing(steps: list[float | None]):
    assert ordered(steps) == []
