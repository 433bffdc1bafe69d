"""``rootward compare``: which method should be trusted here, and what does it cost?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.cli import estimate
from rootward.cli.config import key_config, write_config
from rootward.cli.load import check_folder, load_subject, print_config, settings_of
from rootward.cli.output import Talk, duration, shown
from rootward.cli.settings import CompareSettings
from rootward.cli.trace import planted_of, run_inputs
from rootward.core.errors import ArtefactError

if TYPE_CHECKING:
    from rootward.core.records import ComparedMethod, Comparison, Interval
    from rootward.subject.behaviour import Behaviour
    from rootward.subject.subject import Subject
    from rootward.verification.compare_plan import ComparisonPlan

MARKS = ("record.json", "run.toml", "retrain", "scored")


def run(given: Mapping[str, Any], talk: Talk) -> int:
    """Compare methods into a run folder, write its page and print the table."""
    settings: CompareSettings = settings_of("compare", given)
    if given["print_config"]:
        return print_config("compare", settings, talk)
    check_folder(settings.out, MARKS, "run")
    from rootward.api import BASELINES, COMPARED, comparison_plan
    from rootward.subject.behaviour import Behaviour
    from rootward.verification.compare_plan import plan_entries

    behaviour = Behaviour.load(settings.behaviour, name=settings.name, description=settings.description)
    defaults = (*COMPARED, "source") if settings.methods is None else ()
    others = (*defaults, *BASELINES, "loss_at_start")
    plan_entries(settings.methods or (), others, settings.options, settings.tune)  # before the model is read
    subject = load_subject(settings, talk, settings.retrain)
    arguments = {
        "options": settings.options,
        "subsets": settings.subsets,
        "seeds": settings.seeds,
        "tune": settings.tune,
        "removal": settings.removal,
        "leave_out": settings.leave_out,
        "tail_patch": settings.tail_patch,
        "planted": planted_of(settings),
        "allow_few": settings.allow_few,
        "split_seed": settings.split_seed,
    }
    plan = comparison_plan(subject, behaviour, settings.methods, **arguments)
    if given["dry_run"]:
        return _dry_run(settings, plan, talk)
    _note_plan(plan, talk)
    if not _compute(settings, subject, behaviour, arguments, bool(given["overwrite"]), talk):
        talk.note(f"{shown(settings.out)} holds this run already; it is shown as it is (--overwrite computes it again)")
    show(settings, talk)
    return 0


def _note_plan(plan: ComparisonPlan, talk: Talk) -> None:
    from rootward.verification.words import command_notes

    for note in command_notes(plan.subject):  # before hours of training
        talk.note(note)
    if plan.choosing:
        talk.note(f"{len(plan.choosing)} queries choose, {len(plan.reported)} others are reported")


def _dry_run(settings: CompareSettings, plan: ComparisonPlan, talk: Talk) -> int:
    from rootward.verification.compare_plan import estimate_comparison
    from rootward.verification.retrain import by_command

    found = estimate_comparison(plan, cache=settings.out / "retrain", workers=settings.workers)
    tracked, budget, plain = estimate.measured(plan.subject, settings.token_budget)
    size, queries = tracked.layout.size, len(plan.behaviour)
    needs = {
        entry.name: estimate.of_method(
            plan.subject,
            size,
            queries,
            entry.method,
            [entry.method.configure(dict(o)) for o in entry.settings.values()],
        )
        for entry in plan.entries
    }
    at_most = any(need.at_most for need in needs.values())
    # a step is a pass over one document, and after it all queries are measured
    steps = plan.most_steps * plain * (1 + len(plan.reported)) / len(plan.subject.encoded)
    scoring = estimate.PASS * plain * sum(need.passes for need in needs.values()) + steps
    weights = estimate.parameter_bytes(plan.subject.model)
    training = weights if by_command(plan.subject) else 6 * weights * found.workers
    own = 4 * size * queries + max(need.memory_bytes for need in needs.values())
    memory = max(training, estimate.pass_memory(plan.subject, budget) + own)
    details = {
        "methods": len(plan.entries),
        "gradient passes": math.ceil(sum(need.passes for need in needs.values())),
        "settings tuned over": sum(len(entry.settings) for entry in plan.entries if len(entry.settings) > 1),
        "models": found.jobs,
        "models still to make": found.pending,
        "processes": found.workers,
        **({} if plan.left_out is None else {"documents left out one by one": plan.left_out}),
        **({} if plan.patched is None else {"single steps, at most": plan.most_steps}),
        "scoring": estimate.said(scoring, at_most),
        **estimate.method_times(needs, plain),
        "documents a subset": int(plan.subsets.masks[0].sum()),
        "queries reported": len(plan.reported),
    }
    for entry in plan.entries:
        if not entry.method.card.baseline:
            talk.say(f"{entry.name}: {entry.method.card.cost}")
    seconds = None if found.seconds is None else found.seconds + scoring
    rows = sum(len(entry.settings) for entry in plan.entries) * len(plan.subject.encoded)
    disk = 10_000 * found.jobs + 8 * rows * len(plan.behaviour) + 10**6
    return estimate.show("compare", estimate.Estimate(seconds, memory, disk, details, at_most), settings.out, talk)


def _compute(
    settings: CompareSettings,
    subject: Subject,
    behaviour: Behaviour,
    arguments: Mapping[str, Any],
    overwrite: bool,
    talk: Talk,
) -> bool:
    """Make the run; False where the folder holds it, whole, already."""
    from rootward.api import compare
    from rootward.core.memory import highest_memory_mb
    from rootward.core.records import Cost, RunRecord, read_model
    from rootward.core.runfolder import open_run, run_key

    config, inputs = key_config(settings), run_inputs(subject, behaviour, None)
    record = settings.out / "record.json"
    if record.exists() and not overwrite:
        old = read_model(RunRecord, record)
        whole = (settings.out / "compare.json").exists()
        if old.key == run_key("compare", config, inputs) and old.status == "done" and whole:
            return False
    command = f"rootward compare --config {settings.out / 'run.toml'}"
    with open_run(settings.out, "compare", config, inputs, command=command, overwrite=overwrite) as folder:
        write_config("compare", settings, settings.out / "run.toml")
        for note in subject.notes:
            folder.warn(note)
        compare(
            subject,
            behaviour,
            folder,
            methods=settings.methods,
            workers=settings.workers,
            token_budget=settings.token_budget,
            progress=talk.progress,
            **arguments,
        )
        disk = sum(path.stat().st_size for path in settings.out.rglob("*") if path.is_file()) / 1e6
        seconds = sum(folder.record.timings.values())
        folder.done(cost=Cost(seconds=seconds, peak_memory_mb=highest_memory_mb(), disk_mb=disk))
    return True


def show(settings: CompareSettings, talk: Talk) -> None:
    """The table by LDS, how far the methods agree, what to take, and the page."""
    from rootward.report import build, headline
    from rootward.report.folder import read_folder

    folder = read_folder(settings.out)
    found = folder.comparison
    if found is None:
        raise ArtefactError(f"{settings.out / 'compare.json'} is missing; run the command again with --overwrite")
    page: Path | None = build(settings.out) if settings.report else None
    table(found, talk)
    tops(found, talk)
    single(found, talk)
    tuning(found, talk)
    agreement(found, talk)
    for note in found.notes:
        talk.say(f"- {note}")
    talk.say()
    talk.say(found.summary)
    talk.say(f"Run:  {shown(settings.out)}")
    if page is not None:
        talk.say(f"Page: {shown(page)}")
    talk.result(
        "compare",
        {
            "run": str(settings.out),
            "recommended": found.recommended,
            "as_good": found.as_good,
            "headline": headline(folder.record, folder.trace, folder.verdict, found),
            "comparison": found.model_dump(mode="json"),
            "warnings": folder.record.warnings,
            "report": None if page is None else str(page),
        },
    )


def table(found: Comparison, talk: Talk) -> None:
    """One line a method, the highest LDS first."""
    seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    title = (
        f"{found.behaviour}: {found.queries} queries, {found.subsets} subsets of {found.subset_documents} of "
        f"{found.documents} documents, {seeds}{' (FEW: mostly noise)' if found.few else ''}; * is a baseline"
    )
    columns = [
        ("", "right"), ("method", "left"), ("LDS [95 %]", "right"), ("shuffled", "right"),
        ("behind best [95 %]", "right"), ("passes", "right"), ("time", "right"), ("MB", "right"),
    ]  # fmt: skip
    rows = [
        [
            n,
            _name(one),
            ranged(one.lds),
            f"< {one.null.high:.2f}",
            "–" if one.behind_best is None else ranged(one.behind_best),
            "–" if one.cost.ratio is None else _passes(one.cost.ratio),
            _time(one.cost.seconds),
            "–" if one.cost.peak_memory_mb is None else f"{one.cost.peak_memory_mb:.0f}",
        ]
        for n, one in enumerate(found.methods, 1)
    ]
    talk.table(columns, rows, title=title)
    if found.ceiling is not None:
        talk.say(f"Noise ceiling, the most that any scores can reach here: {ranged(found.ceiling)}.")


def tops(found: Comparison, talk: Talk) -> None:
    """What each ranking's top documents do, and whether they are the planted ones, where either is known."""
    columns = [("method", "left")]
    removed = found.removed_documents
    if removed is not None:
        columns += [(f"without its top {removed} ({found.unit})", "right"), (f"less {removed} random", "right")]
    planted = any(one.auroc for one in found.methods)
    if planted:
        columns.append(("AUROC of the planted [95 %]", "right"))
    if len(columns) == 1:
        return
    rows: list[list[str]] = []
    for one in found.methods:
        row = [_name(one)]
        if removed is not None:
            effect = found.removed_at_random if one.method == "random" else one.removal
            row += ["–" if value is None else ranged(value) for value in (effect, one.beyond_random)]
        if planted:
            row.append("–" if one.auroc is None else ranged(one.auroc))
        rows.append(row)
    talk.table(columns, rows)


