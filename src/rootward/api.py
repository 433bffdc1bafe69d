"""The public verbs `attribute`, `trace`, `verify` and `compare`; `report` is the room of that name.

The command line calls these and nothing below them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rootward.capture.finite import without_not_finite
from rootward.capture.inputs import MethodInputs, has_text, plain_pass_seconds
from rootward.capture.losses import token_records, write_documents
from rootward.capture.several import timed
from rootward.capture.store import GradientStore
from rootward.core import registry
from rootward.core.errors import ArtefactError, DependencyError, InputError, NumericalError
from rootward.core.hashing import digest, digest_json
from rootward.core.memory import forget_peak
from rootward.core.progress import Progress, silent
from rootward.core.records import Comparison, Interval, MethodResult, Trace, Verdict, write_model
from rootward.core.runfolder import RunFolder, open_run
from rootward.core.scorefile import read_scores, score_parts, write_scores
from rootward.core.scores import Scores
from rootward.subject.arguments import check_asked, check_options, check_several
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification.compare_plan import ComparisonPlan, plan_comparison
from rootward.verification.jobs import known_versions
from rootward.verification.stats import auroc, precision_at, spearman
from rootward.verification.words import final_weights_notes

BASELINES = ("bm25", "representation_cosine", "document_length", "loss", "random")
"""Beside every attribution, whatever was asked for."""
COMPARED = ("gradient_dot", "gradient_cosine", "ekfac", "trak", "logra")
"""What `compare` takes where no method is named; where the training kept checkpoints, SOURCE too."""
MEASUREMENTS = {
    "contrast": "log-probability of the wanted answer less that of the unwanted one",
    "loss": "loss of the answer",
    "scalar": "a function of the model",
}


def attribute(
    subject: Subject,
    behaviour: Behaviour,
    method: str = "gradient_dot",
    *,
    options: Mapping[str, Any] | None = None,
    index: str | Path | GradientStore | None = None,
    token_budget: int | None = None,
    progress: Progress = silent,
    inputs: MethodInputs | None = None,
    skip_not_finite: bool = False,
) -> Scores:
    """What each training document does to a behaviour.

    Args:
        subject: the model and its documents.
        behaviour: what is asked about.
        method: a key, alias or preset from `rootward methods`.
        options: the method's options; unknown ones are errors.
        index: a gradient store (or its folder) that methods with ``source = "index"`` read.
        token_budget: padded tokens per batch; None measures what fits.
        progress: told of every batch; may raise ``KeyboardInterrupt`` to stop.
        inputs: what several calls share (`trace`); replaces subject, behaviour, index and all that follows it.
        skip_not_finite: leave out documents whose loss or gradient is not finite (`capture.finite`); else an error.

    Returns:
        Scores ``[q, n]``: positive = training more on the document raises the measurement.

    Raises:
        InputError: unknown method or option, or ``skip_not_finite`` beside ``inputs``. ArtefactError: the index is of
            another model, data or settings.
    """
    chosen, preset = registry.get(method)
    check_options(options)
    config = chosen.configure({**preset, **(options or {})}, method)
    if inputs is not None and skip_not_finite:
        raise InputError(
            "skip_not_finite: `inputs` hold their own documents; make them of "
            "capture.finite.without_not_finite(subject), or leave one of the two away"
        )
    if inputs is None:
        check_asked(subject, behaviour)
        store = GradientStore(index) if isinstance(index, str | Path) else index
        subject = without_not_finite(subject, token_budget, progress) if skip_not_finite else subject
        inputs = MethodInputs(subject, behaviour, token_budget, store, progress)
    return timed(chosen, config, inputs)


def trace(
    subject: Subject,
    behaviour: Behaviour,
    run: RunFolder | str | Path,
    *,
    methods: Sequence[str] = ("gradient_dot", "gradient_cosine"),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    index: str | Path | None = None,
    token_budget: int | None = None,
    planted: tuple[str, Any] | None = None,
    token_documents: int = 40,
    measure_plain: bool = True,
    progress: Progress = silent,
    skip_not_finite: bool = False,
) -> tuple[Trace, dict[str, Scores]]:
    """Attribute a behaviour by several methods, with the baselines beside them, into a run folder.

    Args:
        subject: the model and its documents.
        behaviour: what is asked about.
        run: the folder that is written to; an open one (`open_run`) stays open. The page is `report`'s.
        methods: names from `rootward methods`; the first is the main one.
        options: method name -> its options.
        index: a gradient store's folder, for methods with ``source = "index"``.
        token_budget: padded tokens per batch; None measures what fits.
        planted: (metadata field, value) of the documents known to cause the behaviour, where that is known.
        token_documents: how many documents at each end of the main ranking get token scores.
        measure_plain: time one plain forward+backward pass, so that costs can be given as a ratio to it.
        progress: told of every batch.
        skip_not_finite: leave out documents whose loss or gradient is not finite (`capture.finite`); else an error.

    Returns:
        The trace as written, and the scores by the name that each method was asked for under.

    Raises:
        InputError: what is asked for cannot be. ArtefactError: the folder holds another run; the difference is shown.
    """
    check_several(subject, behaviour, methods or (), options)
    plan = _planned(subject, behaviour, methods or (), options or {})
    subject = without_not_finite(subject, token_budget, progress) if skip_not_finite else subject
    truth = _truth(subject, planted)
    store = GradientStore(index) if index is not None else None
    inputs = MethodInputs(subject, behaviour, token_budget, store, progress)
    with _opened(run, inputs, plan, planted, token_documents) as folder:
        coverage = inputs.coverage(gradients=plan.needs_gradients)
        plain = None
        if measure_plain and plan.needs_gradients:
            plain = plain_pass_seconds(subject, inputs.tracked, token_budget or 4096)
            folder.timing("plain_pass", plain)
        scores = _attributed(inputs, plan, folder)
        write_documents(subject, folder, inputs)
        folder.write_scores(score_parts(scores))
        record = _record(inputs, plan, scores, truth, plain, token_documents)
        record = record.model_copy(update={"planted_field": _planted_field(planted)})
        write_model(folder.path / "trace.json", record)
        folder.update(coverage=coverage)
    return record, scores


@dataclass(frozen=True)
class _Plan:
    """What a trace will run: the methods asked for and the baselines beside them, by the names they go under."""

    asked: tuple[str, ...]
    methods: Mapping[str, registry.Method]
    configs: Mapping[str, registry.MethodConfig]
    options: Mapping[str, Mapping[str, Any]]
    missing: tuple[str, ...]

    @cached_property
    def needs_gradients(self) -> bool:
        return any("gradients" in method.card.needs for method in self.methods.values())


def _planned(
    subject: Subject, behaviour: Behaviour, methods: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> _Plan:
    """Check names and options before anything is run."""
    asked = tuple(dict.fromkeys(methods))
    if not asked:
        raise InputError("methods: expected at least one, got none")
    baselines = baselines_for(subject, behaviour)
    names = [*asked, *(name for name in baselines if name not in asked)]
    unused = sorted(set(options) - set(names))
    if unused:
        raise InputError(f"options: {', '.join(unused)} not among the methods of this trace: {', '.join(names)}")
    resolved = {name: registry.get(name) for name in names}
    configs = {n: m.configure({**preset, **options.get(n, {})}, n) for n, (m, preset) in resolved.items()}
    without = [] if has_text(subject) or "bm25" in asked or behaviour.kind == "scalar" else ["bm25"]
    missing = tuple(f"the baseline {name} is missing: the documents have no text" for name in without)
    return _Plan(asked, {n: m for n, (m, _) in resolved.items()}, configs, options, missing)


@contextmanager
def _opened(
    run: RunFolder | str | Path,
    inputs: MethodInputs,
    plan: _Plan,
    planted: tuple[str, Any] | None,
    token_documents: int,
) -> Generator[RunFolder]:
    """The run's folder: as given, or opened under a key of what decides its results."""
    if isinstance(run, RunFolder):
        yield run
        return
    subject, behaviour = inputs.subject, inputs.behaviour
    config = {
        "methods": list(plan.asked),
        "options": {name: dict(values) for name, values in plan.options.items()},
        "behaviour": behaviour.name,
        "planted": _planted_field(planted),
        "tokens": token_documents,
    }
    found = {**subject.fingerprint(), "behaviour": behaviour.hash}
    if inputs.store is not None:
        found["index"] = digest((inputs.store.folder / "manifest.jsonl").read_bytes())
    with open_run(Path(run), "trace", config, found) as folder:
        for note in subject.notes:
            folder.warn(note)
        yield folder


