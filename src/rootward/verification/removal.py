"""Were they the cause? Retraining without the documents found, beside controls of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rootward.core.errors import InputError
from rootward.core.hashing import digest, digest_json
from rootward.core.progress import Progress, silent
from rootward.core.records import Arm, Cost, Verdict
from rootward.core.scores import Scores
from rootward.interventions.data import Intervention
from rootward.subject.behaviour import Behaviour
from rootward.subject.documents import Documents
from rootward.subject.subject import Subject
from rootward.verification import words
from rootward.verification.arms import ArmPlan, build_arms, mean_scores
from rootward.verification.evaluation import Evaluation, Measured
from rootward.verification.jobs import Job, JobResult
from rootward.verification.predictions import Prediction, announce, new_prediction, predict
from rootward.verification.retrain import Results, by_command, run_jobs
from rootward.verification.stats import cut_interval, paired_interval

Measure = Literal["rate", "mean"]
BASELINES = ("bm25", "representation_cosine", "document_length", "loss", "loss_at_start", "random")


@dataclass(frozen=True)
class Test:
    """A removal test that is planned and not yet run."""

    __test__ = False  # not one of pytest's

    subject: Subject
    arms: list[ArmPlan]
    scores: NDArray[np.float64]
    main: str
    measure: Measure
    seeds: tuple[int, ...]
    evaluation: Evaluation
    notes: tuple[str, ...]

    @property
    def jobs(self) -> list[Job]:
        """One job for each arm and seed."""
        return [Job(arm.name, rows, seed, train=arm.trains) for arm in self.arms for seed, rows in arm.rows.items()]

    @property
    def key(self) -> str:
        """Hash of what is tested: the subject, the documents of each arm and the measure; not of any score."""
        ids = self.subject.documents.ids
        arms = {
            arm.name: {str(s): digest("\n".join(ids[r] for r in rows)) for s, rows in arm.rows.items()}
            for arm in self.arms
        }
        probes = self.evaluation.probes.hash
        return digest_json([self.subject.fingerprint(), arms, self.main, self.measure, probes])[:32]

    def value(self, measured: Measured) -> float:
        """The measure of one model."""
        return measured.rate if self.measure == "rate" else measured.mean


def verify(
    subject: Subject,
    scores: Mapping[str, Scores] | Scores,
    intervention: Intervention | int | str,
    probes: Behaviour,
    *,
    cache: Path,
    main: str | None = None,
    baselines: Sequence[str] = BASELINES,
    planted_ids: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    random_controls: bool = True,
    retention: bool = False,
    measure: Measure | None = None,
    heldout: Documents | None = None,
    examples: int = 4,
    workers: int | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Retrain without the documents found, and with controls of equal size, and say whether they were the cause.

    Arms: the full set; without (or, for `Keep`, on only) the documents of ``intervention``; as many random ones,
    another draw for each seed; as many from the top of every other method in ``scores``; without the planted ones; the
    model before training; with ``retention`` also *only* the documents found beside only as many random ones.
    ``holds`` is true where the main arm has less of the behaviour than the full set, and its effect's 95 % interval
    (paired by seed) and that of every random control of the same kind do not overlap. One seed has no interval, so it
    cannot hold.

    Args:
        subject: what is tested; it is not changed.
        scores: one method's scores, or several by name.
        intervention: `Drop`, `Keep`, a number of documents, or a share such as "5%": that many from the top.
        probes: the behaviour on queries that were not used for the scores.
        cache: folder of finished retrainings and of ``predictions.json``, written before the first of them.
        main: the method whose claim is tested; may be left out where there is one.
        baselines: which names in ``scores`` are baselines.
        planted_ids: ids of all documents that were planted, where that is known.
        seeds: of the recipe; at least 3 give an interval worth the name.
        random_controls: False is refused: there is no verdict without a control.
        retention: add the arms that keep only the documents found.
        measure: "rate", the share of probes with a value above 0 (contrasts only, and their default), or "mean".
        heldout: documents for the held-out loss per trained token.
        examples: probes that are answered in full by each arm's first model.
        workers: processes (`run_jobs`).
        progress: told of finished retrainings.

    Raises:
        InputError: what was given does not fit together.
        RootwardError: a retraining failed; those that were finished stay.
    """
    test = prepare(
        subject, scores, intervention, probes, main=main, baselines=baselines, planted_ids=planted_ids, seeds=seeds,
        random_controls=random_controls, retention=retention, measure=measure, heldout=heldout, examples=examples,
    )  # fmt: skip
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    prediction = _announced(test, cache)
    results = run_jobs(subject, test.jobs, test.evaluation, workers=workers, cache=cache, progress=progress)
    return _verdict(test, results, prediction)


