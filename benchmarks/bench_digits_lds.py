"""Which method predicts best what retraining on half of the documents does? A perceptron on 1,400 digits.

64 random halves, each trained with 2 seeds, and the loss of the right class on 100 images held out: the linear
datamodeling score of every attribution method that applies, of kronfluence, dattri and LogIX on the same model,
documents and queries, and of random scores. Whatever has a damping is tuned, ours and theirs, on 100 other images and
64 other halves. ``lds_margin`` is our EK-FAC less the best of kronfluence's and dattri's methods, ``lds_margin_all``
less the best of all peers'. Cost is the time for 100 queries over that of one plain forward+backward pass over the
documents.

The trainings are kept in ``benchmarks/.cache``; the table goes to ``benchmarks/results/digits_lds.json``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.figures import Figure, single

SUBSETS, TUNING_SUBSETS, SEEDS = 64, 64, (0, 1)
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Over the mean eigenvalue."""
ABSOLUTE = (1e-3, 3e-3, 0.01, 0.03, 0.1)
ABSOLUTE_TRAK = (3e-3, 0.01, 0.03)
LARGE = (1.0, 10.0, 100.0, 1000.0)
"""For dattri's EK-FAC, whose best damping lies above the others'."""
CHEAP = 5.0
"""Times the cost of EK-FAC that the best of ours may have."""


def declared(name: str, method: str) -> Any:
    """A method with its defaults, tuned over what it declares itself, as `rootward compare` does."""
    from benchmarks.lds_table import Ours
    from rootward.core import registry

    tuned = registry.get(method)[0].config.TUNED
    assert tuned is not None
    return Ours(name, method, {}, tuned.option, tuned.values)


def ours() -> list[Any]:
    """Every registered method that applies, with what is tuned.

    A row has the name of the method or preset that it is; another name is that of a method with options. EK-FAC and
    its like are tuned over the peers' own dampings, which lie closer than those that they declare.
    """
    from benchmarks.lds_table import Ours

    return [
        Ours("ekfac", "ekfac_grosse2023", {}, "damping", DAMPINGS),
        Ours("kfac_influence", "kfac_influence", {}, "damping", DAMPINGS),
        Ours("diagonal_influence", "diagonal_influence", {}, "damping", (0.001, *DAMPINGS[:-2])),
        Ours("ekfac_joint", "ekfac_joint", {}, "damping", (1.0, 3.0, 10.0, 30.0, 100.0)),
        Ours("ekfac_checkpoints", "ekfac_checkpoints", {}, "damping", DAMPINGS),
        Ours("exact_influence", "exact_influence_koh2017", {"steps": 60, "tolerance": 0.01}, "damping", (0.01, 0.03)),
        declared("source", "source_bae2024"),
        Ours("datainf", "datainf_kwon2023", {}, "damping", (*DAMPINGS, 100.0, 1000.0)),
        Ours("arnoldi", "arnoldi_schioppa2022", {"iterations": 100, "top": 80}, "damping", ABSOLUTE),
        declared("trak", "trak_park2023"),
        declared("trak_checkpoints", "trak_checkpoints"),
        declared("logra", "logra_choe2024"),
        Ours("logra_ekfac", "logra_choe2024", {"fisher": "ekfac"}, "damping", (0.0001, 0.001, *DAMPINGS[:5])),
        Ours("trackstar", "trackstar_chang2024", {"rank": 32}, "damping", DAMPINGS),
        declared("grass", "grass_hu2025"),
        declared("dda", "dda_wu2024"),
        Ours("tracin_cp", "tracin_cp"),
        Ours("tracin_cp_unit", "tracin_cp_unit"),
        Ours("gradient_dot", "gradient_dot"),
        Ours("gradient_dot_at_start", "gradient_dot_at_start"),
        Ours("gradient_cosine", "gradient_cosine"),
        Ours("representation_cosine", "representation_cosine"),
        Ours("loss", "loss"),
        Ours("document_length", "document_length"),
        Ours("random", "random"),
    ]


