"""``rootward verify``: were they the cause? Retrains, and says so in the run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.cli import estimate
from rootward.cli.config import resolve, write_config
from rootward.cli.guard import DONE, NOT_PASSED
from rootward.cli.load import load_subject, print_config, settings_of
from rootward.cli.output import Talk, shown
from rootward.cli.settings import TraceSettings, VerifySettings
from rootward.cli.trace import divide, planted_of
from rootward.core.errors import ArtefactError, InputError
from rootward.core.expected import nearest

if TYPE_CHECKING:
    from rootward.core.scores import Scores
    from rootward.subject.behaviour import Behaviour
    from rootward.subject.subject import Subject


def run(given: Mapping[str, Any], talk: Talk) -> int:
    """Test a trace by retraining; `NOT_PASSED` where the verdict does not hold."""
    settings: VerifySettings = settings_of("verify", given)
    if given["print_config"]:
        return print_config("verify", settings, talk)
    record, trace, traced_settings = read_trace(settings.run)
    from rootward.subject.behaviour import Behaviour

    source = traced_settings.behaviour
    whole = Behaviour.load(source, name=traced_settings.name, description=traced_settings.description)
    _, traced, held = divide(traced_settings, whole)
    probes = choose_probes(settings, traced, held, talk)
    scores = read_scores(settings, trace)
    if settings.start is not None:
        traced_settings = traced_settings.model_copy(update={"start": settings.start})
    subject = load_subject(traced_settings, talk, settings.retrain or traced_settings.retrain)
    check_inputs(settings.run, record, subject, traced)
    from rootward.verification.words import command_notes

    for note in command_notes(subject):  # before hours of training
        talk.note(note)
    arguments = _arguments(settings, trace, traced_settings, subject)
    if given["dry_run"]:
        return _dry_run(settings, subject, scores, probes, arguments, talk)
    return _verify(settings, record, trace, subject, scores, probes, arguments, talk)


def read_trace(folder: Path) -> tuple[Any, Any, TraceSettings]:
    """The record, the trace and the settings of a finished trace; anything else is an `ArtefactError`."""
    from rootward.core.records import RunRecord, Trace, read_model

    if not folder.is_dir():
        raise ArtefactError(
            f"{shown(folder)}: expected the folder of a trace, found none; make one with `rootward trace`"
        )
    record = read_model(RunRecord, folder / "record.json")
    if record.kind not in ("trace", "demo") or record.status != "done":
        raise ArtefactError(
            f"{shown(folder)}: expected a trace that is done, found one of kind {record.kind!r} with status "
            f"{record.status!r}; run `{record.command or 'rootward trace'}` first"
        )
    trace = read_model(Trace, folder / "trace.json")
    if not (folder / "run.toml").exists():
        raise ArtefactError(f"{shown(folder)}: has no run.toml, so its model and documents are unknown; trace again")
    return record, trace, resolve("trace", {}, folder / "run.toml")


def choose_probes(settings: VerifySettings, traced: Behaviour, held: Behaviour | None, talk: Talk) -> Behaviour:
    """Queries that the trace did not see; its own only with --same-queries."""
    from rootward.core.hashing import digest_json
    from rootward.subject.behaviour import Behaviour

    if settings.probes is not None:
        probes = Behaviour.load(settings.probes, name=traced.name, description=traced.description)
        seen = {digest_json(query.prompt) for query in traced.queries}
        same = sum(digest_json(query.prompt) in seen for query in probes.queries)
        if same and not settings.same_queries:
            raise InputError(
                f"--probes {shown(settings.probes)}: {same} of {len(probes)} prompts were traced, and a cause is "
                "tested on others; take them out, or allow it with --same-queries"
            )
        talk.note(f"measured on {len(probes)} probes of {shown(settings.probes)}")
        return probes
    if held is not None and not settings.same_queries:
        talk.note(f"measured on the {len(held)} queries that the trace held out")
        return held
    if settings.same_queries:
        talk.note(f"measured on the {len(traced)} queries that were traced (--same-queries): an optimistic test")
        return traced
    raise InputError(
        f"the trace used all of its {len(traced)} queries, and a cause is tested on others: give --probes FILE, "
        "trace again with --hold-out 0.5, or measure on the traced ones all the same with --same-queries"
    )


def read_scores(settings: VerifySettings, trace: Any) -> dict[str, Scores]:
    """The main method's scores and those of the baselines asked for, from the run folder."""
    import numpy as np
    import pyarrow.parquet as pq

    from rootward.core.scores import Scores

    path = settings.run / "scores.parquet"
    if not path.exists():
        raise ArtefactError(f"{path}: missing; run the trace again with --overwrite")
    units = {result.method: result.unit for result in trace.methods}
    scores: dict[str, Scores] = {}
    for name in dict.fromkeys([trace.main_method, *settings.baselines]):
        if name == "random":
            raise InputError("--baseline random: random controls of equal size are always run; name another ranking")
        if name not in units:
            raise InputError(
                f"--baseline {name}: the trace has no such ranking{nearest(name, units)}\nit has: {', '.join(units)}"
            )
        table = pq.read_table(path, filters=[("method", "=", name), ("query", "=", -1)])
        values = np.asarray(table.column("score"), dtype=np.float32)[None]
        ids = tuple(table.column("id").to_pylist())
        scores[name] = Scores(values, ("mean",), ids, name, units[name], trace.behaviour)
    return scores