def prepare(
    subject: Subject,
    scores: Mapping[str, Scores] | Scores,
    intervention: Intervention | int | str,
    probes: Behaviour,
    *,
    main: str | None = None,
    baselines: Sequence[str] = BASELINES,
    planted_ids: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    random_controls: bool = True,
    retention: bool = False,
    measure: Measure | None = None,
    heldout: Documents | None = None,
    examples: int = 4,
) -> Test:
    """Check everything and lay out the arms; nothing is trained. Arguments as for `verify`."""
    if not random_controls:
        raise InputError("random_controls: a verdict needs a random control of equal size; leave it on")
    if not subject.can_retrain:
        raise InputError(
            f"{subject.name}: cannot be retrained: no recipe and start are known, and no command is given; give "
            'retrain = "command {documents} {out} {seed}"'
        )
    named = {scores.method: scores} if isinstance(scores, Scores) else dict(scores)
    if main is None:
        if len(named) != 1:
            raise InputError(f"main: expected the method to test, one of {', '.join(named) or 'none'}")
        main = next(iter(named))
    if main not in named:
        raise InputError(f"main: expected one of {', '.join(named)}, got {main!r}")
    chosen = tuple(dict.fromkeys(int(seed) for seed in seeds))
    if not chosen:
        raise InputError("seeds: expected at least one")
    if measure is None:
        measure = "rate" if probes.kind == "contrast" else "mean"
    if measure == "rate" and probes.kind != "contrast":
        raise InputError(f"measure: a rate needs a contrast, and {probes.name!r} is a {probes.kind}; use 'mean'")
    notes = list(subject.notes)
    if by_command(subject) and len(chosen) > 1 and words.command_notes(subject):
        notes += words.command_notes(subject)
        chosen = chosen[:1]
    by_row = {name: mean_scores(value, subject.documents.ids, probes.goal) for name, value in named.items()}
    with_base = not by_command(subject) or (subject.base is not None and subject.base.is_dir())
    arms = build_arms(
        subject, by_row, intervention, main=main, baselines=baselines, planted_ids=planted_ids, seeds=chosen,
        retention=retention, with_base=with_base,
    )  # fmt: skip
    notes += words.seed_notes(len(chosen))
    evaluation = Evaluation(probes, heldout, examples)
    return Test(subject, arms, by_row[main], main, measure, chosen, evaluation, tuple(notes))


def _announced(test: Test, cache: Path) -> Prediction:
    """The prediction, on disk before the first training; only the model before training is measured earlier."""
    subject, evaluation = test.subject, test.evaluation
    threads = subject.recipe.threads if subject.recipe is not None else 1
    bare = Evaluation(evaluation.probes, None, 0)
    full = test.value(bare.measure(subject.model, subject.objective, threads=threads))
    base = [job for job in test.jobs if not job.train]
    start = None
    if base:
        found = run_jobs(subject, base, evaluation, workers=0, cache=cache)
        start = test.value(next(iter(found.values())).measured)
    changes = predict(test.arms, test.scores, full, start, evaluation.probes.goal)
    prediction = new_prediction(test.key, evaluation.probes.name, test.measure, start, full, changes)
    return announce(cache, prediction)


def _verdict(test: Test, results: Results, prediction: Prediction) -> Verdict:
    predicted = prediction.changes
    full = [test.value(results["full", seed].measured) for seed in test.seeds]
    arms = [_arm(test, plan, [results[plan.name, seed] for seed in plan.rows], full, predicted) for plan in test.arms]
    main = next(arm for arm in arms if arm.name == test.main)
    controls = [arm for arm in arms if arm.kind == "random" and arm.action == main.action]
    if not controls or any(arm.documents != main.documents for arm in controls):
        raise InputError("a verdict needs a random control of equal size beside the main arm")
    probes = test.evaluation.probes
    holds = judge(main, controls, probes.goal)
    unit = "share" if test.measure == "rate" else probes.unit
    notes = [*test.notes, *words.repeat_notes(test.subject, results), *words.arm_notes(arms, full, prediction, probes)]
    return Verdict(
        behaviour=probes.name,
        measure=words.measure_text(test.measure, probes),
        unit=unit,
        main=test.main,
        arms=arms,
        holds=holds,
        summary=words.summary(probes.name, arms, main, controls[0], unit, len(test.subject.documents), holds),
        probes=probes.records()[: test.evaluation.examples],
        cost=Cost(seconds=round(sum({r.key: r.seconds for r in results.values()}.values()), 3)),
        notes=notes,
    )


def _arm(
    test: Test, plan: ArmPlan, found: Sequence[JobResult], full: list[float], predicted: Mapping[str, float | None]
) -> Arm:
    values = [test.value(result.measured) for result in found]
    losses = [r.measured.heldout_loss for r in found if r.measured.heldout_loss is not None]
    changed = plan.kind not in ("full", "base")
    share = test.measure == "rate"
    return Arm(
        name=plan.name,
        label=plan.label,
        kind=plan.kind,
        action=plan.action,
        documents=plan.documents,
        seeds=list(plan.rows) if plan.trains else [],
        values=values,
        heldout_loss=losses,
        predicted=predicted.get(plan.name),
        effect=paired_interval(full, values) if changed else None,
        cut=cut_interval(full, values) if changed and (share or test.evaluation.probes.goal == "raise") else None,
        examples=found[0].measured.answers,
    )


def judge(main: Arm, controls: Sequence[Arm], goal: str) -> bool:
    """Whether the main arm's effect lies beyond every control's, without overlap, in the direction that was claimed.

    Dropping should leave less of the behaviour than the full set and than dropping at random; keeping only the
    documents found should leave more of it than keeping as many at random. With one seed there is no interval: False.
    """
    sign = (-1.0 if goal == "lower" else 1.0) * (1.0 if main.action == "keep" else -1.0)
    effect = main.effect
    if effect is None or effect.n < 2:
        return False
    low = min(sign * effect.low, sign * effect.high)
    beyond = all(
        control.effect is not None and low > max(sign * control.effect.low, sign * control.effect.high)
        for control in controls
    )
    return beyond and (main.action == "keep" or sign * effect.value > 0)
