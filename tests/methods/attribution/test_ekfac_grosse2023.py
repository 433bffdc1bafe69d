"""EK-FAC influence: against dense twins, against steps and retraining, and nearer to the exact one than its likes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from rootward.api import attribute
from rootward.capture.curvatures import fitted
from rootward.capture.fit import FitConfig
from rootward.capture.inputs import MethodInputs
from rootward.core import registry
from rootward.core.errors import ArtefactError, InputError
from rootward.core.scores import Scores
from rootward.curvature.base import Damping
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.predictions import Labels
from rootward.subject.subject import Subject
from tests.capture import worlds as w
from tests.capture.test_hvp import naive_ggn
from tests.capture.test_moments import Sides, twin
from tests.methods.attribution.supervised import (
    RIDGE,
    classifier,
    document_rows,
    fit,
    outputs,
    query_rows,
    randn,
    ridge,
)
from tests.methods.contract import World, close, contrast, loss, naive_gradients, naive_queries, run, scalar

BEHAVIOURS = {"contrast": contrast, "loss": loss, "scalar": scalar}
PRESETS = {"ekfac": "ekfac", "kfac": "kfac_influence", "diagonal": "diagonal_influence"}
EVERY = {**PRESETS, "adam": "adam_influence"}
SMALL = r"layers\.1\.(self_attn\.[qk]|mlp\.up|input_layernorm)"


def rank_correlation(a: Any, b: Any) -> float:
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def dense_blocks(
    subject: Subject, labels: Labels, kind: str, sides: dict[str, Sides]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every block's basis ``[p, p]`` and eigenvalues ``[p]``, from rows of tokens and dense gradients."""
    model, objective, encoded = subject.model, subject.objective, subject.encoded
    parameters = dict(model.named_parameters())
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, rows in sides.items():
        spectra = [
            torch.linalg.eigh(s.T @ s / rows.tokens)
            for s in map(torch.cat, (rows.left, rows.right) if rows.left else (rows.right,))
        ]
        basis, values = torch.ones(1, 1).double(), torch.ones(1).double() * rows.tokens / len(encoded)
        for spectrum in spectra:
            basis, values = torch.kron(basis, spectrum.eigenvectors), torch.kron(values, spectrum.eigenvalues)
        if kind == "diagonal":
            basis = torch.eye(len(basis), dtype=basis.dtype)
        if kind != "kfac":
            values = torch.zeros_like(values)
            for example in encoded:
                batch = objective.collate([example])
                for losses in objective.predictions(model, batch).relabelled(labels, batch.ids):
                    (g,) = torch.autograd.grad(losses.sum(), parameters[name], retain_graph=True)
                    values += (g.flatten() @ basis).square() / len(encoded)
        found[name] = basis, values
    return found


def twin_scores(blocks: dict[str, tuple[Tensor, Tensor]], q: Tensor, g: Tensor, damping: float, scope: str) -> Tensor:
    """``-q (C + lam)^-1 g`` block by block."""
    whole = torch.cat([values for _, values in blocks.values()]).mean()
    total, start = torch.zeros(len(q), len(g), dtype=g.dtype), 0
    for basis, values in blocks.values():
        part = slice(start, start + len(values))
        start = part.stop
        lam = damping * float(values.mean() if scope == "block" else whole)
        total -= (q[:, part] @ basis / (values + lam)) @ (g[:, part] @ basis).T
    return total


@pytest.mark.parametrize("scope", ["block", "whole"])
@pytest.mark.parametrize("kind", PRESETS)
def test_a_classifier_against_dense_matrices(kind: str, scope: str):
    subject, labels = classifier(12), Labels("exact")
    names = [name for name, _ in subject.model.named_parameters()]
    sides = twin(subject.model, subject.objective, subject.encoded, names, labels)
    behaviour = outputs(randn(3, 5, seed=9))
    blocks = dense_blocks(subject, labels, kind, sides)
    expected = twin_scores(blocks, query_rows(subject, behaviour), document_rows(subject), 0.1, scope)
    found = attribute(subject, behaviour, PRESETS[kind], options={"queries": "each", "damping_scope": scope})
    close(found.values, expected, 1e-5)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("kind", PRESETS)
