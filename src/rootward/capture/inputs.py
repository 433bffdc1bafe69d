"""What an attribution method is given, and the few passes that most of them share."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rootward.capture.run import Sink, probe, run_pass
from rootward.capture.sinks import LowRank, Products, WeightedSum, gradient_norms
from rootward.capture.sites import Tracked, track
from rootward.capture.store import GradientStore
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.core.layout import ParamLayout
from rootward.core.progress import Progress, silent
from rootward.core.records import Coverage
from rootward.core.registry import Card
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.encode import Example
from rootward.subject.subject import Subject

START = -1
"""In place of a checkpoint's number: the weights that training began from."""


@dataclass
class MethodInputs:
    """A subject, what is asked about, and how to run; ``store`` is an index to read instead of a pass."""

    subject: Subject
    behaviour: Behaviour
    token_budget: int | None = None
    store: GradientStore | None = None
    progress: Progress = silent
    fits: dict[str, Any] = field(default_factory=dict[str, Any])
    """Curvatures that were fitted with these inputs, by key (`capture.curvatures`)."""

    others: tuple[Behaviour, ...] = ()
    """Further behaviours, whose queries' rows stand below those of ``behaviour`` and share its passes; see `apart`."""

    @cached_property
    def tracked(self) -> Tracked:
        """The parameters to attribute, measured on a small batch."""
        return tracked_of(self.subject)

    @property
    def likeness(self) -> float:
        """Sign of "documents like the answer raise the measurement": -1 for a loss, which they lower; else 1."""
        return -1.0 if self.behaviour.kind == "loss" else 1.0

    @property
    def behaviours(self) -> tuple[Behaviour, ...]:
        """All that is asked about."""
        return (self.behaviour, *self.others)

    @property
    def query_names(self) -> tuple[str, ...]:
        """Names of the queries, behind their behaviour's where there are several."""
        if not self.others:
            return tuple(q.name for q in self.behaviour.queries)
        return tuple(f"{behaviour.name}: {q.name}" for behaviour in self.behaviours for q in behaviour.queries)

    def about(self, *behaviours: Behaviour) -> MethodInputs:
        """The same with other behaviours; what was fitted and measured is shared."""
        twin = replace(self, behaviour=behaviours[0], others=behaviours[1:])
        return self._sharing(twin, self.tracked)

    def reached_by(self, gradients: Mapping[str, Tensor]) -> MethodInputs:
        """The same with the parameters alone that some query's gradient reaches: above a concept's layer none does."""
        names = [name for name, value in gradients.items() if bool(value.any())]
        if not names or len(names) == len(self.tracked.layout.names):
            return self
        return self._sharing(replace(self), self.tracked.only(frozenset(names).__contains__))

    @staticmethod
    def _sharing(twin: MethodInputs, tracked: Tracked) -> MethodInputs:
        twin.__dict__["tracked"] = tracked  # measured before; a twin would measure it again
        return twin

    def apart(self, scores: Scores) -> list[Scores]:
        """The scores of each behaviour, of those of all (`scored`)."""
        each, start, found = len(scores.values) == len(self.query_names), 0, list[Scores]()
        for behaviour in self.behaviours:
            each_row = each or len(behaviour) == 1
            names = tuple(q.name for q in behaviour.queries) if each_row else ("mean",)
            rows = scores.values[start : start + len(names)]
            found.append(replace(scores, values=rows, queries=names, behaviour=behaviour.name, goal=behaviour.goal))
            start += len(names)
        return found

    def scored(
        self,
        card: Card,
        values: Tensor | NDArray[np.floating],
        *,
        unit: str | None = None,
        gradients: bool = True,
        notes: Sequence[str] = (),
    ) -> Scores:
        """What a method returns, from its values alone.

        Args:
            card: the method's.
            values: ``[q, n]`` with a row per query or, where the method took their mean, one; or ``[n]`` where the
                query plays no part. Columns are the usable documents.
            unit: by default the card's.
            gradients: whether parameters were looked at, for the coverage.
            notes: for the reader of the result.
        """
        encoded = self.subject.encoded
        found = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        each = found.ndim == 2 and len(found) == len(self.query_names)
        means = tuple(behaviour.name for behaviour in self.behaviours) if self.others else ("mean",)
        if len(set(encoded.ids)) == 1:
            notes = (*notes, "one document: there is nothing to rank")
        return Scores(
            values=np.atleast_2d(found).astype(np.float32),
            queries=self.query_names if each else means,
            document_ids=encoded.ids,
            rows=encoded.rows,
            method=card.key,
            unit=unit or card.unit,
            behaviour=self.behaviour.name,
            goal=self.behaviour.goal,
            coverage=self.coverage(gradients=gradients),
            notes=tuple(notes),
        )

    def holding(self, checkpoint: int | None) -> AbstractContextManager[object]:
        """The subject's model with the weights of a checkpoint, of the `START`, or (None) as it is."""
        if checkpoint is None:
            return nullcontext()
        return self.subject.at_start() if checkpoint == START else self.subject.at_checkpoint(checkpoint)

    def checkpoint_rates(self, option: str, *, average: bool = False) -> list[float]:
        """The learning rate of the step that each of the subject's checkpoints ends; all 1 where no recipe is known.

        ``average``: the mean rate of all steps since the checkpoint before. ``option`` is how the errors call what
        asked for checkpoints.

        Raises:
            InputError: the subject has no checkpoints. ArtefactError: the recipe makes fewer of these documents.
        """
        subject = self.subject
        if not subject.checkpoints:
            raise InputError(
                f"{option}: the subject has none; train it with checkpoints = 3 in the recipe, or use the final weights"
            )
        recipe = subject.recipe
        if recipe is None:
            return [1.0] * len(subject.checkpoints)
        total = recipe.steps(len(subject.encoded))
        # the rate just before the checkpoint: at the very end a decayed schedule is at zero
        ends = recipe.checkpoint_steps(total)
        first = [0, *ends[:-1]] if average else [max(step - 1, 0) for step in ends]
        spans = [range(start, max(end, 1)) for start, end in zip(first, ends, strict=True)]
        rates = [sum(recipe.rate(step, total) for step in span) / len(span) for span in spans]
        if len(rates) < len(subject.checkpoints):
            raise ArtefactError(
                f"{option}: with these documents the recipe makes {len(rates)} checkpoints, the subject has "
                f"{len(subject.checkpoints)}; give the documents that it was trained on, or use 'final'"
            )
        return rates[: len(subject.checkpoints)]  # a training that was stopped has the first ones

    def feed(self, sinks: Sequence[Sink], examples: Sequence[Example], task: str) -> None:
        """One pass of the model, with the weights that it has now, over the examples with their own labels.

        ``task`` is its name in progress reports; errors are those of `run_pass`. Parameters are measured
        (`MethodInputs.tracked`) only if a sink wants their factors: forward passes alone need none.
        """
        factored = any(sink.backward or sink.inputs for sink in sinks)
        run_pass(
            self.subject.model,
            self.subject.objective,
            examples,
            sinks,
            tracked=self.tracked if factored else None,
            token_budget=self.token_budget,
            progress=self.progress,
            task=task,
        )

    def products(
        self,
        queries: Mapping[str, Tensor | LowRank],
        examples: Sequence[Example],
        *,
        norms: bool = False,
        tokens: bool = False,
    ) -> Products:
        """A pass over the examples with `Products` of their gradients with the queries."""
        sink = Products(self.tracked.layout, queries, len(examples), norms=norms, tokens=tokens)
        self.feed([sink], examples, "token scores" if tokens else "documents")
        require_finite(sink.dots.T, examples, "products with the queries")
        return sink

    def require_finite_sums(self, sums: Iterable[Tensor], what: str) -> None:
        """`NumericalError` where a sum over all documents is not finite; another pass finds the document to name."""
        if all(bool(torch.isfinite(value).all()) for value in sums):
            return
        examples = self.subject.encoded
        sink = gradient_norms(self.tracked.layout, len(examples), self.subject.device)
        self.feed([sink], examples, "looking for the document")
        assert sink.squared is not None
        require_finite(sink.squared, examples, "gradients")
        raise NumericalError(
            f"{what} are not finite, although each document's gradient is; load the model with float32"
        )

    def per_document(self) -> float:
        """What the recipe divides a document's loss by, beside their number: the mean trained tokens, or 1."""
        recipe, encoded = self.subject.recipe, self.subject.encoded
        token = recipe is not None and recipe.reduction == "token"
        return encoded.trained_tokens / len(encoded) if token else 1.0

    def training_time(self, first: int = 0, last: int | None = None) -> float:
        """The learning rates of steps ``first`` to ``last`` summed; SGD's momentum makes its steps that much longer.

        Raises `InputError` where no recipe is known.
        """
        recipe = self.subject.recipe
        if recipe is None:
            raise InputError(f"{self.subject.name} has no recipe, so the length of its training is not known")
        total = recipe.steps(len(self.subject.encoded))
        rates = sum(recipe.rate(step, total) for step in range(first, total if last is None else last))
        # AdamW divides by the gradient's size, whatever the momentum; SGD's buffer adds steps up
        return rates if recipe.optimiser == "adamw" else rates / (1 - recipe.momentum)

    def recipe_damping(self) -> float:
        """Damping that a training by SGD has by itself: weight decay, and one over its length.

        Gradient descent for a time t answers a curvature s with ``(1 - exp(-t s)) / s``, which is t for small and 1/s
        for large s, as ``1 / (s + 1/t)`` is. In units of losses summed over a document.

        Raises `InputError` for AdamW, whose steps are not those of plain coordinates, and where no recipe is known.
        """
        recipe, time = self.subject.recipe, self.training_time()
        if recipe is None or recipe.optimiser != "sgd" or time <= 0:
            raise InputError(
                "damping = 'recipe': expected a recipe with optimiser = 'sgd'; give a number (`rootward compare` tunes "
                "it), or use source_bae2024, which follows AdamW"
            )
        return (recipe.weight_decay + 1 / time) * self.per_document()

    def coverage(self, *, gradients: bool) -> Coverage:
        """What was seen of the model (where gradients are used) and of the documents."""
        return coverage_of(self.subject, self.tracked if gradients else None)

    @cached_property
    def queries_fit(self) -> bool:
        """Whether a gradient for each query takes at most half of the free memory.

        Asked once, so that everything made of the same inputs (scores, their token scores) goes the same way.
        """
        return len(self.query_names) == 1 or self._query_bytes <= 0.5 * free_memory(self.subject.device)

    @property
    def _query_bytes(self) -> int:
        return len(self.query_names) * self.tracked.layout.size * 4

    @property
    def queries_need(self) -> str:
        """What a gradient for each query takes, in words."""
        return f"the gradients of {len(self.query_names)} queries need {self._query_bytes / 1e9:.3g} GB one by one"

    def query_gradients(self, layout: ParamLayout, *, mean: bool) -> dict[str, Tensor]:
        """Gradients of the measurement ``[q, *shape]`` for every parameter; ``mean``: of its mean over queries, q = 1.

        Of several behaviours the rows follow one another.

        Raises:
            InputError: they would not fit in memory one by one; the message says what would.
        """
        count = len(self.behaviour)
        if not mean and not self.queries_fit:
            raise InputError(
                f"{self.queries_need}, more than half of what is free; take their mean (--option "
                "gradient_dot.queries=mean, with the method's own name; options={'queries': 'mean'}), or attribute "
                "fewer parameters with `parameters`"
            )
        if self.others:
            every = [self.about(behaviour).query_gradients(layout, mean=mean) for behaviour in self.behaviours]
            return {name: torch.cat([found[name] for found in every]) for name in layout.names}
        if self.behaviour.kind == "scalar":
            return self._scalar_gradients(layout, mean=mean)
        parts = self.behaviour.parts(self.subject.objective)
        weights = torch.zeros(len(parts), 1 if mean else count, dtype=torch.float64)
        for n, part in enumerate(parts):
            weights[n, 0 if mean else part.query] = part.weight / (count if mean else 1)
        dtype = next(self.subject.model.parameters()).dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sink = WeightedSum(layout, weights.to(wide), wide)
        self.feed([sink], [part.example for part in parts], "queries")
        return sink.result()

    def plain_gradients(self, layout: ParamLayout, *, mean: bool) -> dict[str, Tensor]:
        """`query_gradients` of any parameters by plain autograd, a backward pass per query: none has to be tracked.

        Raises:
            NumericalError: a query's loss is not finite. InputError: see `query_gradients`.
        """
        if self.behaviour.kind == "scalar":
            return self._scalar_gradients(layout, mean=mean)
        subject, count = self.subject, len(self.behaviour)
        parts = self.behaviour.parts(subject.objective)
        with differentiable(subject.model, layout) as wanted:
            rows = [torch.zeros(1 if mean else count, *p.shape, dtype=p.dtype, device=p.device) for p in wanted]
            for q in range(count):
                own = [part for part in parts if part.query == q]
                losses = subject.objective.losses(
                    subject.model, subject.objective.collate([part.example for part in own], subject.device)
                )
                bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
                if bad:
                    raise NumericalError(
                        f"query {self.behaviour.queries[q].name!r}: the loss of its document {own[bad[0]].example.id} "
                        "is not finite; look at the model's weights"
                    )
                weights = torch.tensor([part.weight / (count if mean else 1) for part in own]).to(losses)
                found = torch.autograd.grad(losses @ weights, wanted, allow_unused=True)
                for row, value in zip(rows, found, strict=True):
                    if value is not None:
                        row[0 if mean else q] += value
        return dict(zip(layout.names, rows, strict=True))

    def _scalar_gradients(self, layout: ParamLayout, *, mean: bool) -> dict[str, Tensor]:
        """Autograd of a function of the model, one backward pass per value (one in all for the mean)."""
        function, name = self.behaviour.function, self.behaviour.name
        assert function is not None
        with differentiable(self.subject.model, layout) as wanted:
            values = function(self.subject.model).flatten()
            if len(values) != len(self.behaviour):
                raise InputError(
                    f"behaviour {name!r}: expected {len(self.behaviour)} values, one per query, got {len(values)}"
                )
            if not bool(torch.isfinite(values.detach()).all()):
                raise NumericalError(f"behaviour {name!r}: expected finite values, got {values.detach().tolist()[:4]}")
            if not values.requires_grad:
                raise InputError(f"behaviour {name!r}: its function depends on no attributed parameter")
            targets = [values.mean()] if mean else list(values)
            rows = [
                torch.autograd.grad(value, wanted, retain_graph=q + 1 < len(targets), allow_unused=True)
                for q, value in enumerate(targets)
            ]
        return {
            name: torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows])
            for k, (name, p) in enumerate(zip(layout.names, wanted, strict=True))
        }