def _attributed(inputs: MethodInputs, plan: _Plan, run: RunFolder) -> dict[str, Scores]:
    """Scores by name; a baseline that cannot be had is noted in the run, a method that was asked for is an error."""
    for text in plan.missing:
        run.warn(text)
    scores: dict[str, Scores] = {}
    for name in plan.methods:
        options = plan.options.get(name)
        try:
            forget_peak()
            scores[name] = attribute(inputs.subject, inputs.behaviour, name, options=options, inputs=inputs)
        except (InputError, ArtefactError, DependencyError) as error:
            if name in plan.asked:
                raise
            run.warn(f"the baseline {name} is missing: {error}")
            continue
        run.timing(name, scores[name].cost.seconds)
        for note in scores[name].notes:
            run.warn(f"{name}: {note}")
    return scores


def _record(
    inputs: MethodInputs,
    plan: _Plan,
    scores: Mapping[str, Scores],
    truth: np.ndarray | None,
    plain: float | None,
    token_documents: int,
) -> Trace:
    subject, behaviour, main = inputs.subject, inputs.behaviour, plan.asked[0]
    results = [_method_result(n, plan.methods[n], found, scores[main], truth, plain) for n, found in scores.items()]
    return Trace(
        behaviour=behaviour.name,
        description=behaviour.description,
        measurement=MEASUREMENTS[behaviour.kind],
        unit=behaviour.unit,
        goal=behaviour.goal,
        main_method=main,
        methods=_against_baselines(results),
        queries=behaviour.records(behaviour.evaluate(subject.model, subject.objective)),
        tokens=token_records(inputs, plan.methods[main], plan.configs[main], scores[main], token_documents),
        notes=final_weights_notes(subject, {name: (plan.methods[name], plan.configs[name]) for name in plan.asked}),
    )


