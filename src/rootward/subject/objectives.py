"""Objectives: how documents become examples, examples batches, and batches one loss per document.

`CausalLM` predicts the next token of a response; `Classification` and `Regression` serve any
`torch.nn.Module` on documents ``{"x": ..., "y": ...}``. Another objective is any object with the members of
`Objective`.

A document's loss is the **sum** over its trained tokens in nats (or its half squared error), at least in
float32.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rootward.core.errors import ArtefactError, InputError
from rootward.core.hashing import digest
from rootward.subject import encode as e
from rootward.subject.documents import Document, Documents, make_document
from rootward.subject.encode import Batch, Encoded, Example
from rootward.subject.predictions import Predictions
from rootward.subject.supervised import Classification, Regression

__all__ = ["CausalLM", "Classification", "Objective", "Regression"]

DEFAULT_TOKENS = 1024
"""Context where neither the caller nor the tokenizer names one."""
NO_TARGET = "no trained token left after truncation"
ONE_TOKEN = "only one token: nothing to predict"
NO_RESPONSE = "the response has no tokens"


@runtime_checkable
class Objective(Protocol):
    """What a subject is trained on. ``unit`` is that of `losses`; `describe` goes into fingerprints.

    An example's ``trained`` decides which targets count in the loss, never what the model is given: passes that look at
    inputs alone ask for one target.
    """

    unit: str

    def encode(self, documents: Documents) -> Encoded:
        """The usable examples, in document order, and why the others are not."""
        ...

    def encode_one(self, content: Mapping[str, Any], *, last_turn: bool = False) -> Example:
        """One document outside the training data; ``last_turn`` trains on a chat's last reply only."""
        ...

    def collate(self, examples: Sequence[Example], device: str | torch.device = "cpu") -> Batch:
        """Examples to one padded batch on ``device``."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Differentiable loss of every document ``[n]``, summed over its trained tokens."""
        ...

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        """Outputs for every trained target, with `losses` as their loss at the data's labels."""
        ...

    def tokens(self, example: Example) -> list[str]:
        """Display pieces of the example's tokens."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able settings that decide the losses."""
        ...


