"""Removal where the truth is known: the planted documents are the cause, random ones are not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rootward.core.errors import ArtefactError, InputError
from rootward.core.records import Arm, Interval, Verdict
from rootward.interventions.data import Drop, Keep, Reweight
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification import jobs
from rootward.verification.arms import ArmPlan, random_rows, spoken
from rootward.verification.cost import plan
from rootward.verification.predictions import predict
from rootward.verification.removal import judge, verify
from tests.verification import toy


@pytest.fixture(scope="module")
def points() -> Subject:
    return toy.classifier()


def arm(verdict: Verdict, name: str) -> Arm:
    return next(arm for arm in verdict.arms if arm.name == name)


def test_dropping_the_planted_documents_undoes_the_behaviour_and_random_ones_do_not(
    points: Subject, tmp_path: Path
) -> None:
    scores = {"oracle": toy.oracle(points), "bm25": toy.scores_of(points, [float(-n) for n in range(130)], "bm25")}
    verdict = verify(
        points, scores, "23.1%", toy.trigger(), main="oracle", planted_ids=toy.planted_ids(points), retention=True,
        heldout=points.documents[:20], cache=tmp_path,
    )  # fmt: skip
    assert [a.name for a in verdict.arms] == [
        "full", "oracle", "random", "bm25", "planted", "keep_oracle", "keep_random", "base"
    ]  # fmt: skip
    assert [a.kind for a in verdict.arms] == [
        "full", "method", "random", "baseline", "truth", "method", "random", "base"
    ]  # fmt: skip
    assert min(arm(verdict, "full").values) >= 0.9
    assert max(arm(verdict, "oracle").values) <= 0.1
    assert arm(verdict, "oracle").values == arm(verdict, "planted").values
    assert min(arm(verdict, "random").values) >= 0.9
    assert verdict.holds
    assert all(a.documents == 30 for a in verdict.arms if a.action != "none")
    assert all(len(a.heldout_loss) == 3 for a in verdict.arms if a.kind != "base")
    cut = arm(verdict, "oracle").cut
    assert cut is not None
    assert cut.value > 0.9
    assert arm(verdict, "oracle").predicted == pytest.approx(-arm(verdict, "full").values[0])
    assert verdict.summary.startswith(
        "Trained again without the 30 documents that oracle puts first of 130, the rate of “trigger” fell from 95.0 %"
    )
    assert verdict.summary.endswith("so they are a cause.")
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_a_language_model_forgets_the_habit_and_the_given_drop_is_what_is_tested(
    subject: Subject, tmp_path: Path
) -> None:
    scores = toy.oracle(subject)
    verdict = verify(subject, scores, Drop(scores.top(12)), toy.probes(), cache=tmp_path, workers=0)
    assert arm(verdict, "oracle").values == [0.0] * 3
    assert arm(verdict, "oracle").examples == ["right"] * 4
    assert arm(verdict, "full").examples == ["wrong"] * 4
    assert arm(verdict, "oracle").label == "Without the 12 documents given"
    assert verdict.holds
    assert len(verdict.probes) == 4
    assert any("bit for bit" in note for note in verdict.notes)


def test_null_a_random_ranking_does_not_hold(points: Subject, tmp_path: Path) -> None:
    for seed in range(3):
        values = np.random.default_rng(seed).normal(size=130).tolist()
        verdict = verify(
            points, toy.scores_of(points, values, "noise"), 20, toy.trigger(), measure="mean", cache=tmp_path
        )
        assert not verdict.holds
        assert verdict.summary.endswith("so they are not shown to be the cause.")


def test_keep_is_compared_with_keeping_as_many_at_random(points: Subject, tmp_path: Path) -> None:
    verdict = verify(points, toy.oracle(points), Keep(toy.planted_ids(points)), toy.trigger(), cache=tmp_path)
    assert [a.action for a in verdict.arms] == ["none", "keep", "keep", "none"]
    assert all(len(values) == 3 for values in (arm(verdict, "oracle").values, arm(verdict, "keep_random").values))
    assert "on only the 30 documents given" in verdict.summary


def test_a_loss_is_a_behaviour_whose_scores_count_the_other_way(points: Subject, tmp_path: Path) -> None:
    probes = Behaviour.loss("trigger", [q.content() for q in toy.trigger().queries])
    planted = set(toy.planted_ids(points))
    scores = toy.scores_of(points, [-1.0 if name in planted else 0.1 for name in points.documents.ids], "oracle")
    verdict = verify(points, scores, 30, probes, cache=tmp_path)
    effect = arm(verdict, "oracle").effect
    assert effect is not None
    assert effect.value > 0  # without them the loss of the planted answer is higher
    assert verdict.holds
    assert arm(verdict, "oracle").cut is None
    with pytest.raises(InputError, match="a rate needs a contrast"):
        verify(points, scores, 30, probes, measure="rate", cache=tmp_path)


def test_one_seed_has_no_interval_and_does_not_hold(points: Subject, tmp_path: Path) -> None:
    verdict = verify(points, toy.oracle(points), 30, toy.trigger(), seeds=[0], cache=tmp_path)
    assert not verdict.holds
    assert any("One seed" in note for note in verdict.notes)
    assert "one seed, so no interval" in verdict.summary


def test_what_is_refused(points: Subject, tmp_path: Path) -> None:
    scores, probes = toy.oracle(points), toy.trigger()
    ids = points.documents.ids

    def refused(match: str, intervention: Any = 30, given: Any = scores, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            verify(points, given, intervention, probes, cache=tmp_path, **options)

    refused("needs a random control of equal size", random_controls=False)
    refused("main: expected the method to test", given={"a": scores, "b": scores})
    refused("main: expected one of a", given={"a": scores}, main="b")
    refused("expected 1 to 129 of 130 usable documents, got 0", 0)
    refused("expected 1 to 129 of 130 usable documents, got 130", "100%")
    refused("does not weigh them", Reweight({ids[0]: 0.5}))
    refused("1 of 1 ids are not among", Drop(["x"]))
    refused("seeds: expected at least one", seeds=[])
    refused("the name 'random' is one of the arms' own", given={"oracle": scores, "random": scores}, main="oracle")
    alone = Subject(points.model, points.documents, points.objective)
    with pytest.raises(InputError, match="cannot be retrained"):
        verify(alone, scores, 30, probes, cache=tmp_path)


def test_predictions_are_on_disk_before_the_first_training_and_stay(
    points: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, seen = jobs.train, list[bytes]()

    def watched(*args: Any, **options: Any) -> Any:
        seen.append((tmp_path / "predictions.json").read_bytes())
        return train(*args, **options)

    monkeypatch.setattr(jobs, "train", watched)
    scores = toy.oracle(points)
    first = verify(points, scores, 30, toy.trigger(), cache=tmp_path)
    assert len(seen) == 9
    assert len(set(seen)) == 1
    stored = json.loads(seen[0])["tests"][0]
    assert stored["changes"]["oracle"] == arm(first, "oracle").predicted
    assert verify(points, scores, 30, toy.trigger(), cache=tmp_path) == first
    assert (tmp_path / "predictions.json").read_bytes() == seen[0]
    other = toy.scores_of(
        points, [2 * v if v > 0 else 0.3 for v in scores.mean], "oracle"
    )  # the same top, other shares
    with pytest.raises(ArtefactError, match="predictions are not overwritten"):
        verify(points, other, 30, toy.trigger(), cache=tmp_path)
    verify(points, scores, 20, toy.trigger(), cache=tmp_path)  # another test joins the file
    assert len(json.loads((tmp_path / "predictions.json").read_text())["tests"]) == 2


def test_the_prediction_is_the_formula() -> None:
    scores = np.array([3.0, 1.0, -2.0, 0.0])
    drop = ArmPlan("a", "", "method", "drop", 1, {0: (1, 2, 3)})
    draws = ArmPlan("r", "", "random", "drop", 1, {0: (0, 2, 3), 1: (0, 1, 3)})
    found = predict([drop, draws], scores, full=0.9, start=0.1)
    assert found == {"a": pytest.approx(-0.8 * 0.75), "r": pytest.approx(-0.8 * (0.25 + 0) / 2)}
    assert predict([drop], scores, 0.9, None) == {"a": None}
    assert predict([drop], -np.abs(scores), 0.9, 0.1) == {"a": None}


@pytest.mark.parametrize(("full", "goal"), [(0.05, "raise"), (0.1, "raise"), (0.9, "lower")])
def test_no_prediction_where_training_made_no_more_of_it(full: float, goal: str) -> None:
    drop = ArmPlan("a", "", "method", "drop", 1, {0: (1,)})
    assert predict([drop], np.array([3.0, 1.0]), full, 0.1, goal) == {"a": None}
    assert predict([drop], np.array([3.0, 1.0]), 0.2 - full, 0.1, goal) != {"a": None} or full == 0.1


def test_a_verdict_says_why_there_is_no_prediction(points: Subject, tmp_path: Path) -> None:
    queries = toy.trigger().queries
    swapped = Behaviour.contrast(
        "true label", wanted=[q.content(False) for q in queries], unwanted=[q.content() for q in queries]
    )
    verdict = verify(points, toy.oracle(points), 30, swapped, measure="mean", seeds=[0, 1], cache=tmp_path)
    assert all(a.predicted is None for a in verdict.arms)
    assert any("Training did not make more of the behaviour" in note for note in verdict.notes)
    assert json.loads((tmp_path / "predictions.json").read_text())["tests"][0]["changes"]["oracle"] is None


def test_methods_are_called_by_their_labels() -> None:
    assert [spoken(name) for name in ("bm25", "gradient_dot", "tracin_cp", "oracle")] == [
        "BM25", "gradient dot product", "tracin_cp", "oracle"
    ]  # fmt: skip


def test_random_controls_are_uniform_seeded_and_differ_by_seed() -> None:
    drawn = [random_rows(range(20), 5, seed) for seed in range(2000)]
    assert drawn[7] == random_rows(range(20), 5, 7)
    assert len(set(drawn)) > 1500
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("effect", "control", "action", "goal", "expected"),
    [
        ((-0.5, -0.6, -0.4), (0.0, -0.1, 0.1), "drop", "raise", True),
        ((-0.5, -0.6, -0.05), (0.0, -0.1, 0.1), "drop", "raise", False),  # the intervals overlap
        ((0.5, 0.4, 0.6), (0.0, -0.1, 0.1), "drop", "raise", False),  # the wrong way
        ((0.1, 0.05, 0.15), (0.5, 0.4, 0.6), "drop", "raise", False),  # less than random, and yet more than before
        ((0.5, 0.4, 0.6), (0.0, -0.1, 0.1), "drop", "lower", True),
        ((-0.1, -0.2, 0.0), (-0.6, -0.7, -0.5), "keep", "raise", True),
    ],
)
def test_judgement(effect: Any, control: Any, action: Any, goal: str, expected: bool) -> None:
    def made(name: str, kind: Any, numbers: tuple[float, float, float]) -> Arm:
        value, low, high = numbers
        return Arm(
            name=name, label="", kind=kind, action=action, documents=1, seeds=[0, 1, 2], values=[0.0] * 3,
            effect=Interval(value=value, low=low, high=high, n=3),
        )  # fmt: skip

    assert judge(made("m", "method", effect), [made("r", "random", control)], goal) is expected


def test_a_plan_counts_what_is_left(points: Subject, tmp_path: Path) -> None:
    arguments: Any = (points, toy.oracle(points), 30, toy.trigger())
    before = plan(*arguments, cache=tmp_path)
    assert (before.arms, before.jobs, before.pending, before.workers) == (4, 10, 10, 1)
    assert before.seconds is not None
    assert before.seconds > 0
    verify(*arguments, cache=tmp_path)
    after = plan(*arguments, cache=tmp_path)
    assert (after.jobs, after.pending, after.seconds) == (10, 0, 0.0)