def test_a_language_model_against_dense_matrices(world: World, kind: str, behaviour: str):
    subject, labels = world.subject(parameters=SMALL), Labels("sampled", 2, 5)
    asked = BEHAVIOURS[behaviour]()
    names = MethodInputs(subject, asked).tracked.layout.names
    assert len(names) == 4
    sides = twin(subject.model, subject.objective, subject.encoded, names, labels)
    g, q = naive_gradients(subject, subject.encoded, names), naive_queries(subject, asked, names)
    blocks = dense_blocks(subject, labels, kind, sides)
    options: dict[str, Any] = {"fit_draws": 2, "fit_seed": 5, "damping": 0.3}
    found = run(subject, asked, PRESETS[kind], queries="each", **options)
    close(found.values, twin_scores(blocks, q, g, 0.3, "block"), 1e-5)
    mean = run(subject, asked, PRESETS[kind], **options)
    assert mean.queries == ("mean",)
    close(mean.values, found.values.mean(0, keepdims=True), 1e-5)


def test_a_preconditioned_step_changes_the_measurement_by_the_score():
    subject, behaviour = classifier(10), outputs(randn(2, 5, seed=9))
    inputs = MethodInputs(subject, behaviour)
    scores = attribute(subject, behaviour, "ekfac", options={"queries": "each"}, inputs=inputs).values
    curvature = fitted(inputs, FitConfig(), Damping()).curvature
    parameters = dict(subject.model.named_parameters())
    function = behaviour.function
    assert function is not None
    eps = 1e-5
    for n, row in enumerate(document_rows(subject)):
        step = {name: value[0] for name, value in curvature.apply(curvature.layout.unflatten(row[None])).items()}
        sides: list[Tensor] = []
        for sign in (-1.0, 2.0):  # downhill on the document's loss, then uphill from the other side
            with torch.no_grad():
                for name, value in step.items():
                    parameters[name].add_(sign * eps * value)
                sides.append(function(subject.model))
        with torch.no_grad():
            for name, value in step.items():
                parameters[name].sub_(eps * value)
        close(scores[:, n], (sides[0] - sides[1]) / (2 * eps), 1e-4)


@pytest.mark.parametrize("kind", PRESETS)
def test_removing_a_document_of_a_quadratic_and_training_again(kind: str):
    """Leaving out document n changes the output by ``-score / N`` over one less the leverage, exactly."""
    subject, x, y = ridge()
    queries = randn(3, 3, seed=6)
    hessian = x.T @ x / len(x) + RIDGE * torch.eye(3, dtype=torch.float64)
    damping = RIDGE / float((x.T @ x / len(x)).diagonal().mean())
    scores = attribute(
        subject, outputs(queries), PRESETS[kind], options={"queries": "each", "damping": damping}
    ).values.astype(np.float64)
    before = queries @ fit(x, y, torch.ones(len(x), dtype=torch.float64))
    wrong = 0.0
    for n in range(len(x)):
        weights = torch.ones(len(x), dtype=torch.float64)
        weights[n] = 0.0
        change = (queries @ fit(x, y, weights) - before)[:, 0].numpy()
        leverage = float(x[n] @ torch.linalg.solve(hessian, x[n])) / len(x)
        expected = -scores[:, n] / len(x) / (1 - leverage)
        if kind != "diagonal":
            close(change, expected, 1e-5)
        wrong = max(wrong, float(np.abs(change - expected).max() / np.abs(change).max()))
    assert kind != "diagonal" or wrong > 0.01  # it does not know that inputs are correlated