def _forward_parameters(model: nn.Module) -> tuple[frozenset[str], bool]:
    """Names that ``forward`` takes, and whether it takes any name. Adapters pass all on to their base."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    kind = type(base)
    if kind not in _signatures:
        taken = inspect.signature(kind.forward).parameters
        _signatures[kind] = frozenset(taken), any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return _signatures[kind]


_signatures: dict[type, tuple[frozenset[str], bool]] = {}


def _keep_form(model: nn.Module) -> str:
    """How the model is told which positions need logits: "rows" ``[n,k]``, "columns" ``[k]`` or "none"."""
    if "logits_to_keep" not in _forward_parameters(model)[0]:
        return "none"
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    module = sys.modules.get(type(base).__module__)
    return "rows" if hasattr(module, "slice_logits_to_keep") else "columns"


class CausalLM:
    """Next-token prediction on the response.

    Args:
        tokenizer: a transformers tokenizer; its chat template renders ``messages``.
        max_tokens: longest document; longer ones are cut on the right and reported. None: the tokenizer's
            limit, or 1024.
        response_only: train on the assistant's turns and completions only; False: on every token but the
            first.
        keep_logits: ask the model for logits of the needed positions only, where it can. The result is the
            same.
    """

    unit = "nats"

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int | None = None,
        response_only: bool = True,
        *,
        keep_logits: bool = True,
    ) -> None:
        if max_tokens is None:
            limit = getattr(tokenizer, "model_max_length", None)
            max_tokens = int(limit) if limit is not None and limit < 1_000_000 else DEFAULT_TOKENS
        if max_tokens < 2:
            raise InputError(f"max_tokens: expected at least 2 (one token predicts the next), got {max_tokens}")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.response_only = response_only
        self.keep_logits = keep_logits
        pad = tokenizer.pad_token_id
        self.pad = int(pad) if pad is not None else 0  # never read: padding is masked and has no target
        self._pieces: dict[int, str] = {}

    def describe(self) -> dict[str, Any]:
        """Settings, with hashes of the chat template and the vocabulary."""
        template, vocabulary = self.tokenizer.chat_template, self.tokenizer.get_vocab()
        return {
            "kind": "causal_lm",
            "max_tokens": self.max_tokens,
            "response_only": self.response_only,
            "chat_template": digest(str(template))[:16] if template else None,
            "vocabulary": digest("\n".join(f"{v} {k}" for k, v in sorted(vocabulary.items())))[:16],
        }

    def _tokens_of(self, documents: Sequence[Document]) -> list[e.Tokens]:
        """Ids and response mask of each document, tokenised by form in few calls."""
        forms: dict[str, list[int]] = {"messages": [], "prompt": [], "text": []}
        for n, document in enumerate(documents):
            form = next((key for key in forms if key in document.content), None)
            if form is None:
                raise InputError(f"{document.source}: a language model needs text, got {', '.join(document.content)}")
            forms[form].append(n)
        chats, pairs, texts = ([documents[n] for n in rows] for rows in forms.values())
        found: dict[int, e.Tokens] = {}
        if chats:
            encoded = e.encode_chats(self.tokenizer, [d.content["messages"] for d in chats], [d.source for d in chats])
            found.update(zip(forms["messages"], encoded, strict=True))
        completions = [(d.content["prompt"], d.content["completion"]) for d in pairs]
        found.update(zip(forms["prompt"], e.encode_completions(self.tokenizer, completions), strict=True))
        found.update(
            zip(forms["text"], e.encode_texts(self.tokenizer, [d.content["text"] for d in texts]), strict=True)
        )
        if not self.response_only:
            return [(found[n][0], [True] * len(found[n][0])) for n in range(len(documents))]
        return [found[n] for n in range(len(documents))]

    def encode(self, documents: Documents) -> Encoded:
        """Examples of the documents that leave something to train on; `InputError` if none does."""
        examples: list[Example] = []
        dropped: dict[str, int] = {}
        for row, (document, (ids, trained)) in enumerate(zip(documents, self._tokens_of(documents), strict=True)):
            example = self._example(document.id, row, ids, trained)
            if example.targets:
                examples.append(example)
                continue
            reason = ONE_TOKEN if len(ids) < 2 else NO_TARGET if example.truncated else NO_RESPONSE
            dropped[reason] = dropped.get(reason, 0) + 1
        if not examples:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in dropped.items())
            raise InputError(
                f"none of {len(documents)} documents can be used with max_tokens = {self.max_tokens} ({reasons})"
            )
        return Encoded(examples, dropped)

    def _example(self, identity: str, row: int, ids: list[int], trained: list[bool]) -> Example:
        cut = len(ids) > self.max_tokens
        tokens, flags = e.tensors(ids[: self.max_tokens], trained[: self.max_tokens])
        return Example(identity, row, tokens, flags, cut)

    def encode_one(self, content: Mapping[str, Any], *, last_turn: bool = False) -> Example:
        """One document outside the training data (row -1); ``last_turn``: only a chat's last reply counts."""
        return self.encode_many([content], last_turn=last_turn)[0]

    def encode_many(self, contents: Sequence[Mapping[str, Any]], *, last_turn: bool = False) -> list[Example]:
        """`encode_one` of several, tokenised together."""
        documents = [make_document(content, f"query {n}") for n, content in enumerate(contents)]
        examples: list[Example] = []
        for document, (ids, trained) in zip(documents, self._tokens_of(documents), strict=True):
            flags = e.last_turn_only(trained) if last_turn and "messages" in document.content else trained
            example = self._example(document.id, -1, ids, flags)
            if not example.targets:
                raise InputError(
                    f"{document.source}: no trained token is left of {len(ids)} (max_tokens = {self.max_tokens})"
                )
            examples.append(example)
        return examples

    def collate(self, examples: Sequence[Example], device: str | torch.device = "cpu") -> Batch:
        """Pad to the longest; no attention mask is passed where nothing is padded."""
        lengths = [example.length for example in examples]
        n, t = len(examples), max(lengths)
        ids = torch.full((n, t), self.pad, dtype=torch.int64)
        flags = torch.zeros((n, t), dtype=torch.bool)
        for row, example in enumerate(examples):
            ids[row, : lengths[row]] = example.ids
            flags[row, : lengths[row]] = example.trained
        mask = torch.arange(t) < torch.tensor(lengths)[:, None]
        targets = torch.full((n, t), e.IGNORED, dtype=torch.int64)
        targets[:, :-1] = torch.where(flags[:, 1:], ids[:, 1:], e.IGNORED)
        counts = [example.targets for example in examples]
        needed = max(counts)
        # Positions with a target first, in order (the sort is stable); beyond a row's count there is none.
        keep = torch.sort((targets == e.IGNORED).to(torch.uint8), dim=1, stable=True).indices[:, :needed].contiguous()
        inputs = {"input_ids": ids} if min(lengths) == t else {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
        return Batch(
            inputs={key: value.to(device) for key, value in inputs.items()},
            targets=targets.to(device),
            mask=mask.to(device),
            trained=torch.tensor(counts, dtype=torch.int64, device=device),
            rows=torch.tensor([example.row for example in examples], dtype=torch.int64, device=device),
            ids=tuple(example.id for example in examples),
            keep=keep.to(device),
        )

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits ``[n,k,v]`` and targets ``[n,k]`` of the kept positions, and where they stand (None: all, k = t)."""
        names, takes_any = _forward_parameters(model)
        arguments: dict[str, Any] = {k: v for k, v in batch.inputs.items() if k in names or takes_any}
        if "use_cache" in names or takes_any:
            arguments["use_cache"] = False
        form = _keep_form(model) if self.keep_logits and batch.keep is not None else "none"
        targets, places = batch.targets, None
        if form == "rows":
            places = batch.keep
            arguments["logits_to_keep"] = places
        elif form == "columns":
            columns = (targets != e.IGNORED).any(0).nonzero().squeeze(1)
            places = columns.expand(len(batch), -1)
            arguments["logits_to_keep"] = columns
        if places is not None:
            targets = targets.gather(1, places)
        output = model(**arguments)
        logits = output.logits if hasattr(output, "logits") else output
        if logits.shape[:2] != targets.shape:
            raise ArtefactError(
                f"expected logits of shape {tuple(targets.shape)} and the vocabulary from "
                f"{type(model).__name__}, got "
                f"{tuple(logits.shape)}; adapters that add virtual tokens (prompt tuning) are not supported"
            )
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        return wide, targets, places

    def _target_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Losses ``[n,k]`` of the kept positions and where they stand ``[n,k]`` (None: all, k = t)."""
        logits, targets, places = self._logits(model, batch)
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=e.IGNORED)
        return flat.view(targets.shape), places

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        """Logits at every trained token of the batch."""
        logits, targets, _ = self._logits(model, batch)
        trained = targets != e.IGNORED
        rows = trained.nonzero()[:, 0]
        return Predictions(logits[trained], targets[trained], rows, len(batch))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum over trained tokens of -log p(token | before), in nats, ``[n]``; differentiable."""
        return self._target_losses(model, batch)[0].sum(1)

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """-log p of every trained token at its own place ``[n,t]``, 0 elsewhere; rows sum to `losses`."""
        kept, places = self._target_losses(model, batch)
        n, t = batch.targets.shape
        if places is None:
            places = torch.arange(t, device=kept.device).expand(n, t)
        result = kept.new_zeros(n, t + 1)
        return result.scatter_add(1, places + 1, kept)[:, :t]

    def tokens(self, example: Example) -> list[str]:
        """The text of each token with its spaces; a character of several tokens stands at the first."""
        ids: list[int] = example.ids.tolist()
        missing = [i for i in dict.fromkeys(ids) if i not in self._pieces]
        self._pieces.update(zip(missing, self._decoded([[i] for i in missing]), strict=True))
        pieces = [self._pieces[i] for i in ids]
        start = 0
        while start < len(pieces):
            end = start
            while end < len(pieces) and "\ufffd" in pieces[end]:
                end += 1
            if end - start > 1:
                pieces[start:end] = [self._decoded([ids[start:end]])[0], *[""] * (end - start - 1)]
            start = max(end, start + 1)
        return pieces

    def _decoded(self, runs: Sequence[list[int]]) -> list[str]:
        """Decode runs behind an ordinary token, since decoders strip the space from what stands first."""
        if not runs:
            return []
        anchor = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        front = self.tokenizer.decode(anchor, **options)
        return [self.tokenizer.decode([*anchor, *run], **options).removeprefix(front) for run in runs]