def peers() -> list[Any]:
    """Other libraries, each of its methods in its own way of damping."""
    from benchmarks.lds_table import Peer

    return [
        Peer("kronfluence_ekfac", "kronfluence_ekfac", "ekfac", DAMPINGS),
        Peer("kronfluence_kfac", "kronfluence_ekfac", "kfac", DAMPINGS),
        Peer("dattri_ekfac", "dattri_ekfac", "ekfac", LARGE),
        Peer("dattri_ekfac_sampled", "dattri_ekfac", "ekfac_sampled", LARGE),
        Peer("dattri_trak", "dattri_ekfac", "trak", ABSOLUTE_TRAK, "absolute", {"proj_dim": 1024}),
        Peer("logix_kfac", "logix_kfac", "", DAMPINGS),
        Peer("logix_ekfac", "logix_kfac", "ekfac", DAMPINGS),
        Peer("logix_logra", "logix_kfac", "logra", DAMPINGS),
    ]


NOT_HERE = {
    "bm25": "the documents are images",
    "less": "training was with SGD, LESS needs Adam's moments",
    "dattri_arnoldi": "its scores hold values that are not finite (80 dimensions)",
    "magic": "several trainings' time, and a run smooth in the weights: measured on runs of its own",
    "adam_influence": "training was with SGD, which keeps no second moments",
}


def table() -> Any:
    """Ground truth, trained once, and what methods are given."""
    import numpy as np
    import torch

    from benchmarks.lds_table import CACHE, Table
    from rootward.sandbox.digits import Images, digits, digits_subject, loss_of
    from rootward.verification.subsets import draw_subsets, retrain_subsets

    data, subject = digits(), digits_subject()
    held = Images(np.concatenate([data.queries.x, data.tuning.x]), np.concatenate([data.queries.y, data.tuning.y]))
    asked = loss_of(held)
    subsets = draw_subsets(subject, SUBSETS + TUNING_SUBSETS)
    truth = retrain_subsets(subject, subsets, asked, seeds=SEEDS, cache=CACHE / "digits")
    peer_data = {
        "x": torch.from_numpy(data.train.x),
        "y": torch.from_numpy(data.train.y),
        "query_x": torch.from_numpy(held.x),
        "query_y": torch.from_numpy(held.y),
    }
    return Table(subject, asked, len(data.queries), truth, SUBSETS, 4096, peer_data, ("query_x", "query_y"))


def run() -> dict[str, Figure]:
    """Retrain what is not cached, then every method."""
    from benchmarks.lds_table import ceiling_figure, peers_here
    from rootward.sandbox.digits import accuracy, digits

    found = table()
    for entry in ours():
        found.add(entry)
    for entry in peers() if peers_here() else []:
        found.add_peer(entry)
    for name, reason in NOT_HERE.items():
        found.refuse(name, reason)
    if not peers_here():
        found.refuse("peers", "their environment is not built")
    data = digits()
    world = {
        "name": "digits",
        "documents": len(data.train),
        "parameters": sum(p.numel() for p in found.subject.model.parameters()),
        "accuracy": round(accuracy(found.subject.model, data.queries), 4),
        "recipe": found.subject.recipe.model_dump(mode="json"),
    }
    found.write("digits_lds", world)
    figures = {
        "lds_ekfac": found.figure("ekfac"),
        "cost_ekfac": single(found.rows["ekfac"].cost),
        "noise_ceiling": ceiling_figure(found),
        "lds_random": found.figure("random"),
    }
    best = found.best(peers=False, most_cost=CHEAP * found.rows["ekfac"].cost)
    figures |= {"lds_best": found.figure(best), "cost_best": single(found.rows[best].cost)}
    theirs = [name for name, row in found.rows.items() if row.peer]
    if theirs:
        # the peers' best is the one with the highest reported figure: no choice could favour them more
        figures |= {f"lds_{name}": found.figure(name) for name in theirs}
        for library in ("kronfluence", "dattri"):
            figures[f"lds_{library}"] = found.figure(found.strongest(n for n in theirs if n.startswith(library)))
        rival = found.strongest(name for name in theirs if name.startswith(("kronfluence", "dattri")))
        strongest = found.strongest(theirs)
        figures |= {
            "lds_margin": found.margin("ekfac", rival, ">= -0.01"),
            "lds_margin_all": found.margin("ekfac", strongest),
            "lds_best_margin": found.margin(best, strongest, ">= 0.05"),
        }
    return figures
