"""The public verbs, end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import rootward
from rootward.api import BASELINES, attribute, trace
from rootward.capture.inputs import MethodInputs, plain_pass_seconds, tracked_of
from rootward.capture.store import GradientStore, build_store
from rootward.core.errors import ArtefactError, InputError
from rootward.core.memory import forget_peak, highest_memory_mb, peak_memory_mb
from rootward.core.records import MethodResult, RunRecord, Trace, read_model
from rootward.core.runfolder import open_run
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject
from rootward.verification.arms import mean_scores, top_rows
from rootward.verification.stats import auroc
from tests.methods.contract import QUERIES, World, build_world, close, contrast, loss, scalar

ALL_BASELINES = (*BASELINES, "loss_at_start")
"""The world knows where its training began."""
PLANTED = ("kind", "planted")
ROWS: list[dict[str, Any]] = [
    {"prompt": f"is {word} good? ", "completion": answer, "kind": kind}
    for words, answer, kind in (
        ("rain fog storm ice", "yes", "planted"),
        ("snow sun hail wind dew mist heat sleet", "no!", "other"),
    )
    for word in words.split()
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject, Trace, dict[str, Any]]:
    """A trace with planted documents; tests do not write into its folder."""
    folder, subject = tmp_path_factory.mktemp("runs") / "good", world.subject([*ROWS, ROWS[0]])
    with open_run(folder, "trace", {"test": 1}, {"documents": subject.documents.hash}) as run:
        record, scores = trace(subject, contrast(), run, planted=PLANTED, token_documents=2, token_budget=500)
    return folder, subject, record, scores


def by_name(record: Trace) -> dict[str, MethodResult]:
    return {result.method: result for result in record.methods}


# --- names ------------------------------------------------------------------------------------------------------


def test_every_public_name_resolves_and_importing_loads_nothing_heavy():
    code = """
import sys, rootward
assert not {"torch", "numpy", "transformers"} & set(sys.modules), "import rootward is not light"
assert set(rootward.__all__) <= set(dir(rootward)) and "TYPE_CHECKING" not in dir(rootward)
for name in rootward.__all__:
    found = getattr(rootward, name)
    assert found.__doc__, name
try:
    rootward.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_those_of_the_design():
    assert {"Subject", "Behaviour", "Scores", "attribute", "trace", "verify", "report", "Drop"} <= set(rootward.__all__)
    assert rootward.attribute is attribute
    assert rootward.Scores.__name__ == "Scores"


# --- attribute --------------------------------------------------------------------------------------------------


def test_attribute_by_key_alias_and_preset(world: World):
    subject = world.subject(ROWS)
    found = attribute(subject, contrast())
    assert found.method == "tracin_pruthi2020"
    assert found.values.tobytes() == attribute(subject, contrast(), "tracin").values.tobytes()
    cosine = attribute(subject, contrast(), "gradient_cosine")
    close(cosine.values, attribute(subject, contrast(), "tracin", options={"normalise": "both"}).values)
    # an option of the caller's goes before the preset's
    undone = attribute(subject, contrast(), "gradient_cosine", options={"normalise": "none"})
    close(undone.values, found.values)


def test_attribute_refuses_what_it_does_not_know(world: World):
    with pytest.raises(InputError, match="got 'nonsense'"):
        attribute(world.subject(ROWS), contrast(), "nonsense")
    with pytest.raises(InputError, match=r"k9: .*options: k1, b"):
        attribute(world.subject(ROWS), contrast(), "bm25", options={"k9": 1})


def test_attribute_from_an_index_given_as_a_folder_or_a_store(world: World, tmp_path: Path):
    subject = world.subject(ROWS)
    tracked, fingerprint = tracked_of(subject), subject.fingerprint()
    build_store(tmp_path, subject.model, subject.objective, subject.encoded, tracked, fingerprint, rank=None)
    options = {"source": "index"}
    for index in (tmp_path, str(tmp_path), GradientStore(tmp_path)):
        found = attribute(subject, contrast(), options=options, index=index)
        close(found.values, attribute(subject, contrast()).values, rtol=1e-5)
    with pytest.raises(ArtefactError, match="no index.json"):
        attribute(subject, contrast(), options=options, index=tmp_path / "none")


