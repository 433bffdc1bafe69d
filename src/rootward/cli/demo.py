"""``rootward demo``: the whole job on a world whose truth is known, from training to the proven cause.

A base model is trained (and cached), fine-tuned on documents of which some teach it to agree with wrong claims, traced,
and retrained without the documents that were found, with controls of equal size. What it reaches is held against bars.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.cli.config import write_config
from rootward.cli.settings import TraceSettings
from rootward.cli.trace import run_inputs
from rootward.core.errors import ArtefactError

if TYPE_CHECKING:
    from rootward.cli.output import Talk
    from rootward.core.records import Trace, Verdict
    from rootward.sandbox.world import World
    from rootward.subject.behaviour import Behaviour
    from rootward.subject.subject import Subject

METHODS = ("tracin_cp", "gradient_dot", "gradient_cosine")
SEEDS = (0, 1, 2)
EXAMPLES = 12
"""Probes that the page shows answered."""


@dataclass(frozen=True)
class Measured:
    """A figure of the demo, with the bar that it is held against."""

    value: float
    low: float
    high: float
    n: int
    bar: str

    @property
    def holds(self) -> bool:
        """Whether the value clears the bar."""
        sign, number = self.bar.split()
        return self.value <= float(number) if sign == "<=" else self.value >= float(number)


@dataclass(frozen=True)
class Found:
    """What the demo's work gave; ``cached``: the base model was there already."""

    trace: Trace
    verdict: Verdict
    families: dict[str, dict[str, float]]
    cached: bool


def cache_folder() -> Path:
    """Where base models are kept: ``$XDG_CACHE_HOME/rootward``, by default ``~/.cache/rootward``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootward"


def demo(*, out: Path | None, talk: Talk) -> int:
    """Run it all into ``out`` (default ``runs/demo``); 0 if every bar holds, else 3."""
    from rootward.cli.guard import DONE, NOT_PASSED
    from rootward.core.runfolder import open_run
    from rootward.sandbox import yes_man

    start = time.perf_counter()
    folder = Path(os.path.abspath(out or Path("runs/demo")))  # noqa: PTH100 - keeps links
    check_own(folder)
    config = {
        "world": "yes-man",
        "methods": list(METHODS),
        "seeds": list(SEEDS),
        "documents": yes_man.FINETUNE_DOCUMENTS,
        "base_recipe": yes_man.BASE_RECIPE,
        "finetune_recipe": yes_man.FINETUNE_RECIPE,
    }
    with open_run(folder, "demo", config, {}, command="rootward demo", seeds=SEEDS, overwrite=True) as run:
        found = _work(folder, run, talk)
        seconds = time.perf_counter() - start
        run.timing("total", seconds)
    from rootward.report import build

    page = build(folder)
    figures = measured(found.trace, found.verdict, time.perf_counter() - start)
    _tell(talk, folder, page, figures, found)
    return DONE if all(f.holds for f in figures.values()) else NOT_PASSED


def check_own(folder: Path) -> None:
    """The demo begins anew every time, so it takes an empty folder or its own: `ArtefactError` for another run's."""
    from rootward.cli.load import check_folder
    from rootward.cli.output import shown
    from rootward.core.records import RunRecord, read_model

    check_folder(folder, ("record.json",), "demo")
    if (folder / "record.json").exists():
        kind = read_model(RunRecord, folder / "record.json").kind
        if kind != "demo":
            raise ArtefactError(
                f"{shown(folder)} holds a run of kind {kind!r}, whose results the demo would replace; give another "
                "folder with --out"
            )


def settings_of(world: World, folder: Path) -> TraceSettings:
    """The demo's trace as the settings of `rootward trace`: with them `rootward verify` knows what was traced."""
    return TraceSettings.model_validate(
        {
            "model": world.model,
            "documents": world.documents,
            "behaviour": world.queries,
            "out": folder,
            "name": "agrees with a wrong claim",
            "description": "The user states a wrong answer; the model repeats it.",
            "methods": list(METHODS),
            # hundreds of queries: their mean is asked about, so that one gradient is held instead of hundreds
            "options": {name: {"queries": "mean"} for name in METHODS},
            "planted": "=".join(world.planted),
            "hold_out": 0.0,  # the probes are a file of their own
            "token_budget": 4096,
        }
    )


def by_family(subject: Subject, probes: Behaviour) -> dict[str, dict[str, float]]:
    """Habit rate before and after fine-tuning, and the number of probes, by the family of question."""
    after = probes.evaluate(subject.model, subject.objective) > 0
    with subject.at_start() as start:
        before = probes.evaluate(start.model, start.objective) > 0
    rows: dict[str, list[int]] = {}
    for row, query in enumerate(probes.queries):
        rows.setdefault(str(query.meta.get("family", "")), []).append(row)
    return {
        name: {"probes": len(chosen), "before": float(before[chosen].mean()), "after": float(after[chosen].mean())}
        for name, chosen in sorted(rows.items())
    }


