"""What a run leaves on disk and what the page reads: typed, versioned, and free of torch.

A run folder holds

    run.toml            the resolved config; ``rootward run.toml`` style replay needs nothing else
    record.json         `RunRecord`
    documents.parquet   one row per document (`DOCUMENT_COLUMNS`)
    scores.parquet      one row per query, method and document (`SCORE_COLUMNS`)
    trace.json          `Trace`: behaviour, methods, baselines, token scores of the documents at the top and bottom
    verdict.json        `Verdict`: what happened when the documents were taken out
    compare.json        `Comparison`: which method predicts retraining here, and what each costs
    report.html         the page

Files are written to a temporary name and renamed, so a file that exists is whole.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rootward.core.errors import ArtefactError, NumericalError, StorageError

SCHEMA_VERSION = 1

DOCUMENT_COLUMNS = (
    "row",
    "id",
    "text",
    "response",
    "source",
    "tokens",
    "trained",
    "truncated",
    "loss",
    "meta",
)
"""``row`` is for display only; results are joined by ``id``. ``meta`` is JSON text."""
SCORE_COLUMNS = ("method", "query", "id", "score")
"""``score`` is positive where training more on the document raises the measurement; ``query`` -1 is the mean over
queries."""


class Model(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Model):
    """A mean with its 95 % interval over ``n`` repetitions (seeds or queries)."""

    value: float
    low: float
    high: float
    n: int


class Cost(Model):
    """What a result cost; ``ratio`` is to one plain forward+backward pass over the same documents, if measured.

    ``peak_memory_mb`` is the whole process's peak: for a method in a trace or a comparison while it ran (where the
    system can forget a peak), for any other result so far.
    """

    seconds: float
    peak_memory_mb: float | None = None
    disk_mb: float = 0.0
    ratio: float | None = None


class Coverage(Model):
    """What the method saw of the model and of the data; what it did not see is named."""

    parameters: int
    covered: int
    uncovered: dict[str, int] = Field(default_factory=dict[str, int])
    documents: int
    used: int
    dropped: dict[str, int] = Field(default_factory=dict[str, int])
    truncated: int = 0
    duplicates: int = 0
    tokens: int = 0
    trained_tokens: int = 0


class TokenScores(Model):
    """One document's tokens and how much each adds to the document's score (they sum to it)."""

    id: str
    query: int
    tokens: list[str]
    scores: list[float]
    trained: list[bool]


class MethodResult(Model):
    """One method's answer to the behaviour, with the agreement with the planted truth where that is known."""

    method: str
    label: str
    unit: str
    baseline: bool
    cost: Cost
    spearman_with_main: float | None = None
    auroc: Interval | None = None
    precision_at_planted: float | None = None
    beats_baselines: bool | None = None
    notes: list[str] = Field(default_factory=list[str])


class Query(Model):
    """One thing asked about, as text: a prompt with the answer wanted and, for a contrast, the unwanted one."""

    name: str
    prompt: str
    wanted: str
    unwanted: str | None = None
    value: float | None = None


class Trace(Model):
    """A behaviour, the methods that traced it, and what a page shows of them.

    ``notes``: what has to be said beside the main method's ranking.
    """

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    description: str = ""
    measurement: str
    unit: str
    goal: Literal["raise", "lower"]
    main_method: str
    methods: list[MethodResult]
    queries: list[Query]
    tokens: list[TokenScores] = Field(default_factory=list[TokenScores])
    planted_field: str | None = None
    notes: list[str] = Field(default_factory=list[str])


class Arm(Model):
    """One set of retrainings: which documents were taken out (or kept), and the behaviour afterwards.

    ``values`` are the behaviour's mean for each seed, ``predicted`` was written before any of them was trained.
    """

    name: str
    label: str
    kind: Literal["full", "method", "random", "baseline", "truth", "base"]
    action: Literal["none", "drop", "keep"]
    documents: int
    seeds: list[int]
    values: list[float]
    heldout_loss: list[float] = Field(default_factory=list[float])
    predicted: float | None = None
    effect: Interval | None = None
    cut: Interval | None = None
    examples: list[str] = Field(default_factory=list[str])


class Verdict(Model):
    """What happened when the change was made, beside controls of equal size. There is no verdict without a control.

    ``measure`` names the behaviour's measure; ``effect`` of an arm is its change against the full set, paired by seed;
    ``cut`` is the share of the full set's value that went away. ``holds`` is true where the main arm's interval and
    every random control's interval do not overlap.
    """

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    measure: str
    unit: str
    main: str
    arms: list[Arm]
    holds: bool
    summary: str
    probes: list[Query] = Field(default_factory=list[Query])
    cost: Cost
    notes: list[str] = Field(default_factory=list[str])


class SettingPoint(Model):
    """One value of the option that was tuned: its LDS on the part that chooses, and on the part that is reported."""

    setting: float
    tuning: Interval
    reported: Interval


