"""BM25 (Robertson et al., 1994, "Okapi at TREC-3"): which documents share the query's words?

The baseline that every attribution has to beat: it reads neither the model nor its gradients. The query is the prompt
with the wanted answer, a document its whole text; words are lower-cased runs of letters and digits, none is left out,
so that short answers count. Computed by ``bm25s`` in Lucene's variant (Kamphuis et al., 2020), where the weight of a
word stays above zero and the numerator has no factor k1 + 1; a word counts as often as the query holds it:

    score[q, n] = sum_{w in q} idf_w tf_wn / (tf_wn + k1 (1 - b + b len_n / mean len))
    idf_w = log(1 + (N - df_w + 0.5) / (df_w + 0.5))

k1 = 1.5 and b = 0.75 are the usual defaults. Documents like the answer raise a contrast and lower a loss: for a loss
the score is negative.
"""

from __future__ import annotations

import re

import bm25s
import numpy as np
from pydantic import Field

from rootward.capture.inputs import MethodInputs, has_text
from rootward.core.errors import InputError
from rootward.core.registry import Card, MethodConfig, register
from rootward.core.scores import Scores

CARD = Card(
    key="bm25",
    label="BM25 (shared words)",
    question="attribution",
    paper="Okapi at TREC-3",
    reference="Robertson et al. 1994",
    needs=("text",),
    cost="milliseconds",
    unit="BM25",
    aliases=("okapi",),
    baseline=True,
)
WORD = re.compile(r"\w+")


class Config(MethodConfig):
    """The two constants of BM25."""

    k1: float = Field(default=1.5, ge=0, description="how soon a word's repetition saturates")
    b: float = Field(default=0.75, ge=0, le=1, description="how much long documents are marked down, 0 to 1")


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits."""
    return WORD.findall(text.lower())


@register(CARD, Config)
def run(inputs: MethodInputs, config: Config) -> Scores:
    """BM25 of every usable document for each query's prompt and wanted answer."""
    if inputs.behaviour.kind == "scalar":
        raise InputError("bm25: a scalar behaviour has no text to look for")
    if not has_text(inputs.subject):
        raise InputError("bm25: the documents have no text to look in")
    encoded = inputs.subject.encoded
    corpus = [words(inputs.subject.documents[row].text) or [""] for row in encoded.rows]
    index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
    index.index(corpus, show_progress=False)
    known = {word for document in corpus for word in document}
    values = np.zeros((len(inputs.behaviour), len(encoded)), dtype=np.float32)
    for q, query in enumerate(inputs.behaviour.queries):
        asked = [word for word in words(f"{query.prompt_text} {query.wanted}") if word in known]
        if asked:
            values[q] = inputs.likeness * index.get_scores(asked)
    return inputs.scored(CARD, values, gradients=False)
