"""``rootward trace``: which documents make the model do this?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.cli import estimate
from rootward.cli.config import key_config, write_config
from rootward.cli.load import check_folder, load_subject, print_config, settings_of
from rootward.cli.output import Talk, shown, snippet
from rootward.cli.settings import CompareSettings, TraceSettings
from rootward.core.errors import ArtefactError, InputError
from rootward.core.expected import nearest

if TYPE_CHECKING:
    from rootward.core.registry import Method, MethodConfig
    from rootward.subject.behaviour import Behaviour
    from rootward.subject.subject import Subject

ENOUGH_QUERIES = 10
"""From this many on, half of the queries are held out unless the user says otherwise."""
MARKS = ("record.json", "run.toml")
OUTPUTS = ("trace.json", "verdict.json", "verify.toml", "scores.parquet", "documents.parquet", "report.html")


def run(given: Mapping[str, Any], talk: Talk) -> int:
    """Rank the documents into a run folder, write its page and print the top."""
    settings: TraceSettings = settings_of("trace", given)
    if given["print_config"]:
        return print_config("trace", settings, talk)
    check_folder(settings.out, MARKS, "run")
    from rootward.subject.behaviour import Behaviour

    whole = Behaviour.load(settings.behaviour, name=settings.name, description=settings.description)
    settings, behaviour, held = divide(settings, whole)
    settings, configured, each = check_methods(settings, behaviour)
    subject = load_subject(settings, talk, settings.retrain)
    _check_planted(settings, subject)
    if settings.index is not None:
        check_index(settings.index, subject)
    if held is not None:
        talk.note(
            f"{len(behaviour)} of {len(whole)} queries are traced; {len(held)} are held out for `rootward verify`"
        )
    elif len(whole) >= ENOUGH_QUERIES:
        talk.note("every query is traced, so `rootward verify` will need others: --probes FILE")
    if given["dry_run"]:
        need = estimate.of_trace(subject, settings, len(behaviour), configured, each)
        return estimate.show("trace", need, settings.out, talk)
    finished = _compute(settings, subject, behaviour, bool(given["overwrite"]), talk)
    if not finished:
        talk.note(f"{shown(settings.out)} holds this run already; it is shown as it is (--overwrite computes it again)")
    show(settings, talk)
    return 0


def divide(settings: TraceSettings, whole: Behaviour) -> tuple[TraceSettings, Behaviour, Behaviour | None]:
    """(settings with the share made explicit, the queries to trace, those held out if any)."""
    share = settings.hold_out
    if share is None:
        share = 0.5 if len(whole) >= ENOUGH_QUERIES else 0.0
    settings = settings.model_copy(update={"hold_out": share})
    if share == 0:
        return settings, whole, None
    traced, held = whole.split(settings.split_seed, 1 - share, settings.split_by)
    return settings, traced, held


def check_methods(
    settings: TraceSettings, behaviour: Behaviour
) -> tuple[TraceSettings, dict[str, tuple[Method, MethodConfig]], bool]:
    """(settings, methods that read gradients with their configs, whether any needs the gradient of each query).

    Unknown methods and options are refused before anything is loaded; with an index, methods that can read it do.
    """
    from rootward.api import BASELINES
    from rootward.core import registry

    names = [*dict.fromkeys([*settings.methods, *BASELINES])]
    for name in settings.options:
        if name not in names:
            raise InputError(
                f"--option {name}: that method is not run{nearest(name, names)}\n"
                f"methods of this run: {', '.join(names)}"
            )
    options = {name: dict(values) for name, values in settings.options.items()}
    configured: dict[str, tuple[Method, MethodConfig]] = {}
    each, reads_index = False, False
    for name in names:
        method, preset = registry.get(name)
        known = method.config.model_fields
        for key in options.get(name, {}):
            if key not in known:
                raise InputError(
                    f"--option {name}.{key}: unknown option of method {name}{nearest(key, known)}\n"
                    f"options: {', '.join(known) or 'none'}"
                )
        config = method.configure({**preset, **options.get(name, {})}, name)
        checkpoints = getattr(config, "checkpoints", "final")
        if settings.index is not None and "source" in known and checkpoints == "final":
            options.setdefault(name, {}).setdefault("source", "index")
            reads_index = True
        if "gradients" in method.card.needs:
            configured[name] = method, config
            each = each or getattr(config, "queries", "each") != "mean"
    if settings.index is not None and not reads_index:
        raise InputError(f"--index: none of {', '.join(settings.methods)} reads an index; leave it out")
    return settings.model_copy(update={"options": options}), configured, each


def check_index(index: Path, subject: Subject) -> None:
    """`ArtefactError`, with the difference, unless the index is whole and of this subject; every shard is checked."""
    from rootward.capture.store import GradientStore

    store = GradientStore(index)
    store.require(subject.fingerprint())
    for _ in store.blocks():
        pass


def planted_of(settings: TraceSettings | CompareSettings) -> tuple[str, Any] | None:
    """``field=value`` as (field, value); the value is JSON-like: ``planted=true`` is a boolean, ``source=web`` text."""
    from rootward.cli.config import toml_value

    if settings.planted is None:
        return None
    key, _, text = settings.planted.partition("=")
    return key.strip(), toml_value(text.strip())


def _check_planted(settings: TraceSettings, subject: Subject) -> None:
    planted = planted_of(settings)
    if planted is None:
        return
    key, value = planted
    found = sum(document.meta.get(key) == value for document in subject.documents)
    if not found:
        fields = sorted({name for document in subject.documents for name in document.meta})
        raise InputError(
            f"--planted {settings.planted}: no document has {key} = {value!r}{nearest(key, fields)}\n"
            f"fields of the documents: {', '.join(fields) or 'none'}"
        )


def run_inputs(subject: Subject, behaviour: Behaviour, index: Path | None) -> dict[str, str]:
    """Hashes of what the run reads."""
    found = {**subject.fingerprint(), **subject.origin(), "behaviour": behaviour.hash}
    if index is None:
        return found
    from rootward.core.hashing import digest

    return {**found, "index": digest((index / "manifest.jsonl").read_bytes())}


def _compute(settings: TraceSettings, subject: Subject, behaviour: Behaviour, overwrite: bool, talk: Talk) -> bool:
    """Make the run; False where the folder holds it, whole, already."""
    from rootward.api import trace
    from rootward.core.memory import highest_memory_mb
    from rootward.core.records import Cost, RunRecord, read_model
    from rootward.core.runfolder import open_run, run_key

    config, inputs = key_config(settings), run_inputs(subject, behaviour, settings.index)
    record = settings.out / "record.json"
    if record.exists() and not overwrite:
        old = read_model(RunRecord, record)
        whole = all((settings.out / name).exists() for name in ("trace.json", "scores.parquet", "documents.parquet"))
        if old.key == run_key("trace", config, inputs) and old.status == "done" and whole:
            return False
    elif overwrite:
        for name in OUTPUTS:
            (settings.out / name).unlink(missing_ok=True)
    command = f"rootward trace --config {settings.out / 'run.toml'}"
    with open_run(settings.out, "trace", config, inputs, command=command, overwrite=overwrite) as folder:
        write_config("trace", settings, settings.out / "run.toml")
        for note in subject.notes:
            folder.warn(note)
        result, _ = trace(
            subject,
            behaviour,
            folder,
            methods=settings.methods,
            options=settings.options,
            index=settings.index,
            token_budget=settings.token_budget,
            planted=planted_of(settings),
            token_documents=settings.tokens,
            progress=talk.progress,
        )
        seconds = sum(folder.record.timings.values())
        disk = sum(path.stat().st_size for path in settings.out.iterdir() if path.is_file()) / 1e6
        main = next(m for m in result.methods if m.method == result.main_method)
        peak = highest_memory_mb()
        folder.done(cost=Cost(seconds=seconds, peak_memory_mb=peak, disk_mb=disk, ratio=main.cost.ratio))
    return True


def show(settings: TraceSettings, talk: Talk) -> None:
    """The top documents, the story in sentences, and the page."""
    from rootward.report import build, headline
    from rootward.report.folder import read_folder

    folder = read_folder(settings.out)
    if folder.trace is None:
        raise ArtefactError(f"{settings.out / 'trace.json'} is missing; run the command again with --overwrite")
    page = build(settings.out) if settings.report else None
    rows = top_rows(folder, settings.top)
    columns = [("rank", "right"), ("score", "right"), ("id", "left"), ("source", "left"), ("text", "left")]
    table = [(r["rank"], f"{r['score']:.4g}", r["id"][:8], r["source"], snippet(r["text"], 60)) for r in rows]
    sentences = headline(folder.record, folder.trace, folder.verdict)
    for sentence in sentences:
        talk.say(sentence)
    more = "raise" if folder.trace.goal == "raise" else "lower"
    talk.table(columns, table, title=f"Documents that {more} it most, by {folder.trace.main_method}")
    talk.say(f"Run:  {shown(settings.out)}")
    if page is not None:
        talk.say(f"Page: {shown(page)}")
    talk.result(
        "trace",
        {
            "run": str(settings.out),
            "status": folder.record.status,
            "main_method": folder.trace.main_method,
            "goal": folder.trace.goal,
            "documents": rows,
            "headline": sentences,
            "methods": [method.model_dump(mode="json") for method in folder.trace.methods],
            "coverage": folder.record.coverage.model_dump(mode="json") if folder.record.coverage else None,
            "warnings": folder.record.warnings,
            "report": str(page) if page is not None else None,
        },
    )


def top_rows(folder: Any, count: int) -> list[dict[str, Any]]:
    """The documents that make most of the behaviour by the main method, each once."""
    means: Mapping[str, float] = folder.means[folder.trace.main_method]
    sign = -1 if folder.trace.goal == "lower" else 1
    chosen: Sequence[str] = sorted(means, key=lambda name: -sign * means[name])[:count]
    documents = folder.documents(chosen)
    return [
        {
            "rank": rank,
            "score": means[name],
            "id": name,
            "source": documents[name].source,
            "copies": documents[name].copies,
            "text": documents[name].text,
        }
        for rank, name in enumerate(chosen, 1)
    ]
