"""Queries: a prompt with the answer wanted and perhaps one unwanted, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rootward.core.errors import InputError
from rootward.subject.documents import Document, check_json, check_messages, make_document, plain_meta
from rootward.subject.encode import Example

FORM = '{"prompt" or "messages": ..., "wanted": ..., "unwanted": ...}'


@dataclass(frozen=True)
class Part:
    """One loss of a query's measurement: measurement_q = sum over its parts of ``weight`` * loss."""

    query: int
    example: Example
    weight: float


@dataclass(frozen=True)
class QueryItem:
    """A prompt (text, or chat turns that end before the reply), the answer wanted and perhaps one unwanted.

    ``contents`` are whole documents (wanted, unwanted) where the query was given as such.
    """

    name: str
    prompt: str | list[dict[str, Any]]
    wanted: str
    unwanted: str | None = None
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    contents: tuple[dict[str, Any], dict[str, Any] | None] | None = None

    def content(self, wanted: bool = True) -> dict[str, Any]:
        """The document whose response is the wanted (or unwanted) answer."""
        if self.contents is not None:
            chosen = self.contents[0] if wanted else self.contents[1]
            if chosen is not None:
                return chosen
        answer = self.wanted if wanted else self.unwanted
        if answer is None:
            raise InputError(f"query {self.name!r} has no unwanted answer")
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "completion": answer}
        return {"messages": [*self.prompt, {"role": "assistant", "content": answer}]}

    @property
    def prompt_text(self) -> str:
        """The prompt for people: of a chat of one turn its text, else the turns by role."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)


def as_document(item: Document | Mapping[str, Any], number: int, what: str) -> Document:
    """A checked document; ``what`` and ``number`` name it in errors."""
    return item if isinstance(item, Document) else make_document(item, f"{what} {number}")


def query_from_documents(wanted: Document, unwanted: Document | None, number: int) -> QueryItem:
    """A query from whole documents: what comes before the last reply is the prompt."""

    def parts(document: Document) -> tuple[str | list[dict[str, Any]], str]:
        content = document.content
        if "messages" in content:
            last = max(n for n, turn in enumerate(content["messages"]) if turn["role"] == "assistant")
            return content["messages"][:last], content["messages"][last]["content"]
        if "x" in content:
            return "", document.id
        return content.get("prompt", ""), document.response

    prompt, answer = parts(wanted)
    other = None if unwanted is None else parts(unwanted)[1]
    contents = (wanted.content, None if unwanted is None else unwanted.content)
    return QueryItem(str(wanted.meta.get("name", number)), prompt, answer, other, wanted.meta, contents)


def parse_query(item: QueryItem | Mapping[str, Any], source: str, number: int) -> QueryItem:
    """A checked query; `InputError` with its source otherwise."""
    if isinstance(item, QueryItem):
        return replace(item)
    row = dict(item)
    name, messages, prompt = str(row.pop("name", number)), row.pop("messages", None), row.pop("prompt", None)
    wanted, unwanted = row.pop("wanted", None), row.pop("unwanted", None)
    if (messages is None) == (prompt is None):
        raise InputError(f"{source}: expected either a prompt or messages; the form is {FORM}")
    if wanted is None:
        raise InputError(f"{source}: only a prompt and no wanted answer; the form is {FORM}")
    for key, value in (("wanted", wanted), ("unwanted", unwanted)):
        if value is not None and (not isinstance(value, str) or not value):
            raise InputError(f"{source}: expected {key} to be text that is not empty, got {value!r}")
    if messages is not None:
        prompt = check_messages(messages, source, answered=False)
        if prompt[-1]["role"] == "assistant":
            raise InputError(f"{source}: the messages end with the assistant; put its answer into wanted")
    elif not isinstance(prompt, str):
        raise InputError(f"{source}: expected prompt to be text, got {type(prompt).__name__}")
    meta = plain_meta(row)
    check_json([prompt, wanted, unwanted, name, meta], source)
    return QueryItem(name, prompt, wanted, unwanted, meta)
