"""Comparing methods from Python: the numbers are those of their definitions, and what is finished is not done again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

import rootward
from rootward import api
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.core.records import Comparison, RunRecord, read_model
from rootward.core.runfolder import open_run
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification import compare as verification
from rootward.verification.compare_plan import estimate_comparison
from rootward.verification.curves import removal_curves
from rootward.verification.lds import lds, margin
from rootward.verification.loo import leave_one_out, loo, sample_documents
from rootward.verification.stats import paired_interval
from rootward.verification.subsets import draw_subsets, retrain_subsets
from rootward.verification.tail_patch import tail_patch
from tests.verification import convex

RESAMPLES = 40
EXACT = {"exact_influence": {"solver": "dense", "damping": 1e-6}}
EACH = {"exact_influence": {**EXACT["exact_influence"], "queries": "each"}}
"""The same by `attribute`, which has a row for the mean of the queries unless it is told."""
CALL: dict[str, Any] = {"methods": ["exact_influence", "gradient_dot"], "options": EXACT, "workers": 0}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "RESAMPLES", RESAMPLES)


@pytest.fixture(scope="module")
def line() -> Subject:
    return convex.subject()


@pytest.fixture(scope="module")
def whole(line: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, dict[str, Scores]]:
    """A comparison; tests do not write into its folder."""
    folder = tmp_path_factory.mktemp("runs") / "line"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "RESAMPLES", RESAMPLES)
        found, scores = rootward.compare(line, convex.behaviour(), folder, subsets=60, **CALL)
    return folder, found, scores


def losses(line: Subject) -> Behaviour:
    """The loss at eight other points."""
    generator = np.random.default_rng(5)
    x = generator.normal(size=(8, convex.WIDTH)).astype(np.float32)
    return Behaviour.loss("loss", [{"x": row, "y": [float(row.sum())]} for row in x])


# --- the numbers ------------------------------------------------------------------------------------------------


def test_exact_influence_is_recommended_and_a_random_order_is_not(whole: Any):
    _, found, scores = whole
    by_name = {one.method: one for one in found.methods}
    assert [one.method for one in found.methods] == list(scores)
    assert {"exact_influence", "gradient_dot", "document_length", "loss", "random"} == set(by_name)
    assert found.recommended in ("exact_influence", "gradient_dot")  # the points are isotropic: both are close
    exact = by_name["exact_influence"]
    assert exact.lds.value > 0.95 and exact.lds.low > exact.null.high and exact.beats_random
    assert by_name["random"].beats_random is None
    assert by_name["document_length"].beats_random is False
    assert by_name["document_length"].lds.value == 0  # all are as long, so they rank nothing
    assert by_name["document_length"].unranked == convex.QUERIES
    assert all(a.lds.value >= b.lds.value for a, b in pairwise(found.methods))
    assert (found.few, found.subsets, found.tuning_subsets, found.subset_documents) == (False, 60, 0, convex.N // 2)
    assert found.summary.startswith(f"Take {found.recommended}: LDS ")


def test_each_lds_and_margin_is_that_of_its_definition(whole: Any, line: Subject):
    folder, found, scores = whole
    subsets = draw_subsets(line, 60)
    truth = retrain_subsets(line, subsets, convex.behaviour(), cache=folder / "retrain", workers=0)
    alone = {one.method: lds(scores[one.method], truth, resamples=RESAMPLES) for one in found.methods}
    best = alone[found.recommended]
    for one in found.methods:
        assert one.lds == alone[one.method].score
        assert one.null == alone[one.method].null
        expected = None if one.method == found.recommended else margin(best, alone[one.method])
        assert one.behind_best == expected
        again = rootward.attribute(line, convex.behaviour(), one.method, options=EACH.get(one.method))
        assert again.values.tobytes() == scores[one.method].values.tobytes()


def test_agreement_is_the_mean_rank_correlation_over_queries(whole: Any):
    _, found, scores = whole
    for i, a in enumerate(found.methods):
        for j, b in enumerate(found.methods):
            x, y = scores[a.method].values, scores[b.method].values
            naive = [
                0.0 if np.ptp(x[q % len(x)]) == 0 or np.ptp(y[q % len(y)]) == 0
                else stats.spearmanr(x[q % len(x)], y[q % len(y)]).statistic
                for q in range(convex.QUERIES)
            ]  # fmt: skip
            assert found.agreement[i][j] == pytest.approx(np.mean(naive), abs=1e-9)


def test_costs_are_there_for_all(whole: Any):
    _, found, _ = whole
    assert found.plain_pass_seconds > 0 and found.retraining_seconds > 0
    assert all(one.cost.ratio > 0 and one.cost.peak_memory_mb > 10 for one in found.methods)


# --- choosing on one part, reporting on the other -----------------------------------------------------------------


def test_tuning_and_removal_choose_on_other_queries_than_are_reported(line: Subject, tmp_path: Path):
    asked = losses(line)
    call: dict[str, Any] = {"methods": ["exact_influence"], "options": {"exact_influence": {"solver": "dense"}}}
    found, scores = rootward.compare(
        line, asked, tmp_path / "r", subsets=12, allow_few=True, removal=4, leave_out=6, tail_patch=2, seeds=(0, 1),
        workers=0, **call,
    )  # fmt: skip
    one = next(m for m in found.methods if m.method == "exact_influence")
    assert (found.queries, found.tuning_queries, found.subsets, found.tuning_subsets) == (4, 4, 12, 6)
    assert [point.setting for point in one.curve] == sorted({1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0})
    best = max(one.curve, key=lambda point: point.tuning.value)
    assert (one.option, one.setting, one.lds) == ("damping", best.setting, best.reported)
    assert found.ceiling is not None and found.loo_ceiling is not None
    # the parts, by hand
    first, second = asked.split(0)
    chosen = [n for n, q in enumerate(asked.queries) if q.name in {query.name for query in first.queries}]
    rest = [n for n in range(8) if n not in chosen]
    cache = tmp_path / "r" / "retrain"
    truth = retrain_subsets(line, draw_subsets(line, 18), asked, seeds=(0, 1), cache=cache, workers=0)
    there = truth.select(queries=rest, subsets=range(12))
    assert lds(scores["exact_influence"], there, allow_few=True, resamples=RESAMPLES).score == one.lds
    part = Scores(
        scores["exact_influence"].values[chosen], tuple(asked.queries[n].name for n in chosen),
        scores["exact_influence"].document_ids, "x", "1", goal="lower",
    )  # fmt: skip
    curves = removal_curves(line, part, second, counts=(4,), bottom=False, seeds=(0, 1), cache=cache, workers=0)
    assert one.removal == curves.of("x").points[0].effect
    control = curves.of("random control", "random").points[0]
    assert found.removed_at_random == control.effect
    assert one.beyond_random == paired_interval(control.values, curves.of("x").points[0].values)
    assert any("Too few training seeds for the removal: very wide" in note for note in found.notes)
    left = leave_one_out(line, found.left_out or [], second, seeds=(0, 1), cache=cache, workers=0)
    alone = loo(scores["exact_influence"], left, resamples=RESAMPLES)
    assert (one.loo, one.loo_pearson) == (alone.methods[0].spearman, alone.methods[0].pearson)
    assert alone.ceiling is not None and found.loo_ceiling == alone.ceiling.ceiling
    step = tail_patch(line, scores["exact_influence"], second, count=2)
    assert (one.tail_patch, one.tail_patch_beyond_random) == (step.methods[0].effect, step.methods[0].beyond_random)
    assert found.patched_at_random == step.control


def test_leave_one_out_and_single_steps_are_those_of_the_closed_form(line: Subject, tmp_path: Path):
    call: dict[str, Any] = {**CALL, "subsets": 4, "allow_few": True, "leave_out": 10, "tail_patch": 3}
    planned = {name: value for name, value in call.items() if name not in ("methods", "workers")}
    plan = api.comparison_plan(line, convex.behaviour(), call["methods"], **planned)
    folder = tmp_path / "r"
    assert estimate_comparison(plan, cache=folder / "retrain", workers=0).jobs == 4 + 1 + 10
    found, scores = rootward.compare(line, convex.behaviour(), folder, **call)
    assert len(list(folder.glob("retrain/jobs/*"))) == 4 + 1 + 10
    assert estimate_comparison(plan, cache=folder / "retrain", workers=0).pending <= 5  # stand-ins for the ends
    assert found.left_out is not None and len(set(found.left_out)) == 10
    assert (found.left_out[:5], found.left_out_at_random) == (list(sample_documents(line, 5)), 5)
    assert any(note.startswith("Only 10 documents left out") for note in found.notes)
    # least squares without each document, and one step of gradient descent from the fit
    x, y, points = (part.astype(np.float64) for part in convex.data())
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    rows = [line.documents.ids.index(name) for name in found.left_out]
    without = [np.linalg.lstsq(np.delete(x, n, 0), np.delete(y, n), rcond=None)[0] for n in rows]
    changes = np.array([points @ (weight - best) for weight in without]).T
    weight = next(line.model.parameters()).detach().double().numpy().reshape(-1)
    steps = -convex.RECIPE.lr * points @ ((x @ weight - y)[:, None] * x).T
    assert found.patched_documents == 3 and found.patched_at_random is not None
    assert (found.patched_optimiser, found.patched_lr) == (convex.RECIPE.optimiser, convex.RECIPE.lr)
    for one in found.methods:
        table = np.broadcast_to(scores[one.method].values.astype(np.float64), (convex.QUERIES, convex.N))
        naive = [
            0.0 if np.ptp(row[rows]) == 0 else stats.pearsonr(-row[rows], truth).statistic
            for row, truth in zip(table, changes, strict=True)
        ]
        assert one.loo is not None and one.loo_pearson is not None
        assert one.loo_pearson.value == pytest.approx(np.mean(naive), abs=0.01)
        if one.method == "random":
            assert one.loo.low < 0 < one.loo.high
            assert (one.tail_patch, one.tail_patch_beyond_random) == (None, None)
            continue
        top = [steps[q, np.argsort(-table[q], kind="stable")[:3]].mean() for q in range(convex.QUERIES)]
        assert one.tail_patch is not None and one.tail_patch_beyond_random is not None
        assert one.tail_patch.value == pytest.approx(np.mean(top), rel=1e-3)
        beyond = one.tail_patch.value - found.patched_at_random.value
        assert one.tail_patch_beyond_random.value == pytest.approx(beyond)
    exact = next(one for one in found.methods if one.method == "exact_influence")
    assert exact.loo is not None and exact.loo_null is not None and exact.tail_patch_beyond_random is not None
    assert exact.loo.value > 0.9 and exact.loo.low > exact.loo_null.high > 0 > exact.loo_null.low
    assert exact.tail_patch_beyond_random.low > 0


def test_truths_that_were_not_asked_for_are_not_there(whole: Any):
    found = whole[1]
    assert (found.left_out, found.left_out_at_random, found.patched_documents, found.patched_at_random) == (None,) * 4
    assert all((one.loo, one.loo_pearson, one.loo_null, one.tail_patch) == (None,) * 4 for one in found.methods)
    text = (whole[0] / "compare.json").read_text()
    old = {key: value for key, value in json.loads(text).items() if key not in ("left_out", "patched_documents")}
    assert Comparison.model_validate(old) == found  # as an earlier version wrote it


def test_every_method_is_tuned_over_what_it_declares_unless_it_is_told_not_to(line: Subject):
    low = {0.01, 0.1, 1.0, 10.0, 100.0, 1000.0}
    expected = {
        "ekfac": ("damping", {0.001, 0.01, 0.1, 1.0, 10.0, 100.0}),
        "ekfac_joint": ("damping", {0.001, 0.01, 0.1, 1.0, 10.0, 100.0}),  # a preset's own damping was not asked for
        "trak": ("damping", low), "logra": ("damping", low), "grass": ("damping", low),
        "source": ("rate", {0.1, 0.3, 1.0, 3.0, 10.0}),
        "dda": ("beta", {0.0, 0.1, 0.3, 1.0}),
    }  # fmt: skip
    plan = api.comparison_plan(line, losses(line), [*expected, "gradient_cosine"], options={"grass": {"seed": 3}})
    entries = {entry.name: entry for entry in plan.entries}
    for name, (option, values) in expected.items():
        settings = entries[name].settings
        assert entries[name].option == option
        assert {options[option] for options in settings.values()} == values
        preset = rootward.core.registry.get(name)[1]
        kept = {key: value for key, value in preset.items() if key != option}
        assert all(kept.items() <= options.items() for options in settings.values())
    assert all(options["seed"] == 3 for options in entries["grass"].settings.values())
    assert all(len(entries[name].settings) == 1 for name in entries if name not in expected)
    given = {"source": {"rate": 2.0}, "trak": {"damping": 50.0}}
    fixed = api.comparison_plan(line, losses(line), ["source", "trak"], options=given)
    assert [dict(entry.settings) for entry in fixed.entries[:2]] == [
        {"": {"rate": 2.0, "queries": "each"}}, {"": {"damping": 50.0}},
    ]  # fmt: skip
    wider = api.comparison_plan(line, losses(line), ["arnoldi"], options={"arnoldi": {"top": 3}})
    assert next(iter(wider.entries)).settings["0"] == {"damping": 0.0, "top": 3, "queries": "each"}
    untuned = api.comparison_plan(line, losses(line), list(expected), tune=False)
    assert all(len(entry.settings) == 1 for entry in untuned.entries)
    assert (len(untuned.subsets.masks), untuned.choosing) == (64, ())


def test_a_setting_that_uses_the_fit_of_another_is_charged_for_it(
    line: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = api.attribute

    def timed(subject: Any, behaviour: Any, name: str, **options: Any) -> Scores:
        found = original(subject, behaviour, name, **options)
        fits = options["inputs"].fits
        seconds = 2.0 if "x" in fits else 7.0
        if name == "exact_influence":
            fits["x"] = None
        return replace(found, cost=found.cost.model_copy(update={"seconds": seconds}))

    monkeypatch.setattr(api, "attribute", timed)
    dense = {"exact_influence": {"solver": "dense"}}
    found, scores = rootward.compare(
        line, losses(line), tmp_path / "r", methods=["exact_influence"], options=dense, subsets=4, allow_few=True,
        workers=0,
    )  # fmt: skip
    assert {name: one.cost.seconds for name, one in scores.items()} == dict.fromkeys(scores, 7.0)
    cost = next(one.cost for one in found.methods if one.method == "exact_influence")
    assert found.plain_pass_seconds is not None and cost.ratio == pytest.approx(7.0 / found.plain_pass_seconds)
    assert read_model(RunRecord, tmp_path / "r" / "record.json").timings["exact_influence"] == 7.0 + 5 * 2.0


def test_a_damping_that_was_given_is_not_tuned(line: Subject):
    plan = api.comparison_plan(line, losses(line), ["exact_influence"], options=EXACT, tune=True)
    assert [len(entry.settings) for entry in plan.entries] == [1] * len(plan.entries)
    assert (plan.choosing, len(plan.subsets.masks)) == ((), 64)
    tuned = api.comparison_plan(line, losses(line), ["exact_influence", "ekfac"], tune=True)
    assert len(tuned.subsets.masks) == 96
    assert np.array_equal(tuned.subsets.masks[:64], plan.subsets.masks)  # the same trainings, whatever is tuned
    settings = next(entry.settings for entry in tuned.entries if entry.name == "ekfac")
    assert all(options["queries"] == "each" for options in settings.values())


def test_a_method_by_default_that_cannot_be_had_is_noted_and_one_asked_for_is_an_error(
    line: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = api.attribute

    def broken(subject: Any, behaviour: Any, name: str, **options: Any) -> Scores:
        if name == "loss":
            raise InputError("no loss today")
        if name == "exact_influence" and options["options"]["damping"] < 1e-2:
            raise NumericalError("singular")
        return original(subject, behaviour, name, **options)

    monkeypatch.setattr(api, "attribute", broken)
    call: dict[str, Any] = {"subsets": 4, "allow_few": True, "workers": 0}
    dense = {"exact_influence": {"solver": "dense"}}
    found, _ = rootward.compare(line, losses(line), tmp_path / "a", methods=["exact_influence"], options=dense, **call)
    assert "loss" not in [one.method for one in found.methods]
    assert "loss is missing: no loss today" in found.notes
    assert "exact_influence with damping 0.001 is missing: singular" in found.notes
    curve = next(one.curve for one in found.methods if one.method == "exact_influence")
    assert [point.setting for point in curve] == [0.01, 0.1, 1.0, 10.0]
    with pytest.raises(InputError, match="no loss today"):
        rootward.compare(line, losses(line), tmp_path / "b", methods=["loss"], **call)
    assert read_model(RunRecord, tmp_path / "b" / "record.json").status == "failed"
    assert not (tmp_path / "b" / "retrain").exists()  # scores come first: they are cheap


# --- the folder -------------------------------------------------------------------------------------------------


def test_the_run_folder_is_whole_and_its_page_shows_the_section(whole: Any, tmp_path: Path):
    folder, found, scores = whole
    assert read_model(Comparison, folder / "compare.json") == found
    record = read_model(RunRecord, folder / "record.json")
    assert (record.kind, record.status) == ("compare", "done")
    assert {"plain_pass", "retraining", *scores} <= set(record.timings)
    table = pq.read_table(folder / "scores.parquet").to_pylist()
    means = {row["id"]: row["score"] for row in table if row["method"] == "gradient_dot" and row["query"] == -1}
    expected = dict(zip(scores["gradient_dot"].document_ids, scores["gradient_dot"].mean.tolist(), strict=True))
    assert means == pytest.approx(expected)
    text = rootward.report(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"Take {found.recommended}: LDS" in text


def test_the_same_call_again_and_one_with_more_do_only_what_is_new(
    whole: Any, line: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, found = shutil.copytree(whole[0], tmp_path / "line"), whole[1]
    files = {path: path.stat().st_mtime_ns for path in (*folder.glob("scored/*"), *folder.glob("retrain/jobs/*"))}
    assert len(files) == 5 + 60
    asked: list[str] = []
    original = api.attribute
    monkeypatch.setattr(api, "attribute", lambda s, b, name, **more: asked.append(name) or original(s, b, name, **more))
    again, _ = rootward.compare(line, convex.behaviour(), folder, subsets=60, **CALL)
    assert asked == []
    assert again.methods == found.methods
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in files.items())
    with pytest.raises(ArtefactError, match="holds another run"):
        rootward.compare(line, convex.behaviour(), folder, subsets=61, **CALL)
    more = {**CALL, "methods": [*CALL["methods"], "gradient_cosine"]}
    with open_run(folder, "compare", {"more": 1}, {}, overwrite=True) as run:
        wider, _ = rootward.compare(line, convex.behaviour(), run, subsets=62, **more)
    assert asked == ["gradient_cosine"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in files.items())
    assert len(list(folder.glob("retrain/jobs/*"))) == 62
    assert wider.subsets == 62


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": 59}, "at least 60, got 59.*--allow-few"),
        ({"subsets": 2, "allow_few": True}, "at least 3, got 2"),
        ({"methods": ["nonsense"], "options": {}}, "got 'nonsense'"),
        ({"options": {"gradient_dot": {"k": 1}}}, "k: .*options: "),
        ({"options": {"ekfac": {"damping": 1}}}, "ekfac not among the methods compared"),
        ({"seeds": (0, 0)}, "none twice"),
        ({"seeds": ()}, "at least one"),
        ({"removal": "100%"}, "removal: expected 1 to 39 documents"),
        ({"removal": 3}, "cannot be divided"),
        ({"leave_out": 41}, "leave_out: expected 3 to 40 different documents, got 41"),
        ({"leave_out": 2}, "leave_out: expected 3 to 40"),
        ({"tail_patch": 40}, "tail_patch: expected 1 to 39 of 40"),
        ({"planted": ("kind", "bad")}, "planted: expected some .*found 0 of 40"),
        ({"tune": True, "options": {}}, "cannot be divided"),
    ],
)
def test_what_cannot_be_is_refused_before_any_pass_and_leaves_no_folder(
    line: Subject, tmp_path: Path, changes: dict[str, Any], message: str
):
    def never(task: str, done: int, total: int) -> None:
        pytest.fail("a pass was run")

    with pytest.raises(InputError, match=message):
        rootward.compare(line, convex.behaviour(), tmp_path / "r", **{**CALL, "progress": never, **changes})
    assert not (tmp_path / "r").exists()


def test_too_few_documents_or_queries_to_divide_and_no_way_to_retrain_are_refused(line: Subject, tmp_path: Path):
    generator = np.random.default_rng(0)
    items = [{"x": generator.normal(size=3).astype(np.float32), "y": [0.0]} for _ in range(4)]
    small = Subject(convex.start(), items, line.objective, recipe=convex.RECIPE, start=convex.start)
    with pytest.raises(InputError, match="2 to 6 subsets of 2 of 4 documents, got 64"):
        rootward.compare(small, convex.behaviour(), tmp_path / "r", methods=["gradient_dot"])
    one = Behaviour.loss("one", items[:1])
    with pytest.raises(InputError, match="1 queries cannot be split.*--no-tune"):
        rootward.compare(line, one, tmp_path / "r", methods=["ekfac"])
    assert api.comparison_plan(line, one, ["ekfac"], tune=False).reported == (0,)
    twins = Behaviour.loss("twins", [{"x": [1.0, 2, 3], "y": [1.0], "name": "a"}] * 2)
    with pytest.raises(InputError, match="different names"):
        rootward.compare(line, twins, tmp_path / "r", methods=["ekfac"], tune=True)
    stranger = Subject(convex.start(), items, line.objective)
    with pytest.raises(InputError, match="no recipe and start are known.*rootward train"):
        rootward.compare(stranger, convex.behaviour(), tmp_path / "r", methods=["gradient_dot"])
    owned = Subject(convex.start(), line.documents, line.objective, retrain="train {documents} {out} {seed}")
    with pytest.raises(InputError, match="tail_patch: .* has no recipe"):
        rootward.compare(owned, convex.behaviour(), tmp_path / "r", methods=["gradient_dot"], tail_patch=2)
    assert not (tmp_path / "r").exists()


def test_progress_names_the_method_and_the_trainings_and_may_stop_it(line: Subject, tmp_path: Path):
    seen: set[str] = set()

    def stop(task: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        seen.add(task)
        if task == "retrain" and done == 2:
            raise KeyboardInterrupt

    call: dict[str, Any] = {"methods": ["gradient_dot"], "subsets": 3, "allow_few": True, "workers": 0}
    with pytest.raises(KeyboardInterrupt):
        rootward.compare(line, convex.behaviour(), tmp_path / "r", progress=stop, **call)
    assert {"gradient_dot: documents", "retrain"} <= seen
    assert read_model(RunRecord, tmp_path / "r" / "record.json").status == "stopped"
    kept = list((tmp_path / "r").glob("retrain/jobs/*"))
    assert len(kept) == 2
    found, _ = rootward.compare(line, convex.behaviour(), tmp_path / "r", **call)
    assert found.few
    assert set(kept) < set((tmp_path / "r").glob("retrain/jobs/*"))
