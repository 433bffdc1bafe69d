"""What each command can be told: one checked model a command, read from flags, a TOML file and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _count(value: Any) -> Any:
    """``"20"`` is the number 20; ``"5%"`` stays text."""
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


def _listed(value: Any) -> Any:
    """``"0,1,2"`` is a list of three."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Count = Annotated[int | str, BeforeValidator(_count)]
Precision = Literal["float32", "float64", "bfloat16", "float16"]


class Settings(BaseModel):
    """Unknown keys are errors. ``volatile`` names what does not change a result, so it is no part of a run's key."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    volatile: ClassVar[tuple[str, ...]] = ()


class SubjectSettings(Settings):
    """A model folder, the documents that it was trained on, and how both are read."""

    model: Path
    documents: Path
    base: Path | None = None
    start: Path | None = None
    max_tokens: int | None = Field(None, ge=2)
    response_only: bool | None = None
    parameters: str | None = None
    device: str = "cpu"
    weights_dtype: Precision = "float32"
    limit: int | None = Field(None, ge=1)
    token_budget: int | None = Field(None, ge=1)
    skip_not_finite: bool = False


class TrainSettings(Settings):
    """`rootward train`: ``recipe`` is checked by the recipe itself."""

    base: Path
    documents: Path
    out: Path
    adapter_base: Path | None = None
    max_tokens: int | None = Field(None, ge=2)
    response_only: bool = True
    device: str = "cpu"
    recipe: dict[str, Any] = Field(default_factory=dict[str, Any])


class IndexSettings(SubjectSettings):
    """`rootward index`."""

    out: Path
    rank: Annotated[Literal["none"], Field()] | Annotated[int, Field(ge=1)] = 16
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "float16"] = "float32"
    shard_documents: int | None = Field(None, ge=1)


class TraceSettings(SubjectSettings):
    """`rootward trace`."""

    behaviour: Path
    out: Path
    name: str | None = None
    description: str = ""
    methods: list[str] = Field(default_factory=lambda: ["gradient_dot", "gradient_cosine"], min_length=1)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    index: Path | None = None
    planted: str | None = Field(None, pattern=r"^[^=]+=")
    hold_out: float | None = Field(None, ge=0, lt=1)
    split_seed: int = Field(0, ge=0)
    split_by: str | None = None
    tokens: int = Field(40, ge=0)
    retrain: str | None = None
    report: bool = True
    top: int = Field(10, ge=1)
    volatile: ClassVar[tuple[str, ...]] = (
        "out", "report", "top", "retrain", "start", "model", "documents", "base", "behaviour", "index",
    )  # fmt: skip
    """What a path holds goes into the key as a hash."""


class VerifySettings(Settings):
    """`rootward verify`."""

    run: Path
    probes: Path | None = None
    same_queries: bool = False
    count: Count = "5%"
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_listed)] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1
    )
    baselines: list[str] = Field(default_factory=lambda: ["bm25"])
    retain: bool = False
    measure: Literal["rate", "mean"] | None = None
    retrain: str | None = None
    start: Path | None = None
    workers: int | None = Field(None, ge=0)
    heldout: Path | None = None
    report: bool = True


class CompareSettings(SubjectSettings):
    """`rootward compare`: without methods, a set of cheap ones."""

    behaviour: Path
    out: Path
    name: str | None = None
    description: str = ""
    methods: list[str] | None = Field(None, min_length=1)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    subsets: int = Field(64, ge=3)
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_listed)] = Field(
        default_factory=lambda: [0], min_length=1
    )
    tune: bool = True
    removal: Count | None = None
    leave_out: int | None = Field(None, ge=3)
    tail_patch: int | None = Field(None, ge=1)
    planted: str | None = Field(None, pattern=r"^[^=]+=")
    allow_few: bool = False
    split_seed: int = Field(0, ge=0)
    retrain: str | None = None
    workers: int | None = Field(None, ge=0)
    report: bool = True
    volatile: ClassVar[tuple[str, ...]] = (
        "out", "report", "retrain", "start", "model", "documents", "base", "behaviour", "workers", "allow_few",
    )  # fmt: skip


COMMANDS: dict[str, type[Settings]] = {
    "train": TrainSettings,
    "index": IndexSettings,
    "trace": TraceSettings,
    "verify": VerifySettings,
    "compare": CompareSettings,
}
