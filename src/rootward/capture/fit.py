"""Fit a curvature to a model and its documents: the passes, how many documents they need, and what came of it.

EK-FAC takes two passes over a *sample*. The first sums the covariances of inputs and output gradients; their
eigenvectors are the bases. The second sums squares of documents' gradients in those bases, the corrected
eigenvalues, in two halves. How much the two halves would disagree about scores tells how many documents are enough
(`agreement`), so that a model with a million documents costs no more than one with a thousand.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rootward.capture.fitparts import Parts
from rootward.capture.inputs import require_finite
from rootward.capture.moments import WIDEST, CovarianceSums, SecondMoments
from rootward.capture.precision import native_bfloat16
from rootward.capture.rescaling import Rescaled, Scale
from rootward.capture.run import predictions_of, run_pass
from rootward.capture.sinks import BaseSink, gradient_norms
from rootward.capture.sites import Tracked
from rootward.core.errors import InputError, NumericalError
from rootward.core.hashing import digest
from rootward.core.progress import Progress, silent
from rootward.core.records import Model
from rootward.curvature.agreement import Overlap, combined, needed, of_eigenvalues, of_side, reached
from rootward.curvature.base import DEFAULT, RELATIVE, Damping
from rootward.curvature.kronecker import Basis, Covariances, Eigenbases, KroneckerCurvature, flat
from rootward.subject.encode import Example
from rootward.subject.objectives import Objective
from rootward.subject.predictions import Labels, Predictions

FEW_OUTPUTS = 32
"""Up to this many outputs every label is taken with its probability instead of sampled ones."""
INPUTS, OUTPUTS = 128, 8
"""Tokens of the covariances' samples over the widest side: the inputs' count for more and cost less."""
Side = Literal["inputs", "outputs"]
FIRST = 64
"""Documents after which the halves are compared for the first time."""
SAMPLING = 2
"""Version of how documents are chosen for each statistic; part of a curvature's key."""


class FitConfig(Model):
    """How a curvature is fitted; part of its key. Unknown keys are errors."""

    kind: Literal["identity", "diagonal", "kfac", "ekfac"] = "ekfac"
    labels: Literal["auto", "data", "sampled", "exact"] = Field(
        default="auto",
        description="auto: exact for one target and few outputs, else sampled from the model; data: empirical",
    )
    draws: int = Field(default=1, ge=1, description="labels sampled per forward pass")
    covariance_documents: int | None = Field(
        default=None,
        ge=1,
        description="documents for the covariances; by default 128 tokens per entry of the widest side for "
        "inputs, which need no backward pass, and 8 for output gradients",
    )
    documents: int | None = Field(
        default=None, ge=1, description="documents for the eigenvalues; by default as many as `agreement` needs"
    )
    agreement: float = Field(
        default=0.98,
        gt=0,
        lt=1,
        description="wanted correlation of scores with those of eigenvalues without sampling error",
    )
    damping: float = Field(
        default=RELATIVE,
        ge=0,
        description="over a block's mean eigenvalue, in the estimate of the agreement; scores may be damped otherwise",
    )
    bf16: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: covariances and rotations of wide sides in bfloat16 where the processor has it",
    )
    seed: int = Field(default=0, ge=0)

    def quick(self, model: nn.Module) -> bool:
        """Whether wide products are in bfloat16: what ``bf16`` stands for with this model on this machine."""
        first = next(model.parameters())
        return self.bf16 == "auto" and first.dtype != torch.float64 and native_bfloat16(first.device)


