"""Studying Large Language Model Generalization with Influence Functions (Grosse et al., 2023, arXiv:2308.03296).

Upweighting document n by eps moves the parameters to which training converges by ``-eps (G + lam I)^-1 grad L_n``, so
that a measurement m changes by

    score[q, n] = - <grad m_q, (G + lam I)^-1 grad L_n>                         (their equations 6 and 8)

with G the Gauss-Newton matrix in its EK-FAC approximation (George et al. 2018, arXiv:1806.03884): per matrix a
Kronecker product of eigenbases, and in it the second moments of documents' gradients. Positive = training more on the
document raises the measurement; removing it changes the measurement by about ``-score / number of documents``.

The queries are preconditioned, not the documents, and the mean of a behaviour's queries is taken before that unless a
score for each is asked for. Factors come from a sample of the documents that is as large as it needs to be, which the
notes state, eigenvalues from other documents than the eigenbases as far as there are others; labels are sampled from
the model, or all taken with their probabilities where outputs are few.

Deviations: their damping is 0.1 times the mean eigenvalue of each block, as here; their queries are low-rank by
option (rank 32), as here; they use the linear layers of MLPs only, here what the subject's ``parameters`` say. A bias
is a block of its own. Presets: K-FAC eigenvalues, the diagonal Fisher matrix, the optimiser's diagonal (below), and
``ekfac_checkpoints``: the scores at every checkpoint that the training kept, each row divided by its standard deviation
over documents, are averaged. At the end of training what a document taught has mostly been learnt and its gradient is
small; before, it is not. (The average over models is TRAK's, Park et al. 2023, arXiv:2303.14186; over the checkpoints
of one run it needs no other training.) ``ekfac_joint`` keeps the whole second-moment matrix of the largest entries of
all eigenbases (`curvature.joint`), which EK-FAC takes as uncorrelated; its damping has to be chosen:
after training by SGD ``damping = "recipe"`` does, after AdamW (what ``rootward train`` uses by default), where the
recipe says nothing of it, ``rootward compare``, which tunes it.

``curvature = "adam"`` (``adam_influence``) takes the diagonal from the optimiser instead of a pass: ``G = diag(v)``
with power -1, where v (``exp_avg_sq``, not corrected for bias) is the last checkpoint's: the estimate of the diagonal
Fisher matrix, where Adam's own preconditioner is ``1 / (sqrt(v) + eps)``. v is a running mean of squared gradients of
*steps*, of a batch's loss as the recipe divides it: for a mean over B independent documents about 1/B of the
documents' second moments. The damping is relative, so such a factor changes the scores' unit, not their ranking.

Exact when: inputs and output gradients are independent, at a minimum of a quadratic (the oracle test).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, model_validator
from scipy.stats import spearmanr
from torch import Tensor

from rootward.capture.curvatures import FitOptions, fitted, joined, kept_in
from rootward.capture.inputs import MethodInputs
from rootward.capture.sinks import LowRank, low_rank
from rootward.core.errors import InputError
from rootward.core.registry import Card, Need, Tuned, Work, register
from rootward.core.scores import Scores
from rootward.curvature.base import RELATIVE, Curvature, Damping
from rootward.curvature.kronecker import KroneckerCurvature

CARD = Card(
    key="ekfac_grosse2023",
    label="EK-FAC influence function",
    question="attribution",
    paper="Studying Large Language Model Generalization with Influence Functions",
    reference="arXiv:2308.03296",
    needs=("gradients",),
    cost="1 forward+backward per document without the weight gradients, and the factors from a sample of documents",
    unit="measurement per unit of loss weight",
    aliases=("ekfac", "influence"),
    presets={
        "kfac_influence": {"curvature": "kfac"},
        "diagonal_influence": {"curvature": "diagonal"},
        "adam_influence": {"curvature": "adam"},
        "ekfac_checkpoints": {"checkpoints": "all"},
        "ekfac_joint": {"joint": 1000, "damping": 10.0, "damping_scope": "whole"},
    },
    notes="ekfac_joint wants its damping chosen: by `rootward compare`, which tunes it, or after training by SGD with "
    "damping = 'recipe' (`rootward train` uses AdamW by default, after which that is refused)",
    several=True,
)


class Config(FitOptions):
    """Options; damping as in the paper. What begins with ``fit_`` decides how the factors are made."""

    TUNED: ClassVar = Tuned("damping", (0.001, 0.01, 0.1, 1.0, 10.0, 100.0))
    curvature: Literal["ekfac", "kfac", "diagonal", "adam"] = Field(
        default="ekfac", description="adam: the diagonal that the optimiser kept, its second moments; nothing is fitted"
    )
    damping: NonNegativeFloat | Literal["recipe"] = Field(
        default=RELATIVE,
        description="over the mean eigenvalue of a block; recipe: what training by SGD amounts to (weight decay + "
        "1/t), refused after AdamW: tune it there with `rootward compare`",
    )
    damping_scope: Literal["block", "whole"] = Field(
        default="block", description="whose mean eigenvalue: each block its own, or that of the whole layout"
    )
    joint: int = Field(default=0, ge=0, description="so many of the largest eigenbasis entries are taken jointly")
    queries: Literal["mean", "each"] = Field(
        default="mean", description="one score for the mean of the queries, or a score for each"
    )
    checkpoints: Literal["final", "all"] = Field(
        default="final", description="all: scores at each kept checkpoint over their spread, averaged"
    )
    rank: int | None = Field(default=None, ge=1, description="approximate preconditioned queries to this rank")
    folder: str | None = Field(default=None, description="keep the fitted curvature here, and read it from here")
    sensitivity: bool = Field(default=True, description="also rank with a tenth and ten times the damping, for a note")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.joint and (self.damping_scope != "whole" or self.curvature != "ekfac"):
            raise ValueError(
                f"joint: expected curvature = 'ekfac' and damping_scope = 'whole', got joint = {self.joint} with "
                f"curvature = {self.curvature!r} and damping_scope = {self.damping_scope!r}; use the preset "
                "ekfac_joint, or damping_scope = 'whole' with curvature = 'ekfac'"
            )
        idle = sorted(n for n in self.model_fields_set if n.startswith("fit_") or (n == "folder" and self.folder))
        if self.curvature == "adam" and idle:
            raise ValueError(f"curvature = 'adam' is not fitted, so {', '.join(idle)} has no meaning; leave it out")
        return self


def _damping(inputs: MethodInputs, config: Config, factor: float = 1.0) -> Damping:
    if config.damping == "recipe":
        return Damping(0.0, inputs.recipe_damping() * factor, config.damping_scope)
    return Damping(config.damping * factor, scope=config.damping_scope)


def _fitted(inputs: MethodInputs, config: Config, checkpoint: int | None) -> tuple[Curvature, str]:
    """The curvature at the present weights, and what to say of it."""
    if config.curvature == "adam":
        return _optimisers(inputs, config, checkpoint)
    fit = config.fit_config(config.curvature)
    folder = kept_in(config.folder, checkpoint)
    found = fitted(inputs, fit, _damping(inputs, config), folder)
    if not config.joint:
        return found.curvature, found.record.note
    joint = joined(inputs, fit, found, config.joint, folder)
    taken = len(joint.eigenvalues)
    note = f"{taken} entries of the eigenbasis jointly"
    if taken < config.joint:
        everything = taken == inputs.tracked.layout.size
        of_what = "all there are" if everything else "a quarter of the gradients there are (documents x labels)"
        note += f" in place of {config.joint}: {of_what}"
    return joint, "; ".join((found.record.note, note, *joint.notes))


def _optimisers(inputs: MethodInputs, config: Config, checkpoint: int | None) -> tuple[Curvature, str]:
    """The diagonal of Adam's second moments at a checkpoint, by default the last one, and where it is from.

    Raises `InputError` where none were kept for every attributed parameter.
    """
    subject, layout = inputs.subject, inputs.tracked.layout
    kept = subject.moments(-1 if checkpoint is None else checkpoint) if subject.checkpoints else None
    missing = layout.names if kept is None else [name for name in layout.names if name not in kept.second]
    if kept is None or missing:
        raise InputError(
            f"curvature = 'adam': expected the optimiser's second moments of {len(layout.names)} parameters beside the "
            f"checkpoint, none for {missing[0]}; train with optimiser = 'adamw' and checkpoints, or use "
            "curvature = 'diagonal'"
        )
    moments = {name: kept.second[name].to(subject.device) for name in layout.names}
    found = KroneckerCurvature.diagonal(layout, moments, _damping(inputs, config))
    dead = f"; no curvature in {len(found.dead)} parameters, first {found.dead[0]}" if found.dead else ""
    return found, f"diagonal of the optimiser's second moments (step {kept.step}){dead}"


def _places(inputs: MethodInputs, config: Config) -> list[int | None]:
    """The checkpoints to look at; None is the subject's own weights."""
    if config.checkpoints == "final":
        return [None]
    return list(range(len(inputs.checkpoint_rates("checkpoints = 'all'"))))


