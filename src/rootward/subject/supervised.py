"""Objectives of any `torch.nn.Module` on ``{"x": ..., "y": ...}``: classification and regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rootward.core.errors import InputError
from rootward.subject.documents import Document, Documents, make_document
from rootward.subject.encode import Batch, Encoded, Example
from rootward.subject.predictions import Predictions


class _Supervised:
    """What `Classification` and `Regression` share: documents ``{"x", "y"}`` and ``model(x)``."""

    unit = "nats"
    kind = "supervised"

    def __init__(self, padding: int | None = None) -> None:
        """``padding`` is the entry of integer sequences that fills them up: it is no token of the document."""
        self.padding = padding

    def describe(self) -> dict[str, Any]:
        """The kind of objective, and the padding where there is one."""
        return {"kind": self.kind} | ({} if self.padding is None else {"padding": self.padding})

    def encode(self, documents: Documents) -> Encoded:
        """Every document is usable; `InputError` for one without x and y, or with a shape of its own."""
        examples = [self._example(document, row) for row, document in enumerate(documents)]
        for example, document in zip(examples, documents, strict=True):
            first = examples[0]
            for key in ("x", "y"):
                expected, got = getattr(first, key).shape, getattr(example, key).shape
                if expected != got:
                    raise InputError(f"{document.source}: expected {key} of shape {tuple(expected)}, got {tuple(got)}")
        if not examples:
            raise InputError("expected at least one document, got none")
        return Encoded(examples)

    def encode_one(self, content: Mapping[str, Any], *, last_turn: bool = False) -> Example:
        """One document outside the training data (row -1)."""
        return self._example(make_document(content, "query"), -1)

    def _example(self, document: Document, row: int) -> Example:
        if "x" not in document.content:
            raise InputError(
                f"{document.source}: {self.kind} needs documents {{x, y}}, got {', '.join(document.content)}"
            )
        x, y = document.content["x"], document.content["y"]
        sequence = not x.is_floating_point() and x.dim() == 1
        ids = x.to(torch.int64) if sequence else torch.zeros(1, dtype=torch.int64)
        trained = torch.ones(len(ids), dtype=torch.bool)
        return Example(document.id, row, ids, trained, x=x, y=self._target(y, document.source), targets=1)

    def _target(self, y: Tensor, source: str) -> Tensor:
        return y

    def collate(self, examples: Sequence[Example], device: str | torch.device = "cpu") -> Batch:
        """Stack ``x`` and ``y``; one position per document, or one per entry of an integer sequence."""
        x = torch.stack([example.x for example in examples if example.x is not None])
        y = torch.stack([example.y for example in examples if example.y is not None])
        n, t = len(examples), examples[0].length
        return Batch(
            inputs={"x": x.to(device)},
            targets=y.to(device),
            mask=self._mask(x, n, t).to(device),
            trained=torch.ones(n, dtype=torch.int64, device=device),
            rows=torch.tensor([example.row for example in examples], dtype=torch.int64, device=device),
            ids=tuple(example.id for example in examples),
        )

    def _mask(self, x: Tensor, n: int, t: int) -> Tensor:
        if self.padding is None or x.dim() != 2 or x.is_floating_point():
            return torch.ones(n, t, dtype=torch.bool)
        return x != self.padding

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        x = batch.inputs["x"]
        first = next(model.parameters(), None)
        output = model(x.to(first.dtype) if first is not None and x.is_floating_point() else x)
        output = output.logits if hasattr(output, "logits") else output
        return output if output.dtype in (torch.float32, torch.float64) else output.float()

    def tokens(self, example: Example) -> list[str]:
        """The entries of an integer sequence, else one piece for the whole."""
        return [str(i) for i in example.ids.tolist()] if example.length > 1 else ["x"]


class Classification(_Supervised):
    """Cross-entropy in nats of ``model(x)`` (logits ``[n, classes]``) at the class ``y``."""

    kind = "classification"

    def _target(self, y: Tensor, source: str) -> Tensor:
        if y.is_floating_point() or y.numel() != 1 or int(y) < 0:
            raise InputError(f"{source}: expected y to be a class number from 0 on, got {y.tolist()!r}")
        return y.reshape(()).to(torch.int64)

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        """Logits of every document; a class that the model does not have is an `InputError`."""
        logits = self._outputs(model, batch)
        if logits.dim() != 2 or int(batch.targets.max()) >= logits.shape[1]:
            raise InputError(
                f"expected logits [n, classes] with more than {int(batch.targets.max())} classes, got "
                f"{tuple(logits.shape)}"
            )
        return Predictions(logits, batch.targets, torch.arange(len(batch), device=logits.device), len(batch))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """-log p(y | x), ``[n]``; a class that the model does not have is an `InputError`."""
        predictions = self.predictions(model, batch)
        return F.cross_entropy(predictions.outputs, predictions.targets, reduction="none")


class Regression(_Supervised):
    """Half the squared error of ``model(x)``, summed over outputs."""

    unit = "squared error / 2"
    kind = "regression"

    def _target(self, y: Tensor, source: str) -> Tensor:
        return y if y.is_floating_point() else y.to(torch.get_default_dtype())

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        """The model's values of every document, flattened."""
        values = self._outputs(model, batch).reshape(len(batch), -1)
        targets = batch.targets.reshape(len(batch), -1).to(values.dtype)
        if values.shape != targets.shape:
            raise InputError(
                f"expected predictions of shape {tuple(targets.shape)} as y has, got {tuple(values.shape)}"
            )
        rows = torch.arange(len(batch), device=values.device)
        return Predictions(values, targets, rows, len(batch), categorical=False)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """``0.5 |model(x) - y|^2``, ``[n]``."""
        predictions = self.predictions(model, batch)
        return 0.5 * (predictions.outputs - predictions.targets).square().sum(1)
