"""Random subsets: the same whatever the order of the file, trained once, shared by all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.core.records import read_model, write_model
from rootward.core.scores import Scores
from rootward.subject.subject import Subject
from rootward.verification import pool, retrain
from rootward.verification.subsets import Retrained, draw_subsets, estimate_subsets, joined, retrain_subsets
from tests.verification import convex, toy


def small(subject: Subject, cache: Path, count: int = 4, **options: Any) -> Retrained:
    return retrain_subsets(subject, draw_subsets(subject, count), convex.behaviour(), cache=cache, **options)


def test_subsets_are_halves_and_depend_on_the_ids_alone(line: Subject) -> None:
    drawn = draw_subsets(line, 400)
    assert set(drawn.masks.sum(1).tolist()) == {20}
    assert len(np.unique(drawn.masks, axis=0)) == 400
    share = drawn.masks.mean(0)
    assert abs(share - 0.5).max() < 4 * 0.5 / 400**0.5  # every document as likely
    assert (draw_subsets(line, 7).masks == drawn.masks[:7]).all()
    assert (draw_subsets(line, 7, draw=1).masks != drawn.masks[:7]).any()
    order = np.random.default_rng(1).permutation(convex.N)
    assert (draw_subsets(convex.subject(order), 7).masks == drawn.masks[:7, order]).all()


def test_of_two_copies_either_one_may_be_left_out() -> None:
    items = [{"x": [float(n // 2)], "y": [0.0]} for n in range(8)]
    subject = Subject(convex.start(), items, convex.Regression())
    masks = draw_subsets(subject, 60).masks
    assert ((masks[:, 0] != masks[:, 1]).any()) and ((masks[:, 0] & masks[:, 1]).any())


def test_nothing_is_trained_twice(line: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    perform = pool.perform

    def counted(work: Any, job: Any, *rest: Any) -> Any:
        calls.append(job.label)
        return perform(work, job, *rest)

    monkeypatch.setattr(pool, "perform", counted)
    first = small(line, tmp_path)
    assert calls == [f"subset {n}, seed 0" for n in range(4)]
    again = small(line, tmp_path)
    assert again == first
    assert len(calls) == 4
    more = small(line, tmp_path, count=6, seeds=(0, 1))
    new = [f"subset {n}, seed 1" for n in range(4)] + [f"subset {n}, seed {k}" for n in (4, 5) for k in (0, 1)]
    assert sorted(calls[4:]) == sorted(new)
    assert (more.measured[:4, 0] == first.measured[:, 0]).all()


def test_the_measured_values_are_those_of_a_fresh_fit(line: Subject, line_truth: Retrained) -> None:
    x, y, points = (part.astype(np.float64) for part in convex.data())
    for s in range(5):
        mask = line_truth.masks[s]
        best = np.linalg.lstsq(x[mask], y[mask], rcond=None)[0]
        assert line_truth.measured[s, 0] == pytest.approx(points @ best, abs=0.05)


def test_worker_processes_give_the_same_bits(line: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = small(line, tmp_path / "here", workers=0)
    used: list[int] = []
    run_pool = retrain.run_pool

    def counted(work: bytes, tasks: Any, workers: int, done: Any) -> None:
        used.append(workers)
        run_pool(work, tasks, workers, done)

    monkeypatch.setattr(retrain, "run_pool", counted)
    there = small(line, tmp_path / "there", workers=1)
    assert used == [1]
    assert there.key == here.key

    line_of_main = convex.subject()
    monkeypatch.setattr(line_of_main, "_start", lambda: convex.start())
    small(line_of_main, tmp_path / "lambda", workers=1)
    assert used == [1]  # a lambda cannot travel


def test_processes_are_started_only_where_they_pay(
    line: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def pooled(_: bytes, tasks: Any, __: int, done: Any) -> None:
        sent.append(len(tasks))
        pool.run_here(retrain.work_of(line, convex_evaluation(), base), tasks, done)

    def convex_evaluation() -> Any:
        from rootward.verification.evaluation import Evaluation

        return Evaluation(convex.behaviour(), None, 0)

    base = retrain.start_hash(line, line.recipe)
    monkeypatch.setattr(retrain, "run_pool", pooled)
    monkeypatch.setattr(retrain, "default_workers", lambda *_: 2)
    small(line, tmp_path / "a")
    assert sent == []
    monkeypatch.setattr(retrain, "START_SECONDS", 0.0)
    small(line, tmp_path / "b")
    assert sent == [2]  # two were timed here


def test_the_estimate_counts_what_is_left(line: Subject, tmp_path: Path) -> None:
    subsets = draw_subsets(line, 6)
    before = estimate_subsets(line, subsets, convex.behaviour(), seeds=(0, 1), cache=tmp_path)
    assert (before.jobs, before.pending, before.workers) == (12, 12, 1)
    assert before.seconds is not None and before.seconds > 0
    small(line, tmp_path)
    after = estimate_subsets(line, subsets, convex.behaviour(), seeds=(0, 1), cache=tmp_path)
    assert (after.jobs, after.pending) == (12, 8)


def test_a_result_can_be_saved_and_divided(line_truth: Retrained, tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    write_model(path, line_truth)
    assert read_model(Retrained, path) == line_truth
    part = line_truth.select(subsets=[5, 2], queries=[4, 0, 1])
    assert (part.measured == line_truth.measured[[5, 2]][:, :, [4, 0, 1]]).all()
    assert (part.masks == line_truth.masks[[5, 2]]).all()
    assert part.queries == ["point 4", "point 0", "point 1"]
    assert part.key != line_truth.key
    with pytest.raises(InputError, match="different numbers from 0 to 127"):
        line_truth.select(subsets=[0, 0])
    path.write_text(path.read_text().replace('"share"', '"shared"'))
    with pytest.raises(ArtefactError, match="does not hold a Retrained"):
        read_model(Retrained, path)


def test_scores_are_joined_by_id_and_by_name(line: Subject) -> None:
    ids, names = line.documents.ids, [f"point {q}" for q in range(convex.QUERIES)]
    scores = convex.influence(line)
    turned = Scores(scores.values[::-1, ::-1], scores.queries[::-1], ids[::-1], "turned", "1")
    assert (joined(turned, names, ids) == scores.values).all()
    mean = Scores(scores.values[:1], ("mean",), ids, "mean", "1")
    assert (joined(mean, names, ids) == np.repeat(scores.values[:1], 5, 0)).all()
    one = Scores(scores.values[:1], ("point 0",), ids, "one", "1")
    with pytest.raises(InputError, match="no scores for 4 measured queries, first 'point 1'"):
        joined(one, names, ids)
    with pytest.raises(InputError, match="the same name"):
        joined(replace(scores, queries=("point 0",) * 5), names, ids)
    with pytest.raises(InputError, match="no score for 1 documents, first unknown"):
        joined(scores, names, [*ids[1:], "unknown"])


def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    line: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "perform", None)
    alone = Subject(convex.start(), [{"x": [1.0] * 3, "y": [0.0]}], convex.Regression())
    with pytest.raises(InputError, match="at least one of 1 usable documents"):
        draw_subsets(alone)
    four = Subject(convex.start(), [{"x": [n] * 3, "y": [0.0]} for n in range(4)], convex.Regression())
    with pytest.raises(InputError, match="2 to 6 subsets of 2 of 4 documents, got 64"):
        draw_subsets(four)
    with pytest.raises(InputError, match="share"):
        draw_subsets(line, share=1.0)
    with pytest.raises(InputError, match="draw: expected 0 or more"):
        draw_subsets(line, draw=-1)
    with pytest.raises(InputError, match="other documents"):
        retrain_subsets(toy.classifier(), draw_subsets(line, 4), convex.behaviour(), cache=tmp_path)
    with pytest.raises(InputError, match="none twice"):
        small(line, tmp_path, seeds=(1, 1))
    owner = Subject(line.model, line.documents, line.objective, retrain="train {documents} {out}")
    with pytest.raises(InputError, match="takes no {seed}"):
        small(owner, tmp_path, seeds=(0, 1))


def test_a_ground_truth_that_does_not_fit_together_is_refused(line_truth: Retrained) -> None:
    fields = line_truth.select(subsets=[0, 1], queries=[0]).model_dump()
    with pytest.raises(InputError, match="values \\[subset, seed, query\\] = \\(2, 1, 1\\)"):
        Retrained(**{**fields, "values": fields["values"][:1]})
    with pytest.raises(InputError, match="0 or 1 for each of 40"):
        Retrained(**{**fields, "kept": ["01", "10"]})
    with pytest.raises(InputError, match="one size"):
        Retrained(**{**fields, "kept": ["1" * 40, "0" * 40]})
    with pytest.raises(NumericalError, match="not finite"):
        Retrained(**{**fields, "values": [[[float("nan")]], [[1.0]]]})