def _others(inputs: MethodInputs, config: Config) -> tuple[float, ...]:
    """Factors of the damping that the ranking is compared with; several behaviours have no ranking in common."""
    return (0.1, 10.0) if config.sensitivity and config.damping != 0 and not inputs.others else ()


def _asked(inputs: MethodInputs, config: Config) -> tuple[MethodInputs, dict[str, Tensor]]:
    """Gradients of the queries ``[q, *shape]``, and inputs of those parameters alone that they reach.

    A curvature that is kept in a folder is for any query, and one of a damping over the whole layout is of all of it.
    """
    dense = inputs.query_gradients(inputs.tracked.layout, mean=config.queries == "mean")
    if config.folder is not None or config.damping_scope == "whole" or config.curvature == "adam":
        return inputs, dense
    near = inputs.reached_by(dense)
    return near, {name: dense[name] for name in near.tracked.layout.names}


def _queries(inputs: MethodInputs, config: Config, curvature: Curvature, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """Preconditioned queries ``[q, *shape]``, then their mean with each of the other dampings."""
    found = curvature.apply(dense)
    others = _others(inputs, config)
    if others:
        mean = {name: value.mean(0, keepdim=True) for name, value in dense.items()}
        more = [curvature.apply(mean, -1.0, _damping(inputs, config, factor)) for factor in others]
        found = {name: torch.cat([value, *(m[name] for m in more)]) for name, value in found.items()}
    return found


def _reduced(queries: dict[str, Tensor], rank: int | None) -> dict[str, Tensor | LowRank]:
    if rank is None:
        return dict(queries)
    return {name: low_rank(g.flatten(2), rank) if g.dim() >= 3 else g for name, g in queries.items()}


def _rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def _sensitivity(values: Tensor, count: int, inputs: MethodInputs, config: Config) -> list[str]:
    """How well the ranking agrees with those of the other dampings, which stand below the ``count`` queries' rows."""
    others = _others(inputs, config)
    if not others or values.shape[1] < 3:
        return []
    mean = values[:count].mean(0).numpy()
    agreed: list[str] = []
    for factor, row in zip(others, values[count:], strict=True):
        if np.ptp(mean) > 0 and np.ptp(row.numpy()) > 0:
            agreed.append(f"{_rank_correlation(mean, row.numpy()):.3f} with {factor:g} times it")
    said = "of the recipe" if config.damping == "recipe" else f"{config.damping:.3g} of the mean eigenvalue"
    return [f"damping {said}; the ranking agrees to {', '.join(agreed)}"] if agreed else []


def _at(inputs: MethodInputs, config: Config, checkpoint: int | None) -> tuple[Tensor, list[str]]:
    """Scores ``[q, n]`` at the present weights, and what to say of them."""
    near, dense = _asked(inputs, config)
    curvature, note = _fitted(near, config, checkpoint)
    queries = _queries(near, config, curvature, dense)
    values = -near.products(_reduced(queries, config.rank), inputs.subject.encoded).dots
    count = len(values) - len(_others(inputs, config))
    where = "" if checkpoint is None else f"checkpoint {checkpoint}: "
    idle = len(inputs.tracked.layout.names) - len(near.tracked.layout.names)
    notes = [note + (f"; the queries reach none of {idle} other parameters" if idle else "")]
    return values[:count], [where + n for n in (*notes, *_sensitivity(values, count, inputs, config))]


def _spread(values: Tensor) -> Tensor:
    """Standard deviation over documents ``[q, 1]``; 1 where all scores are the same."""
    found = values.std(1, keepdim=True, correction=0)
    return torch.where(found > 0, found, 1.0)


def token_scores(inputs: MethodInputs, config: Config, positions: Sequence[int]) -> dict[int, np.ndarray]:
    """Token scores of the mean over queries, for documents at these positions: they sum to the score."""
    examples = [inputs.subject.encoded[n] for n in positions]
    places = _places(inputs, config)
    total: dict[int, np.ndarray] = {}
    for checkpoint in places:
        with inputs.holding(checkpoint):
            near, dense = _asked(inputs, config)
            curvature, _ = _fitted(near, config, checkpoint)
            if config.checkpoints == "all":
                scale = 1 / (_spread(_at(inputs, config, checkpoint)[0]) * len(places))
                dense = {n: g * scale.to(g).view(-1, *[1] * (g.dim() - 1)) for n, g in dense.items()}
            queries = curvature.apply(dense)
            sink = near.products(_reduced(queries, config.rank), examples, tokens=True)
        assert sink.by_token is not None
        for n, position in enumerate(positions):
            value = -sink.by_token[n].mean(0).numpy()
            total[position] = total[position] + value if position in total else value
    return total


def needs(config: Config, work: Work) -> Need:
    """The fit (of many documents it reads a sample) and the pass for the scores, at every checkpoint looked at."""
    fit = {"ekfac": 2, "kfac": 1, "diagonal": 1, "adam": 0}[config.curvature] + (config.joint > 0)
    places = max(1, work.checkpoints) if config.checkpoints == "all" else 1
    return Need((fit + 1) * places, memory_bytes=16 * config.joint**2)


@register(CARD, Config, tokens=token_scores, needs=needs)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """Scores of every usable document; one row for the mean of the queries, or one per query."""
    places = _places(inputs, config)
    total: Tensor | None = None
    notes: list[str] = []
    for checkpoint in places:
        with inputs.holding(checkpoint):
            values, found = _at(inputs, config, checkpoint)
        if config.checkpoints == "all":
            values = values / _spread(values) / len(places)
        total = values if total is None else total + values
        notes += found
    assert total is not None
    unit = "standard deviations over documents" if config.checkpoints == "all" else CARD.unit
    return inputs.scored(CARD, total, unit=unit, notes=notes)
