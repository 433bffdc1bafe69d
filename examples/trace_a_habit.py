"""The same as trace_a_habit.toml in Python: train, trace, verify. Run `python make_base.py` first."""

from __future__ import annotations

from pathlib import Path

import rootward as rw
from rootward.subject.recipe import Recipe, train_folder

HERE = Path(__file__).parent


def main() -> None:
    """Which documents make the model agree, and were they the cause?"""
    model, documents = HERE / "out" / "model-of-the-script", HERE / "documents.jsonl"
    if not model.exists():
        recipe = Recipe(epochs=4, lr=5e-3, batch_size=8, checkpoints=4)
        train_folder(HERE / "out" / "base", documents, model, recipe)

    subject = rw.Subject.load(model, documents, parameters=".*")
    traced, probes = rw.Behaviour.load(HERE / "queries.jsonl").split(seed=0)
    scores = {name: rw.attribute(subject, traced, name) for name in ("tracin_cp_unit", "bm25")}
    for identity in scores["tracin_cp_unit"].top(3):
        print(identity, subject.documents[subject.documents.ids.index(identity)].text.replace("\n", " | "))

    cache = HERE / "out" / "retrain"
    verdict = rw.verify(subject, scores, 20, probes=probes, main="tracin_cp_unit", cache=cache, workers=0)
    print(verdict.summary)


if __name__ == "__main__":
    main()
