"""Tail patch: one training step on a single top document, from the final model; how does the measurement change?

    tail patch of query q = mean over its top-k documents n of ( m_q(model after one step on n) - m_q(model) )

Source: Chang et al. 2024, TrackStar (arXiv 2410.17413), where m is the target's probability and the step is that of the
pre-training optimiser. Deviations: m is the behaviour's measurement, counted towards its goal (so for a loss it is the
change of the log-probability, in nats); the optimiser starts with fresh moments, so Adam's step is about ``lr`` in
every parameter. Beside it stands the same for as many random documents: only the difference is the
method's. Baselines (BM25, representation similarity, length) are methods like any other here; a document that several
rank at the top is stepped on once. Nothing is retrained, so this is cheap, and it says what a document does now, not
what it did in training.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Literal

import numpy as np

from rootward.core.errors import InputError
from rootward.core.progress import Progress, silent
from rootward.core.records import SCHEMA_VERSION, Interval, Model
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.training import train
from rootward.verification.stats import interval
from rootward.verification.subsets import by_name, joined, pick

TOP = 10


class Patched(Model):
    """One method. ``top[q]`` is the mean over query q's top documents.

    ``effect`` is its mean over queries, ``beyond_random`` that of its difference to the control, paired by query.
    """

    method: str
    top: list[float]
    effect: Interval
    beyond_random: Interval


class TailPatch(Model):
    """Mean change of the measurement towards the goal, in the behaviour's unit, for one step of ``lr``.

    Of ``count`` top documents for each method and query, and (``random[q]``, with the mean ``control``) of as many
    random ones, the same for all of them. Intervals are 95 % t intervals over queries; with one query there is none
    (``n`` is 1).
    """

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    unit: str
    optimiser: str
    lr: float
    count: int
    random: list[float]
    control: Interval
    methods: list[Patched]

    def of(self, method: str) -> Patched:
        """One method by name; `InputError` lists those there are."""
        return pick(self.methods, method)


def tail_patch(
    subject: Subject,
    scores: Scores | Mapping[str, Scores],
    behaviour: Behaviour,
    *,
    count: int = TOP,
    optimiser: Literal["recipe", "sgd"] = "recipe",
    lr: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> TailPatch:
    """One step on each method's top documents of every query and on random ones; the model itself is not touched.

    Args:
        subject: the final model and its documents.
        scores: methods and baselines by name; each of the same queries, or one ranking for all.
        behaviour: what is measured after each step, on all queries at once.
        count: documents per query.
        optimiser: the "recipe"'s with its settings, or plain "sgd".
        lr: size of the step; by default the recipe's. Plain SGD on a model that was trained with another optimiser
            needs its own.
        seed: of the random documents, and of the step where the model has dropout.
        progress: told of every document.

    Raises:
        InputError: a count that leaves no other document, no recipe or no learning rate, or a query or document without
            a score.
        NumericalError: a step that leaves a value that is not finite.
    """
    total = len(subject.encoded)
    if not 1 <= count < total:
        raise InputError(f"count: expected 1 to {total - 1} of {total} usable documents, got {count}")
    named = by_name(scores)
    recipe = _step_recipe(subject, optimiser, lr, seed)
    sign = -1.0 if behaviour.goal == "lower" else 1.0
    names = [query.name for query in behaviour.queries]
    tops = {
        name: np.argsort(-sign * joined(table, names, subject.encoded.ids), axis=1, kind="stable")[:, :count]
        for name, table in named.items()
    }
    others = random.Random(f"rootward tail patch {seed} {total} {count}").sample(range(total), count)
    places = sorted({*others}.union(*(top.ravel().tolist() for top in tops.values())))
    before = behaviour.evaluate(subject.model, subject.objective)
    changes = np.zeros((total, len(names)))
    model = copy.deepcopy(subject.model)
    for number, place in enumerate(places):
        model.load_state_dict(subject.model.state_dict())
        train(model, [subject.encoded[place]], subject.objective, recipe)
        changes[place] = sign * (behaviour.evaluate(model, subject.objective) - before)
        progress("tail patch", number + 1, len(places))
    control = [float(changes[others, q].mean()) for q in range(len(names))]
    methods: list[Patched] = []
    for name, chosen in tops.items():
        top = [float(changes[chosen[q], q].mean()) for q in range(len(names))]
        beyond = interval(np.subtract(top, control))
        methods.append(Patched(method=name, top=top, effect=interval(top), beyond_random=beyond))
    return TailPatch(
        behaviour=behaviour.name,
        unit=behaviour.unit,
        optimiser=recipe.optimiser,
        lr=recipe.lr,
        count=count,
        random=control,
        control=interval(control),
        methods=methods,
    )


def _step_recipe(subject: Subject, optimiser: str, lr: float | None, seed: int) -> Recipe:
    """The recipe of a single step."""
    if optimiser not in ("recipe", "sgd"):
        raise InputError(f"optimiser: expected 'recipe' or 'sgd', got {optimiser!r}")
    given = subject.recipe
    if optimiser == "recipe":
        if given is None:
            raise InputError(f"{subject.name}: no recipe is known; give optimiser = 'sgd' and lr")
        base = given
    else:
        if lr is None and (given is None or given.optimiser != "sgd"):
            raise InputError("lr: plain SGD on a model that was not trained with it needs a learning rate of its own")
        kept = {} if given is None else {"lr": given.lr, "reduction": given.reduction, "parameters": given.parameters,
                                         "threads": given.threads}  # fmt: skip
        base = Recipe.parse({"optimiser": "sgd", **kept})
    once = {"epochs": 1, "batch_size": 1, "schedule": "constant", "warmup_steps": 0, "checkpoints": 0, "seed": seed}
    return Recipe.parse({**base.model_dump(), **once, "lora": None, "lr": base.lr if lr is None else lr})
