from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootward.core.errors import InputError
from rootward.core.hashing import document_id
from rootward.subject.documents import Documents, load_documents, save_jsonl
from tests.subject.small import ROWS


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


def test_reads_every_form_and_keeps_other_fields(tmp_path: Path) -> None:
    rows = [{**row, "family": "f", "number": n} for n, row in enumerate(ROWS)]
    path = write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    documents = load_documents(path)
    assert [d.content for d in documents] == ROWS
    assert documents[2].source == "a.jsonl:3" and documents[2].meta == {"family": "f", "number": 2}
    assert documents.ids == tuple(document_id(row) for row in ROWS)
    assert load_documents(rows).ids == documents.ids == load_documents(str(path)).ids
    assert load_documents(path, limit=2).ids == documents.ids[:2]
    assert load_documents(documents) is documents


def test_parquet_and_datasets_folder_give_the_same_documents(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": f"p{n}", "completion": "c", "extra": float("nan") if n else 1.5} for n in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "dict"))
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows)})
    both.save_to_disk(str(tmp_path / "both"))
    expected = load_documents(rows)
    for source in (tmp_path / "d.parquet", tmp_path / "folder", tmp_path / "dict", datasets.Dataset.from_list(rows)):
        found = load_documents(source)
        assert found.ids == expected.ids
        assert [d.meta for d in found] == [{"extra": 1.5}, {"extra": None}, {"extra": None}]
    assert load_documents(tmp_path / "d.parquet", limit=2).ids == expected.ids[:2]
    with pytest.raises(InputError, match="splits train, test"):
        load_documents(tmp_path / "both")
    with pytest.raises(InputError, match="save_to_disk"):
        load_documents(tmp_path)
    write(tmp_path / "bad.parquet", "not parquet")
    with pytest.raises(InputError, match=r"bad.parquet: cannot be read as Parquet"):
        load_documents(tmp_path / "bad.parquet")


