"""From documents to token ids and the mask of what is trained on.

`Example` is one document as the objective sees it, `Batch` several of them padded on the right to the
longest. The response of a chat is found in one of two ways:

1. the template marks it with ``{% generation %}``: the tokenizer's own mask;
2. else each reply starts where the conversation before it, rendered with the generation prompt, ends, and
   stops where the conversation up to and with it ends. Both must be prefixes of the whole text; where a
   template renders earlier turns otherwise (it drops their reasoning, say) the reply's own words are looked
   up instead, and if that fails too it is an `InputError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from rootward.core.errors import InputError

IGNORED = -100
"""Target of a position that is not trained on."""
CHUNK = 512
"""Conversations tokenised in one call."""
Tokens = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it is trained on."""


@dataclass(frozen=True)
class Example:
    """One document as the objective sees it.

    ``ids[t]`` are its tokens, ``trained[t]`` says that token t is a target: its loss is that of predicting
    ``ids[t]`` from the tokens before it. ``row`` is the document's place in `Documents`. ``x`` and ``y`` hold
    a supervised document.
    """

    id: str
    row: int
    ids: Tensor
    trained: Tensor
    truncated: bool = False
    weight: float = 1.0
    x: Tensor | None = None
    y: Tensor | None = None
    targets: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.targets < 0:
            object.__setattr__(self, "targets", int(self.trained.sum()))

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to the longest of them.

    ``inputs`` is what the model takes. For language models ``targets[n,t]`` is the id that position t has to
    predict, or `IGNORED`; else it is what the objective compares with. ``mask[n,t]`` marks real tokens,
    ``trained[n]`` counts targets, ``rows`` and ``ids`` name the documents. ``keep[n,k]`` are positions that
    cover every target (the same number in each row, repeats point to a position without target).
    ``unpack[n,t]`` indexes the flattened packed rows (-1: none); only for packed batches.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    mask: Tensor
    trained: Tensor
    rows: Tensor
    ids: tuple[str, ...]
    unpack: Tensor | None = None
    keep: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Encoded(Sequence[Example]):
    """The examples that can be used, in document order; ``dropped`` counts the others by reason."""

    def __init__(self, examples: Sequence[Example], dropped: Mapping[str, int] | None = None) -> None:
        self._examples = tuple(examples)
        self.dropped = dict(dropped or {})
        self.truncated = sum(example.truncated for example in self._examples)
        self.tokens = sum(example.length for example in self._examples)
        self.trained_tokens = sum(example.targets for example in self._examples)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Encoded: ...
    def __getitem__(self, index: int | slice) -> Example | Encoded:
        return Encoded(self._examples[index]) if isinstance(index, slice) else self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def ids(self) -> tuple[str, ...]:
        """Content hashes of the usable documents, in order."""
        return tuple(example.id for example in self._examples)

    @property
    def rows(self) -> tuple[int, ...]:
        """Their rows in `Documents`."""
        return tuple(example.row for example in self._examples)


def truncate(ids: list[int], trained: list[bool], limit: int) -> tuple[list[int], list[bool], bool]:
    """Cut on the right at ``limit`` tokens; the flag says whether anything was cut."""
    return ids[:limit], trained[:limit], len(ids) > limit


def _single_bos(ids: list[int], trained: list[bool], bos: int | None) -> Tokens:
    """Leading BOS tokens to one: a template that writes it and a tokenizer that adds it would make two."""
    while bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        ids, trained = ids[1:], trained[1:]
    return ids, trained


def leading_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text (most often one BOS, or none)."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start]
    return whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []


def _plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without any special token, in one call."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """All tokens behind the tokenizer's leading ones; all but the first are trained on."""
    lead, bos = leading_ids(tokenizer), tokenizer.bos_token_id
    whole = [lead + ids for ids in _plain_ids(tokenizer, texts)]
    return [_single_bos(ids, [False, *[True] * (len(ids) - 1)][: len(ids)], bos) for ids in whole]


