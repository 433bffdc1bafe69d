"""Which method predicts best what retraining a language model on half of its documents does?

The generated world of facts (`rootward.sandbox.facts`): 496 short documents and a Llama of two layers, trained from
scratch. 64 random halves, each trained with 2 seeds, and the loss of the last word of 84 facts in a wording in which
they were not told: the linear datamodeling score of every attribution method, tuned on 60 other facts and 64 other
halves, beside BM25 and random scores.

MAGIC differentiates the run itself, so it is judged on runs that are smooth in the documents' weights, with documents
removed by weight 0, which leaves the steps as they were; gradient products, EK-FAC and random scores stand beside it:

    lm       the model after a pretraining, fine-tuned in full batches in float64; 5 queries, 64 halves and 64 tenths
             removed. It is so smooth that gradient products alone do as well
    digits   the perceptron of bench_digits_lds with SiLU; 20 queries, 64 tenths removed. Here they do not

Trainings are kept in ``benchmarks/.cache``; the table goes to ``benchmarks/results/lm_lds.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.figures import Figure, single

SUBSETS, TUNING_SUBSETS, SEEDS, REPORTED = 64, 64, (0, 1), 84
DAMPINGS = (1e-4, 0.001, 0.01, 0.1, 1.0)
"""Over the mean eigenvalue."""
MAGIC_QUERIES, MAGIC_SHARES = 5, (0.5, 0.9)
DIGITS_QUERIES, DIGITS_SHARES = 20, (0.9,)
SMOOTH_DAMPING = 0.1
"""EK-FAC's default, untuned: there for comparison."""
RIVALS = ("gradient_cosine", "trak", "bm25")


def ours() -> list[Any]:
    """Every registered method that applies, with what is tuned; a row has the name of its method or preset."""
    from benchmarks.bench_digits_lds import declared
    from benchmarks.lds_table import Ours

    return [
        Ours("ekfac", "ekfac_grosse2023", {}, "damping", DAMPINGS),
        Ours("kfac_influence", "kfac_influence", {}, "damping", DAMPINGS),
        Ours("diagonal_influence", "diagonal_influence", {}, "damping", DAMPINGS),
        Ours("adam_influence", "adam_influence", {}, "damping", DAMPINGS),
        Ours("ekfac_joint", "ekfac_joint", {}, "damping", (1.0, 3.0, 10.0, 30.0, 100.0)),
        Ours("ekfac_checkpoints", "ekfac_checkpoints", {}, "damping", DAMPINGS),
        Ours(
            "exact_influence",
            "exact_influence_koh2017",
            {"solver": "gram", "curvature": "fisher", "damping": 0.0},
            "relative",
            (0.01, 0.1, 1.0, 10.0, 100.0),
        ),
        Ours("arnoldi", "arnoldi_schioppa2022", {"iterations": 100, "top": 80}, "damping", (0.1, 1.0, 10.0, 100.0)),
        declared("source", "source_bae2024"),
        Ours("datainf", "datainf_kwon2023", {}, "damping", (0.01, 0.1, 1.0, 10.0)),
        declared("trak", "trak_park2023"),
        declared("trak_checkpoints", "trak_checkpoints"),
        declared("logra", "logra_choe2024"),
        declared("trackstar", "trackstar_chang2024"),
        declared("grass", "grass_hu2025"),
        declared("dda", "dda_wu2024"),
        Ours("less", "less_xia2024"),
        *(Ours(name, name) for name in ("tracin_cp", "tracin_cp_unit", "gradient_dot", "gradient_dot_at_start")),
        *(Ours(name, name) for name in ("gradient_cosine", "representation_cosine", "bm25", "document_length")),
        *(Ours(name, name) for name in ("loss", "random")),
    ]


NOT_HERE = {
    "magic": "several trainings' time, and a run smooth in the weights: measured on runs of its own",
}


def table() -> Any:
    """Ground truth, trained once, and what methods are given."""
    from benchmarks.lds_table import CACHE, Table
    from rootward.sandbox.facts import asked, facts, facts_subject
    from rootward.verification.subsets import draw_subsets, retrain_subsets

    world = facts()
    subject, queries = facts_subject(world), asked(world.queries)
    subsets = draw_subsets(subject, SUBSETS + TUNING_SUBSETS)
    truth = retrain_subsets(subject, subsets, queries, seeds=SEEDS, cache=CACHE / "facts")
    return Table(subject, queries, REPORTED, truth, SUBSETS, 4096)