def _planted_field(planted: tuple[str, Any] | None) -> str | None:
    return f"{planted[0]}={planted[1]}" if planted else None


def baselines_for(subject: Subject, behaviour: Behaviour) -> tuple[str, ...]:
    """The baselines that can be had.

    A function of the model has no text to compare documents with, and words need documents of text; the loss at the
    start of training needs that start.
    """
    names = [*BASELINES, *(["loss_at_start"] if subject.base is not None else [])]
    without = {"bm25", "representation_cosine"} if behaviour.kind == "scalar" else set[str]()
    if not has_text(subject):
        without.add("bm25")
    return tuple(name for name in names if name not in without)


def _truth(subject: Subject, planted: tuple[str, Any] | None) -> np.ndarray | None:
    if planted is None:
        return None
    key, value = planted
    if not any(document.meta.get(key) == value for document in subject.documents):
        raise InputError(f"planted: expected documents with {key} = {value!r}, found none of {len(subject.documents)}")
    return np.array([subject.documents[e.row].meta.get(key) == value for e in subject.encoded])


def _method_result(
    name: str,
    method: registry.Method,
    scores: Scores,
    main: Scores,
    truth: np.ndarray | None,
    plain: float | None,
) -> MethodResult:
    """Planted documents make more of the behaviour, so that ranking is the one they are looked for in."""
    card = method.card
    found: Interval | None = None
    precision = None
    if truth is not None and 0 < truth.sum() < len(truth):
        found = auroc(scores.toward, truth)
        precision = precision_at(scores.toward, truth, int(truth.sum()))
    cost = scores.cost
    if plain is not None and "gradients" in card.needs:
        cost = cost.model_copy(update={"ratio": cost.seconds / plain})
    label = card.label if name in (card.key, *card.aliases) else f"{card.label}: {name}"
    return MethodResult(
        method=name,
        label=label,
        unit=scores.unit,
        baseline=card.baseline,
        cost=cost,
        spearman_with_main=spearman(scores.mean, main.mean),
        auroc=found,
        precision_at_planted=precision,
        notes=list(scores.notes),
    )


