"""BM25 against the formula, word by word."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from rootward.core.errors import InputError
from rootward.methods.attribution.bm25 import words
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject
from tests.methods.contract import World, contrast, run

TEXTS = [
    "rain, Rain, sun", "is rain good? yes", "nothing alike", "YES is good, is it? 100% yes_sir", "grün ist die Farbe",
]  # fmt: skip


def naive(queries: list[str], texts: list[str], k1: float, b: float) -> np.ndarray:
    """Lucene's BM25, summed word by word."""
    documents = [words(text) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    result = np.zeros((len(queries), len(texts)))
    for q, query in enumerate(queries):
        for word in words(query):
            holding = sum(word in document for document in documents)
            weight = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            for n, document in enumerate(documents):
                count = document.count(word)
                if count:
                    result[q, n] += weight * count / (count + k1 * (1 - b + b * len(document) / average))
    return result


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (2.0, 1.0), (0.0, 0.5)])
def test_against_the_formula(world: World, k1: float, b: float):
    subject = world.subject([{"text": text} for text in TEXTS])
    found = run(subject, contrast(), "bm25", k1=k1, b=b)
    queries = [f"{q.prompt_text} {q.wanted}" for q in contrast().queries]
    np.testing.assert_allclose(found.values, naive(queries, TEXTS, k1, b), rtol=1e-5, atol=1e-7)
    assert found.values[:, 2].tolist() == [0, 0, 0]
    assert (found.values[:, 1] > 0).all()


def test_the_wanted_answer_counts_and_the_unwanted_does_not(world: World):
    subject = world.subject([{"text": "perhaps"}, {"text": "never"}, {"text": "else"}])
    asked = Behaviour.contrast("x", [{"prompt": "?", "wanted": "perhaps", "unwanted": "never"}])
    assert (run(subject, asked, "okapi").values[0] > 0).tolist() == [True, False, False]


def test_a_query_without_a_known_word_scores_nothing(world: World):
    asked = Behaviour.loss("x", [{"prompt": "", "wanted": "zzz"}])
    assert not run(world.subject(), asked, "bm25").values.any()


def test_words_are_lower_cased_runs_of_letters_and_digits():
    assert words("Ärger, it's 3.5 o'clock!") == ["ärger", "it", "s", "3", "5", "o", "clock"]


def test_documents_without_words(world: World):
    subject = world.subject([{"text": "?!"}, {"text": "good rain"}])
    assert (run(subject, contrast(), "bm25").values[0] > 0).tolist() == [False, True]


def test_documents_without_text_are_refused():
    rows = [{"x": torch.ones(3) * n, "y": n % 2} for n in range(4)]
    subject = Subject(nn.Linear(3, 2), rows, Classification())
    with pytest.raises(InputError, match="bm25: the documents have no text"):
        run(subject, Behaviour.loss("x", rows[:2]), "bm25")
