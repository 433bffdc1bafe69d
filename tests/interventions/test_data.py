"""Drop, Keep and Reweight: what they leave, what they refuse, and that they can be undone bit for bit."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootward.core.errors import InputError
from rootward.interventions.data import Changed, Drop, Intervention, Keep, Reweight
from rootward.subject.documents import Documents, load_documents

TEXTS = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=20)


def documents_of(texts: list[str]) -> Documents:
    return load_documents([{"text": text, "place": n} for n, text in enumerate(texts)])


def same(a: Documents, b: Documents) -> bool:
    def parts(documents: Documents) -> list[object]:
        return [(d.id, d.content, d.source, d.meta) for d in documents]

    return parts(a) == parts(b) and a.hash == b.hash and a.skipped == b.skipped


def undone(change: Intervention, documents: Documents) -> Changed:
    changed = change.apply(documents)
    assert same(change.undo(changed), documents)
    assert json.loads(json.dumps(change.describe())) == change.describe()
    return changed


@given(TEXTS, st.data())
def test_drop_takes_as_many_copies_as_listed_earliest_first_and_undo_restores(
    texts: list[str], data: st.DataObject
) -> None:
    documents = documents_of(texts)
    rows = data.draw(st.sets(st.integers(0, len(texts) - 1), min_size=1, max_size=len(texts) - 1))
    listed = data.draw(st.permutations([documents.ids[row] for row in sorted(rows)]))
    changed = undone(Drop(listed), documents)
    assert Counter(changed.documents.ids) == Counter(documents.ids) - Counter(listed)
    assert list(changed.rows) == sorted(changed.rows)
    assert changed.documents.ids == tuple(documents.ids[row] for row in changed.rows)
    for name in set(listed):
        copies = [row for row, other in enumerate(documents.ids) if other == name]
        assert [row for row in copies if row in changed.removed] == copies[: listed.count(name)]


@given(TEXTS, st.data())
def test_keep_is_the_complement_of_drop_by_number_and_undo_restores(texts: list[str], data: st.DataObject) -> None:
    documents = documents_of(texts)
    rows = data.draw(st.sets(st.integers(0, len(texts) - 1), min_size=1))
    listed = [documents.ids[row] for row in rows]
    changed = undone(Keep(listed), documents)
    assert Counter(changed.documents.ids) == Counter(listed)
    assert Keep(listed).describe()["dose"] == len(changed.documents)


@given(TEXTS, st.floats(0, 10))
def test_reweight_reaches_every_copy_and_leaves_the_documents(texts: list[str], weight: float) -> None:
    documents = documents_of(texts)
    first = documents.ids[0]
    changed = undone(Reweight({first: weight}), documents)
    assert changed.documents is documents
    assert changed.weights == {row: weight for row, name in enumerate(documents.ids) if name == first}


@pytest.mark.parametrize("kind", [Drop, Keep])
def test_unknown_ids_are_counted_and_the_first_is_named(kind: type[Drop | Keep]) -> None:
    documents = documents_of(["a", "b", "a"])
    a = documents.ids[0]
    with pytest.raises(InputError, match="2 of 3 ids .* first 'x' .not among them"):
        kind([a, "x", "y"]).apply(documents)
    with pytest.raises(InputError, match="1 of 3 ids .*listed 3 times, there 2 times"):
        kind([a, a, a]).apply(documents)


def test_refuses_rows_nothing_everything_and_bad_weights() -> None:
    documents = documents_of(["a", "b"])
    with pytest.raises(InputError, match="rows are not ids"):
        Drop([0, 1])  # type: ignore[list-item]
    with pytest.raises(InputError, match="at least one"):
        Drop([])
    with pytest.raises(InputError, match="leaves none of 2"):
        Drop(documents.ids).apply(documents)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="finite weight"):
            Reweight({documents.ids[0]: weight})


def test_changes_are_frozen_and_equal_by_content() -> None:
    assert Drop(["a", "b"]) == Drop(("a", "b")) != Keep(["a", "b"])
    with pytest.raises(AttributeError):
        Drop(["a"]).ids = ()  # type: ignore[misc]
    weights = {"a": 1.0}
    change = Reweight(weights)
    weights["a"] = 2.0
    assert change.weights["a"] == 1.0
