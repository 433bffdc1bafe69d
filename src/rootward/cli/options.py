"""The options of the command line, one name each; `rootward.cli.main` puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML; flags go before it, it before defaults.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config as TOML and stop.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print time, memory and disk needed; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress or notes: only the result and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
Model = Annotated[
    Path | None, typer.Argument(metavar="MODEL", help="Folder of the model or adapter.", show_default=False)
]
Run = Annotated[Path | None, typer.Argument(metavar="RUN", help="Folder of a trace.", show_default=False)]
Documents = Annotated[
    Path | None,
    typer.Option("--documents", metavar="FILE", help="Training documents: JSONL, Parquet or a datasets folder."),
]
Base = Annotated[Path | None, typer.Option("--base", metavar="FOLDER", help="Base model of an adapter.")]
Start = Annotated[
    Path | None,
    typer.Option("--start", metavar="FOLDER", help="Model that training began from, if trained elsewhere or moved."),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="N", help="Longest document. Default: as trained, else the context."),
]
Parameters = Annotated[
    str | None,
    typer.Option(
        "--parameters", metavar="REGEX", help="Parameters to attribute. Default: those that training changed."
    ),
]
TokenBudget = Annotated[
    int | None, typer.Option("--token-budget", metavar="N", help="Padded tokens per batch. Default: what fits.")
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="cpu (default), cuda or cuda:0.")]
SkipNotFinite = Annotated[
    bool,
    typer.Option(
        "--skip-not-finite", help="Leave out documents whose loss or gradient is not finite; they are counted."
    ),
]
WeightsDtype = Annotated[
    str | None, typer.Option("--weights-dtype", metavar="TYPE", help="float32 (default), bfloat16, float16 or float64.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Read the first N documents only.")]
Retrain = Annotated[
    str | None,
    typer.Option("--retrain", metavar="COMMAND", help='For a model trained elsewhere: "cmd {documents} {out} {seed}".'),
]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")]

Out = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the run goes.")]
TrainConfig = Annotated[
    Path | None, typer.Argument(metavar="CONFIG.toml", help="Same as --config.", show_default=False)
]
TrainBase = Annotated[Path | None, typer.Option("--base", metavar="FOLDER", help="Model that training begins from.")]
TrainOut = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the trained model goes.")]
AdapterBase = Annotated[
    Path | None, typer.Option("--adapter-base", metavar="FOLDER", help="Base model, where --base is an adapter.")
]
ResponseOnly = Annotated[
    bool | None, typer.Option("--response-only/--whole", help="Train on replies only (default) or on all tokens.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", metavar="N", help="Default 1.")]
Lr = Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate. Default 1e-3.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Documents a step. Default 32.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Default 0.")]
Optimiser = Annotated[str | None, typer.Option("--optimiser", metavar="NAME", help="adamw (default) or sgd.")]
Schedule = Annotated[
    str | None, typer.Option("--schedule", metavar="NAME", help="constant (default), linear or cosine.")
]
Checkpoints = Annotated[
    int | None, typer.Option("--checkpoints", metavar="N", help="How many to keep, spread evenly. Default 0.")
]
LoraRank = Annotated[int | None, typer.Option("--lora-rank", metavar="N", help="Train LoRA adapters of this rank.")]
Recipe = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="KEY=VALUE", help="Any other option of the recipe, e.g. clip=1.0."),
]
IndexOut = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the index goes.")]
Rank = Annotated[
    str | None,
    typer.Option("--rank", metavar="N|none", help="Side of the random projection of a matrix (16), or none."),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="Of the stored rows: float32 (default) or float16.")
]
IndexSeed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the projection. Default 0.")]
ShardDocuments = Annotated[
    int | None, typer.Option("--shard-documents", metavar="N", help="Documents a shard. Default: by size.")
]
Behaviour = Annotated[
    Path | None, typer.Option("--behaviour", metavar="FILE", help="Queries as JSONL: prompt, wanted, unwanted.")
]
Method = Annotated[
    list[str] | None, typer.Option("--method", metavar="NAME", help="May be repeated; the first is the main one.")
]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="METHOD.KEY=VALUE", help="An option of a method; may be repeated."),
]
Name = Annotated[str | None, typer.Option("--name", metavar="TEXT", help="Of the behaviour. Default: the file's name.")]
Description = Annotated[
    str | None, typer.Option("--description", metavar="TEXT", help="Of the behaviour, for the page.")
]
Index = Annotated[Path | None, typer.Option("--index", metavar="FOLDER", help="Read gradients from an index.")]
Planted = Annotated[
    str | None, typer.Option("--planted", metavar="FIELD=VALUE", help="Documents known to be the cause.")
]
HoldOut = Annotated[
    float | None,
    typer.Option(
        "--hold-out", metavar="SHARE", help="Share of the queries kept for verify. Default: half, of ten or more."
    ),
]
SplitSeed = Annotated[int | None, typer.Option("--split-seed", metavar="N", help="Of that division. Default 0.")]
Tokens = Annotated[
    int | None, typer.Option("--tokens", metavar="N", help="Documents at each end with token scores. Default 40.")
]
Top = Annotated[int | None, typer.Option("--top", metavar="N", help="Rows of the table printed. Default 10.")]
Probes = Annotated[
    Path | None, typer.Option("--probes", metavar="FILE", help="Queries to measure. Default: those the trace held out.")
]
SameQueries = Annotated[bool, typer.Option("--same-queries", help="Measure on the traced queries all the same.")]
Count = Annotated[str | None, typer.Option("--count", metavar="N|5%", help="Documents to take out. Default 5%.")]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="0,1,2", help="Retrainings of every variant.")]
Baseline = Annotated[
    list[str] | None,
    typer.Option("--baseline", metavar="NAME", help="Ranking to compare with; may be repeated. Default bm25."),
]
Retain = Annotated[bool, typer.Option("--retain", help="Also train on the documents found alone.")]
Measure = Annotated[
    str | None,
    typer.Option("--measure", metavar="rate|mean", help="Share of queries above 0 (contrasts), or the mean."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", help="Processes; 0: this one. Default: as many as fit the cores."),
]
Subsets = Annotated[
    int | None,
    typer.Option("--subsets", metavar="N", help="Random halves of the documents to train on. Default 64; at least 60."),
]
SubsetSeeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="0,1", help="Trainings of every subset. Default 0; two give a noise ceiling."),
]
Tune = Annotated[
    bool | None,
    typer.Option("--tune/--no-tune", help="Choose dampings on half the queries and more subsets (default)."),
]
Removal = Annotated[
    str | None, typer.Option("--removal", metavar="N|5%", help="Also train without the top of each ranking.")
]
LeaveOut = Annotated[
    int | None, typer.Option("--leave-out", metavar="N", help="Also train without each of N documents: N trainings.")
]
TailPatch = Annotated[
    int | None, typer.Option("--tail-patch", metavar="K", help="Also take one step on each of a query's top K.")
]
AllowFew = Annotated[bool, typer.Option("--allow-few", help="Accept fewer than 60 subsets; the result is marked.")]
Plan = Annotated[bool, typer.Option("--dry-run", "--plan", help="Print time, memory and disk needed; write nothing.")]
ComparedMethods = Annotated[
    list[str] | None,
    typer.Option("--method", metavar="NAME", help="May be repeated. Default: cheap ones; baselines are always there."),
]
Heldout = Annotated[
    Path | None, typer.Option("--heldout", metavar="FILE", help="Documents whose loss shows what else suffered.")
]
ReportRun = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
ReportOut = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: RUN/report.html.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look.")]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME | find WORDS]", help="One method with its options, or a search.")
]