def _against_baselines(results: list[MethodResult]) -> list[MethodResult]:
    """Say of every method whether its AUROC interval lies above the best baseline's value."""
    baselines = [r.auroc.value for r in results if r.baseline and r.auroc is not None]
    if not baselines:
        return results
    best = max(baselines)
    return [
        r if r.baseline or r.auroc is None else r.model_copy(update={"beats_baselines": bool(r.auroc.low > best)})
        for r in results
    ]


def verify(subject: Subject, scores: Scores | Mapping[str, Scores], intervention: Any, **options: Any) -> Verdict:
    """Make the change, retrain, measure, with controls of equal size: see `rootward.verification.removal.verify`."""
    from rootward.verification.removal import verify as run

    return run(subject, scores, intervention, **options)


def compare(
    subject: Subject,
    behaviour: Behaviour,
    run: RunFolder | str | Path,
    *,
    methods: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    subsets: int = 64,
    seeds: Sequence[int] = (0,),
    tune: bool = True,
    removal: int | str | None = None,
    leave_out: int | None = None,
    tail_patch: int | None = None,
    planted: tuple[str, Any] | None = None,
    allow_few: bool = False,
    split_seed: int = 0,
    workers: int | None = None,
    token_budget: int | None = None,
    progress: Progress = silent,
    skip_not_finite: bool = False,
) -> tuple[Comparison, dict[str, Scores]]:
    """Which method can be trusted on this subject, and what does it cost? Methods and baselines against retraining.

    Every method scores all documents for every query; the subject is trained again on random halves of its documents,
    and the scores are held against what came out (LDS), beside a shuffled control and the cost. Finished trainings
    (``run/retrain``) and scores (``run/scored``) are kept: the same call continues where it was stopped, and a call
    with more methods or subsets in the same folder (opened with ``overwrite``) makes only what is new.

    Args:
        subject: must be retrainable: with recipe and start, or the owner's command. A small replica of the real one.
        behaviour: the queries.
        run: the folder that is written to; an open one (`open_run`) stays open. The page is `report`'s.
        methods: names from `rootward methods`; None takes `COMPARED`. The baselines are always added.
        options: method -> its options; what is given here is not tuned.
        subsets: random subsets that the numbers come from; at least 60 unless ``allow_few``.
        seeds: of the recipe, for every subset; two or more give a noise ceiling.
        tune: choose what each method declares on half of the queries and half as many subsets more; report the rest.
        removal: also train without so many (or ``"5%"``) of each method's top documents, and as many random ones.
        leave_out: also train without each of so many documents, half of them drawn at random and half from both ends of
            all rankings (`loo.spread_documents`), for a correlation with what each does alone; one training for each.
        tail_patch: also take one step on each query's so many top documents, and as many random ones: no training.
        planted: (metadata field, value) of documents known to cause the behaviour, for an AUROC.
        allow_few: accept fewer than 60 subsets; the result is marked.
        split_seed: of the division of the queries, where ``tune`` or ``removal`` needs one.
        workers: processes that train (`rootward.verification.retrain.run_jobs`).
        token_budget: padded tokens per batch; None measures what fits.
        progress: told of batches and trainings.
        skip_not_finite: as in `attribute`; no model is trained on such documents either.

    Returns:
        The comparison as written to ``compare.json``, and the scores by method, the highest LDS first.

    Raises:
        InputError: what is asked for cannot be; before any pass or training. ArtefactError: the folder holds another
            run. RootwardError: a training failed; those that were finished stay.
    """
    from rootward.verification.compare import compare_scores

    def planned(of: Subject) -> ComparisonPlan:
        return comparison_plan(
            of, behaviour, methods, options=options, subsets=subsets, seeds=seeds, tune=tune, removal=removal,
            leave_out=leave_out, tail_patch=tail_patch, planted=planted, allow_few=allow_few, split_seed=split_seed,
        )  # fmt: skip

    check_several(subject, behaviour, methods, options)
    plan = planned(subject)
    if skip_not_finite:  # after what can be refused without a pass
        subject = without_not_finite(subject, token_budget, progress)
        plan = planned(subject)
    with _compared(run, plan) as folder:
        inputs = MethodInputs(subject, behaviour, token_budget, None, progress)
        plain = plain_pass_seconds(subject, inputs.tracked, token_budget or 4096)
        folder.timing("plain_pass", plain)
        found, notes = _scored(plan, folder, plain, token_budget, progress)
        write_documents(subject, folder, inputs)
        record, chosen = compare_scores(
            plan, found, cache=folder.path / "retrain", workers=workers, plain=plain, notes=notes, progress=progress
        )
        folder.timing("retraining", record.retraining_seconds)
        folder.write_scores(score_parts(chosen))
        write_model(folder.path / "compare.json", record)
        folder.update(coverage=inputs.coverage(gradients=True), seeds=list(seeds))
    return record, chosen


