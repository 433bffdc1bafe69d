"""Brittleness: the smallest count that flips an answer, beside as many random documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rootward.core.errors import InputError
from rootward.core.records import read_model, write_model
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from rootward.subject.supervised import Regression
from rootward.verification import brittleness as module
from rootward.verification.brittleness import Brittleness, Flips, brittleness

N = 40


def zero() -> torch.nn.Module:
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    return model


def weights(model: torch.nn.Module) -> torch.Tensor:
    return next(model.parameters()).reshape(-1)


def votes() -> Subject:
    """Each document votes on one of two weights: the weight is the mean of its votes when training has converged.

    Weight 0 has 12 votes of +1 and 8 of -1, weight 1 has 2 of +1 and 18 of -1.
    """
    items: list[dict[str, Any]] = []
    for n in range(N):
        which, number = n // 20, n % 20
        ups = (12, 2)[which]
        items.append({"x": [1.0 - which, float(which)], "y": [1.0 if number < ups else -1.0], "n": n})
        items[-1]["x"] = [value * (1 + 1e-4 * number) for value in items[-1]["x"]]  # no two documents are equal
    recipe = Recipe(optimiser="sgd", lr=0.5, epochs=40, batch_size=N, reduction="document")
    return Subject(zero(), items, Regression(), recipe=recipe, start=zero)


def behaviour() -> Behaviour:
    return Behaviour.scalar("weights", weights, ["first", "second"])


def truth(subject: Subject) -> Scores:
    table = np.zeros((2, N), dtype=np.float32)
    for n, document in enumerate(subject.documents):
        table[n // 20, n] = float(document.content["y"])
    return Scores(table, ("first", "second"), subject.documents.ids, "votes", "1")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return votes()


def search(subject: Subject, scores: Scores | dict[str, Scores], cache: Path, **options: Any) -> Brittleness:
    fixed: dict[str, Any] = {"grid": range(1, 21), "seeds": (0,), "workers": 0, "cache": cache}
    return brittleness(subject, scores, behaviour(), **{**fixed, **options})


def run(subject: Subject, scores: Scores, cache: Path, **options: Any) -> Flips:
    return search(subject, scores, cache, **options).of(scores.method)


def test_the_smallest_count_that_flips_is_found(subject: Subject, tmp_path: Path) -> None:
    whole = search(subject, truth(subject), tmp_path)
    found = whole.of("votes")
    first, second = found.flips
    assert first.before > 0 > second.before
    # 12 against 8: with 4 gone the mean is just at 0 (the tiny differences of x decide), with 5 it is below
    assert first.documents in (4, 5)
    assert first.after <= 0
    # 2 against 18: with 16 of those below gone it is a tie, with 17 it is above
    assert second.documents in (16, 17)
    assert second.after > 0
    assert (found.flipped, found.median) == (1.0, (first.documents + second.documents) / 2)
    assert not first.random_flips  # 4 or 5 random documents of 40
    write_model(tmp_path / "brittleness.json", whole)
    assert read_model(Brittleness, tmp_path / "brittleness.json") == whole


def test_methods_share_their_trainings_and_the_control(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = truth(subject)
    tables = {
        "votes": scores,
        "again": scores,
        "length": Scores(np.arange(N, dtype=np.float32)[None], ("all",), scores.document_ids, "length", "1"),
    }
    rounds: list[int] = []
    run_jobs = module.run_jobs

    def counted(subject: Any, jobs: Any, *rest: Any, **options: Any) -> Any:
        rounds.append(len(jobs))
        return run_jobs(subject, jobs, *rest, **options)

    monkeypatch.setattr(module, "run_jobs", counted)
    both = search(subject, tables, tmp_path, grid=(5, 17))
    assert len(rounds) == 4  # all documents, two rounds for all methods together, the controls
    monkeypatch.setattr(module, "run_jobs", run_jobs)
    for name, table in tables.items():
        assert search(subject, {name: table}, tmp_path, grid=(5, 17)).methods == [both.of(name)]
    assert both.of("again").flips == both.of("votes").flips
    assert [flip.documents for flip in both.of("votes").flips] == [5, 17]
    assert both.of("length").flips != both.of("votes").flips
    with pytest.raises(InputError, match="expected one of votes, again, length, got nobody"):
        both.of("nobody")


def test_bisection_finds_what_trying_every_count_finds(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    run_jobs = module.run_jobs

    def counted(subject: Any, jobs: Any, *rest: Any, **options: Any) -> Any:
        rounds.append(len(jobs))
        return run_jobs(subject, jobs, *rest, **options)

    monkeypatch.setattr(module, "run_jobs", counted)
    found = run(subject, truth(subject), tmp_path)
    assert sum(rounds) <= 1 + 2 * 6 + 2  # all documents, at most 6 rounds of 2 queries, 2 controls
    for q, flip in enumerate(found.flips):
        each = [run(subject, truth(subject), tmp_path, grid=[count]).flips[q].documents for count in range(1, 21)]
        assert flip.documents == next(count for count in each if count is not None)


def test_scores_with_the_wrong_sign_flip_nothing(subject: Subject, tmp_path: Path) -> None:
    scores = truth(subject)
    wrong = Scores(-scores.values, scores.queries, scores.document_ids, "wrong", "1")
    found = run(subject, wrong, tmp_path, grid=(5, 10), seeds=(0, 1))
    assert [flip.documents for flip in found.flips] == [None, None]
    assert (found.flipped, found.median) == (0.0, None)
    assert all(abs(flip.after) >= abs(flip.before) for flip in found.flips)


def test_the_threshold_is_what_has_to_be_crossed(subject: Subject, tmp_path: Path) -> None:
    high = run(subject, truth(subject), tmp_path, threshold=0.15)
    assert high.flips[0].documents in (1, 2, 3)
    below = run(subject, truth(subject), tmp_path, threshold=0.5)  # 0.2 is below it now, so more votes of +1 are wanted
    assert below.flips[0].after > 0.5 > below.flips[0].before


def test_what_cannot_be_done_is_refused(subject: Subject, tmp_path: Path) -> None:
    for grid in ((N,), (0,), ()):
        with pytest.raises(InputError, match="grid: expected numbers from 1 to 39"):
            run(subject, truth(subject), tmp_path, grid=grid)
    scores = truth(subject)
    with pytest.raises(InputError, match="at least one method"):
        search(subject, {}, tmp_path)
    with pytest.raises(InputError, match="no score for 1 documents"):
        run(subject, Scores(scores.values[:, 1:], scores.queries, scores.document_ids[1:], "m", "1"), tmp_path)
    with pytest.raises(InputError, match="no scores for 2 measured queries"):
        run(subject, Scores(scores.values, ("a", "b"), scores.document_ids, "m", "1"), tmp_path)