GOOD = '{"text": "fine"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 'x'}", "b.jsonl:2: not JSON"),
        ('{"text": "x"', "b.jsonl:2: not JSON"),
        ('{"text": "x", "n": NaN}', "b.jsonl:2: not JSON: NaN"),
        ("[" * 100_000, "b.jsonl:2: not JSON"),
        ('["text"]', "b.jsonl:2: expected an object"),
        ("{}", "b.jsonl:2: lacks the text.*none"),
        ('{"body": "x"}', "b.jsonl:2: lacks the text.*'body'"),
        ('{"text": 3}', "b.jsonl:2: expected text to be text, got int"),
        ('{"text": ""}', "b.jsonl:2: text is empty"),
        ('{"text": null}', "b.jsonl:2: lacks the text"),
        ('{"prompt": "x"}', "b.jsonl:2: only a prompt and no response"),
        ('{"prompt": "x", "completion": ""}', "b.jsonl:2: completion is empty"),
        ('{"prompt": ["x"], "completion": "y"}', "b.jsonl:2: expected prompt to be text, got list"),
        ('{"completion": "y"}', "b.jsonl:2: has a completion and no prompt"),
        ('{"messages": "x"}', "b.jsonl:2: expected messages to be a list"),
        ('{"messages": []}', "b.jsonl:2: expected messages to be a list"),
        ('{"messages": ["x"]}', r"b.jsonl:2: messages\[0\]: expected"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', r"b.jsonl:2: messages\[0\]: expected a role .*'bot'"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            r"messages\[0\]: expected content to be text, got NoneType",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', "b.jsonl:2: only a prompt and no response"),
        ('{"text": "\\ud800"}', "b.jsonl:2: holds half of a surrogate pair"),
        ('{"text": "x", "m": "\\udc00"}', "b.jsonl:2: holds half of a surrogate pair"),
        (b'{"text": "caf\xe9"}', "b.jsonl:2: not UTF-8: byte 0xe9 at column 14"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = write(tmp_path / "b.jsonl", GOOD, line, GOOD)
    with pytest.raises(InputError, match=message):
        load_documents(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "blank.jsonl", "", "  ")
    write(tmp_path / "notes.txt", GOOD)
    for name, message in (
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("empty.jsonl", "empty.jsonl: the file is empty"),
        ("blank.jsonl", "blank.jsonl: holds no document"),
        ("notes.txt", "notes.txt: expected a file .jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            load_documents(tmp_path / name)
    with pytest.raises(InputError, match="documents: holds no document"):
        load_documents([])
    with pytest.raises(InputError, match="limit: expected at least 1"):
        load_documents([{"text": "x"}], limit=0)
    with pytest.raises(InputError, match="documents:2: expected an object"):
        load_documents([{"text": "x"}, "text"])


def test_blank_lines_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b"}')
    documents = load_documents(path)
    assert [d.content["text"] for d in documents] == ["a", "b"]
    assert documents.skipped == {"blank line": 1} and documents[1].source == "w.jsonl:3"


def test_duplicates_are_counted_and_kept() -> None:
    documents = load_documents([{"text": "a", "n": 1}, {"text": "b"}, {"text": "a", "n": 2}, {"text": "a"}])
    assert len(documents) == 4 and documents.duplicates == 2
    assert documents[0] == documents[2] and documents[0].meta != documents[2].meta


def test_subset_and_hash_follow_the_order() -> None:
    documents = load_documents([{"text": c} for c in "abcd"])
    assert documents.subset([2, 0]).ids == (documents.ids[2], documents.ids[0])
    assert documents.subset([0, 1]).hash != documents.subset([1, 0]).hash
    assert isinstance(documents[1:], Documents) and documents[1:].ids == documents.ids[1:]
    with pytest.raises(InputError, match="expected rows from 0 to 3, got 4"):
        documents.subset([4])


def test_supervised_documents_are_recognised_by_content(tmp_path: Path) -> None:
    import numpy as np
    import torch

    documents = load_documents(
        [{"x": [1.0, 2.0], "y": 1, "tag": "t"}, {"x": torch.tensor([1.0, 2.0]), "y": 1}, {"x": np.ones(2), "y": 1}]
    )
    assert documents.ids[0] == documents.ids[1] != documents.ids[2] and documents[0].meta == {"tag": "t"}
    with pytest.raises(InputError, match="memory and cannot be written"):
        save_jsonl(documents, tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="x holds NaN"):
        load_documents([{"x": [float("nan")], "y": 0}])
    with pytest.raises(InputError, match="documents:1: expected x to be"):
        load_documents([{"x": "words", "y": 0}])


def test_text_forms_win_over_x_and_y(tmp_path: Path) -> None:
    rows = [{**row, "x": n, "y": 1} for n, row in enumerate(ROWS)]
    documents = load_documents(write(tmp_path / "xy.jsonl", *map(json.dumps, rows)))
    assert [d.content for d in documents] == ROWS and documents[1].meta == {"x": 1, "y": 1}
    assert load_documents([{"x": [1.0], "y": 1, "text": None}])[0].content["y"] == 1


def test_a_call_of_a_tool_has_no_text(tmp_path: Path) -> None:
    def line(*turns: tuple[str, str | None]) -> str:
        return json.dumps({"messages": [{"role": r, "content": c, "tool_calls": None} for r, c in turns]})

    call = [("user", "hi"), ("assistant", None), ("tool", "4")]
    good = load_documents(write(tmp_path / "t.jsonl", line(*call, ("assistant", "four"))))
    assert [turn["content"] for turn in good[0].content["messages"]] == ["hi", "", "4", "four"]
    assert good[0].response == "\nfour"
    missing = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"id": "1"}]},
               {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]  # fmt: skip
    assert load_documents([{"messages": missing}])[0].content["messages"][1]["tool_calls"] == [{"id": "1"}]
    with pytest.raises(InputError, match=r"u.jsonl:2: only a prompt and no response"):
        load_documents(write(tmp_path / "u.jsonl", GOOD, line(*call)))
    for turns in ([("user", "hi"), ("assistant", None)], [("user", None), ("assistant", "x")]):
        with pytest.raises(InputError, match=r"v.jsonl:2: messages.*content"):
            load_documents(write(tmp_path / "v.jsonl", GOOD, line(*turns)))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
messages = st.lists(st.tuples(st.sampled_from(["system", "user", "tool"]), texts), max_size=3).map(
    lambda turns: [{"role": r, "content": c} for r, c in turns]
)
contents = st.one_of(
    st.builds(lambda t: {"text": t}, texts),
    st.builds(lambda p, c: {"prompt": p, "completion": c}, st.one_of(st.just(""), texts), texts),
    st.builds(lambda m, a: {"messages": [*m, {"role": "assistant", "content": a}]}, messages, texts),
)
meta = st.dictionaries(
    st.sampled_from(["a", "b", "id"]), st.one_of(st.none(), st.integers(), texts, st.lists(texts, max_size=2))
)


@given(rows=st.lists(st.tuples(contents, meta), min_size=1, max_size=5))
def test_round_trip_through_jsonl(
    rows: list[tuple[dict[str, Any], dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # U+2028, U+0085 and control characters are text within a line, not its end.
    documents = load_documents([{**content, **extra} for content, extra in rows])
    path = tmp_path_factory.mktemp("round") / "d.jsonl"
    save_jsonl(documents, path)
    again = load_documents(path)
    assert again.ids == documents.ids and [d.content for d in again] == [content for content, _ in rows]
    assert [d.meta for d in again] == [extra for _, extra in rows]


def test_line_separators_within_text_survive(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\U0001f600"
    save_jsonl(load_documents([{"text": text}]), tmp_path / "s.jsonl")
    assert [d.content for d in load_documents(tmp_path / "s.jsonl")] == [{"text": text}]
    write(tmp_path / "p.jsonl", '{"text": "\\ud83d\\ude00"}')  # a whole pair is one character
    assert load_documents(tmp_path / "p.jsonl")[0].content == {"text": "\U0001f600"}