class FitRecord(Model):
    """What a fit used, and how far its sampling can be felt: correlations of scores (see `curvature.agreement`).

    ``half_agreement`` is that of eigenvalues from two halves of the documents, ``label_agreement`` that of eigenvalues
    from two seeds of sampled labels, on half of the first `FIRST` of them. ``input_agreement`` is what the inputs'
    covariances allow, judged by one block of each shape; ``agreement`` puts it together with that of the eigenvalues
    from all sampled documents, as a correlation with scores from an endless sample. Errors of the output gradients'
    covariances, and of blocks that differ from the one looked at, are not in it. All at the fit's ``damping``; None
    where nothing was estimated. ``asked`` is the agreement that was asked for.
    """

    kind: str
    labels: str
    draws: int
    total_documents: int
    covariance_documents: int = 0
    covariance_tokens: int = 0
    documents: int = 0
    asked: float | None = None
    agreement: float | None = None
    label_agreement: float | None = None
    half_agreement: float | None = None
    input_agreement: float | None = None
    dead: tuple[str, ...] = ()
    jittered: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict[str, float])

    @property
    def note(self) -> str:
        """For people: what was used, how far the scores depend on it, and what can be done about that."""
        parts = [f"{self.kind} from {self.documents:,} of {self.total_documents:,} documents"]
        if self.covariance_documents:
            parts[0] += f", covariances from {self.covariance_documents:,} ({self.covariance_tokens:,} tokens)"
        labels = {"data": "the data's labels", "exact": "every label by its probability"}
        parts[0] += ", " + labels.get(self.labels, f"labels sampled from the model ({self.draws} a document)")
        if self.agreement is not None:
            parts.append(f"Estimated correlation with the scores of an endless sample: {self.agreement:.3f}")
            if self.asked is not None and self.agreement < self.asked:
                parts[-1] += f", below the {self.asked:g} asked for; {self._remedy}"
        if self.label_agreement is not None:
            seen = (min(self.documents, FIRST) + 1) // 2  # the first half's
            parts.append(
                f"Single scores depend on the sampled labels: two seeds' correlate at {self.label_agreement:.3f} on "
                f"{seen} document{'s' if seen > 1 else ''}"
            )
            if self.label_agreement < (self.asked or 1):
                parts[-1] += "; raise fit_draws for steadier ones (rankings may gain little)"
        if self.dead:
            parts.append(f"No curvature in {len(self.dead)} parameters, first {self.dead[0]}")
        if self.jittered:
            parts.append(f"Eigendecomposition only with a jitter: {', '.join(self.jittered)}")
        return ". ".join(parts)

    @property
    def _remedy(self) -> str:
        """What raises the agreement."""
        short = ["fit_documents"] if self.documents < self.total_documents else []
        if 0 < self.covariance_documents < self.total_documents:
            short.append("fit_covariance_documents")
        return f"raise {' and '.join(short)}" if short else "these are as many documents as there are"


def _last_target(example: Example) -> Example:
    """The same inputs, with a single target: where only inputs are looked at, the output head has less to do."""
    if example.targets < 2:
        return example
    trained = torch.zeros_like(example.trained)
    trained[int(example.trained.nonzero()[-1])] = True
    return replace(example, trained=trained, targets=1)


@dataclass(frozen=True)
class Fitted:
    """A curvature and how it was fitted."""

    curvature: KroneckerCurvature
    record: FitRecord