def single(found: Comparison, talk: Talk) -> None:
    """How well scores tell what single documents do, where that was measured: left out, or stepped on."""
    if found.left_out is not None:
        columns = [
            (f"{len(found.left_out)} documents left out, one by one", "left"), ("Spearman [95 %]", "right"),
            ("shuffled", "right"), ("Pearson [95 %]", "right"),
        ]  # fmt: skip
        rows = [
            [_name(one), _or_dash(one.loo), f"< {one.loo_null.high:.2f}", _or_dash(one.loo_pearson)]
            for one in found.methods
            if one.loo_null is not None
        ]
        talk.table(columns, rows)
        drawn = found.left_out_at_random or 0
        talk.say(
            f"Predicted with measured change, over {drawn} documents drawn at random and {len(found.left_out) - drawn} "
            "from both ends of the rankings."
        )
        if found.loo_ceiling is not None:
            talk.say(f"Noise ceiling: {ranged(found.loo_ceiling)}.")
    if found.patched_documents is not None:
        k = found.patched_documents
        columns = [
            (f"one step on each of a query's top {k}", "left"), (f"towards the goal ({found.unit})", "right"),
            (f"less {k} random", "right"),
        ]  # fmt: skip
        rows = [
            [
                _name(one),
                _or_dash(found.patched_at_random if one.method == "random" else one.tail_patch, _fine),
                _or_dash(one.tail_patch_beyond_random, _fine),
            ]
            for one in found.methods
        ]
        talk.table(columns, rows)
        if found.patched_lr is not None:
            talk.say(f"One step: {found.patched_optimiser}, learning rate {found.patched_lr:g}, from the final model.")