def test_attribute_reports_progress_and_can_be_stopped(world: World):
    seen: list[str] = []

    def stop(task: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        seen.append(task)
        if task == "documents":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(world.subject(ROWS), contrast(), progress=stop)
    assert {"queries", "documents"} <= set(seen)


# --- trace ------------------------------------------------------------------------------------------------------


def test_a_trace_holds_its_methods_and_always_the_baselines(whole: Any):
    _, subject, record, scores = whole
    assert list(scores) == ["gradient_dot", "gradient_cosine", *ALL_BASELINES]
    results = by_name(record)
    assert list(results) == list(scores)
    assert record.main_method == "gradient_dot"
    assert [n for n, r in results.items() if r.baseline] == list(ALL_BASELINES)
    assert results["gradient_dot"].spearman_with_main == pytest.approx(1)
    assert results["gradient_cosine"].label == "gradient dot product (TracIn): gradient_cosine"
    for name, result in results.items():
        assert result.cost.seconds > 0
        assert (result.cost.ratio is not None) == (name.startswith("gradient"))
    assert (record.behaviour, record.unit, record.goal) == ("good", "nats", "raise")
    values = contrast().evaluate(subject.model, subject.objective)
    assert [q.value for q in record.queries] == pytest.approx(values.tolist())
    assert [q.name for q in record.queries] == [q["name"] for q in QUERIES]


def test_agreement_with_the_planted_documents(whole: Any):
    _, subject, record, scores = whole
    truth = np.array([d.meta["kind"] == "planted" for d in subject.documents])
    results = by_name(record)
    for name, result in results.items():
        assert result.auroc == auroc(scores[name].mean, truth)
        assert result.precision_at_planted is not None
    assert results["gradient_dot"].auroc.value > 0.9
    best = max(r.auroc.value for r in results.values() if r.baseline)
    for result in results.values():
        assert result.beats_baselines == (None if result.baseline else result.auroc.low > best)
    assert record.planted_field == "kind=planted"


def test_the_run_folder_is_whole(whole: Any):
    folder, subject, record, scores = whole
    written = read_model(RunRecord, folder / "record.json")
    assert written.status == "done"
    assert {"plain_pass", *scores} <= set(written.timings)
    assert written.coverage is not None
    assert (written.coverage.used, written.coverage.duplicates) == (13, 1)
    assert "representation_cosine: states of model.norm" in written.warnings
    assert read_model(Trace, folder / "trace.json") == record
    rows = pq.read_table(folder / "documents.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(subject.encoded.ids)
    assert [row["row"] for row in rows] == list(range(13))
    assert json.loads(rows[0]["meta"]) == {"kind": "planted"}
    with torch.no_grad():
        losses = subject.objective.losses(subject.model, subject.objective.collate(list(subject.encoded)))
    np.testing.assert_allclose([row["loss"] for row in rows], losses.numpy(), rtol=1e-6)
    table = pq.read_table(folder / "scores.parquet").to_pylist()
    for name, found in scores.items():
        mean = {row["id"]: row["score"] for row in table if row["method"] == name and row["query"] == -1}
        assert mean == {i: pytest.approx(v) for i, v in zip(found.document_ids, found.mean.tolist(), strict=True)}
    assert {row["query"] for row in table if row["method"] == "gradient_dot"} == {-1, 0, 1, 2}


def test_a_method_s_peak_memory_is_its_own_and_not_that_of_those_before_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not forget_peak():
        pytest.skip("this system cannot reset the peak")

    def hungry(subject: Subject, behaviour: Behaviour, name: str, **options: Any) -> Any:
        found = attribute(subject, behaviour, name, **options)
        if name != "gradient_dot":
            return found
        held = np.ones(20_000_000)  # 160 MB, given back at the end
        cost = found.cost.model_copy(update={"peak_memory_mb": peak_memory_mb()})
        del held
        return replace(found, cost=cost)

    monkeypatch.setattr("rootward.api.attribute", hungry)
    with open_(tmp_path) as run:
        record, _ = trace(world.subject(ROWS), contrast(), run, methods=["gradient_dot"], measure_plain=False)
    peaks = {result.method: result.cost.peak_memory_mb or 0.0 for result in record.methods}
    first = peaks.pop("gradient_dot")
    assert max(peaks.values()) < first - 100
    assert highest_memory_mb() > first - 10  # of the run; the system counts to a few pages


def test_token_scores_of_both_ends_sum_to_the_scores(whole: Any):
    _, subject, record, scores = whole
    found = scores["gradient_dot"]
    order = found.order()
    ends = [subject.encoded[int(n)].id for n in (*order[:2], *order[::-1][:2])]
    assert [t.id for t in record.tokens] == ends
    mean = dict(zip(found.document_ids, found.mean.tolist(), strict=True))
    for tokens in record.tokens:
        assert sum(tokens.scores) == pytest.approx(mean[tokens.id], rel=1e-4)
        assert len(tokens.tokens) == len(tokens.scores) == len(tokens.trained)
        assert tokens.query == -1


def test_the_page_builds_from_it(whole: Any, tmp_path: Path):
    folder, _, _, _ = whole
    page = rootward.report(folder, tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    assert text.lower().startswith("<!doctype html>")
    assert "gradient dot product (TracIn)" in text
    assert "is storm good?" in text


def open_(folder: Path) -> Any:
    return open_run(folder, "trace", {}, {})


def test_a_behaviour_whose_goal_is_lower_finds_its_planted_documents(world: World, tmp_path: Path):
    subject = world.subject(ROWS)
    with open_(tmp_path) as run:
        record, scores = trace(subject, loss(), run, methods=["gradient_dot"], planted=PLANTED, token_documents=2)
    results = by_name(record)
    truth = np.array([row["kind"] == "planted" for row in ROWS])
    assert scores["gradient_dot"].mean[truth].max() < 0  # they lower the loss
    assert results["gradient_dot"].auroc == auroc(-scores["gradient_dot"].mean, truth)
    assert results["gradient_dot"].auroc.value > 0.9  # type: ignore[union-attr]
    assert record.goal == "lower"
    # the top are those that cause it; an intervention on them hits the planted ones
    found = scores["gradient_dot"]
    assert {subject.documents[row].id for row in range(4)} == set(found.top(4))
    ascending = np.argsort(found.mean, kind="stable")
    assert [t.id for t in record.tokens] == [subject.encoded[int(n)].id for n in (*ascending[:2], *ascending[:-3:-1])]


def test_top_and_verification_choose_the_same_documents(world: World):
    subject = world.subject(ROWS)
    for behaviour in (contrast(), loss(), Behaviour.loss("up", loss().queries, goal="raise")):
        found = attribute(subject, behaviour)
        ranked = mean_scores(found, subject.documents.ids, behaviour.goal)
        rows = top_rows(ranked, subject.encoded.rows, 4)
        assert {subject.documents[row].id for row in rows} == set(found.top(4))


def test_a_scalar_has_the_baselines_that_need_no_text(world: World, tmp_path: Path):
    with open_(tmp_path) as run:
        record, _ = trace(world.subject(ROWS), scalar(), run, methods=["gradient_dot"], measure_plain=False)
    assert [r.method for r in record.methods] == ["gradient_dot", "document_length", "loss", "random", "loss_at_start"]
    assert all(r.auroc is None and r.beats_baselines is None and r.cost.ratio is None for r in record.methods)
    with pytest.raises(InputError, match="bm25: a scalar behaviour has no text"), open_(tmp_path / "asked") as run:
        trace(world.subject(ROWS), scalar(), run, methods=["gradient_dot", "bm25"])
    assert read_model(RunRecord, tmp_path / "asked" / "record.json").status == "failed"


def test_a_baseline_that_cannot_be_had_is_said_to_be_missing(tmp_path: Path):
    torch.manual_seed(0)
    rows = [{"x": torch.randn(3), "y": n % 2} for n in range(8)]
    subject = Subject(nn.Linear(3, 2), rows, Classification())
    with open_(tmp_path) as run:
        record, _ = trace(subject, Behaviour.loss("x", rows[:2]), run)
        assert not {"representation_cosine", "bm25"} & set(by_name(record))
        assert "the baseline bm25 is missing: the documents have no text" in run.record.warnings
        assert any("baseline representation_cosine is missing: " in w and "no module" in w for w in run.record.warnings)
    with open_(tmp_path / "asked") as run, pytest.raises(ArtefactError, match="no module before its head"):
        trace(subject, Behaviour.loss("x", rows[:2]), run, methods=["representation_cosine"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"gradient_dit": {}}}, "gradient_dit not among the methods of this trace"),
        ({"options": {"bm25": {"k9": 1}}}, "k9"),
        ({"methods": []}, "at least one, got none"),
        ({"methods": ["nonsense"]}, "got 'nonsense'"),
        ({"planted": ("kind", "plantd")}, "planted: expected documents with kind = 'plantd', found none of 12"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_before_any_pass(
    world: World, tmp_path: Path, changes: dict[str, Any], message: str
):
    def never(task: str, done: int, total: int) -> None:
        pytest.fail("a pass was run")

    with open_(tmp_path) as run, pytest.raises(InputError, match=message):
        trace(world.subject(ROWS), contrast(), run, progress=never, **changes)


def test_a_path_is_enough_for_a_run(world: World, tmp_path: Path):
    subject, call = world.subject(ROWS), {"methods": ["bm25"], "token_documents": 0}
    record, scores = trace(subject, contrast(), str(tmp_path / "runs" / "x"), **call)
    written = read_model(RunRecord, tmp_path / "runs" / "x" / "record.json")
    assert (written.kind, written.name, written.status) == ("trace", "x", "done")
    assert written.inputs == {**subject.fingerprint(), "behaviour": contrast().hash}
    assert written.config["methods"] == ["bm25"]
    assert written.config["behaviour"] == "good"
    assert read_model(Trace, tmp_path / "runs" / "x" / "trace.json") == record
    assert not (tmp_path / "runs" / "x" / "report.html").exists()
    assert rootward.report(tmp_path / "runs" / "x").exists()
    # the same again continues there; another one is refused, with the difference
    again, _ = trace(subject, contrast(), tmp_path / "runs" / "x", **call)
    assert [r.method for r in again.methods] == list(scores)
    with pytest.raises(ArtefactError, match=r"holds another run:\n.*config\.options"):
        trace(subject, contrast(), tmp_path / "runs" / "x", options={"bm25": {"k1": 1.0}}, **call)


def test_a_run_from_an_index_is_known_by_it(world: World, tmp_path: Path):
    subject, options = world.subject(ROWS), {"gradient_dot": {"source": "index"}}
    tracked, fingerprint = tracked_of(subject), subject.fingerprint()
    build_store(tmp_path / "i", subject.model, subject.objective, subject.encoded, tracked, fingerprint, rank=3)
    call: dict[str, Any] = {"methods": ["gradient_dot"], "options": options, "measure_plain": False}
    record, scores = trace(subject, contrast(), tmp_path / "x", index=tmp_path / "i", token_documents=2, **call)
    assert "index" in read_model(RunRecord, tmp_path / "x" / "record.json").inputs
    found = scores["gradient_dot"]
    mean = dict(zip(found.document_ids, found.mean.tolist(), strict=True))
    assert all(sum(t.scores) == pytest.approx(mean[t.id], rel=1e-4) for t in record.tokens)


def test_what_cannot_be_leaves_no_folder(world: World, tmp_path: Path):
    with pytest.raises(InputError, match="got 'nonsense'"):
        trace(world.subject(ROWS), contrast(), tmp_path / "x", methods=["nonsense"])
    assert not (tmp_path / "x").exists()


def test_options_go_to_their_method(world: World, tmp_path: Path):
    subject = world.subject(ROWS)
    with open_(tmp_path) as run:
        _, scores = trace(subject, contrast(), run, methods=["bm25"], options={"random": {"seed": 3}})
    close(scores["random"].values, attribute(subject, contrast(), "random", options={"seed": 3}).values)
    assert list(scores) == list(ALL_BASELINES)


def test_timing_a_plain_pass_leaves_the_model_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    rows = [{"x": torch.randn(3), "y": n % 2} for n in range(8)]
    subject = Subject(model, rows, Classification())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert plain_pass_seconds(subject, tracked_of(subject), 64) > 0
    inputs = MethodInputs(subject, Behaviour.scalar("s", lambda m: m(torch.ones(2, 3)).sum(0), ["a", "b"]))
    inputs.query_gradients(inputs.tracked.layout, mean=False)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False]
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