@contextmanager
def differentiable(model: nn.Module, layout: ParamLayout) -> Generator[list[Tensor]]:
    """The layout's parameters, alone requiring gradients, in a model in evaluation mode; all as before afterwards."""
    named = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in named.items()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for name, p in named.items():
            p.requires_grad_(name in layout.sizes)
        with torch.enable_grad():
            yield [named[name] for name in layout.names]
    finally:
        for name, p in named.items():
            p.requires_grad_(flags[name])
        for module, mode in modes:
            module.training = mode


def require_finite(values: Tensor, examples: Sequence[Example], what: str) -> None:
    """`NumericalError` that names the first document (a row of ``values``) with an entry that is not finite."""
    bad = (~torch.isfinite(values).reshape(len(examples), -1).all(1)).nonzero().flatten().tolist()
    if bad:
        first = examples[bad[0]]
        raise NumericalError(
            f"the {what} of {len(bad)} documents are not finite, first document {first.id} (row {first.row}); look at "
            "that document's gradient, load the model with dtype float32, or leave such documents out (skip_not_finite)"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken now: of the graphics card, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def tracked_of(subject: Subject) -> Tracked:
    """The parameters of a subject that are attributed: those seen to have per-document gradients."""
    return probe(subject.model, subject.objective, subject.encoded, track(subject.model, subject.parameters))


def has_text(subject: Subject) -> bool:
    """Whether there is text in the documents; those of a supervised objective, ``{"x", "y"}``, have none."""
    return any(document.text for document in subject.documents)


def coverage_of(subject: Subject, tracked: Tracked | None) -> Coverage:
    """Shares of parameters, documents and tokens that a method sees; uncovered parameters summed up by module kind."""
    encoded = subject.encoded
    total = sum(p.numel() for p in subject.model.parameters())
    uncovered: dict[str, int] = {}
    for name, size in (tracked.uncovered if tracked is not None else {}).items():
        kind = _kind(name)
        uncovered[kind] = uncovered.get(kind, 0) + size
    return Coverage(
        parameters=total,
        covered=tracked.covered if tracked is not None else 0,
        uncovered=uncovered,
        documents=len(subject.documents),
        used=len(encoded),
        dropped={**subject.documents.skipped, **encoded.dropped},
        truncated=encoded.truncated,
        duplicates=subject.documents.duplicates,
        tokens=encoded.tokens,
        trained_tokens=encoded.trained_tokens,
    )


def _kind(name: str) -> str:
    """A parameter's name without the layer number, so that equal parameters of all layers are one line."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def plain_pass_seconds(subject: Subject, tracked: Tracked, token_budget: int, sample: int = 64) -> float:
    """Seconds of one plain forward+backward pass (B1) over the subject's documents, from a sample spread over lengths.

    B1 is what training pays: the same batches, gradients of the attributed weights. It is timed on ``sample`` documents
    (the second of two runs) and scaled by tokens.
    """
    from rootward.capture.batching import batches

    encoded = subject.encoded
    order = np.argsort([e.length for e in encoded], kind="stable")
    chosen = [encoded[int(n)] for n in order[np.linspace(0, len(order) - 1, min(sample, len(order))).astype(int)]]
    seconds = 0.0
    with differentiable(subject.model, tracked.layout) as wanted:
        for _ in range(2):
            start = time.perf_counter()
            for positions in batches(chosen, token_budget):
                batch = subject.objective.collate([chosen[n] for n in positions], subject.device)
                torch.autograd.grad(subject.objective.losses(subject.model, batch).sum(), wanted, allow_unused=True)
            if subject.device.type == "cuda":
                torch.cuda.synchronize(subject.device)
            seconds = time.perf_counter() - start
    return seconds * encoded.tokens / max(sum(e.length for e in chosen), 1)