class ComparedMethod(Model):
    """How well one method predicts retraining on random subsets, and what it cost.

    ``lds`` is its linear datamodeling score, ``null`` that of the same scores with the documents shuffled.
    ``behind_best`` is the best method's LDS less this one's on the same resamples (None for the best itself);
    ``beats_random``: the interval of the margin over the random baseline lies above 0, and the LDS above the null.
    ``removal`` is the change of the measurement without the top documents, ``beyond_random`` that change less the one
    without as many random ones, both paired by seed. ``option`` is what a comparison tunes of this method (its
    damping, mostly; None: nothing) and ``setting`` the value taken. ``curve`` shows how the LDS depends on it where it
    was tuned; ``at_edge``: the chosen one is the first or last, so a wider range may have a better one.

    Where documents were left out one by one: ``loo`` is Spearman's and ``loo_pearson`` Pearson's correlation over them
    of the change that the scores predict with the measured one, mean over queries, and ``loo_null`` Spearman's for
    shuffled scores. Where single steps were asked for: ``tail_patch`` is the mean change of the measurement, towards
    its goal, after one training step on a top document, ``tail_patch_beyond_random`` less that of random ones.
    """

    method: str
    label: str
    unit: str
    baseline: bool
    cost: Cost
    lds: Interval
    null: Interval
    unranked: int
    per_query: bool
    beats_random: bool | None = None
    behind_best: Interval | None = None
    option: str | None = None
    setting: float | None = None
    curve: list[SettingPoint] = Field(default_factory=list[SettingPoint])
    at_edge: bool = False
    removal: Interval | None = None
    beyond_random: Interval | None = None
    auroc: Interval | None = None
    loo: Interval | None = None
    loo_pearson: Interval | None = None
    loo_null: Interval | None = None
    tail_patch: Interval | None = None
    tail_patch_beyond_random: Interval | None = None
    notes: list[str] = Field(default_factory=list[str])


class Comparison(Model):
    """Which method to trust on this subject: methods beside baselines, by their LDS, the highest first.

    ``agreement[i][j]`` is Spearman's correlation of the scores of ``methods[i]`` and ``methods[j]`` over documents, the
    mean over the reported queries. ``subsets`` and ``queries`` are those that are reported; the tuning ones chose the
    settings and, where documents were removed, which. ``recommended`` is None where nothing can be told from a random
    order; ``as_good`` are methods that cost less and cannot be told from it. ``few`` marks fewer subsets than an LDS
    needs.

    ``left_out`` are the ids of the documents that were left out one by one, the first ``left_out_at_random`` of them
    drawn at random, the others from both ends of the rankings; ``loo_ceiling`` is the most that scores can reach there.
    ``patched_documents`` is the number of a query's top documents that one step was taken on, of ``patched_optimiser``
    at the learning rate ``patched_lr``; ``patched_at_random`` the mean change after a step on as many random ones.
    """

    schema_version: int = SCHEMA_VERSION
    behaviour: str
    description: str = ""
    measurement: str
    unit: str
    goal: Literal["raise", "lower"]
    documents: int
    queries: int
    tuning_queries: int
    subsets: int
    tuning_subsets: int
    subset_documents: int
    seeds: list[int]
    few: bool
    ceiling: Interval | None = None
    methods: list[ComparedMethod]
    agreement: list[list[float]]
    recommended: str | None
    as_good: list[str]
    summary: str
    removed_documents: int | None = None
    removed_at_random: Interval | None = None
    left_out: list[str] | None = None
    left_out_at_random: int | None = None
    loo_ceiling: Interval | None = None
    patched_documents: int | None = None
    patched_at_random: Interval | None = None
    patched_optimiser: str | None = None
    patched_lr: float | None = None
    planted_field: str | None = None
    plain_pass_seconds: float | None = None
    retraining_seconds: float
    notes: list[str] = Field(default_factory=list[str])


Status = Literal["running", "done", "failed", "stopped"]


class RunRecord(Model):
    """Who ran what on which inputs. ``key`` is the hash of config and inputs: reuse goes by it, never by a name."""

    schema_version: int = SCHEMA_VERSION
    kind: str
    name: str
    key: str
    command: str = ""
    status: Status = "running"
    started: str
    seconds: float | None = None
    config: dict[str, Any]
    inputs: dict[str, str] = Field(default_factory=dict[str, str])
    seeds: list[int] = Field(default_factory=list[int])
    versions: dict[str, str] = Field(default_factory=dict[str, str])
    machine: dict[str, str] = Field(default_factory=dict[str, str])
    timings: dict[str, float] = Field(default_factory=dict[str, float])
    coverage: Coverage | None = None
    cost: Cost | None = None
    warnings: list[str] = Field(default_factory=list[str])
    error: str | None = None


def versions() -> dict[str, str]:
    """Versions of what decides a result's numbers, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in ("rootward", "torch", "transformers", "peft", "tokenizers", "numpy"):
        found[name] = _installed(name)
    return found


@cache
def _installed(name: str) -> str:
    """Looked up once in a process: reading the metadata takes longer than a step of a small model."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """Processor, cores and system: retraining is bitwise equal on the same machine only."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def whole_or_absent(path: Path) -> Generator[Path]:
    """A temporary name beside ``path``: renamed to it at the end, removed if anything goes wrong on the way."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there: temporary name, flush to disk, rename."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise StorageError(
            f"could not write {path}: {error.strerror or error}; free space and run the same command again"
        ) from error


def write_model(path: Path, value: BaseModel) -> None:
    """A pydantic model as indented JSON, atomically; a number that is not finite is a `NumericalError`."""
    try:
        text = json.dumps(value.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericalError(f"{path}: a number to be written is not finite ({error})") from error
    write_text(path, text + "\n")


M = TypeVar("M", bound=BaseModel)


def read_model(kind: type[M], path: Path) -> M:
    """Read what `write_model` wrote; an unknown schema version or a damaged file is an `ArtefactError`."""
    if not path.exists():
        raise ArtefactError(f"expected {kind.__name__} at {path}, found no such file")
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); run the command that made it again") from error
    fields = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {"schema_version": None}
    found = fields.get("schema_version", SCHEMA_VERSION)
    if found != SCHEMA_VERSION:
        raise ArtefactError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {found}; use the version that made it"
        )
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{path} does not hold a {kind.__name__}: {error}") from error