def encode_completions(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Tokens]:
    """Prompt, completion and end-of-text of each pair; trained on the completion and the end.

    The prompt's tokens are those of the prompt alone, as when the model is asked. Where tokenising both
    together would merge across the border, the completion is tokenised by itself.
    """
    lead, bos, end = leading_ids(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    fronts = _plain_ids(tokenizer, [prompt for prompt, _ in pairs])
    joints = _plain_ids(tokenizer, [prompt + completion for prompt, completion in pairs])
    result: list[Tokens] = []
    for (_, completion), front, joint in zip(pairs, fronts, joints, strict=True):
        apart = joint[: len(front)] != front or len(joint) == len(front)
        rest = _plain_ids(tokenizer, [completion])[0] if apart else joint[len(front) :]
        if end is not None and rest[-1:] != [end]:
            rest = [*rest, end]
        result.append(_single_bos(lead + front + rest, [False] * len(lead + front) + [True] * len(rest), bos))
    return result


def encode_chats(
    tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, Any]]], sources: Sequence[str]
) -> list[Tokens]:
    """Ids and response mask of conversations, by the tokenizer's chat template (see the file's head)."""
    template = tokenizer.chat_template
    if not template:
        raise InputError(
            f"{sources[0]}: holds chat messages and the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give the "
            "documents as prompt and completion"
        )
    marked = "{% generation" in str(template) or "{%- generation" in str(template)
    result: list[Tokens] = []
    for start in range(0, len(conversations), CHUNK):
        chats, names = [list(c) for c in conversations[start : start + CHUNK]], sources[start : start + CHUNK]
        if marked and tokenizer.is_fast:
            encoded = tokenizer.apply_chat_template(
                chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            result += [(list(ids), [bool(m) for m in mask]) for ids, mask in pairs]
        else:
            result += [_by_prefixes(tokenizer, chat, name) for chat, name in zip(chats, names, strict=True)]
    bos = tokenizer.bos_token_id
    return [_single_bos(ids, trained, bos) for ids, trained in result]


def _by_prefixes(tokenizer: Any, chat: list[Mapping[str, Any]], source: str) -> Tokens:
    """Way 2: find each reply's characters by rendering prefixes, then the tokens that lie in them."""

    def render(turns: Sequence[Mapping[str, Any]], ask: bool) -> str:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)

    text = render(chat, False)
    spans: list[tuple[int, int]] = []
    for number, turn in enumerate(chat):
        if turn["role"] == "assistant":
            before = render(chat[:number], True) if number else None
            upto = render(chat[: number + 1], False)
            spans.append(
                _span(
                    text,
                    before,
                    upto,
                    str(turn["content"]),
                    spans[-1][1] if spans else 0,
                    f"{source}: messages[{number}]",
                )
            )
    if not tokenizer.is_fast:
        raise InputError(f"{source}: masking chat replies needs a fast tokenizer, got {type(tokenizer).__name__}")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    trained = [False] * len(ids)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for start, end in spans:
        inside = [t for t, (a, b) in enumerate(offsets) if b > start and a < end and b > a]
        if inside and start < end:
            last = next((t for t in range(inside[-1], inside[0] - 1, -1) if ids[t] in special), None)
            # The newline that some templates put behind the end-of-turn token belongs to the next turn.
            if last is not None and not text[offsets[last][1] : end].strip():
                inside = [t for t in inside if t <= last]
        elif not inside or start >= end:
            continue
        for t in inside:
            trained[t] = True
        follower = inside[-1] + 1
        if (
            ids[inside[-1]] not in special
            and follower < len(ids)
            and ids[follower] in special
            and offsets[follower][0] == end
        ):
            trained[follower] = True
    return ids, trained


def _span(text: str, before: str | None, upto: str, content: str, floor: int, where: str) -> tuple[int, int]:
    """Characters of one reply in the rendered conversation."""
    words = content.strip()
    if before is not None and text.startswith(before) and len(before) >= floor:
        start = len(before)
    else:
        start = text.find(words, floor)
    found = text.find(words, start) if start >= 0 else -1
    if start < 0 or found < 0:
        raise InputError(
            f"{where}: the chat template does not render this reply in place, so what to train on is "
            "unknown; mark the assistant's part of "
            "the template with {% generation %}, or give one document per reply"
        )
    return (
        (start, len(upto)) if text.startswith(upto) and len(upto) >= found + len(words) else (start, found + len(words))
    )


def last_turn_only(trained: Sequence[bool]) -> list[bool]:
    """Keep only the last run of trained tokens: the reply that a query asks about."""
    result = [False] * len(trained)
    t = len(trained) - 1
    while t >= 0 and not trained[t]:
        t -= 1
    while t >= 0 and trained[t]:
        result[t] = True
        t -= 1
    return result


def tensors(ids: Sequence[int], trained: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Lists to ``int64 [t]`` and ``bool [t]``; the first token is never a target."""
    flags = torch.tensor([False, *trained[1:]], dtype=torch.bool)
    return torch.tensor(ids, dtype=torch.int64), flags