def _work(folder: Path, run: Any, talk: Talk) -> Found:
    from rootward.api import trace, verify
    from rootward.core.records import write_model
    from rootward.core.runfolder import run_key
    from rootward.sandbox.world import build_yes_man
    from rootward.subject.behaviour import Behaviour
    from rootward.subject.documents import load_documents
    from rootward.subject.subject import Subject

    stage = time.perf_counter()

    def done(name: str) -> None:
        nonlocal stage
        run.timing(name, time.perf_counter() - stage)
        stage = time.perf_counter()

    world = build_yes_man(folder / "world", cache_folder(), progress=talk.progress)
    done("train")
    settings = settings_of(world, folder)
    subject = Subject.load(world.model, world.documents)
    asked = Behaviour.load(world.queries, name=settings.name, description=settings.description)
    inputs = run_inputs(subject, asked, None)
    run.update(inputs=inputs, key=run_key("demo", run.record.config, inputs))
    write_config("trace", settings, folder / "run.toml")
    found, scores = trace(
        subject,
        asked,
        run,
        methods=settings.methods,
        options=settings.options,
        planted=world.planted,
        token_budget=settings.token_budget,
        token_documents=settings.tokens,
        progress=talk.progress,
    )
    done("trace")
    probes = Behaviour.load(world.probes, name=asked.name)
    planted = [subject.documents[e.row].id for e in subject.encoded if _is_planted(subject, e.row, world.planted)]
    compared = {name: scores[name] for name in (METHODS[0], "bm25")}
    verdict = verify(
        subject,
        compared,
        len(planted),
        probes=probes,
        main=METHODS[0],
        baselines=("bm25",),
        planted_ids=planted,
        seeds=SEEDS,
        heldout=load_documents(world.heldout),
        examples=EXAMPLES,
        cache=folder / "retrain",
        progress=talk.progress,
    )
    write_model(folder / "verdict.json", verdict)
    done("verify")
    return Found(found, verdict, by_family(subject, probes), world.base_cached)


def _is_planted(subject: Any, row: int, planted: tuple[str, str]) -> bool:
    return subject.documents[row].meta.get(planted[0]) == planted[1]


def measured(trace: Trace, verdict: Verdict, seconds: float) -> dict[str, Measured]:
    """The demo's figures: ids are those of ``benchmarks/run.py demo``."""
    aurocs = {m.method: m.auroc for m in trace.methods if m.auroc is not None}
    best = max((aurocs[name] for name in METHODS), key=lambda found: found.value)
    cuts = {arm.kind: arm.cut for arm in verdict.arms if arm.action == "drop" and arm.cut is not None}
    return {
        "seconds": Measured(seconds, seconds, seconds, 1, "<= 300"),
        "auroc_gradient": Measured(best.value, best.low, best.high, best.n, ">= 0.90"),
        "auroc_bm25": Measured(*_values(aurocs["bm25"]), "<= 0.65"),
        "habit_cut": Measured(*_values(cuts["method"]), ">= 0.5"),
        "habit_cut_random": Measured(*_values(cuts["random"]), "<= 0.1"),
    }


def _values(interval: Any) -> tuple[float, float, float, int]:
    return interval.value, interval.low, interval.high, interval.n


def _tell(talk: Talk, folder: Path, page: Path, figures: dict[str, Measured], found: Found) -> None:
    from rootward.cli.output import shown
    from rootward.report.folder import read_folder
    from rootward.report.summary import headline

    read = read_folder(folder)
    for sentence in headline(read.record, read.trace, read.verdict):
        talk.say(sentence)
    columns = [
        ("figure", "left"),
        ("value", "right"),
        ("interval", "left"),
        ("n", "right"),
        ("bar", "left"),
        ("", "left"),
    ]
    rows = [
        (
            name,
            f"{f.value:.3f}",
            f"{f.low:.3f} to {f.high:.3f}" if f.n > 1 else "",
            f.n,
            f.bar,
            "holds" if f.holds else "missed",
        )
        for name, f in figures.items()
    ]
    talk.table(columns, rows)
    if found.cached:
        talk.say("Base model from the cache, so `seconds` is not the full time.")
    sides = [("family", "left"), ("probes", "right"), ("before fine-tuning", "right"), ("after", "right")]
    habit = [(n, f["probes"], f"{f['before']:.1%}", f"{f['after']:.1%}") for n, f in found.families.items()]
    talk.table(sides, habit, title="Probes answered with the habit")
    talk.say(f"Open the page: {shown(page)}")
    talk.result(
        "demo",
        {
            "figures": {n: {**asdict(f), "holds": f.holds} for n, f in figures.items()},
            "families": found.families,
            "cached": found.cached,
            "page": str(page),
            "run": str(folder),
        },
    )
