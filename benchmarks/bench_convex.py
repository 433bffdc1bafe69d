"""Is exact influence exact? Softmax regression with L2 on digits, where retraining has no noise at all.

1,400 images, 640 weights, float64; the minimum is found to rounding. ``exact_influence_koh2017`` at the minimum, with
the L2 term as its damping (G is the Hessian of the mean document loss, the objective's Hessian is G + L2), against

    loo    leaving each of 300 documents out and minimising again: Pearson over documents, for each of 100 queries
    lds    minimising on 64 random halves: Spearman with the sums of scores

Random scores stand beside both.
"""

from __future__ import annotations

from benchmarks.figures import Figure, single

L2, LEFT_OUT, SUBSETS, SEED = 1e-3, 300, 64, 0


def run() -> dict[str, Figure]:
    """Fit, attribute by Hessian and by Gauss-Newton, leave out, halve."""
    import numpy as np
    import torch

    from rootward.api import attribute
    from rootward.sandbox.digits import CLASSES, PIXELS, Softmax, digits, loss_of
    from rootward.subject.subject import Subject
    from rootward.subject.supervised import Classification
    from rootward.verification.lds import lds
    from rootward.verification.resampling import Rows, correlate, percentiles, resampled
    from rootward.verification.subsets import Retrained, draw_subsets

    data = digits()
    toy = Softmax(data.train, L2)
    best = toy.fit()
    model = torch.nn.Linear(PIXELS, CLASSES, bias=False, dtype=torch.float64)
    model.weight.data.copy_(torch.from_numpy(best))
    subject = Subject(model.eval(), data.train.documents, Classification(), name="softmax regression")
    asked = loss_of(data.queries)
    options = {"damping": L2, "relative": 0.0}
    scores = attribute(subject, asked, "exact_influence_koh2017", options={**options, "curvature": "hessian"})
    whole = attribute(
        subject, asked, "exact_influence_koh2017", options={**options, "curvature": "ggn", "solver": "dense"}
    )
    random = attribute(subject, asked, "random")

    generator = np.random.default_rng(SEED)
    chosen = np.sort(generator.permutation(len(data.train))[:LEFT_OUT])
    before = toy.losses(best, data.queries)
    gained = np.zeros((len(data.queries), LEFT_OUT))  # by having the document
    for k, n in enumerate(chosen):
        weights = np.ones(len(data.train))
        weights[n] = 0
        gained[:, k] = before - toy.losses(toy.fit(weights, best), data.queries)
    truth, predicted = Rows(gained, "pearson"), Rows(scores.values[:, chosen], "pearson")
    per_query = correlate(truth, predicted)
    chance = np.repeat(random.values[:, chosen], len(per_query) // len(random.values), axis=0)
    slope = float((gained * scores.values[:, chosen]).sum() / np.square(scores.values[:, chosen]).sum())

    subsets = draw_subsets(subject, SUBSETS)
    retrained = Retrained(
        behaviour=asked.name,
        unit=asked.unit,
        queries=[query.name for query in asked.queries],
        document_ids=list(subsets.document_ids),
        seeds=[0],
        share=subsets.share,
        kept=["".join("1" if bit else "0" for bit in mask) for mask in subsets.masks],
        # the mean over the half, as training on it would take it
        values=[[toy.losses(toy.fit(mask / subsets.share, best), data.queries).tolist()] for mask in subsets.masks],
    )
    loo = percentiles(float(np.median(per_query)), per_query, len(per_query))
    mean = percentiles(float(per_query.mean()), resampled(truth, predicted, 1000, SEED), LEFT_OUT)
    found = {"lds_exact": (lds(scores, retrained), ">= 0.9"), "lds_exact_ggn": (lds(whole, retrained), ">= 0.9"),
             "lds_random": (lds(random, retrained), "")}  # fmt: skip
    return {
        "loo_pearson": Figure(loo.value, loo.low, loo.high, loo.n, ">= 0.98"),
        "loo_pearson_mean": Figure(mean.value, mean.low, mean.high, mean.n, ">= 0.98"),
        "loo_scale": single(slope * len(data.train)),
        "loo_random": single(float(correlate(truth, Rows(chance, "pearson")).mean())),
        **{name: Figure(r.score.value, r.score.low, r.score.high, r.subsets, bar) for name, (r, bar) in found.items()},
    }
