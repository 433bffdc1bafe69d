"""Which method should be trusted here, and what does it cost? Methods beside baselines on one subject.

The subject is trained again on random subsets of its documents; every method's scores are held against what came out
(LDS). What has to be chosen is chosen on one half of the queries: the documents to remove, and, on other subsets too, a
damping or what else a method declares. What is reported comes from the rest. Without such a choice all queries are
reported.

Three further truths where they are asked for: training without each ranking's top, training without single documents,
and one training step on a top document. None of them takes part in the recommendation, which is by LDS.

Scores are made elsewhere (`rootward.api.compare`): what is here needs no method, and takes scores of any origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rootward.core.errors import InputError
from rootward.core.progress import Progress, silent
from rootward.core.records import ComparedMethod, Comparison, Interval, SettingPoint
from rootward.core.scores import Scores
from rootward.verification.advice import advise
from rootward.verification.compare_plan import RANDOM_BASELINE, ComparisonPlan, Entry
from rootward.verification.curves import RANDOM, Curves, removal_curves
from rootward.verification.detection import detect
from rootward.verification.lds import LDS, MIN_SUBSETS, Tuning, lds, margin, tune
from rootward.verification.loo import LOO, MIN_LEFT_OUT, LeftOut, leave_one_out, loo, spread_documents
from rootward.verification.resampling import RESAMPLES, Rows, correlate
from rootward.verification.stats import paired_interval
from rootward.verification.subsets import Retrained, joined, retrain_subsets
from rootward.verification.tail_patch import TailPatch, tail_patch
from rootward.verification.words import command_notes, measure_text, opposite_notes


@dataclass(frozen=True)
class _Result:
    """One method's scores under the setting taken, and what they were worth."""

    entry: Entry
    setting: str
    scores: Scores
    lds: LDS
    tuning: Tuning | None


@dataclass(frozen=True)
class _Beside:
    """What was asked for beside the LDS; None: it was not."""

    curves: Curves | None = None
    left_out: LeftOut | None = None
    drawn: int | None = None
    loo: LOO | None = None
    patch: TailPatch | None = None


