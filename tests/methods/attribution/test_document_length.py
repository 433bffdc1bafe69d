"""Length is the number of trained tokens."""

from __future__ import annotations

from tests.methods.contract import World, contrast, loss, run


def test_trained_tokens_for_any_query(world: World):
    subject = world.subject([{"prompt": "four", "completion": "six!!!"}, {"text": "abc"}])
    found = run(subject, contrast(), "length")
    assert found.values.tolist() == [[7, 3]]  # the completion with its end; a text without its first token
    assert found.queries == ("mean",)
    assert found.unit == "trained tokens"
    assert run(subject, loss(), "document_length").values.tolist() == [[-7, -3]]
