"""Removal and retention: the causes go faster than random, the opponents the other way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rootward.core.errors import InputError
from rootward.core.records import read_model, write_model
from rootward.core.scores import Scores
from rootward.subject.subject import Subject
from rootward.verification import pool
from rootward.verification.curves import RANDOM, Curves, curve_jobs, removal_curves
from tests.verification import toy


@pytest.fixture(scope="module")
def planted() -> Subject:
    return toy.classifier()


def methods(subject: Subject) -> dict[str, Scores]:
    """A ranking that knows what was planted, the same upside down, and one that knows nothing."""
    truth = np.array([document.meta["kind"] == "planted" for document in subject.documents], dtype=float)
    tables = {"oracle": truth, "reverse": -truth, "length": np.random.default_rng(5).normal(size=len(truth))}
    return {name: toy.scores_of(subject, values.tolist(), name) for name, values in tables.items()}


@pytest.fixture(scope="module")
def found(planted: Subject, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    cache = tmp_path_factory.mktemp("curves")
    return removal_curves(
        planted, methods(planted), toy.trigger(), counts=(15, 30), seeds=range(5), cache=cache, workers=0
    )


def test_dropping_the_causes_lowers_the_behaviour_more_than_anything_else(found: Curves) -> None:
    top, length = found.of("oracle"), found.of("length")
    assert top.beyond_random is not None and length.beyond_random is not None
    assert top.beyond_random.high < 0
    assert top.points[1].effect.value < top.points[0].effect.value < 0
    assert top.beyond_random.high < length.beyond_random.low < 0 < length.beyond_random.high
    assert found.of(RANDOM, "random").beyond_random is None
    assert found.of("reverse", "bottom").points == top.points
    assert found.of("reverse").points == found.of("oracle", "bottom").points
    ends = [(curve.method, curve.end) for curve in found.curves[:4]]
    assert ends == [(RANDOM, "random"), ("oracle", "top"), ("oracle", "bottom"), ("reverse", "top")]


def test_the_area_is_the_mean_change_over_the_share_removed(found: Curves) -> None:
    for curve in found.curves:
        areas = []
        for k in range(5):
            y = [0.0, *(point.values[k] - found.full[k] for point in curve.points)]
            areas.append((15 * (y[0] + y[1]) / 2 + 15 * (y[1] + y[2]) / 2) / 30)
        assert curve.area.value == pytest.approx(np.mean(areas))
        assert curve.area.n == 5
        for point in curve.points:
            assert point.effect.value == pytest.approx(np.mean(point.values) - np.mean(found.full))


def test_keeping_the_causes_alone_keeps_the_behaviour(planted: Subject, tmp_path: Path) -> None:
    kept = removal_curves(
        planted, methods(planted), toy.trigger(), counts=(30,), mode="keep", seeds=(0, 1), cache=tmp_path, workers=0
    )
    top, control = kept.of("oracle"), kept.of(RANDOM, "random")
    assert min(top.points[0].values) > max(control.points[0].values)
    share = 1 - 30 / 130
    assert top.area.value == pytest.approx(top.points[0].effect.value / 2)  # one trapezoid, over its own width
    assert kept.total * share == pytest.approx(100)
    alone = removal_curves(
        planted, methods(planted)["oracle"], toy.trigger(), counts=(30,), mode="keep", seeds=(0,), bottom=False,
        cache=tmp_path, workers=0,
    )  # fmt: skip
    assert alone.curves[1].points[0].values == top.points[0].values[:1]
    assert alone.curves[1].area.n == 1


def test_every_method_has_a_control_of_equal_size_and_nothing_runs_twice(
    planted: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = curve_jobs(planted, methods(planted), goal="raise", counts=(15, "30%"), seeds=(0, 1))
    sizes = {job.name: len(job.rows) for job in jobs}
    assert {n for name, n in sizes.items() if RANDOM in name} == {115, 91}
    assert {n for name, n in sizes.items() if "oracle" in name} == {115, 91}
    draws = [set(job.rows) for job in jobs if job.name == f"{RANDOM}, random 15"]
    assert draws[0] != draws[1]
    lower = {job.name: job for job in curve_jobs(planted, methods(planted), goal="lower", counts=(15,), seeds=(0,))}
    raised = {job.name: job for job in jobs if job.seed == 0}
    assert lower["oracle, top 15"].rows == raised["oracle, bottom 15"].rows

    options: dict[str, Any] = {"counts": (20,), "seeds": (0,), "cache": tmp_path, "workers": 0}
    first = removal_curves(planted, methods(planted), toy.trigger(), **options)
    monkeypatch.setattr(pool, "perform", None)
    assert removal_curves(planted, methods(planted), toy.trigger(), **options) == first


def test_what_cannot_be_done_is_refused(planted: Subject, found: Curves, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": tmp_path}
    for counts in ((0,), (130,), ()):
        with pytest.raises(InputError, match="counts: expected numbers from 1 to 129"):
            removal_curves(planted, methods(planted), toy.trigger(), counts=counts, **options)
    with pytest.raises(InputError, match="at least one method"):
        removal_curves(planted, {}, toy.trigger(), **options)
    with pytest.raises(InputError, match="seeds"):
        removal_curves(planted, methods(planted), toy.trigger(), seeds=(0, 0), **options)
    other = Scores(np.ones((1, 1), dtype=np.float32), ("a",), ("unknown",), "other", "1")
    with pytest.raises(InputError, match="no score for 130 documents"):
        removal_curves(planted, other, toy.trigger(), **options)
    with pytest.raises(InputError, match="expected one of random control"):
        found.of("nobody")


def test_a_result_can_be_saved(found: Curves, tmp_path: Path) -> None:
    write_model(tmp_path / "curves.json", found)
    assert read_model(Curves, tmp_path / "curves.json") == found