def test_a_rank_is_that_of_the_preconditioned_queries(world: World):
    subject = world.subject(parameters=r"layers\.1\.mlp\.up")
    full = run(subject, contrast(), "ekfac", queries="each")
    close(run(subject, contrast(), "ekfac", queries="each", rank=16).values, full.values, 1e-5)
    inputs = MethodInputs(subject, contrast(), 500)
    (name,) = inputs.tracked.layout.names
    curvature = fitted(inputs, FitConfig(), Damping()).curvature
    q = curvature.apply(inputs.query_gradients(inputs.tracked.layout, mean=False))[name]
    u, s, v = torch.linalg.svd(q)
    cut = (u[:, :, :2] * s[:, None, :2]) @ v[:, :2]
    g = naive_gradients(subject, subject.encoded, [name])
    close(run(subject, contrast(), "ekfac", queries="each", rank=2).values, -cut.flatten(1) @ g.T, 1e-5)
    assert not np.allclose(full.values, -cut.flatten(1) @ g.T, rtol=0.01)


def test_the_optimisers_diagonal_against_its_formula(world: World):
    """``-sum_p q_p g_p / (v_p + damping * mean v of the block)`` with v from the last checkpoint, or from each."""
    subject, asked = world.subject(), contrast()
    names = MethodInputs(subject, asked, 500).tracked.layout.names

    def expected(checkpoint: int) -> Tensor:
        kept = subject.moments(checkpoint)
        assert kept is not None
        q, g = naive_queries(subject, asked, names), naive_gradients(subject, subject.encoded, names)
        v = [kept.second[name].double().flatten() for name in names]
        return -(q / torch.cat([value + 0.3 * value.mean() for value in v])) @ g.T

    found = run(subject, asked, "adam_influence", queries="each", damping=0.3)
    close(found.values, expected(-1), 1e-5)
    assert "optimiser's second moments (step" in found.notes[0]
    plain = run(subject, asked, "gradient_dot").values
    assert not np.allclose(np.corrcoef(found.values[0], plain[0])[0, 1], 1, atol=1e-3)
    every = run(subject, asked, "adam_influence", queries="each", damping=0.3, checkpoints="all")
    total = np.zeros(found.values.shape)
    for k in range(len(subject.checkpoints)):
        with subject.at_checkpoint(k):
            values = expected(k).numpy()
        total += values / values.std(1, keepdims=True) / len(subject.checkpoints)
    close(every.values, total, 1e-5)


def test_the_optimisers_diagonal_needs_the_optimiser(world: World):
    with pytest.raises(
        InputError, match="expected the optimiser's second moments of .* train with optimiser = 'adamw'"
    ):
        run(world.subject(checkpoints=()), contrast(), "adam_influence")
    for options in ({"fit_draws": 2}, {"folder": "x"}):
        with pytest.raises(InputError, match=f"curvature = 'adam' is not fitted, so {next(iter(options))}"):
            run(world.subject(), contrast(), "adam_influence", **options)
    with pytest.raises(InputError, match="joint: expected .* got joint = .*preset ekfac_joint, or damping_scope"):
        run(world.subject(), contrast(), "adam_influence", joint=10, damping_scope="whole")


@pytest.mark.parametrize("options", [{}, {"queries": "each"}, {"queries": "each", "rank": 2}, {"checkpoints": "all"}])
@pytest.mark.parametrize("kind", EVERY)
def test_scores_of_tokens_sum_to_the_score(world: World, kind: str, options: dict[str, Any]):
    subject = world.subject()
    inputs = MethodInputs(subject, contrast(), 500)
    method, preset = registry.get(EVERY[kind])
    assert method.tokens is not None
    config = method.configure({**preset, **options})
    scores: Scores = method.run(inputs, config)
    places = [0, 3, len(subject.encoded) - 1]
    found = method.tokens(inputs, config, places)
    for n in places:
        assert found[n].shape == (subject.encoded[n].length,)
        assert np.count_nonzero(found[n]) > 1
    close([found[n].sum() for n in places], scores.mean[places], 1e-5)


