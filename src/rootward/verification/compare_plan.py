"""What a comparison of methods is asked for, checked, and what it will cost: the plan of `verification.compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rootward.core import registry
from rootward.core.errors import InputError
from rootward.core.registry import Method
from rootward.core.scores import parse_count
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification.cost import Estimate, estimate
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job
from rootward.verification.lds import MIN_SUBSETS
from rootward.verification.loo import left_out_jobs, sample_documents
from rootward.verification.subsets import COUNT, Subsets, check_seeds, draw_subsets

RANDOM_BASELINE = "random"
"""The baseline that ranks at random: it is no method whose top is removed or stepped on, since controls do that."""


@dataclass(frozen=True)
class Entry:
    """A method in the comparison: its options by setting. Several settings differ in the option that is tuned.

    ``required``: it was asked for by name, so that it is an error where it cannot be had.
    """

    name: str
    method: Method
    settings: Mapping[str, Mapping[str, Any]]
    required: bool

    @property
    def option(self) -> str | None:
        """What a comparison tunes of it; None: nothing."""
        tuned = self.method.config.TUNED
        return None if tuned is None else tuned.option

    @property
    def label(self) -> str:
        """The card's label, with the name where that is a preset's."""
        card = self.method.card
        return card.label if self.name in (card.key, *card.aliases) else f"{card.label}: {self.name}"


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison that is planned and not yet run; every number of it is checked.

    ``subsets`` holds those that are reported (the first ``reported_subsets``) and the tuning ones; ``choosing`` and
    ``reported`` are numbers of the behaviour's queries, ``removed``, ``left_out`` (one by one) and ``patched`` (single
    steps on so many of a query's top) numbers of documents.
    """

    subject: Subject
    behaviour: Behaviour
    entries: tuple[Entry, ...]
    subsets: Subsets
    reported_subsets: int
    seeds: tuple[int, ...]
    choosing: tuple[int, ...]
    reported: tuple[int, ...]
    removed: int | None
    planted: tuple[str, Any] | None
    allow_few: bool
    left_out: int | None = None
    patched: int | None = None

    @cached_property
    def told(self) -> Behaviour:
        """The behaviour on the queries that are reported."""
        return self.behaviour.subset(self.reported) if self.choosing else self.behaviour

    @property
    def most_steps(self) -> int:
        """The most single training steps that it can take: every document is stepped on at most once."""
        if self.patched is None:
            return 0
        rankings = sum(entry.name != RANDOM_BASELINE for entry in self.entries)
        return min(len(self.subject.encoded), self.patched * (1 + rankings * len(self.reported)))

    @cached_property
    def planted_ids(self) -> frozenset[str]:
        """Ids of the planted documents among those used; empty where no truth is given."""
        if self.planted is None:
            return frozenset()
        key, value = self.planted
        documents = self.subject.documents
        return frozenset(e.id for e in self.subject.encoded if documents[e.row].meta.get(key) == value)

    def describe(self) -> dict[str, Any]:
        """What decides the result beside the subject and the behaviour, as JSON can hold it."""
        return {
            "methods": {
                entry.name: {name: dict(options) for name, options in entry.settings.items()} for entry in self.entries
            },
            "subsets": self.reported_subsets,
            "drawn": len(self.subsets.masks),
            "share": self.subsets.share,
            "seeds": list(self.seeds),
            "choosing": list(self.choosing),
            "removed": self.removed,
            "left_out": self.left_out,
            "patched": self.patched,
            "planted": None if self.planted is None else list(self.planted),
        }