def compare_scores(
    plan: ComparisonPlan,
    scores: Mapping[str, Mapping[str, Scores]],
    *,
    cache: Path,
    workers: int | None = None,
    plain: float | None = None,
    notes: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[Comparison, dict[str, Scores]]:
    """Retrain, and hold every method's scores against what came out.

    Args:
        plan: of `plan_comparison`.
        scores: entry -> setting -> scores of all queries; an entry without any is left out.
        cache: folder of finished trainings.
        workers: processes (`run_jobs`).
        plain: seconds of one plain forward and backward pass, for the record.
        notes: to be kept with the result.
        progress: told of finished trainings.

    Returns:
        The comparison, and each method's scores under its chosen setting, by LDS, the highest first.
    """
    present = [entry for entry in plan.entries if scores.get(entry.name)]
    if len(present) < 2:
        raise InputError(f"expected at least two methods with scores, got {[entry.name for entry in present]}")
    truth = retrain_subsets(
        plan.subject, plan.subsets, plan.behaviour, seeds=plan.seeds, cache=cache, workers=workers, progress=progress
    )
    results = [_result(plan, entry, scores[entry.name], truth) for entry in present]
    results.sort(key=lambda result: -result.lds.score.value)
    asked = _asked(plan, results, cache, workers, progress)
    curves, left, patch = asked.curves, asked.left_out, asked.patch
    methods = _methods(plan, results, asked)
    advice = advise(methods, plan.reported_subsets, len(plan.seeds), few=results[0].lds.few)
    behaviour, first = plan.behaviour, results[0].lds
    comparison = Comparison(
        behaviour=behaviour.name,
        description=behaviour.description,
        measurement=measure_text("mean", behaviour).removeprefix("mean "),
        unit=behaviour.unit,
        goal=behaviour.goal,
        documents=len(plan.subject.encoded),
        queries=len(plan.reported),
        tuning_queries=len(plan.choosing),
        subsets=plan.reported_subsets,
        tuning_subsets=len(plan.subsets.masks) - plan.reported_subsets,
        subset_documents=int(plan.subsets.masks[0].sum()),
        seeds=list(plan.seeds),
        few=first.few,
        ceiling=None if first.ceiling is None else first.ceiling.ceiling,
        methods=methods,
        agreement=_agreement(plan, results),
        recommended=advice.recommended,
        as_good=advice.as_good,
        summary=advice.summary,
        removed_documents=plan.removed,
        removed_at_random=None if curves is None else curves.of(RANDOM, "random").points[0].effect,
        left_out=None if left is None else left.document_ids,
        left_out_at_random=asked.drawn,
        loo_ceiling=None if asked.loo is None or asked.loo.ceiling is None else asked.loo.ceiling.ceiling,
        patched_documents=plan.patched,
        patched_at_random=None if patch is None else patch.control,
        patched_optimiser=None if patch is None else patch.optimiser,
        patched_lr=None if patch is None else patch.lr,
        planted_field=None if plan.planted is None else f"{plan.planted[0]}={plan.planted[1]}",
        plain_pass_seconds=plain,
        retraining_seconds=truth.seconds + sum(more.seconds for more in (left, curves) if more is not None),
        notes=[*notes, *_notes(plan, methods, first)],
    )
    return comparison, {result.entry.name: result.scores for result in results}


def _result(plan: ComparisonPlan, entry: Entry, found: Mapping[str, Scores], truth: Retrained) -> _Result:
    reported = range(plan.reported_subsets)
    if len(found) > 1:
        tuning = tune(
            found,
            truth,
            queries=plan.choosing,
            subsets=range(plan.reported_subsets, len(truth.kept)),
            allow_few=plan.allow_few,
            resamples=RESAMPLES,
        )
        return _Result(entry, tuning.chosen, found[tuning.chosen], tuning.report, tuning)
    ((setting, scores),) = found.items()
    there = truth.select(queries=plan.reported, subsets=reported)
    return _Result(entry, setting, scores, lds(scores, there, allow_few=plan.allow_few, resamples=RESAMPLES), None)


def _asked(
    plan: ComparisonPlan, results: Sequence[_Result], cache: Path, workers: int | None, progress: Progress
) -> _Beside:
    """All that was asked for beside the LDS: steps before trainings, since they are cheap."""
    told = plan.told
    patch = None
    if plan.patched is not None:
        ranked = {one.entry.name: one.scores for one in results if one.entry.name != RANDOM_BASELINE}
        patch = tail_patch(plan.subject, ranked, told, count=plan.patched, progress=progress)
    curves = _removal(plan, results, cache, workers, progress)
    if plan.left_out is None:
        return _Beside(curves=curves, patch=patch)
    names = [query.name for query in told.queries]
    rankings = [
        joined(one.scores, names, plan.subject.encoded.ids).mean(0)
        for one in results
        if one.entry.name != RANDOM_BASELINE
    ]
    ids, drawn = spread_documents(plan.subject, rankings, plan.left_out)
    # on all queries, so that a comparison that reports others finds these trainings done
    whole = leave_one_out(
        plan.subject, ids, plan.behaviour, seeds=plan.seeds, cache=cache, workers=workers, progress=progress
    )
    left = whole.select(plan.reported)
    judged = loo({one.entry.name: one.scores for one in results}, left, resamples=RESAMPLES)
    return _Beside(curves, left, drawn, judged, patch)


def _removal(
    plan: ComparisonPlan, results: Sequence[_Result], cache: Path, workers: int | None, progress: Progress
) -> Curves | None:
    """Training without each ranking's top; the ranking is of the choosing queries, the measurement on the others."""
    if plan.removed is None:
        return None
    names = [plan.behaviour.queries[q].name for q in plan.choosing]
    chosen = {
        result.entry.name: replace(
            result.scores,
            values=joined(result.scores, names, result.scores.document_ids).astype(np.float32),
            queries=tuple(names),
        )
        for result in results
        if result.entry.name != RANDOM_BASELINE
    }
    return removal_curves(
        plan.subject,
        chosen,
        plan.behaviour.subset(plan.reported),
        counts=(plan.removed,),
        bottom=False,
        seeds=plan.seeds,
        cache=cache,
        workers=workers,
        progress=progress,
    )


def _methods(plan: ComparisonPlan, results: Sequence[_Result], asked: _Beside) -> list[ComparedMethod]:
    """What is said of each; ``results`` stand by LDS."""
    curves = asked.curves
    chance = next((result.lds for result in results if result.entry.name == RANDOM_BASELINE), None)
    able = [_beats_random(result, chance) for result in results]
    # margins are to the method that would be taken: the first that beats random, else simply the first
    best = results[able.index(True)] if True in able else results[0]
    control = None if curves is None else curves.of(RANDOM, "random").points[0]
    found: list[ComparedMethod] = []
    for result, beats in zip(results, able, strict=True):
        name, one = result.entry.name, result.lds
        removal, beyond = None, None
        if curves is not None and control is not None and name != RANDOM_BASELINE:
            point = curves.of(name).points[0]
            removal, beyond = point.effect, paired_interval(control.values, point.values)
        tuning = result.tuning
        found.append(
            ComparedMethod(
                method=name,
                label=result.entry.label,
                unit=result.scores.unit,
                baseline=result.entry.method.card.baseline,
                cost=result.scores.cost,
                lds=one.score,
                null=one.null,
                unranked=one.unranked,
                per_query=result.scores.queries == tuple(query.name for query in plan.behaviour.queries),
                beats_random=beats,
                behind_best=None if result is best else margin(best.lds, one),
                option=result.entry.option,
                setting=_setting(result),
                curve=[] if tuning is None else [
                    SettingPoint(setting=float(p.setting), tuning=p.tuning, reported=p.reported) for p in tuning.curve
                ],
                at_edge=tuning is not None and tuning.at_edge,
                removal=removal,
                beyond_random=beyond,
                auroc=_auroc(plan, result.scores),
                **_single(name, asked),
                notes=list(result.scores.notes),
            )
        )  # fmt: skip
    return found


def _single(name: str, asked: _Beside) -> dict[str, Interval]:
    """One method against single documents: left out, and stepped on."""
    found: dict[str, Interval] = {}
    if asked.loo is not None:
        one = asked.loo.of(name)
        found |= {"loo": one.spearman, "loo_pearson": one.pearson, "loo_null": one.null}
    if asked.patch is not None and name != RANDOM_BASELINE:
        step = asked.patch.of(name)
        found |= {"tail_patch": step.effect, "tail_patch_beyond_random": step.beyond_random}
    return found


def _setting(result: _Result) -> float | None:
    """The value taken of what the method declares; None where that is nothing or no number (``damping = "recipe"``)."""
    config = result.entry.method.configure(dict(result.entry.settings[result.setting]))
    value: Any = None if result.entry.option is None else getattr(config, result.entry.option)
    return float(value) if isinstance(value, int | float) else None


def _beats_random(result: _Result, chance: LDS | None) -> bool | None:
    """Above the same scores shuffled and, with its whole interval of differences, above one random order."""
    if result.entry.name == RANDOM_BASELINE:
        return None
    above = result.lds.score.low > 0 and result.lds.score.value > result.lds.null.high
    return above and (chance is None or margin(result.lds, chance).low > 0)


def _auroc(plan: ComparisonPlan, scores: Scores) -> Interval | None:
    return detect(scores, plan.planted_ids, permutations=1).auroc if plan.planted_ids else None


def _agreement(plan: ComparisonPlan, results: Sequence[_Result]) -> list[list[float]]:
    """Spearman's correlation over documents of every pair, mean over the reported queries."""
    names = [plan.behaviour.queries[q].name for q in plan.reported]
    ids = results[0].scores.document_ids
    rows = [Rows(joined(result.scores, names, ids), "spearman") for result in results]
    return [[float(correlate(a, b).mean()) for b in rows] for a in rows]


def _notes(plan: ComparisonPlan, methods: Sequence[ComparedMethod], first: LDS) -> list[str]:
    """What has to be said beside the numbers."""
    notes = command_notes(plan.subject)
    if first.few:
        notes.append(
            f"Only {plan.reported_subsets} subsets: below {MIN_SUBSETS} an LDS is mostly noise, so take this as a try."
        )
    if len(plan.seeds) == 1:
        notes.append("One training seed a subset, so no noise ceiling is known: even a perfect method stays below 1.")
    if plan.removed is not None and len(plan.seeds) < 3:
        wide = "no interval" if len(plan.seeds) == 1 else "very wide intervals"
        notes.append(f"Too few training seeds for the removal: {wide}; take three or more for that.")
    if plan.left_out is not None and plan.left_out < MIN_LEFT_OUT:
        notes.append(
            f"Only {plan.left_out} documents left out: below {MIN_LEFT_OUT} the correlation with them is mostly noise."
        )
    whole = [one.method for one in methods if not one.per_query]
    if whole:
        notes.append(f"One ranking for all queries, not one for each: {', '.join(whole)}.")
    below = [one.method for one in methods if one.lds.high < 0]
    if below:
        notes.append(f"Below 0 with the whole interval, so wrong way round on this subject: {', '.join(below)}.")
    edge = [
        f"{one.method} ({one.option} {one.setting:g})" for one in methods if one.at_edge and one.setting is not None
    ]
    if edge:
        notes.append(f"The setting chosen is the lowest or highest that was tried: {', '.join(edge)}.")
    notes.extend(opposite_notes(methods))
    notes.append(f"Each interval is a 95 % one for itself; that the best of {len(methods)} was picked is not in it.")
    return notes