def test_the_note_says_how_the_ranking_depends_on_the_damping():
    subject, behaviour = trained(0)

    def run(**options: Any) -> Scores:
        return attribute(subject, behaviour, "ekfac", options=options)

    found = run(damping=0.2)
    (note,) = [n for n in found.notes if "damping" in n]
    said = re.fullmatch(
        r"damping 0.2 of the mean eigenvalue; the ranking agrees to (\S+) with 0.1 times it, (\S+) with 10 times it",
        note,
    )
    assert said is not None
    for text, damping in zip(said.groups(), (0.02, 2.0), strict=True):
        other = run(damping=damping, sensitivity=False)
        assert float(text) == pytest.approx(rank_correlation(found.mean, other.mean), abs=6e-4)
        assert not [n for n in other.notes if "damping" in n]
    assert float(said[1]) < 1  # it can differ
    assert "ekfac from 60 of 60 documents" in found.notes[0]
    assert not [n for n in run(damping=0.0).notes if "damping" in n]


def test_scores_that_are_all_the_same_have_no_ranking_to_speak_of():
    model = nn.Linear(2, 3, bias=False).double()
    model.weight.data.zero_()
    subject = Subject(model, [{"x": [1.0, 0.0], "y": 0}] * 4, Classification(), parameters=".*")
    found = attribute(subject, outputs(torch.eye(2).double()), "ekfac", options={"queries": "each"})
    assert np.ptp(found.values, axis=1).max() == 0
    assert not any("ranking agrees" in note for note in found.notes)


def test_scores_of_checkpoints_are_averaged_in_units_of_their_spread(world: World, tmp_path: Path):
    subject = world.subject()
    found = run(subject, contrast(), "ekfac_checkpoints", queries="each", folder=str(tmp_path))
    expected = np.zeros(found.values.shape)
    for k in range(len(world.checkpoints)):
        with subject.at_checkpoint(k):
            values = run(subject, contrast(), "ekfac", queries="each").values.astype(np.float64)
        expected += values / values.std(1, keepdims=True) / len(world.checkpoints)
    close(found.values, expected, 1e-5)
    assert found.unit == "standard deviations over documents"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0", "checkpoint-1"]
    assert [note.startswith(f"checkpoint {n // 2}: ") for n, note in enumerate(found.notes)] == [True] * 4
    close(run(subject, contrast(), "ekfac_checkpoints", queries="each", folder=str(tmp_path)).values, found.values)


class Log:
    def __init__(self) -> None:
        self.passes: list[str] = []

    def __call__(self, task: str, done: int, total: int) -> None:
        if task not in self.passes:
            self.passes.append(task)


def test_a_folder_is_read_instead_of_fitting_again(world: World, tmp_path: Path):
    subject, folder, logs = world.subject(), str(tmp_path / "curvature"), [Log(), Log(), Log()]

    def scored(log: Log, **options: Any) -> Scores:
        inputs = MethodInputs(subject, contrast(), 500, progress=log)
        return attribute(subject, contrast(), "ekfac", options={"folder": folder, **options}, inputs=inputs)

    first, second = scored(logs[0]), scored(logs[1])
    assert first.values.tobytes() == second.values.tobytes()
    assert first.notes == second.notes
    assert logs[0].passes == ["queries", "covariances", "eigenvalues", "documents"]
    assert logs[1].passes == ["queries", "documents"]
    assert sorted(p.name for p in Path(folder).iterdir()) == ["curvature.json", "curvature.safetensors"]
    other = scored(logs[2], damping=2.0)  # factors hold for any damping
    close(other.values, run(subject, contrast(), "ekfac", damping=2.0).values)
    assert logs[2].passes == ["queries", "documents"]
    with pytest.raises(ArtefactError, match=r"(?s)another model, other documents or other settings.*fit.seed: 0 -> 1"):
        scored(Log(), fit_seed=1)
    with pytest.raises(ArtefactError, match=r"fit.kind: 'ekfac' -> 'kfac'"):
        scored(Log(), curvature="kfac")
    fewer = world.subject([{"text": "xy"}, {"text": "another"}, {"text": "third"}])
    with pytest.raises(ArtefactError, match="documents: "):
        run(fewer, contrast(), "ekfac", folder=folder)


