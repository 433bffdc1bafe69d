"""Is exact influence exact? Softmax regression with L2 on digits, where retraining has no noise at all.

1,400 images, 640 weights, float64; the minimum is found to rounding. ``exact_influence_koh2017`` at the minimum, with
the L2 term as its damping (G is the Hessian of the mean document loss, the objective's Hessian is G + L2), against

    loo    leaving each of 300 documents out and minimising again (`verification.loo`): Pearson over documents, the mean
           over 100 queries, and the slope of measured on predicted changes. It is 1 for a small change of a document's
           weight and above 1 for leaving all of it out, the more so the more the fit leans on the document
    lds    minimising on 64 random halves (`verification.lds`): Spearman with the sums of scores

Random scores stand beside both. Retraining is `Softmax.fit`, which finds the minimum itself.
"""

from __future__ import annotations

from benchmarks.figures import Figure

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
    from rootward.verification.loo import LeftOut, loo, sample_documents
    from rootward.verification.subsets import Retrained, draw_subsets

    data = digits()
    toy = Softmax(data.train, L2)
    best = toy.fit()
    model = torch.nn.Linear(PIXELS, CLASSES, bias=False, dtype=torch.float64)
    model.weight.data.copy_(torch.from_numpy(best))
    subject = Subject(model.eval(), data.train.documents, Classification(), name="softmax regression")
    asked = loss_of(data.queries)
    options = {"damping": L2, "relative": 0.0, "queries": "each"}
    scores = attribute(subject, asked, "exact_influence_koh2017", options={**options, "curvature": "hessian"})
    whole = attribute(
        subject, asked, "exact_influence_koh2017", options={**options, "curvature": "ggn", "solver": "dense"}
    )
    random = attribute(subject, asked, "random")

    chosen = sample_documents(subject, LEFT_OUT, seed=SEED)
    place = {name: n for n, name in enumerate(subject.encoded.ids)}

    def without(name: str) -> list[list[float]]:
        weights = np.ones(len(data.train))
        weights[place[name]] = 0
        return [toy.losses(toy.fit(weights, best), data.queries).tolist()]

    left_out = LeftOut(
        behaviour=asked.name,
        unit=asked.unit,
        queries=[query.name for query in asked.queries],
        document_ids=list(chosen),
        total=len(data.train),
        seeds=[0],
        full=[toy.losses(best, data.queries).tolist()],
        without=[without(name) for name in chosen],
    )
    judged = loo({"exact": scores, "random": random}, left_out)
    exact, chance = judged.of("exact"), judged.of("random")

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
    found = {
        "loo_pearson": (exact.pearson, ">= 0.98"),
        "loo_slope": (exact.slope, ""),
        "loo_random": (chance.pearson, ""),
        "lds_exact": (lds(scores, retrained).score, ">= 0.9"),
        "lds_exact_ggn": (lds(whole, retrained).score, ">= 0.9"),
        "lds_random": (lds(random, retrained).score, ""),
    }
    return {name: Figure(i.value, i.low, i.high, i.n, bar) for name, (i, bar) in found.items() if i is not None}