@dataclass(frozen=True)
class Fit:
    """All that a fit reads. ``examples`` are sampled from; nothing is kept between calls but ``parts`` on disk.

    ``damping`` is what the curvature has by default; no number depends on it. With ``scales`` the curvature is that of
    rescaled gradients (`capture.rescaling`).
    """

    model: nn.Module
    objective: Objective
    examples: Sequence[Example]
    tracked: Tracked
    config: FitConfig
    damping: Damping = DEFAULT
    token_budget: int | None = None
    progress: Progress = silent
    parts: Parts | None = None
    scales: Mapping[str, Scale] | None = None

    def run(self) -> Fitted:
        """Fit.

        Raises:
            InputError: no documents, or labels = "exact" for documents with several targets.
            NumericalError: a loss, a covariance or an eigendecomposition that is not finite; the message names it.
        """
        if not len(self.examples):
            raise InputError("curvature: expected at least one document, got none")
        if self.config.kind == "identity":
            record = FitRecord(kind="identity", labels="data", draws=1, total_documents=len(self.examples))
            return Fitted(KroneckerCurvature.identity(self.tracked.layout), record)
        labels = self.labels()
        record = FitRecord(
            kind=self.config.kind, labels=labels.kind, draws=labels.draws, total_documents=len(self.examples)
        )
        return self._diagonal(labels, record) if self.config.kind == "diagonal" else self._kronecker(labels, record)

    def labels(self) -> Labels:
        """The labels that "auto" stands for here."""
        kind = self.config.labels
        if kind == "auto":
            predictions = self._predictions()
            one = len(predictions.documents) == 1 and all(e.targets == 1 for e in self.examples)
            kind = "exact" if one and predictions.outputs.shape[1] <= FEW_OUTPUTS else "sampled"
        return Labels(kind, self.config.draws if kind == "sampled" else 1, self.config.seed)

    def _predictions(self) -> Predictions:
        """Of the shortest document."""
        return predictions_of(self.model, self.objective, min(self.examples, key=lambda e: e.length))

    def _order(self) -> list[int]:
        """The documents in the order in which they are sampled: by a hash of seed and id, wherever they stand.

        Copies come after all others: side by side they would be in both halves, which would then agree too well.
        """
        seen, keys = Counter[str](), list[tuple[int, str]]()
        for example in self.examples:
            keys.append((seen[example.id], digest(f"{self.config.seed}|{example.id}")))
            seen[example.id] += 1
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _covariance_sample(self, order: list[int], per_width: int) -> list[int]:
        """The first documents of the order: as many as asked for, or as hold the tokens needed."""
        if self.config.covariance_documents is not None:
            return order[: self.config.covariance_documents]
        layout = self.tracked.layout
        # a table's side of one-hot inputs has no basis to be found, nor has one that is too wide
        sides = [width for name in layout.names for width in flat(layout, name)[self._is_table(name) :]]
        wanted, tokens = per_width * max((width for width in sides if width <= WIDEST), default=1), 0
        for count, n in enumerate(order, 1):
            tokens += self.examples[n].length
            if tokens >= wanted and count >= min(FIRST, len(order)):
                return order[:count]
        return order

    def _is_table(self, name: str) -> bool:
        modules = [site.module for site in self.tracked.sites if name in site.params.values()]
        return all(isinstance(module, nn.Embedding) for module in modules)

    def sample(self, documents: int | None) -> list[int]:
        """The first ``documents`` of the order in which they are sampled; all by default."""
        return self._order()[:documents]

    def labels_per_document(self, labels: Labels) -> int:
        """Gradients that a document has with these labels: draws, or as many as there are outputs."""
        if labels.kind != "exact":
            return labels.draws
        return self._predictions().outputs.shape[1]

    def feed(self, rows: Sequence[int], sinks: Sequence[BaseSink], labels: Labels, task: str) -> None:
        """A pass over these documents with these labels, in the fit's coordinates."""
        examples = [self.examples[n] for n in rows]
        if not any(sink.backward for sink in sinks):
            examples = [_last_target(example) for example in examples]
        run_pass(
            self.model,
            self.objective,
            examples,
            sinks if self.scales is None else [Rescaled(sink, self.scales) for sink in sinks],
            tracked=self.tracked,
            token_budget=self.token_budget,
            progress=self.progress,
            task=task,
            labels=labels,
        )

    def _kronecker(self, labels: Labels, record: FitRecord) -> Fitted:
        order, seconds, began = self._order(), dict[str, float](), time.perf_counter()
        sample, few = self._covariance_sample(order, INPUTS), self._covariance_sample(order, OUTPUTS)
        halves, outputs = self._covariances(few, sample[len(few) :], labels)
        sums = CovarianceSums(self.tracked.layout)
        for part in (*halves, outputs):
            sums.merge(part)
        self._require_finite(sums.sums, sample)
        seconds["covariances"] = time.perf_counter() - began
        began = time.perf_counter()
        dtype = next(self.model.parameters()).dtype
        bases = Eigenbases.of(sums.result(), torch.float64 if dtype == torch.float64 else torch.float32)
        seconds["eigenvectors"] = time.perf_counter() - began
        began = time.perf_counter()
        inputs = self._input_agreement(bases, halves) if len(halves) == 2 else None
        seconds["error estimate"] = time.perf_counter() - began
        tokens = max((sums.tokens[key] for key in sums.tokens), default=0)
        record = record.model_copy(
            update={
                "covariance_documents": len(sample),
                "covariance_tokens": tokens,
                "documents": len(few),
                "input_agreement": inputs,
                "jittered": bases.jittered,
                "seconds": seconds,
            }
        )
        if self.config.kind == "kfac":
            curvature = bases.kfac(self.damping)
            return Fitted(curvature, record.model_copy(update={"dead": curvature.dead}))
        each = {name: bases.basis(name) for name in self.tracked.layout.names}
        # squares along axes that were fitted to the same documents are biased: other documents come first
        others = order[len(sample) :] + order[len(few) : len(sample)] + order[: len(few)]
        eigenvalues, record = self._moments(each, labels, others, record)
        curvature = bases.corrected(eigenvalues, self.damping)
        return Fitted(curvature, record.model_copy(update={"dead": curvature.dead}))

    def _covariances(
        self, few: list[int], others: list[int], labels: Labels
    ) -> tuple[list[CovarianceSums], CovarianceSums]:
        """Sums of the inputs of all documents, in two halves, and of the output gradients of a ``few`` of them.

        The few have their inputs summed in the pass that has their output gradients.
        """
        outputs, halves = self._sums("outputs"), [self._sums("inputs") for _ in few[:2]]
        for k, half in enumerate(halves):
            both = self._summed(("outputs", "inputs"), few[k::2], f"few-{k}", labels, "covariances")
            outputs.merge(both[0])
            half.merge(both[1])
            if others[k::2]:
                more = self._summed(("inputs",), others[k::2], f"others-{k}", Labels(), "covariances of inputs")
                half.merge(more[0])
        return halves, outputs

    def _sums(self, side: Side) -> CovarianceSums:
        return CovarianceSums(self.tracked.layout, side, quick=self.config.quick(self.model))

    def _summed(
        self, sides: Sequence[Side], rows: list[int], name: str, labels: Labels, task: str
    ) -> list[CovarianceSums]:
        """Sums of these sides from one pass over these documents, or from disk where it was finished before."""
        parts, names = self.parts, [f"{side}-{name}" for side in sides]
        sums = [self._sums(side) for side in sides]
        if parts is not None:
            if all([parts.load_covariances(*each) for each in zip(names, sums, strict=True)]):
                return sums
            sums = [self._sums(side) for side in sides]  # only one of them may have been there
        self.feed(rows, sums, labels, task)
        if parts is not None:
            for each in zip(names, sums, strict=True):
                parts.save_covariances(*each)
        return sums

    def _require_finite(self, sums: Mapping[str, Tensor], rows: list[int]) -> None:
        """Name the document whose gradient is not finite: its loss was, or the pass would have said so."""
        bad = [name for name, value in sums.items() if not bool(torch.isfinite(value).all())]
        if not bad:
            return
        sink = gradient_norms(self.tracked.layout, len(rows), next(self.model.parameters()).device)
        self.feed(rows, [sink], Labels(), "looking for the document")
        assert sink.squared is not None
        require_finite(sink.squared, [self.examples[n] for n in rows], "gradients")
        raise NumericalError(
            f"{bad[0]} is not finite, although each document's gradient at its own labels is; load the model with "
            "dtype float32, or fit with the data's labels (fit_labels = 'data')"
        )

    def _input_agreement(self, bases: Eigenbases, halves: list[CovarianceSums]) -> float:
        """Correlation with an endless sample's scores that the inputs' covariances allow.

        Judged by the first block of each shape, one of its sides at a time; output gradients are taken as known.
        """
        first, second = (half.result() for half in halves)
        covariances, kfac = bases.covariances, bases.kfac(Damping(self.config.damping))
        total, seen = Overlap(), set[tuple[int, ...]]()
        for name in self.tracked.layout.names:
            shape = self.tracked.layout.shape(name)
            sides = [(key, other) for key, other in self._sides(name, covariances) if key in halves[0].sums]
            if shape in seen or not sides or sides[0][0] not in halves[1].sums:
                continue
            key, other = sides[0]
            a, b = first.sides[key].moment, second.sides[key].moment
            if a.dim() == 2 and other is not None:
                seen.add(shape)
                scaled = bases.values[other].to(a) * covariances.tokens[name]
                total += of_side(a, b, scaled, kfac.lam(name))
        return reached(total.correlation)

    @staticmethod
    def _sides(name: str, covariances: Covariances) -> list[tuple[str, str | None]]:
        left, right = covariances.left[name], covariances.right[name]
        return [(key, other) for key, other in ((left, right), (right, left)) if key is not None]

    def _diagonal(self, labels: Labels, record: FitRecord) -> Fitted:
        layout = self.tracked.layout
        moments, record = self._moments({name: (None, None) for name in layout.names}, labels, self._order(), record)
        shaped = {name: value.reshape(layout.shape(name)) for name, value in moments.items()}
        curvature = KroneckerCurvature.diagonal(layout, shaped, self.damping)
        return Fitted(curvature, record.model_copy(update={"dead": curvature.dead}))

    def _moments(
        self, bases: Mapping[str, Basis], labels: Labels, order: list[int], record: FitRecord
    ) -> tuple[dict[str, Tensor], FitRecord]:
        """Second moments in the bases, from as many documents as it takes."""
        began, damping, layout = time.perf_counter(), Damping(self.config.damping), self.tracked.layout
        wanted = len(order) if self.config.documents is None else min(self.config.documents, len(order))
        total = self._squares(bases)
        done, end, half, twin = 0, min(wanted, FIRST), None, None
        while done < end:
            total.merge(self._part(bases, labels, order, done, end))
            if done == 0 and labels.kind == "sampled":
                # the first half's documents with other labels: what sampling them alone changes
                same, others = order[:end:2], replace(labels, seed=labels.seed + 1)
                other = self._part(bases, others, same, 0, len(same), "labels")
                twin = of_eigenvalues(layout, total.group(0), other.result(), damping)
            done = end
            half = of_eigenvalues(layout, total.group(0), total.group(1), damping)
            fixed = self.config.documents is not None
            end = wanted if fixed else min(wanted, max(done, needed(half, done, self.config.agreement)))
        sure = None if half is None or done < 4 else reached(half)
        if sure is not None and record.input_agreement is not None:
            sure = combined(sure, record.input_agreement)
        found = {
            "documents": done,
            "asked": self.config.agreement,
            "half_agreement": half,
            "label_agreement": twin,
            "agreement": sure,
            "seconds": {**record.seconds, "eigenvalues": time.perf_counter() - began},
        }
        self._require_finite(total.sums, order[:done])
        return total.result(), record.model_copy(update=found)

    def _squares(self, bases: Mapping[str, Basis]) -> SecondMoments:
        return SecondMoments(self.tracked.layout, bases, groups=2, quick=self.config.quick(self.model))

    def _part(
        self,
        bases: Mapping[str, Basis],
        labels: Labels,
        order: list[int],
        first: int,
        last: int,
        name: str = "moments",
    ) -> SecondMoments:
        """Squares of sampled documents first to last, read from disk where they were finished before."""
        part = self._squares(bases)
        if self.parts is None or not self.parts.load_moments(part, first, last, name):
            self.feed(order[first:last], [part], labels, "eigenvalues")
            if self.parts is not None:
                self.parts.save_moments(part, first, last, name)
        return part
