"""TracIn against one step of training, and against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from rootward.capture import inputs as inputs_room
from rootward.capture.inputs import MethodInputs, tracked_of
from rootward.capture.projection import Projection
from rootward.capture.store import GradientStore, build_store
from rootward.core.errors import ArtefactError, InputError
from rootward.core.layout import ParamLayout
from rootward.core.registry import get
from rootward.methods.attribution.tracin_pruthi2020 import _unit as divided
from rootward.subject.behaviour import Behaviour
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from tests.methods.contract import (
    ROWS,
    World,
    close,
    contrast,
    loss,
    naive_gradients,
    naive_queries,
    run,
    scalar,
)

BEHAVIOURS = {"contrast": contrast, "loss": loss, "scalar": scalar}


def names_of(subject: Subject) -> tuple[str, ...]:
    return tracked_of(subject).layout.names


def subject_of(world: World, **changes: Any) -> Subject:
    return world.subject(parameters=".*", **changes)


# --- what one step of training does ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BEHAVIOURS)
def test_sign_and_size_are_those_of_one_step_on_one_document(world: World, kind: str):
    # Half a step forward less half a step back: the model's norms compute in float32, so a step must not be too small,
    # and what is of second order cancels.
    subject, behaviour, step = subject_of(world), BEHAVIOURS[kind](), 1e-4
    found = run(subject, behaviour, "gradient_dot").values
    parameters = list(subject.model.parameters())
    kept = [p.detach().clone() for p in parameters]
    for n in (0, 1, 5, 7):
        losses = subject.objective.losses(subject.model, subject.objective.collate([subject.encoded[n]]))
        grads = torch.autograd.grad(losses.sum(), parameters)
        moved = 0
        for half in (0.5, -0.5):
            with torch.no_grad():
                for p, g in zip(parameters, grads, strict=True):
                    p.sub_(half * step * g)
            moved += np.sign(half) * behaviour.evaluate(subject.model, subject.objective) / step
            with torch.no_grad():
                for p, old in zip(parameters, kept, strict=True):
                    p.copy_(old)
        largest = float(np.abs(found[:, n]).max())
        assert largest > 1
        np.testing.assert_allclose(found[:, n], moved, rtol=1e-3, atol=1e-3 * largest)


def test_a_positive_score_of_a_loss_raises_the_loss(world: World):
    # the sign follows the measurement, not the goal
    subject = subject_of(world)
    lower, higher = loss(), Behaviour.loss("up", loss().queries, goal="raise")
    close(run(subject, lower, "gradient_dot").values, run(subject, higher, "gradient_dot").values)


# --- against plain loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BEHAVIOURS)
@pytest.mark.parametrize("normalise", ["none", "document", "both"])
def test_against_autograd_one_document_at_a_time(world: World, kind: str, normalise: str):
    subject, behaviour = subject_of(world), BEHAVIOURS[kind]()
    names = names_of(subject)
    documents, queries = naive_gradients(subject, subject.encoded, names), naive_queries(subject, behaviour, names)
    expected = -queries @ documents.T
    if normalise != "none":
        expected = expected / documents.norm(dim=1)
    if normalise == "both":
        expected = expected / queries.norm(dim=1, keepdim=True)
        assert float(expected.abs().max()) <= 1 + 1e-12
    found = run(subject, behaviour, "tracin", normalise=normalise)
    close(found.values, expected)
    assert found.queries == tuple(q.name for q in behaviour.queries)
    assert found.unit == {"none": "measurement per unit of loss weight", "both": "cosine"}.get(
        normalise, "measurement per unit gradient"
    )


def test_a_document_has_the_cosine_of_one_with_its_own_loss(world: World):
    subject = subject_of(world)
    rain = Behaviour.loss("rain", [{"prompt": ROWS[1]["prompt"], "wanted": ROWS[1]["completion"]}])
    found = run(subject, rain, "gradient_cosine").values[0]
    assert found[1] == pytest.approx(-1, abs=1e-6)
    assert np.abs(np.delete(found, 1)).max() < 0.999


def test_only_the_parameters_asked_for_count(world: World):
    subject = world.subject(parameters=r"layers\.1\.mlp")
    names = names_of(subject)
    assert len(names) == 3
    expected = -naive_queries(subject, contrast(), names) @ naive_gradients(subject, subject.encoded, names).T
    close(run(subject, contrast(), "gradient_dot").values, expected)


@pytest.mark.parametrize("normalise", ["none", "document", "both"])
def test_checkpoints_are_weighted_by_their_learning_rates(world: World, normalise: str):
    recipe = Recipe(dtype="float64", checkpoints=2, batch_size=2, epochs=2, lr=0.5, schedule="linear", warmup_steps=2)
    subject = subject_of(world, recipe=recipe)
    total = recipe.steps(len(subject.encoded))
    assert total == 8
    rates = [(subject.at_start, 0.5), *((lambda k=k: subject.at_checkpoint(k), recipe.rate(s - 1, total))
             for k, s in enumerate((4, 8)))]  # fmt: skip
    assert rates[1][1] > rates[2][1] > 0
    names, expected = names_of(subject), torch.zeros(3, len(subject.encoded), dtype=torch.float64)
    for holding, rate in rates:
        with holding():
            queries = naive_queries(subject, contrast(), names)
            documents = naive_gradients(subject, subject.encoded, names)
        part = -queries @ documents.T * rate / 0.5
        part = part if normalise == "none" else part / documents.norm(dim=1)
        expected += part / queries.norm(dim=1, keepdim=True) if normalise == "both" else part
    close(run(subject, contrast(), "tracin_cp", normalise=normalise).values, expected)


def test_the_start_alone(world: World):
    subject = subject_of(world)
    names = names_of(subject)
    with subject.at_start():
        expected = -naive_queries(subject, contrast(), names) @ naive_gradients(subject, subject.encoded, names).T
    found = run(subject, contrast(), "gradient_dot_at_start")
    close(found.values, expected)
    assert not np.allclose(found.values, run(subject, contrast(), "gradient_dot").values, rtol=0.1)


def test_without_a_recipe_all_checkpoints_weigh_alike(world: World):
    subject = subject_of(world, recipe=None, base=None)
    names, expected = names_of(subject), 0
    for k in range(2):
        with subject.at_checkpoint(k):
            expected -= naive_queries(subject, contrast(), names) @ naive_gradients(subject, subject.encoded, names).T
    close(run(subject, contrast(), "tracin_cp").values, expected)


def test_a_stopped_training_has_the_first_checkpoints(world: World):
    recipe = Recipe(dtype="float64", checkpoints=4, batch_size=2, lr=0.5, schedule="linear")
    subject = subject_of(world, recipe=recipe, base=None)  # four checkpoints were planned, two are there
    names, expected = names_of(subject), 0
    for k, weight in enumerate((1.0, 0.75)):
        with subject.at_checkpoint(k):
            queries = naive_queries(subject, contrast(), names)
            documents = naive_gradients(subject, subject.encoded, names)
        expected -= weight * queries @ documents.T
    close(run(subject, contrast(), "tracin_cp").values, expected)


def test_checkpoints_that_the_recipe_cannot_have_made_are_refused(world: World):
    subject = subject_of(world, recipe=Recipe(dtype="float64", checkpoints=1))
    with pytest.raises(ArtefactError, match="makes 1 checkpoints, the subject has 2"):
        run(subject, contrast(), "tracin_cp")
    with pytest.raises(InputError, match="the subject has none"):
        run(subject_of(world, checkpoints=()), contrast(), "tracin_cp")


def test_a_recipe_that_never_moves_gives_zeros_and_no_crash(world: World):
    subject = subject_of(world, recipe=Recipe(dtype="float64", checkpoints=2, batch_size=2, lr=0))
    assert not run(subject, contrast(), "tracin_cp").values.any()


# --- queries and rank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BEHAVIOURS)
def test_the_mean_query_gives_the_mean_of_the_scores(world: World, kind: str):
    subject, behaviour = subject_of(world), BEHAVIOURS[kind]()
    found = run(subject, behaviour, "tracin", queries="mean")
    assert found.queries == ("mean",)
    close(found.values[0], run(subject, behaviour, "tracin").mean)


@pytest.mark.parametrize("normalise", ["none", "document", "both"])
def test_full_rank_is_exact_and_rank_one_is_near(world: World, normalise: str):
    subject = subject_of(world)
    dense = run(subject, contrast(), "tracin", queries="mean", normalise=normalise)
    whole = run(subject, contrast(), "tracin", rank=16, normalise=normalise)
    assert whole.queries == ("mean",)
    close(whole.values, dense.values)
    one = run(subject, contrast(), "tracin", rank=1, normalise=normalise)
    assert not np.allclose(one.values, dense.values, rtol=1e-6)
    assert np.corrcoef(one.values[0], dense.values[0])[0, 1] > 0.7


# --- index -------------------------------------------------------------------------------------------------------


def index(subject: Subject, folder: Path, rank: int | None, **changes: Any) -> GradientStore:
    return build_store(
        folder, subject.model, subject.objective, subject.encoded, tracked_of(subject), subject.fingerprint(),
        rank=rank, token_budget=500, shard_documents=4, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("normalise", ["none", "document", "both"])
@pytest.mark.parametrize("queries", ["each", "mean"])
def test_a_whole_index_equals_the_pass(world: World, tmp_path: Path, normalise: str, queries: str):
    subject = subject_of(world)
    store = index(subject, tmp_path, None)
    found = run(subject, contrast(), "tracin", source="index", index=store, normalise=normalise, queries=queries)
    close(found.values, run(subject, contrast(), "tracin", normalise=normalise, queries=queries).values, rtol=1e-5)
    assert found.notes == ("gradients from an index, whole",)


def test_a_projected_index_ranks_much_as_the_pass(world: World, tmp_path: Path):
    prompts = [f"is {a} {b}? " for a in "abcdef" for b in ("good", "x")]
    texts = [{"prompt": prompt, "completion": answer} for prompt in prompts for answer in ("yes", "no!", "4")]
    subject = world.subject(texts)
    store = index(subject, tmp_path, 8)
    found = run(subject, contrast(), "tracin", source="index", index=tmp_path)
    dense = run(subject, contrast(), "tracin")
    assert spearmanr(found.mean, dense.mean).statistic > 0.8
    assert store.width < tracked_of(subject).layout.size
    assert found.notes == ("gradients from an index, projected to rank 8",)


def test_an_index_of_something_else_is_refused(world: World, tmp_path: Path):
    subject = subject_of(world)
    store = index(subject, tmp_path, None)
    others = {
        "documents": subject_of(world, rows=ROWS[:-1]),
        "parameters": world.subject(parameters="mlp"),
    }
    for key, other in others.items():
        with pytest.raises(ArtefactError, match=rf"built from something else:\n  {key}: "):
            run(other, contrast(), "tracin", source="index", index=store)
    with torch.no_grad():
        weight = subject.model.lm_head.weight
        weight[0, 0] += 1
        try:
            with pytest.raises(ArtefactError, match=r"\n  model: '\w+' -> '\w+'\n"):
                run(subject, contrast(), "tracin", source="index", index=store)
        finally:
            weight[0, 0] -= 1


def test_an_index_cannot_do_what_only_a_pass_can(world: World, tmp_path: Path):
    subject = subject_of(world)
    with pytest.raises(InputError, match="no index was given"):
        run(subject, contrast(), "tracin", source="index")
    store = index(subject, tmp_path, None)
    with pytest.raises(InputError, match="use checkpoints = 'final'"):
        run(subject, contrast(), "tracin_cp", source="index", index=store)
    with pytest.raises(InputError, match="rank is for the queries of a pass"):
        run(subject, contrast(), "tracin", source="index", index=store, rank=2)


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", ["final", "start", "all"])
@pytest.mark.parametrize("normalise", ["none", "document", "both"])
@pytest.mark.parametrize("more", [{}, {"queries": "mean"}, {"rank": 2}], ids=["each", "mean", "rank"])
def test_token_scores_sum_to_the_documents_score(world: World, checkpoints: str, normalise: str, more: dict[str, Any]):
    subject = subject_of(world)
    inputs = MethodInputs(subject, contrast(), 500)
    method, _ = get("tracin")
    config = method.configure({"checkpoints": checkpoints, "normalise": normalise, **more})
    assert method.tokens is not None
    positions = [6, 0, 3]
    tokens = method.tokens(inputs, config, positions)
    assert list(tokens) == positions
    assert [len(tokens[n]) for n in positions] == [subject.encoded[n].length for n in positions]
    whole = method.run(inputs, config).mean
    close([tokens[n].sum() for n in positions], whole[positions], rtol=1e-5)
    assert all(np.ptp(tokens[n]) > 0 for n in positions)


@pytest.mark.parametrize("rank", [3, 20, None])  # 20: many sides are narrower and were kept whole
@pytest.mark.parametrize("normalise", ["none", "document", "both"])
@pytest.mark.parametrize("queries", ["each", "mean"])
def test_token_scores_of_an_index_sum_to_its_score(
    world: World, tmp_path: Path, rank: int | None, normalise: str, queries: str
):
    subject = subject_of(world)
    inputs = MethodInputs(subject, contrast(), 500, index(subject, tmp_path, rank))
    method, _ = get("tracin")
    config = method.configure({"source": "index", "normalise": normalise, "queries": queries})
    assert method.tokens is not None
    positions = [6, 0, 3]
    tokens = method.tokens(inputs, config, positions)
    assert [len(tokens[n]) for n in positions] == [subject.encoded[n].length for n in positions]
    whole = method.run(inputs, config).mean
    np.testing.assert_allclose([tokens[n].sum() for n in positions], whole[positions], rtol=1e-4)


def test_a_lifted_query_is_the_projections_transpose():
    layout = ParamLayout(("wide", "narrow", "vector", "short"), ((7, 9), (2, 9), (20,), (3,)))
    projection = Projection(layout, 3, 5)
    rows = torch.randn(2, projection.width)
    lifted = projection.lift(rows)
    gradients = {name: torch.randn(4, *layout.shape(name)) for name in layout.names}
    full = sum(lifted[name].flatten(1) @ gradients[name].flatten(1).T for name in layout.names)
    torch.testing.assert_close(full, rows @ projection.project_dense(gradients).T)


# --- memory and broken numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BEHAVIOURS)
@pytest.mark.parametrize("source", ["pass", "index"])
def test_queries_that_do_not_fit_are_averaged_and_said_to_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, source: str
):
    subject, behaviour = subject_of(world), BEHAVIOURS[kind]()
    call: dict[str, Any] = {"source": source, "index": index(subject, tmp_path, None) if source == "index" else None}
    plenty = run(subject, behaviour, "tracin", **call)
    assert len(plenty.queries) == len(behaviour)
    assert not any("mean" in note for note in plenty.notes)
    monkeypatch.setattr(inputs_room, "free_memory", lambda device: 1000)
    found = run(subject, behaviour, "tracin", **call)
    assert found.queries == ("mean",)
    close(found.values[0], plenty.mean, rtol=1e-5)
    assert any(f"{len(behaviour)} queries" in note and "their mean" in note for note in found.notes)
    with pytest.raises(InputError, match=r"one by one.*--option gradient_dot.queries=mean"):
        run(subject, behaviour, "tracin", queries="each", **call)


def test_token_scores_follow_the_choice_for_the_scores(world: World, monkeypatch: pytest.MonkeyPatch):
    """The mean of unit queries is not the unit mean: the choice between them is made once."""
    inputs = MethodInputs(subject_of(world), contrast(), 500)
    method, _ = get("tracin")
    config = method.configure({"normalise": "both"})
    monkeypatch.setattr(inputs_room, "free_memory", lambda device: 1000)
    whole = method.run(inputs, config).mean
    monkeypatch.setattr(inputs_room, "free_memory", lambda device: 10**12)
    assert method.tokens is not None
    close([method.tokens(inputs, config, [3])[3].sum()], whole[[3]], rtol=1e-5)


def test_a_norm_that_is_no_number_is_not_hidden():
    dots, norms = torch.tensor([[2.0, 0.0, 3.0]]), torch.tensor([4.0, 0.0, torch.nan])
    found = divided(dots, norms)
    assert found[0, :2].tolist() == [0.5, 0.0]
    assert bool(found[0, 2].isnan())