def test_joint_entries_are_kept_beside_their_base(world: World, tmp_path: Path):
    subject, folder = world.subject(), tmp_path / "curvature"
    options = {"folder": str(folder), "joint": 5}

    def scored(log: Log, **more: Any) -> Scores:
        inputs = MethodInputs(subject, contrast(), 500, progress=log)
        return attribute(subject, contrast(), "ekfac_joint", options={**options, **more}, inputs=inputs)

    logs = [Log(), Log(), Log()]
    first, second = scored(logs[0]), scored(logs[1], damping=3.0)
    assert logs[0].passes == ["queries", "covariances", "eigenvalues", "joint entries", "documents"]
    assert logs[1].passes == ["queries", "documents"]
    own = {**options, "damping": 3.0, "folder": None}
    close(second.values, run(subject, contrast(), "ekfac_joint", **own).values)
    assert scored(Log()).values.tobytes() == first.values.tobytes()
    scored(logs[2], joint=3)  # another number of entries of the same base
    assert logs[2].passes == ["queries", "joint entries", "documents"]
    (kept,) = folder.glob(f"joint-{len_of(first)}.safetensors")
    kept.write_bytes(b"nonsense")
    with pytest.raises(ArtefactError, match="damaged curvature"):
        scored(Log())


def len_of(scores: Scores) -> int:
    """How many entries were taken jointly, as the notes say."""
    return int(re.search(r"(\d+) entries of the eigenbasis jointly", scores.notes[0])[1])  # type: ignore[index]


def test_the_note_says_what_capped_the_joint_entries(world: World):
    inputs = MethodInputs(world.subject(), contrast(), 500)
    options = {"joint": 1000, "damping_scope": "whole", "fit_labels": "data"}
    found = attribute(inputs.subject, contrast(), "ekfac", options=options, inputs=inputs)
    cap = len(inputs.subject.encoded) // 4
    assert f"{cap} entries of the eigenbasis jointly in place of 1000: a quarter of the gradients" in found.notes[0]
    few = attribute(inputs.subject, contrast(), "ekfac", options=options | {"joint": cap}, inputs=inputs)
    assert "in place of" not in few.notes[0]


def test_a_fit_is_shared_by_what_is_run_with_the_same_inputs(world: World, tmp_path: Path):
    inputs = MethodInputs(world.subject(), contrast(), 500, progress=(log := Log()))
    attribute(inputs.subject, contrast(), "ekfac", inputs=inputs)
    log.passes.clear()
    again = attribute(inputs.subject, contrast(), "ekfac", options={"folder": str(tmp_path)}, inputs=inputs)
    assert log.passes == ["queries", "documents"]
    assert (tmp_path / "curvature.json").is_file()  # what was fitted before is kept where it is asked for
    close(run(inputs.subject, contrast(), "ekfac", folder=str(tmp_path)).values, again.values)


@pytest.mark.parametrize("kind", EVERY)
def test_huge_damping_ranks_as_the_gradient_product(world: World, kind: str):
    subject = world.subject()
    found = run(subject, contrast(), EVERY[kind], queries="each", damping=1e9, damping_scope="whole").values
    plain = run(subject, contrast(), "gradient_dot").values
    for mine, theirs in zip(found, plain, strict=True):
        assert rank_correlation(mine, theirs) == pytest.approx(1)
        assert np.corrcoef(mine, theirs)[0, 1] > 1 - 1e-6
    modest = run(subject, contrast(), EVERY[kind], queries="each", damping_scope="whole").values
    assert not all(rank_correlation(a, b) > 0.999 for a, b in zip(modest, plain, strict=True))


