"""``rootward``: one Typer app. This module only declares; every command's work is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rootward.cli import options as o
from rootward.cli.guard import guarded

app = typer.Typer(
    name="rootward",
    help="Trace what a model does back to the training documents that made it so, and prove it by retraining.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich is slow to import, and --help should answer at once
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: o.Out = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Train a small model with a planted habit, trace it, verify it, and write the page."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli.demo import demo as run

        return run(out=given["out"], talk=talk)

    return guarded("demo", given, work)


@app.command()
def train(
    config: o.TrainConfig = None,
    config_option: o.Config = None,
    base: o.TrainBase = None,
    documents: o.Documents = None,
    out: o.TrainOut = None,
    adapter_base: o.AdapterBase = None,
    max_tokens: o.MaxTokens = None,
    response_only: o.ResponseOnly = None,
    device: o.Device = None,
    epochs: o.Epochs = None,
    lr: o.Lr = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    optimiser: o.Optimiser = None,
    schedule: o.Schedule = None,
    checkpoints: o.Checkpoints = None,
    lora_rank: o.LoraRank = None,
    recipe: o.Recipe = None,
    overwrite: o.Overwrite = False,
    print_config: o.PrintConfig = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Fine-tune a model with a recorded recipe, so that it can be retrained exactly."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import train

        return train.run(given, talk)

    return guarded("train", given, work)


@app.command()
def index(
    model: o.Model = None,
    config: o.Config = None,
    documents: o.Documents = None,
    out: o.IndexOut = None,
    rank: o.Rank = None,
    dtype: o.Dtype = None,
    seed: o.IndexSeed = None,
    shard_documents: o.ShardDocuments = None,
    base: o.Base = None,
    max_tokens: o.MaxTokens = None,
    response_only: o.ResponseOnly = None,
    parameters: o.Parameters = None,
    token_budget: o.TokenBudget = None,
    device: o.Device = None,
    weights_dtype: o.WeightsDtype = None,
    skip_not_finite: o.SkipNotFinite = False,
    limit: o.Limit = None,
    overwrite: o.Overwrite = False,
    print_config: o.PrintConfig = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Store the gradients of all documents, so that traces read them; the same command continues."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import index

        return index.run(given, talk)

    return guarded("index", given, work)


@app.command()
def trace(
    model: o.Model = None,
    config: o.Config = None,
    documents: o.Documents = None,
    behaviour: o.Behaviour = None,
    out: o.Out = None,
    method: o.Method = None,
    option: o.Option = None,
    name: o.Name = None,
    description: o.Description = None,
    index: o.Index = None,
    planted: o.Planted = None,
    hold_out: o.HoldOut = None,
    split_seed: o.SplitSeed = None,
    base: o.Base = None,
    start: o.Start = None,
    max_tokens: o.MaxTokens = None,
    response_only: o.ResponseOnly = None,
    parameters: o.Parameters = None,
    token_budget: o.TokenBudget = None,
    tokens: o.Tokens = None,
    top: o.Top = None,
    device: o.Device = None,
    weights_dtype: o.WeightsDtype = None,
    skip_not_finite: o.SkipNotFinite = False,
    limit: o.Limit = None,
    retrain: o.Retrain = None,
    no_report: o.NoReport = False,
    overwrite: o.Overwrite = False,
    print_config: o.PrintConfig = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Rank the training documents by what they do to a behaviour, with baselines beside."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import trace

        return trace.run(given, talk)

    return guarded("trace", given, work)


@app.command()
def verify(
    run: o.Run = None,
    config: o.Config = None,
    probes: o.Probes = None,
    same_queries: o.SameQueries = False,
    count: o.Count = None,
    seeds: o.Seeds = None,
    baseline: o.Baseline = None,
    retain: o.Retain = False,
    measure: o.Measure = None,
    retrain: o.Retrain = None,
    start: o.Start = None,
    workers: o.Workers = None,
    heldout: o.Heldout = None,
    no_report: o.NoReport = False,
    print_config: o.PrintConfig = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Retrain without the documents found, with controls of equal size; exit 3 if it was not the cause."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import verify

        return verify.run(given, talk)

    return guarded("verify", given, work)


@app.command()
def compare(
    model: o.Model = None,
    config: o.Config = None,
    documents: o.Documents = None,
    behaviour: o.Behaviour = None,
    out: o.Out = None,
    method: o.ComparedMethods = None,
    option: o.Option = None,
    subsets: o.Subsets = None,
    seeds: o.SubsetSeeds = None,
    tune: o.Tune = None,
    removal: o.Removal = None,
    leave_out: o.LeaveOut = None,
    tail_patch: o.TailPatch = None,
    planted: o.Planted = None,
    allow_few: o.AllowFew = False,
    name: o.Name = None,
    description: o.Description = None,
    split_seed: o.SplitSeed = None,
    base: o.Base = None,
    start: o.Start = None,
    max_tokens: o.MaxTokens = None,
    response_only: o.ResponseOnly = None,
    parameters: o.Parameters = None,
    token_budget: o.TokenBudget = None,
    device: o.Device = None,
    weights_dtype: o.WeightsDtype = None,
    skip_not_finite: o.SkipNotFinite = False,
    limit: o.Limit = None,
    retrain: o.Retrain = None,
    workers: o.Workers = None,
    no_report: o.NoReport = False,
    overwrite: o.Overwrite = False,
    print_config: o.PrintConfig = False,
    dry_run: o.Plan = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Which method to trust here, and what it costs: all against retraining on random halves of the documents."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import compare

        return compare.run(given, talk)

    return guarded("compare", given, work)


@app.command()
def report(
    run: o.ReportRun,
    out: o.ReportOut = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Write the page of a run: one HTML file that opens with the network off."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import runs

        return runs.report(given["run"], given["out"], talk)

    return guarded("report", given, work)


@app.command()
def runs(
    folder: o.Folder = Path("runs"),
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """List the runs, indexes and trained models in a folder."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import runs

        return runs.runs(given["folder"], talk)

    return guarded("runs", given, work)


@app.command()
def methods(
    words: o.Words = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """List the methods, show one with all its options, or find some by a word, a paper's title or its number."""
    given = locals()

    def work(talk: Any) -> int:
        from rootward.cli import methods

        return methods.run(given["words"] or [], talk)

    return guarded("methods", given, work)


@app.command()
def doctor(json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False) -> int:
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
