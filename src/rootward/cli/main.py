"""``rootward``: one Typer app. This module only declares; every command's work is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rootward.cli.guard import guarded

app = typer.Typer(
    name="rootward",
    help="Trace what a model does back to the training documents that made it so, and prove it by retraining.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich is slow to import, and --help should answer at once
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML; flags go before it, it before defaults.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config as TOML and stop.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print time, memory and disk needed; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]

Model = Annotated[Path | None, typer.Argument(metavar="MODEL", help="Folder of the model or adapter.", show_default=False)]
Run = Annotated[Path | None, typer.Argument(metavar="RUN", help="Folder of a trace.", show_default=False)]
Documents = Annotated[Path | None, typer.Option("--documents", metavar="FILE", help="Training documents: JSONL, Parquet or a datasets folder.")]
Base = Annotated[Path | None, typer.Option("--base", metavar="FOLDER", help="Base model of an adapter.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Longest document. Default: as trained, else the context.")]
Parameters = Annotated[str | None, typer.Option("--parameters", metavar="REGEX", help="Parameters to attribute. Default: those that training changed.")]
TokenBudget = Annotated[int | None, typer.Option("--token-budget", metavar="N", help="Padded tokens per batch. Default: what fits.")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="cpu (default), cuda or cuda:0.")]
WeightsDtype = Annotated[str | None, typer.Option("--weights-dtype", metavar="TYPE", help="float32 (default), bfloat16, float16 or float64.")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Read the first N documents only.")]
Retrain = Annotated[str | None, typer.Option("--retrain", metavar="COMMAND", help='For a model trained elsewhere: "cmd {documents} {out} {seed}".')]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")]


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the run goes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and faster.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train a small model with a planted habit, trace it, verify it, and write the page."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli.demo import demo as run  # type: ignore[import-not-found,unused-ignore]

        return run(out=given["out"], quick=given["quick"], talk=talk)

    return guarded("demo", given, work)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml", help="Same as --config.", show_default=False)] = None,
    config_option: Config = None,
    base: Annotated[Path | None, typer.Option("--base", metavar="FOLDER", help="Model that training begins from.")] = None,
    documents: Documents = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the trained model goes.")] = None,
    adapter_base: Annotated[Path | None, typer.Option("--adapter-base", metavar="FOLDER", help="Base model, where --base is an adapter.")] = None,
    max_tokens: MaxTokens = None,
    response_only: Annotated[bool | None, typer.Option("--response-only/--whole", help="Train on replies only (default) or on all tokens.")] = None,
    device: Device = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Default 1.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate. Default 1e-3.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Documents a step. Default 32.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Default 0.")] = None,
    optimiser: Annotated[str | None, typer.Option("--optimiser", metavar="NAME", help="adamw (default) or sgd.")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", metavar="NAME", help="constant (default), linear or cosine.")] = None,
    checkpoints: Annotated[int | None, typer.Option("--checkpoints", metavar="N", help="How many to keep, spread evenly. Default 0.")] = None,
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", metavar="N", help="Train LoRA adapters of this rank.")] = None,
    recipe: Annotated[list[str] | None, typer.Option("--recipe", metavar="KEY=VALUE", help="Any other option of the recipe, e.g. clip=1.0.")] = None,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Fine-tune a model with a recorded recipe, so that it can be retrained exactly."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import train

        return train.run(given, talk)

    return guarded("train", given, work)


@app.command()
def index(
    model: Model = None,
    config: Config = None,
    documents: Documents = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the index goes.")] = None,
    rank: Annotated[str | None, typer.Option("--rank", metavar="N|none", help="Side of the random projection of a matrix (16), or none.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="TYPE", help="Of the stored rows: float32 (default) or float16.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the projection. Default 0.")] = None,
    shard_documents: Annotated[int | None, typer.Option("--shard-documents", metavar="N", help="Documents a shard. Default: by size.")] = None,
    base: Base = None,
    max_tokens: MaxTokens = None,
    parameters: Parameters = None,
    token_budget: TokenBudget = None,
    device: Device = None,
    weights_dtype: WeightsDtype = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Store the gradients of all documents, so that traces read them; the same command continues."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import index

        return index.run(given, talk)

    return guarded("index", given, work)


@app.command()
def trace(
    model: Model = None,
    config: Config = None,
    documents: Documents = None,
    behaviour: Annotated[Path | None, typer.Option("--behaviour", metavar="FILE", help="Queries as JSONL: prompt, wanted, unwanted.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the run goes.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", metavar="NAME", help="May be repeated; the first is the main one.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="METHOD.KEY=VALUE", help="An option of a method; may be repeated.")] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="TEXT", help="Of the behaviour. Default: the file's name.")] = None,
    description: Annotated[str | None, typer.Option("--description", metavar="TEXT", help="Of the behaviour, for the page.")] = None,
    index: Annotated[Path | None, typer.Option("--index", metavar="FOLDER", help="Read gradients from an index.")] = None,
    planted: Annotated[str | None, typer.Option("--planted", metavar="FIELD=VALUE", help="Documents known to be the cause.")] = None,
    hold_out: Annotated[float | None, typer.Option("--hold-out", metavar="SHARE", help="Share of the queries kept for verify. Default: half, of ten or more.")] = None,
    split_seed: Annotated[int | None, typer.Option("--split-seed", metavar="N", help="Of that division. Default 0.")] = None,
    base: Base = None,
    max_tokens: MaxTokens = None,
    parameters: Parameters = None,
    token_budget: TokenBudget = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Documents at each end with token scores. Default 40.")] = None,
    top: Annotated[int | None, typer.Option("--top", metavar="N", help="Rows of the table printed. Default 10.")] = None,
    device: Device = None,
    weights_dtype: WeightsDtype = None,
    limit: Limit = None,
    retrain: Retrain = None,
    no_report: NoReport = False,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Rank the training documents by what they do to a behaviour, with baselines beside."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import trace

        return trace.run(given, talk)

    return guarded("trace", given, work)


@app.command()
def verify(
    run: Run = None,
    config: Config = None,
    probes: Annotated[Path | None, typer.Option("--probes", metavar="FILE", help="Queries to measure. Default: those the trace held out.")] = None,
    same_queries: Annotated[bool, typer.Option("--same-queries", help="Measure on the traced queries all the same.")] = False,
    count: Annotated[str | None, typer.Option("--count", metavar="N|5%", help="Documents to take out. Default 5%.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="0,1,2", help="Retrainings of every variant.")] = None,
    baseline: Annotated[list[str] | None, typer.Option("--baseline", metavar="NAME", help="Ranking to compare with; may be repeated. Default bm25.")] = None,
    retain: Annotated[bool, typer.Option("--retain", help="Also train on the documents found alone.")] = False,
    measure: Annotated[str | None, typer.Option("--measure", metavar="rate|mean", help="Share of queries above 0 (contrasts), or the mean.")] = None,
    retrain: Retrain = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Processes. Default: as many as fit the cores.")] = None,
    heldout: Annotated[Path | None, typer.Option("--heldout", metavar="FILE", help="Documents whose loss shows what else suffered.")] = None,
    no_report: NoReport = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Retrain without the documents found, with controls of equal size; exit 3 if it was not the cause."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import verify

        return verify.run(given, talk)

    return guarded("verify", given, work)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: RUN/report.html.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Write the page of a run: one HTML file that opens with the network off."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import runs

        return runs.report(given["run"], given["out"], talk)

    return guarded("report", given, work)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look.")] = Path("runs"),
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """List the runs, indexes and trained models in a folder."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import runs

        return runs.runs(given["folder"], talk)

    return guarded("runs", given, work)


@app.command()
def methods(
    words: Annotated[list[str] | None, typer.Argument(metavar="[find WORDS]", help="Search names, papers and titles.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """List the methods, or find one by a word, a paper's title or its number."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import methods

        return methods.run(given["words"] or [], talk)

    return guarded("methods", given, work)


@app.command()
def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> int:
    """Check versions, devices, disk, memory and imports; exit 1 if something needed is broken."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import doctor

        return doctor.run(talk)

    return guarded("doctor", given, work)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Trace what a model does back to the training documents that made it so, and prove it by retraining."""
    if version:
        from rootward import __version__

        sys.stdout.write(f"rootward {__version__}\n")
        raise typer.Exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned, never raised."""
    from rootward.cli.guard import run_app

    return run_app(app, list(sys.argv[1:] if argv is None else argv))