def plan_comparison(
    subject: Subject,
    behaviour: Behaviour,
    methods: Sequence[str],
    *,
    others: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    subsets: int = COUNT,
    seeds: Sequence[int] = (0,),
    tune: bool = True,
    removal: int | str | None = None,
    leave_out: int | None = None,
    tail_patch: int | None = None,
    planted: tuple[str, Any] | None = None,
    allow_few: bool = False,
    split_seed: int = 0,
) -> ComparisonPlan:
    """Check everything that a comparison is asked for, before any pass or training.

    Args:
        subject: must be retrainable: with recipe and start, or the owner's command.
        behaviour: the queries.
        methods: names that must be there.
        others: further names, which may turn out to be missing: baselines and defaults.
        options: method -> its options. What is given here is not tuned.
        subsets: how many random subsets the numbers come from; at least 60 unless ``allow_few``.
        seeds: of the recipe, for every subset. Two or more give a noise ceiling.
        tune: choose what each method declares (`MethodConfig.TUNED`), its damping mostly, on half of the queries and
            half as many subsets more.
        removal: also retrain without so many (or ``"5%"``) of each method's top documents.
        leave_out: also retrain without each of so many documents, one by one (`loo.spread_documents`).
        tail_patch: also take one training step on each of so many of a method's top documents for a query.
        planted: (metadata field, value) of documents known to be the cause.
        allow_few: accept fewer than 60 subsets; the result is marked.
        split_seed: of the division of the queries, where there is one.

    Raises:
        InputError: anything that would fail later.
    """
    entries = plan_entries(methods, others, options or {}, tune)
    if not subject.can_retrain:
        raise InputError(
            f"{subject.name}: no recipe and start are known, so it cannot be trained again; compare on a model that "
            '`rootward train` made, or give retrain = "command {documents} {out} {seed}"'
        )
    check_seeds(subject, seeds)
    if subsets < MIN_SUBSETS and not allow_few:
        raise InputError(
            f"subsets: expected at least {MIN_SUBSETS}, got {subsets}: with so few an LDS is mostly noise; take more, "
            "or accept a marked result with --allow-few (allow_few = True)"
        )
    if subsets < 3:
        raise InputError(f"subsets: expected at least 3, got {subsets}: two are always ranked perfectly or not at all")
    tuning = max(3, subsets // 2) if tune and any(len(entry.settings) > 1 for entry in entries) else 0
    drawn = draw_subsets(subject, subsets + tuning)
    removed = None if removal is None else parse_count(removal, len(subject.encoded))
    if removed is not None and not 0 < removed < len(subject.encoded):
        raise InputError(f"removal: expected 1 to {len(subject.encoded) - 1} documents, got {removal!r} ({removed})")
    _check_single(subject, leave_out, tail_patch)
    everything = tuple(range(len(behaviour)))
    try:
        choosing, reported = ((), everything) if not tuning and removed is None else _halves(behaviour, split_seed)
    except InputError as error:
        if removed is not None:
            raise
        raise InputError(
            f"{error}. Tuning chooses on other queries than are reported: give more of them, or take the methods' own "
            "settings with --no-tune (tune = False)"
        ) from error
    plan = ComparisonPlan(
        subject, behaviour, entries, drawn, subsets, tuple(seeds), choosing, reported, removed, planted, allow_few,
        leave_out, tail_patch,
    )  # fmt: skip
    if planted is not None and not 0 < len(plan.planted_ids) < len(set(subject.encoded.ids)):
        raise InputError(
            f"planted: expected some but not all documents with {planted[0]} = {planted[1]!r}, found "
            f"{len(plan.planted_ids)} of {len(subject.encoded)}"
        )
    return plan


def _check_single(subject: Subject, leave_out: int | None, tail_patch: int | None) -> None:
    """Whether documents can be left out one by one, and steps taken on single ones; `InputError` else."""
    total, different = len(subject.encoded), len(set(subject.encoded.ids))
    if leave_out is not None and not 3 <= leave_out <= different:
        raise InputError(f"leave_out: expected 3 to {different} different documents, got {leave_out}")
    if tail_patch is None:
        return
    if not 1 <= tail_patch < total:
        raise InputError(f"tail_patch: expected 1 to {total - 1} of {total} usable documents, got {tail_patch}")
    if subject.recipe is None:
        raise InputError(
            f"tail_patch: {subject.name} has no recipe, and the step takes its optimiser and learning rate; leave "
            "--tail-patch (tail_patch) away, or call verification.tail_patch with sgd and a learning rate"
        )


def plan_entries(
    methods: Sequence[str], others: Sequence[str], options: Mapping[str, Mapping[str, Any]], tune: bool
) -> tuple[Entry, ...]:
    """The methods by name with their checked options, each name once; `InputError` for a name or option unknown."""
    names = list(dict.fromkeys([*methods, *others]))
    if not names:
        raise InputError("methods: expected at least one, got none")
    unused = sorted(set(options) - set(names))
    if unused:
        raise InputError(f"options: {', '.join(unused)} not among the methods compared: {', '.join(names)}")
    found: list[Entry] = []
    for name in names:
        method, preset = registry.get(name)
        settings = _settings(name, method, preset, options.get(name, {}), tune)
        found.append(Entry(name, method, settings, name in methods))
    return tuple(found)


def _settings(
    name: str, method: Method, preset: Mapping[str, Any], given: Mapping[str, Any], tune: bool
) -> dict[str, dict[str, Any]]:
    """Options by setting: a row of scores for each query where the method can, and every value to choose from.

    The values are those that the method declares and its own. What the user gave is not tuned; a preset's value is.
    """
    fields, options = method.config.model_fields, {**preset, **given}
    if "queries" in fields and "queries" not in options and fields["queries"].default == "mean":
        options["queries"] = "each"
    config, tuned = method.configure(options, name), method.config.TUNED
    if not tune or tuned is None or tuned.option in given:
        return {"": options}
    own = getattr(config, tuned.option)
    values = sorted({*tuned.values, *([float(own)] if isinstance(own, int | float) else [])})
    for value in values:
        method.configure({**options, tuned.option: value}, name)
    return {f"{value:g}": {**options, tuned.option: value} for value in values}


def _halves(behaviour: Behaviour, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the queries that choose and of those that are reported; like prompts stay together."""
    names = [query.name for query in behaviour.queries]
    if len(set(names)) < len(names):
        raise InputError("queries: expected different names, as they are divided by name; give each its own")
    first = {query.name for query in behaviour.split(seed)[0].queries}
    chosen = tuple(n for n, name in enumerate(names) if name in first)
    return chosen, tuple(n for n in range(len(names)) if n not in set(chosen))


def estimate_comparison(plan: ComparisonPlan, *, cache: Path | None = None, workers: int | None = None) -> Estimate:
    """What the retrainings will cost, from a few timed steps: on subsets, without tops and without single documents.

    Which documents are removed is not known yet: as many others stand in for them, and none of these counts as done.
    Of those left out one by one the half drawn at random is known, and others stand in for the rest.
    """
    jobs = plan.subsets.jobs(plan.seeds)
    if plan.removed is not None:
        usable = plan.subject.encoded.rows
        kinds = 2 + sum(entry.name != RANDOM_BASELINE for entry in plan.entries)  # the full set and the control
        for n in range(kinds):
            out = {usable[(n + k) % len(usable)] for k in range(plan.removed if n else 0)}
            # turned round, so that none is taken for one of the trainings below, which measure more queries
            rows = tuple(row for row in reversed(usable) if row not in out)
            jobs += [Job(f"removal {n}", rows, seed) for seed in plan.seeds]
    if plan.left_out is not None:
        drawn = sample_documents(plan.subject, (plan.left_out + 1) // 2)
        ids = tuple(dict.fromkeys([*drawn, *plan.subject.encoded.ids]))[: plan.left_out]
        jobs += left_out_jobs(plan.subject, ids, plan.seeds)
    return estimate(plan.subject, jobs, Evaluation(plan.behaviour, None, 0), cache=cache, workers=workers)