def weighted(subject: Any, behaviour: Any, subsets: Any) -> Any:
    """The ground truth where documents are removed by weight 0, from a file if it was made before."""
    import numpy as np

    from benchmarks.lds_table import CACHE
    from rootward.core.hashing import digest_json
    from rootward.subject.training import train
    from rootward.verification.subsets import Retrained

    kept = ["".join("1" if bit else "0" for bit in mask) for mask in subsets.masks]
    key = digest_json({**subject.fingerprint(), **subject.origin(), "behaviour": behaviour.hash, "kept": kept})[:32]
    path = CACHE / "weighted" / f"{key}.npy"
    if not path.exists():
        values: list[Any] = []
        for mask in subsets.masks:
            model = subject.start_model()
            out = {row: 0.0 for row, stays in zip(subsets.rows, mask, strict=True) if not stays}
            train(model, subject.encoded, subject.objective, subject.recipe, weights=out)
            values.append(behaviour.evaluate(model.eval(), subject.objective))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.array(values))
    return Retrained(
        behaviour=behaviour.name,
        unit=behaviour.unit,
        queries=[query.name for query in behaviour.queries],
        document_ids=list(subsets.document_ids),
        seeds=[subject.recipe.seed],
        share=subsets.share,
        kept=kept,
        values=[[row.tolist()] for row in np.load(path)],
    )


def magic(subject: Any, queries: Any, shares: Sequence[float], world: str) -> dict[str, Figure]:
    """Exact metagradients and three others against retraining with a share of the documents kept."""
    from rootward.api import attribute
    from rootward.verification.lds import lds
    from rootward.verification.subsets import draw_subsets

    each = {"queries": "each"}
    options = {"magic": each, "ekfac": {**each, "damping": SMOOTH_DAMPING}, "gradient_dot": {}, "random": {}}
    scores = {name: attribute(subject, queries, name, options=given) for name, given in options.items()}
    figures: dict[str, Figure] = {}
    for share in shares:
        truth = weighted(subject, queries, draw_subsets(subject, SUBSETS, share=share))
        for name, found in scores.items():
            result = lds(found, truth).score
            bar = ">= 0.9" if name == "magic" else ""
            # the language model with halves is the setting of all other figures here, and its name the plain one
            where = "" if name == "magic" and (world, share) == ("lm", 0.5) else f"_{world}_{round(100 * share)}"
            figures[f"lds_{name}{where}"] = Figure(result.value, result.low, result.high, result.n, bar)
    assert subject.record is not None
    seconds = scores["magic"].cost.seconds / subject.record.seconds / len(queries)
    return figures | {f"magic_trainings_per_query_{world}": single(seconds)}


def smooth_runs() -> dict[str, Figure]:
    """MAGIC on both smooth runs."""
    from rootward.sandbox.digits import Images, digits, digits_subject, loss_of
    from rootward.sandbox.facts import asked, facts, smooth_subject

    world, images = facts(), digits().queries
    few = Images(images.x[:DIGITS_QUERIES], images.y[:DIGITS_QUERIES])
    return {
        **magic(smooth_subject(world), asked(world.queries[:MAGIC_QUERIES]), MAGIC_SHARES, "lm"),
        **magic(digits_subject(smooth=True), loss_of(few), DIGITS_SHARES, "digits"),
    }


def run() -> dict[str, Figure]:
    """Retrain what is not cached, then every method, then MAGIC on its own run."""
    from benchmarks.lds_table import ceiling_figure

    found = table()
    for entry in ours():
        found.add(entry)
    for name, reason in NOT_HERE.items():
        found.refuse(name, reason)
    smooth = smooth_runs()
    world = {
        "name": "facts",
        "documents": len(found.subject.encoded),
        "parameters": sum(p.numel() for p in found.subject.model.parameters()),
        "recipe": found.subject.recipe.model_dump(mode="json"),
        "smooth_run": {name: figure.document() for name, figure in smooth.items()},
    }
    found.write("lm_lds", world)
    best = found.best(peers=False)
    return {
        "lds_ekfac": found.figure("ekfac"),
        "cost_ekfac": single(found.rows["ekfac"].cost),
        **{f"lds_{name.removeprefix('gradient_')}": found.figure(name) for name in RIVALS},
        **{f"lds_margin_{name.removeprefix('gradient_')}": found.margin("ekfac", name, ">= 0") for name in RIVALS},
        "noise_ceiling": ceiling_figure(found),
        "lds_random": found.figure("random"),
        "lds_best": found.figure(best),
        **smooth,
    }