def comparison_plan(
    subject: Subject, behaviour: Behaviour, methods: Sequence[str] | None, **options: Any
) -> ComparisonPlan:
    """The plan of `compare`, with the defaults and the baselines that this subject and behaviour can have."""
    defaults = () if methods is not None else COMPARED
    if methods is None and subject.checkpoints and subject.recipe is not None:
        defaults = (*defaults, "source")
    others = (*defaults, *baselines_for(subject, behaviour))
    return plan_comparison(subject, behaviour, methods or (), others=others, **options)


@contextmanager
def _compared(run: RunFolder | str | Path, plan: ComparisonPlan) -> Generator[RunFolder]:
    """The run's folder: as given, or opened under a key of what decides its results."""
    if isinstance(run, RunFolder):
        yield run
        return
    subject = plan.subject
    found = {**subject.fingerprint(), **subject.origin(), "behaviour": plan.behaviour.hash}
    with open_run(Path(run), "compare", plan.describe(), found, seeds=plan.seeds) as folder:
        for note in subject.notes:
            folder.warn(note)
        yield folder


def _scored(
    plan: ComparisonPlan, run: RunFolder, plain: float, token_budget: int | None, progress: Progress
) -> tuple[dict[str, dict[str, Scores]], list[str]]:
    """Scores by method and setting, from ``run/scored`` where they are there, and what is missing.

    Each method begins with inputs of its own, so that its cost is what it takes alone. Its further settings may use
    the curvature that the first one fitted; they are charged at least what that one took.
    """
    subject, behaviour = plan.subject, plan.behaviour
    base = [subject.fingerprint(), subject.origin(), behaviour.hash, known_versions()]
    found: dict[str, dict[str, Scores]] = {}
    notes: list[str] = []
    for entry in plan.entries:
        own: Progress = lambda task, done, total, name=entry.name: progress(f"{name}: {task}", done, total)  # noqa: E731
        inputs = MethodInputs(subject, behaviour, token_budget, None, own)
        whole, spent = 0.0, 0.0
        for setting, options in entry.settings.items():
            config = entry.method.configure(dict(options)).model_dump(mode="json")
            path = run.path / "scored" / f"{digest_json([*base, entry.method.card.key, config])[:32]}.parquet"
            try:
                if not path.exists():
                    forget_peak()
                    shared = bool(inputs.fits)
                    one = attribute(subject, behaviour, entry.name, options=options, inputs=inputs)
                    seconds = max(one.cost.seconds, whole if shared else 0.0)
                    whole, spent = whole or seconds, spent + one.cost.seconds
                    cost = one.cost.model_copy(update={"seconds": seconds, "ratio": seconds / plain})
                    write_scores(path, replace(one, cost=cost))
            except (InputError, ArtefactError, DependencyError) as error:
                if entry.required:
                    raise
                notes.append(f"{entry.name} is missing: {error}")
                break
            except NumericalError as error:  # a damping too small for this curvature, say; the others may do
                if len(entry.settings) == 1 and entry.required:
                    raise
                notes.append(f"{entry.name}{f' with {entry.option} {setting}' if setting else ''} is missing: {error}")
                continue
            found.setdefault(entry.name, {})[setting] = read_scores(path)
        if entry.name in found:
            run.timing(entry.name, spent or sum(one.cost.seconds for one in found[entry.name].values()))
    for note in notes:
        run.warn(note)
    return found, notes