def tuning(found: Comparison, talk: Talk) -> None:
    """How the LDS that is reported depends on what was tuned, the chosen value in brackets."""
    tuned = [one for one in found.methods if one.curve]
    if not tuned:
        return
    values = sorted({point.setting for one in tuned for point in one.curve})
    rows: list[list[str]] = []
    for one in tuned:
        curve = {point.setting: f"{point.reported.value:.2f}" for point in one.curve}
        if one.setting in curve:
            curve[one.setting] = f"[{curve[one.setting]}]"
        rows.append([f"{_name(one)}: {one.option}", *(curve.get(value, "–") for value in values)])
    columns = [("LDS by setting, [chosen elsewhere]", "left"), *((f"{value:g}", "right") for value in values)]
    talk.table(columns, rows)


def agreement(found: Comparison, talk: Talk) -> None:
    """Spearman's correlation between the methods' scores; the columns are numbered as the rows."""
    columns = [("", "right"), ("agreement (Spearman)", "left")]
    columns += [(str(n), "right") for n in range(1, len(found.methods) + 1)]
    rows = [
        [n, one.method, *(f"{round(value, 2) + 0.0:.2f}".replace("0.", ".") for value in row)]
        for n, (one, row) in enumerate(zip(found.methods, found.agreement, strict=True), 1)
    ]
    talk.table(columns, rows)


def _name(one: ComparedMethod) -> str:
    return f"{one.method} *" if one.baseline else one.method


def ranged(found: Interval) -> str:
    """``0.41 [0.30, 0.52]``; a single repetition has no interval."""
    value, low, high = (f"{round(number, 2) + 0.0:.2f}" for number in (found.value, found.low, found.high))
    return value if found.n < 2 else f"{value} [{low}, {high}]"


def _fine(found: Interval) -> str:
    """As `ranged`, to three digits: what a single step does is small."""
    value, low, high = (f"{number:.3g}" for number in (found.value, found.low, found.high))
    return value if found.n < 2 else f"{value} [{low}, {high}]"


def _or_dash(found: Interval | None, write: Callable[[Interval], str] = ranged) -> str:
    return "–" if found is None else write(found)


def _passes(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else duration(seconds)