def check_inputs(folder: Path, record: Any, subject: Subject, traced: Behaviour) -> None:
    """`ArtefactError`, with the difference, if the model, documents or queries are not those that were traced."""
    from rootward.core.hashing import difference

    now = {**subject.fingerprint(), "behaviour": traced.hash}
    text = difference({key: record.inputs.get(key) for key in now}, now)
    if text:
        raise ArtefactError(
            f"{shown(folder)} was made from something else than what is there now:\n{text}\n"
            "trace again into a new folder"
        )


def _arguments(settings: VerifySettings, trace: Any, traced: TraceSettings, subject: Subject) -> dict[str, Any]:
    from rootward.subject.documents import load_documents

    planted, ids = planted_of(traced), None
    if planted is not None:
        ids = [document.id for document in subject.documents if document.meta.get(planted[0]) == planted[1]]
    return {
        "main": trace.main_method,
        "baselines": [result.method for result in trace.methods if result.baseline],
        "planted_ids": ids,
        "seeds": settings.seeds,
        "retention": settings.retain,
        "measure": settings.measure,
        "heldout": load_documents(settings.heldout) if settings.heldout is not None else None,
    }


def _dry_run(
    settings: VerifySettings, subject: Subject, scores: Any, probes: Any, arguments: Mapping[str, Any], talk: Talk
) -> int:
    from rootward.verification.cost import plan
    from rootward.verification.retrain import by_command

    found = plan(
        subject, scores, settings.count, probes, cache=settings.run / "retrain", workers=settings.workers, **arguments
    )
    # a model in training, its gradients and Adam's two copies, and what the probes take
    weights = 6 * estimate.parameter_bytes(subject.model) * found.workers
    memory = estimate.parameter_bytes(subject.model) if by_command(subject) else weights
    details = {
        "arms": found.arms,
        "models": found.jobs,
        "models still to make": found.pending,
        "processes": found.workers,
        "probes": len(probes),
    }
    need = estimate.Estimate(found.seconds, memory, 10_000 * found.jobs, details)
    return estimate.show("verify", need, settings.run, talk)


def _verify(
    settings: VerifySettings,
    record: Any,
    trace: Any,
    subject: Subject,
    scores: Mapping[str, Scores],
    probes: Behaviour,
    arguments: Mapping[str, Any],
    talk: Talk,
) -> int:
    from rootward.api import verify
    from rootward.core.records import write_model
    from rootward.core.runfolder import RunFolder
    from rootward.report import build, headline

    start = time.perf_counter()
    verdict = verify(
        subject,
        scores,
        settings.count,
        probes=probes,
        cache=settings.run / "retrain",
        workers=settings.workers,
        progress=talk.progress,
        **arguments,
    )
    write_model(settings.run / "verdict.json", verdict)
    write_config("verify", settings, settings.run / "verify.toml")
    folder = RunFolder(settings.run, record)
    folder.update(seeds=list(settings.seeds))
    folder.timing("verify", time.perf_counter() - start)
    page = build(settings.run) if settings.report else None
    show_arms(verdict, talk)
    sentences = headline(folder.record, trace, verdict)
    for text in [*sentences, *verdict.notes]:
        talk.say(text)
    if page is not None:
        talk.say(f"Page: {shown(page)}")
    values = {"run": str(settings.run), "holds": verdict.holds, "verdict": verdict.model_dump(mode="json")}
    talk.result("verify", {**values, "headline": sentences, "report": str(page) if page is not None else None})
    return DONE if verdict.holds else NOT_PASSED


def show_arms(verdict: Any, talk: Talk) -> None:
    """The arms as a table, each with its change against the full set."""
    rows = []
    for arm in verdict.arms:
        effect = arm.effect
        mean = f"{sum(arm.values) / len(arm.values):.4g}" if arm.values else "–"
        change = "–" if effect is None else f"{effect.value:+.4g}"
        if effect is not None and effect.n > 1:  # one seed has no interval
            change += f" [{effect.low:+.4g}, {effect.high:+.4g}]"
        predicted = "–" if arm.predicted is None else f"{arm.predicted:+.4g}"
        rows.append((len(arm.seeds), mean, change, predicted, arm.label))
    columns = [
        ("seeds", "right"),
        (verdict.unit, "right"),
        ("change [95 %]", "right"),
        ("predicted", "right"),
        ("trained", "left"),
    ]
    talk.table(columns, rows, title=verdict.measure)
