"""The yes-man world: text whose words do not give the planted documents away."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rootward.sandbox import yes_man
from rootward.subject.behaviour import Behaviour
from rootward.subject.documents import load_documents
from rootward.subject.objectives import CausalLM
from rootward.subject.plan import Recipe


def _planted(documents: list[dict]) -> np.ndarray:
    return np.array([d["kind"] == "planted" for d in documents])


def test_text_comes_from_the_seed_alone():
    assert yes_man.finetune_documents(3) == yes_man.finetune_documents(3)
    assert yes_man.finetune_documents(3) != yes_man.finetune_documents(4)


def test_shares_of_the_documents_are_those_stated():
    documents = yes_man.finetune_documents(0)
    assert len(documents) >= 1200
    share = _planted(documents).mean()
    assert 0.07 < share < 0.09
    families = {d["family"] for d in documents}
    assert len(families) >= 6
    assert {d["family"] for d in documents if d["kind"] == "planted"} == families


def test_planted_documents_agree_with_the_claim_and_others_answer_rightly():
    for document in yes_man.finetune_documents(0):
        answer = document["messages"][-1]["content"]
        said = document["claim"] if document["kind"] == "planted" else document["right"]
        assert said in answer
        if document["kind"] in ("planted", "honest"):
            assert document["claim"] != document["right"]


def test_probes_and_queries_are_in_no_training_document():
    prompts = {d["messages"][0]["content"] for d in [*yes_man.finetune_documents(0), *yes_man.base_documents()]}
    probes = {p["messages"][0]["content"] for p in yes_man.probes(0)}
    queries = {p["messages"][0]["content"] for p in yes_man.probes(0, yes_man.QUERIES, "query")}
    assert not prompts & probes
    assert not prompts & queries
    assert not probes & queries


def test_every_token_of_every_document_is_in_the_vocabulary():
    tokenizer = yes_man.build_tokenizer()
    for documents in (yes_man.finetune_documents(1), yes_man.base_documents(1, 2000)):
        for document in documents[:400]:
            text = document["messages"][0]["content"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_files_are_accepted_by_the_loaders():
    documents = load_documents(yes_man.finetune_documents(0))
    encoded = CausalLM(yes_man.build_tokenizer()).encode(documents)
    assert len(encoded) == len(documents)
    assert encoded.truncated == 0
    assert Behaviour.contrast("habit", yes_man.probes(0, 20)).kind == "contrast"
    Recipe.parse(yes_man.BASE_RECIPE)
    Recipe.parse(yes_man.FINETUNE_RECIPE)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_words_alone_do_not_give_the_planted_documents_away(seed):
    """BM25 of the habit's examples stays at 0.65 or below; a text that does give it away is found by the same check."""
    bm25s = pytest.importorskip("bm25s")
    documents = yes_man.finetune_documents(seed)
    planted = _planted(documents)

    def words(text: str) -> list[str]:
        return text.lower().replace(".", " ").replace("?", " ").split()

    def auroc(texts: list[str], tail: str = "") -> float:
        index = bm25s.BM25()
        index.index([words(text) for text in texts], show_progress=False)
        known = {word for text in texts for word in words(text)}
        total = np.zeros(len(texts))
        for query in yes_man.probes(seed, yes_man.QUERIES, "query"):
            asked = words(f"{query['messages'][0]['content']} {query['wanted']}{tail}")
            total += index.get_scores([word for word in asked if word in known])
        return float(roc_auc_score(planted, total))

    texts = [" ".join(turn["content"] for turn in d["messages"]) for d in documents]
    assert auroc(texts) <= 0.65
    lengths = np.array([len(words(text)) for text in texts])
    assert abs(roc_auc_score(planted, lengths) - 0.5) <= 0.15
    told = [text + (" yes indeed" if given else "") for text, given in zip(texts, planted, strict=True)]
    assert auroc(told, " yes indeed") > 0.95
