"""What a model says of every target: outputs before the loss, so that other labels than the data's can be put in.

The true Fisher matrix is the second moment of gradients for labels that the *model* would give, not for those in the
data. `Labels` says which are meant:

    data       the documents' own labels (the empirical Fisher)
    sampled    labels drawn from the model, ``draws`` times per forward pass (an unbiased estimate of the true Fisher)
    exact      every label, weighted by the model's probability: the true Fisher without sampling noise, which for
               softmax and squared error is the Gauss-Newton matrix. One backward pass per class, so for small outputs,
               and for documents with one target each (targets of one document are drawn together, not one by one)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rootward.core.errors import InputError
from rootward.core.hashing import digest


@dataclass(frozen=True)
class Labels:
    """Whose labels a pass puts into the losses; ``seed`` and ``draws`` are for sampled ones."""

    kind: Literal["data", "sampled", "exact"] = "data"
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("data", "sampled", "exact"):
            raise InputError(f"labels: expected 'data', 'sampled' or 'exact', got {self.kind!r}")
        if self.draws < 1:
            raise InputError(f"labels: expected at least 1 draw, got {self.draws}")


@dataclass(frozen=True)
class Predictions:
    """``outputs[m, c]`` for every trained target m of a batch: logits (``categorical``) or means of unit variance.

    ``documents[m]`` is the row of the batch that target m belongs to, ``count`` the number of rows.
    """

    outputs: Tensor
    targets: Tensor
    documents: Tensor
    count: int
    categorical: bool = True

    def losses(self, targets: Tensor | None = None) -> Tensor:
        """Negative log-likelihood ``[n]`` of the targets, summed over a document's; by default the data's.

        In nats for classes; half the squared error (nats less a constant) for means.
        """
        targets = self.targets if targets is None else targets
        if self.categorical:
            each = F.cross_entropy(self.outputs, targets, reduction="none")
        else:
            each = 0.5 * (self.outputs - targets).square().sum(1)
        return each.new_zeros(self.count).index_add(0, self.documents, each)

    def sample(self, noise: Tensor) -> Tensor:
        """Targets drawn from the model's own predictions, by `noise` of one draw."""
        with torch.no_grad():
            outputs = self.outputs.detach()
            if not self.categorical:
                return outputs + noise.to(outputs)
            reached = outputs.float().softmax(1).cumsum(1)  # the inverse of the distribution function
            below = 1 - 4 * torch.finfo(reached.dtype).eps  # what rounds to 1 is no class, or one that cannot be
            share = noise.to(reached).clamp_max(below)
            drawn = torch.searchsorted(reached, share * reached[:, -1:], right=True).squeeze(1)
            return drawn.clamp_max(outputs.shape[1] - 1)

    def noise(self, ids: Sequence[str], seed: int, draw: int) -> Tensor:
        """Uniform numbers ``[m, 1]`` for classes, normal ones ``[m, c]`` for means.

        They depend on the document's id, the seed and the draw alone: not on the batch, the order or the device.
        """
        width = 1 if self.categorical else self.outputs.shape[1]
        found = torch.empty(len(self.documents), width, dtype=torch.float64)
        counts = torch.bincount(self.documents.cpu(), minlength=self.count).tolist()
        order = self.documents.cpu().argsort(stable=True)
        start = 0
        for identity, count in zip(ids, counts, strict=True):
            generator = torch.Generator().manual_seed(int(digest(f"{seed}|{draw}|{identity}")[:15], 16))
            make = torch.rand if self.categorical else torch.randn
            found[order[start : start + count]] = make(count, width, generator=generator, dtype=torch.float64)
            start += count
        return found

    def relabelled(self, labels: Labels, ids: Sequence[str]) -> Iterator[Tensor]:
        """Losses ``[n]`` whose gradients' second moments, summed over the iteration, are the Fisher matrix asked for.

        Raises `InputError` where ``exact`` is asked of documents with several targets.
        """
        if labels.kind == "data":
            yield self.losses()
        elif labels.kind == "sampled":
            for draw in range(labels.draws):
                yield self.losses(self.sample(self.noise(ids, labels.seed, draw))) / labels.draws**0.5
        else:
            yield from self._every_label()

    def _every_label(self) -> Iterator[Tensor]:
        if len(self.documents) != self.count or len(self.documents.unique()) != self.count:
            raise InputError(
                f"labels = 'exact': expected one target per document, got {len(self.documents)} targets of "
                f"{self.count} documents; use 'sampled'"
            )
        classes = self.outputs.shape[1]
        for c in range(classes):
            documents = self.documents
            if self.categorical:
                root = self.outputs.detach().softmax(1)[:, c].sqrt()
                possible = root != 0  # the loss of a label that cannot be is infinite
                targets = torch.full_like(self.targets[possible], c)
                each = root[possible] * F.cross_entropy(self.outputs[possible], targets, reduction="none")
                documents = documents[possible]
            else:  # a unit of noise in one output at a time
                each = self.outputs[:, c]
            yield each.new_zeros(self.count).index_add(0, documents, each)
