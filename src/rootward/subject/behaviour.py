"""What is asked about: queries, and a differentiable number for each.

    contrast   log p(wanted | prompt) - log p(unwanted | prompt), in nats, above 0 where it shows; raise
    loss       -log p(wanted | prompt), in nats; lower
    scalar     any differentiable function of the model, one value per query

The last word is the goal: which direction is more of the behaviour.

The first two are weighted sums of losses (`Behaviour.parts`), so that every room that can take a loss can
take them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rootward.core.errors import InputError, NumericalError
from rootward.core.hashing import digest_json
from rootward.core.records import Query
from rootward.subject.documents import Document, content_id
from rootward.subject.objectives import Objective
from rootward.subject.queries import FORM, Part, QueryItem, as_document, parse_query, query_from_documents
from rootward.subject.reading import read_jsonl

Kind = Literal["contrast", "loss", "scalar"]
Goal = Literal["raise", "lower"]


def rate(values: NDArray[np.floating[Any]]) -> float:
    """Habit rate: share of queries whose contrast is above 0."""
    return float(np.mean(np.asarray(values) > 0))


class Behaviour:
    """Queries and how each is measured. ``goal`` says which direction is more of the behaviour."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        queries: Sequence[QueryItem],
        *,
        goal: Goal,
        unit: str = "nats",
        description: str = "",
        function: Callable[[nn.Module], Tensor] | None = None,
    ) -> None:
        if not queries:
            raise InputError(f"behaviour {name!r}: expected at least one query, got none")
        for query in queries:
            if kind == "contrast" and content_id(query.content(True)) == content_id(query.content(False)):
                raise InputError(f"query {query.name!r}: wanted and unwanted are the same, so the contrast is always 0")
        self.kind: Kind = kind
        self.goal: Goal = goal
        self.name, self.unit, self.description = name, unit, description
        self.queries: tuple[QueryItem, ...] = tuple(queries)
        self.function = function
        self._parts: WeakKeyDictionary[Objective, tuple[Part, ...]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        return f"Behaviour({self.name!r}, {self.kind}, {len(self)} queries)"

    @classmethod
    def contrast(
        cls,
        name: str,
        items: Sequence[QueryItem | Mapping[str, Any]] | None = None,
        *,
        wanted: Sequence[Document | Mapping[str, Any]] | None = None,
        unwanted: Sequence[Document | Mapping[str, Any]] | None = None,
        description: str = "",
    ) -> Behaviour:
        """Contrast log p(wanted) - log p(unwanted) of queries, or of documents paired by place."""
        if items is not None:
            queries = [parse_query(item, f"query {n}", n) for n, item in enumerate(items)]
            if any(query.unwanted is None for query in queries):
                raise InputError(f"behaviour {name!r}: a contrast needs an unwanted answer in every query")
            return cls(name, "contrast", queries, goal="raise", description=description)
        if wanted is None or unwanted is None or len(wanted) != len(unwanted):
            sizes = [0 if part is None else len(part) for part in (wanted, unwanted)]
            raise InputError(
                f"behaviour {name!r}: expected as many wanted as unwanted documents, got {sizes[0]} and {sizes[1]}"
            )
        pairs = [
            (as_document(a, n, "wanted"), as_document(b, n, "unwanted"))
            for n, (a, b) in enumerate(zip(wanted, unwanted, strict=True))
        ]
        return cls(
            name,
            "contrast",
            [query_from_documents(a, b, n) for n, (a, b) in enumerate(pairs)],
            goal="raise",
            description=description,
        )

    @classmethod
    def loss(
        cls,
        name: str,
        documents: Sequence[Document | QueryItem | Mapping[str, Any]],
        *,
        goal: Goal = "lower",
        description: str = "",
    ) -> Behaviour:
        """-log p of each document's response; of a chat its last reply. Lower is more of the behaviour."""
        queries: list[QueryItem] = []
        for n, item in enumerate(documents):
            if isinstance(item, QueryItem) or (isinstance(item, Mapping) and "wanted" in item):
                queries.append(parse_query(item, f"query {n}", n))
            else:
                queries.append(query_from_documents(as_document(item, n, "query"), None, n))
        return cls(name, "loss", queries, goal=goal, description=description)

    @classmethod
    def scalar(
        cls,
        name: str,
        function: Callable[[nn.Module], Tensor],
        names: Sequence[str],
        *,
        goal: Goal = "raise",
        unit: str = "1",
        description: str = "",
    ) -> Behaviour:
        """Any differentiable ``function(model) -> [q]`` with one value for each of ``names``."""
        queries = [QueryItem(label, "", label) for label in names]
        return cls(name, "scalar", queries, goal=goal, unit=unit, description=description, function=function)

    @classmethod
    def load(cls, path: str | Path, *, name: str | None = None, description: str = "") -> Behaviour:
        """Read JSONL lines ``{"prompt" or "messages", "wanted", "unwanted"?, "name"?, ...}``.

        Other fields become ``meta``.
        With ``unwanted`` in every line it is a contrast, in none a loss; a mixture is an `InputError`, as is
        any line that cannot be used.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected queries as JSONL: {FORM}")
        lines = [(row, source) for row, source in read_jsonl(path, {})]
        if not lines:
            raise InputError(f"{path}: the file is empty; expected one query a line: {FORM}")
        queries = [parse_query(row, source, n) for n, (row, source) in enumerate(lines)]
        contrast = queries[0].unwanted is not None
        for query, (_, source) in zip(queries, lines, strict=True):
            if (query.unwanted is not None) != contrast:
                raise InputError(
                    f"{source}: expected an unwanted answer in every line or in none, as in the first line"
                )
        kind: Kind = "contrast" if contrast else "loss"
        return cls(name or path.stem, kind, queries, goal="raise" if contrast else "lower", description=description)

    @property
    def hash(self) -> str:
        """16 hex digits of the kind, the goal and all queries."""
        pairs = [(True, False) if self.kind == "contrast" else (True,)] * len(self)
        described = [
            [q.name, *(content_id(q.content(which)) for which in sides)]
            for q, sides in zip(self.queries, pairs, strict=True)
        ]
        return digest_json([self.name, self.kind, self.goal, described])[:16]

    def parts(self, objective: Objective) -> tuple[Part, ...]:
        """The losses that the measurements are made of, with their signs; cached per objective.

        ``measurement_q = sum of weight * loss``: wanted -1 and unwanted +1 in a contrast, +1 in a loss.
        `InputError` for a scalar, or for a query that does not fit into the context.
        """
        if self.kind == "scalar":
            raise InputError(f"behaviour {self.name!r}: a scalar has no losses; differentiate `function(model)`")
        if objective not in self._parts:
            signs = ((True, -1.0), (False, 1.0)) if self.kind == "contrast" else ((True, 1.0),)
            places = [(q, query.content(which), sign) for q, query in enumerate(self.queries) for which, sign in signs]
            many: Any = getattr(objective, "encode_many", None)
            contents = [content for _, content, _ in places]
            examples = (
                many(contents, last_turn=True) if many else [objective.encode_one(c, last_turn=True) for c in contents]
            )
            for (q, _, _), example in zip(places, examples, strict=True):
                if example.truncated:
                    raise InputError(
                        f"query {self.queries[q].name!r} does not fit into {example.length} tokens; "
                        "shorten it or raise max_tokens"
                    )
            self._parts[objective] = tuple(Part(q, x, sign) for (q, _, sign), x in zip(places, examples, strict=True))
        return self._parts[objective]

    def evaluate(
        self, model: nn.Module, objective: Objective | None = None, batch_tokens: int = 8192
    ) -> NDArray[np.float64]:
        """The measurement of every query ``[q]``, in eval mode and without gradient.

        Raises `NumericalError` where one is not finite.
        """
        values = np.zeros(len(self))
        with _evaluating(model):
            if self.function is not None:
                values = self.function(model).detach().double().cpu().numpy().reshape(-1)
            elif objective is None:
                raise InputError(f"behaviour {self.name!r}: a {self.kind} needs the subject's objective to be measured")
            else:
                device = next(model.parameters()).device
                for group in _groups(self.parts(objective), batch_tokens):
                    losses = objective.losses(model, objective.collate([part.example for part in group], device))
                    for part, loss in zip(group, losses.double().tolist(), strict=True):
                        values[part.query] += part.weight * loss
        if len(values) != len(self):
            raise InputError(f"behaviour {self.name!r}: expected {len(self)} values, one per query, got {len(values)}")
        if not np.isfinite(values).all():
            first = self.queries[int(np.argmin(np.isfinite(values)))].name
            raise NumericalError(f"behaviour {self.name!r}: the measurement of query {first!r} is not finite")
        return values

    def records(self, values: NDArray[np.floating[Any]] | None = None) -> list[Query]:
        """The queries as a page shows them, with their measurements if given."""
        return [
            Query(
                name=q.name,
                prompt=q.prompt_text,
                wanted=q.wanted,
                unwanted=q.unwanted,
                value=None if values is None else float(values[n]),
            )
            for n, q in enumerate(self.queries)
        ]

    def subset(self, rows: Sequence[int], name: str | None = None) -> Behaviour:
        """The same behaviour on some of its queries. A scalar cannot be divided."""
        if self.kind == "scalar":
            raise InputError(f"behaviour {self.name!r}: a scalar is one function and cannot be divided")
        chosen = [self.queries[row] for row in rows]
        return Behaviour(
            name or self.name, self.kind, chosen, goal=self.goal, unit=self.unit, description=self.description
        )

    def split(self, seed: int, share: float = 0.5, by: str | None = None) -> tuple[Behaviour, Behaviour]:
        """Disjoint queries: about ``share`` of them to trace with, the rest to verify with.

        Queries with the same prompt stay together. ``by`` names a field of ``meta`` whose values are spread
        over both alike.
        """
        if not 0 < share < 1:
            raise InputError(f"share: expected a number between 0 and 1, got {share}")
        strata: dict[str, dict[str, list[int]]] = {}
        for n, query in enumerate(self.queries):
            prompt = digest_json(query.prompt) if query.prompt else content_id(query.content())
            strata.setdefault(str(query.meta.get(by)) if by else "", {}).setdefault(prompt, []).append(n)
        generator, first, seen = random.Random(seed), list[int](), 0
        for stratum in sorted(strata):
            groups = list(strata[stratum].values())
            generator.shuffle(groups)
            for group in groups:
                seen += len(group)
                # A running account over all strata: small ones do not all round the same way.
                if len(first) + len(group) / 2 <= share * seen:
                    first += group
        second = sorted(set(range(len(self))) - set(first))
        if not first or not second:
            raise InputError(f"behaviour {self.name!r}: {len(self)} queries cannot be split at a share of {share}")
        return self.subset(sorted(first)), self.subset(second)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _groups(parts: Sequence[Part], budget: int) -> Iterator[list[Part]]:
    """Parts of like length under a budget of padded tokens, longest first."""
    group: list[Part] = []
    for part in sorted(parts, key=lambda part: -part.example.length):
        if group and group[0].example.length * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(part)
    if group:
        yield group