def trained(seed: int, count: int = 60) -> tuple[Subject, Behaviour]:
    """A small network after a hundred steps, on points of different sizes and directions."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    scale = torch.tensor([3, 2, 1, 1, 0.5, 0.2], dtype=torch.float64)

    def points(number: int) -> Tensor:
        return torch.randn(number, 6, generator=generator, dtype=torch.float64) * scale

    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = points(count) * torch.randn(count, 1, generator=generator, dtype=torch.float64).exp()
    y = teacher(x).argmax(1)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    rows = [{"x": x[n], "y": int(y[n])} for n in range(count)]
    asked = points(4)
    queries = [{"x": p, "y": int(c)} for p, c in zip(asked, teacher(asked).argmax(1), strict=True)]
    return Subject(model, rows, Classification(), parameters=".*"), Behaviour.loss("queries", queries)


def test_it_is_nearer_to_exact_influence_than_its_likes():
    """Correlation with ``-q (GGN + lam)^-1 g`` of the whole matrix, over ten networks."""
    rows: list[list[float]] = []
    for seed in range(10):
        subject, behaviour = trained(seed)
        names = [name for name, _ in subject.model.named_parameters()]
        matrix = naive_ggn(subject.model, subject.objective, subject.encoded, names)
        g = document_rows(subject)
        examples = [part.example for part in behaviour.parts(subject.objective)]
        q = w.flat(w.naive(subject.model, subject.objective, examples, names))
        lam = 0.1 * float(matrix.diagonal().mean())
        exact = -(q @ torch.linalg.solve(matrix + lam * torch.eye(len(matrix)).to(matrix), g.T)).numpy()
        row: list[float] = []
        for name in (*PRESETS.values(), "gradient_dot"):
            options = {} if name == "gradient_dot" else {"queries": "each", "damping_scope": "whole"}
            found = attribute(subject, behaviour, name, options=options).values
            row.append(float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found, exact, strict=True)])))
        rows.append(row)
    each = np.array(rows)
    ahead = each[:, :1] - each[:, 1:]
    assert (ahead.mean(0) > 2.5 * ahead.std(0, ddof=1) / len(ahead) ** 0.5).all(), each.mean(0)
    assert each[:, 0].mean() > 0.5


def test_what_no_query_reaches_is_neither_fitted_nor_multiplied(world: World, tmp_path: Path):
    """A measurement of the first block's output: the second block's parameters have no part in it."""
    subject = world.subject()
    ids = torch.tensor([[5, 9, 17, 4]])

    def first_block(model: Any) -> Tensor:
        return model(input_ids=ids, output_hidden_states=True).hidden_states[1].square().mean().reshape(1)

    behaviour = Behaviour.scalar("first block", first_block, names=["it"])
    options = {"fit_documents": 8, "fit_covariance_documents": 8}
    inputs = MethodInputs(subject, behaviour, 500)
    near = attribute(subject, behaviour, "ekfac", options=options, inputs=inputs)
    (fit,) = inputs.fits.values()
    assert fit.curvature.layout.names
    assert all("layers.0." in name or "layers" not in name for name in fit.curvature.layout.names)
    assert any("layers.1." in name for name in inputs.tracked.layout.names)
    whole = run(subject, behaviour, "ekfac", **options, folder=str(tmp_path / "all"))  # kept for any query
    close(near.values, whole.values)
    assert near.coverage == whole.coverage
    assert "reach none of" in near.notes[0]
    assert "reach none of" not in whole.notes[0]
    tokens = registry.get("ekfac")[0].tokens
    assert tokens is not None
    config = registry.get("ekfac")[0].configure(options)
    for position, values in tokens(inputs, config, [0, 3]).items():
        close(values.sum(), near.values[0, position])
