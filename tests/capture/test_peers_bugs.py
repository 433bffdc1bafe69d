"""Bugs that other attribution libraries shipped in silence, and the tests that would have seen them.

eigenvectors of EK-FAC used transposed (dattri):
    test_ekfac_is_its_definition
    tests/curvature/test_kronecker.py::test_the_inverse_is_that_of_the_dense_matrix
Conv1D unsupported (kronfluence) or turned over where it is square (bergson):
    test_conv1d_and_linear_twins_have_the_same_influence
    tests/capture/test_factors.py::test_square_conv1d_is_not_transposed
Adam's moments of a square Conv1D turned over, parameter groups in the wrong order (bergson):
    tests/methods/attribution/test_less_xia2024.py::test_square_conv1d_weights_are_not_turned_over
    tests/subject/test_checkpoints.py::test_groups_and_their_order_do_not_mix_parameters_up
K-FAC wrong in bfloat16 (bergson):
    test_half_precision_has_the_covariances_of_single
    test_half_precision_has_the_influence_of_single
NaN ends in a failed eigendecomposition (kronfluence):
    test_a_document_that_is_not_finite_is_named_before_any_eigenvector
    tests/curvature/test_kronecker.py::test_rank_deficient_and_zero_matrices_have_finite_inverses
    tests/curvature/test_kronecker.py::test_an_eigendecomposition_that_fails_is_retried_with_a_jitter
experts of a mixture skipped in silence (bergson):
    test_experts_are_reported_as_uncovered
    tests/capture/test_run.py::test_the_probe_reports_modules_that_mix_documents
the preconditioned vector of query 0 for all queries (infusion):
    test_the_mean_of_queries_is_the_mean_of_their_scores
results depend on batches, padding or the attention kernel:
    test_ekfac_does_not_depend_on_padding_or_attention
    tests/capture/test_products.py::test_batch_size_order_and_packing_do_not_matter
    tests/subject/test_objectives.py::test_padding_and_order_do_not_matter
    tests/methods/test_contract.py::test_batches_do_not_matter
loss times the batch size (bergson):
    test_curvature_does_not_grow_with_the_batch
    tests/subject/test_objectives.py::test_losses_equal_the_naive_loop
a projection scaled by the module's shape (bergson):
    tests/capture/test_projection.py::test_inner_products_are_unbiased_for_every_shape
    tests/capture/test_sketch.py::test_inner_products_are_unbiased_for_every_shape
shards of unequal size:
    test_uneven_shards_merge_to_the_whole
    tests/capture/test_products.py::test_shards_merge_to_the_whole
a resumed run that is not the run (bergson):
    test_a_fit_that_was_stopped_ends_as_one_that_was_not
    tests/capture/test_store.py::test_stopped_at_any_write
    tests/verification/test_retrain.py::test_ctrl_c_and_sigkill_leave_no_process_and_the_same_call_goes_on
the sign and scale of a score:
    test_the_score_is_the_finite_difference_of_a_refit
    tests/methods/attribution/test_tracin_pruthi2020.py::test_sign_and_size_are_those_of_one_step_on_one_document
    tests/methods/test_contract.py::test_helpful_and_harmful_documents_are_on_their_sides
token scores that do not add up (kronfluence):
    test_token_scores_sum_to_the_documents_score
    tests/capture/test_products.py::test_token_scores_stand_at_their_tokens
layers with and without bias in one model:
    test_ekfac_is_its_definition
    tests/capture/test_factors.py::test_per_document_gradients_are_those_of_autograd
weights of one that are not the plain loss:
    tests/subject/test_training.py::test_training_equals_a_plain_loop
    tests/subject/test_training.py::test_first_gradient_is_linear_in_the_weights
two BOS on chats (bergson):
    tests/subject/test_objectives.py::test_exactly_one_bos
adapters evaluated with random weights (bergson):
    tests/subject/test_loading.py::test_adapter_weights_that_do_not_arrive_are_an_error
    tests/subject/test_training.py::test_lora_reload_equals_the_live_model_and_missing_bases_are_named
    tests/subject/test_subject.py::test_a_subject_that_was_trained_here_can_be_trained_again
empty and one-token documents:
    test_documents_without_a_target_do_not_reach_the_curvature
    tests/subject/test_objectives.py::test_truncated_and_dropped_documents_are_reported
a CPU is not enough (bergson):
    test_fitting_asks_nothing_of_cuda
an option that never worked (bergson's score = "nearest"):
    tests/methods/test_contract.py::test_unknown_options_are_refused
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from rootward.api import attribute
from rootward.capture.fit import Fit, FitConfig, Fitted
from rootward.capture.fitparts import Parts
from rootward.capture.inputs import MethodInputs
from rootward.capture.moments import CovarianceSums, SecondMoments
from rootward.capture.run import run_pass
from rootward.capture.sinks import BaseSink, Products, WeightedSum
from rootward.capture.sites import Tracked, track
from rootward.core.block import Block
from rootward.core.errors import NumericalError
from rootward.core.registry import get
from rootward.curvature import kronecker
from rootward.curvature.base import Damping
from rootward.methods.attribution.ekfac_grosse2023 import Config, token_scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.encode import Example
from rootward.subject.objectives import CausalLM, Classification, Objective
from rootward.subject.subject import Subject
from tests.capture import worlds as w
from tests.methods.attribution import supervised as s
from tests.methods.contract import QUERIES, ROWS
from tests.subject.small import byte_tokenizer, tiny_llama

LENGTHS = (5, 11, 3, 8, 11, 2)
DAMPING = Damping(0.1)
EKFAC = "ekfac_grosse2023"


def fit(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    tracked: Tracked,
    kind: str = "ekfac",
    budget: int = 30,
    parts: Parts | None = None,
    labels: str = "data",
) -> Fitted:
    config = FitConfig.model_validate({"kind": kind, "labels": labels})
    return Fit(model, objective, examples, tracked, config, DAMPING, budget, parts=parts).run()


def influence(
    model: nn.Module, objective: Objective, examples: Sequence[Example], tracked: Tracked, **options: Any
) -> Tensor:
    """``-<g_q, (G + lam)^-1 g_n>``, the first two documents being the queries as well: ``[2, n]``."""
    curvature = fit(model, objective, examples, tracked, **options).curvature
    budget = options.get("budget", 30)
    dtype = next(model.parameters()).dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    weights = torch.eye(len(examples), dtype=wide)[:, :2]
    queries = WeightedSum(tracked.layout, weights, wide)
    run_pass(model, objective, examples, [queries], tracked=tracked, token_budget=budget)
    products = Products(tracked.layout, curvature.apply(queries.result()), len(examples))
    run_pass(model, objective, examples, [products], tracked=tracked, token_budget=budget)
    return -products.dots


# --- EK-FAC from its definition ---------------------------------------------------------------------------------


def sides(
    model: nn.Module, objective: Objective, examples: Sequence[Example], names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs ``[m, i]`` and output gradients ``[m, o]`` of every token, one document at a time."""
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for example in examples:
        handles = [
            module.register_forward_hook(lambda _, x, out, name=name: seen.update({name: (x[0].detach(), out)}))
            for name, module in modules.items()
        ]
        loss = objective.losses(model, objective.collate([example])).sum()
        for handle in handles:
            handle.remove()
        found = torch.autograd.grad(loss, [seen[name][1] for name in names])
        for name, gradient in zip(names, found, strict=True):
            kept[name].append((seen[name][0].flatten(0, -2), gradient.flatten(0, -2)))
    return {name: (torch.cat([a for a, _ in rows]), torch.cat([g for _, g in rows])) for name, rows in kept.items()}


def moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def defined(gradients: Tensor, queries: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``U [(U' Q V) / (E_n[(U' G_n V)^2] + lam)] V'`` for eigenvectors as columns of ``left`` and ``right``."""
    values = (left.T @ gradients @ right).square().mean(0)
    return left @ ((left.T @ queries @ right) / (values + 0.1 * values.mean())) @ right.T


WORLDS: dict[str, Callable[[], tuple[nn.Module, Objective, list[Example], str]]] = {
    "square": lambda: (
        nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double(), Classification(), w.vectors(12), ".*"
    ),
    "mixed biases": lambda: (w.perceptron(), Classification(), w.vectors(12), ".*"),
    "llama": lambda: (w.llama(attention_bias=True), w.causal(), w.documents(LENGTHS), r"self_attn\.[qo]_proj|down"),
    "conv1d": lambda: (w.gpt2(), w.causal(), w.documents(LENGTHS), r"attn\.c_proj|c_fc"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORLDS)
def test_ekfac_is_its_definition(name: str):
    model, objective, examples, pattern = WORLDS[name]()
    tracked = track(model, pattern)
    names = tracked.layout.names
    gradients = w.naive(model, objective, examples, names)
    found = fit(model, objective, examples, tracked).curvature.apply(gradients)
    tokens = sides(model, objective, examples, names)
    square = 0
    for n in names:
        g = gradients[n]
        if g.dim() == 2:  # a bias: one row, in the eigenvectors of its own second moment
            vectors = torch.linalg.eigh(moment(g))[1]
            wanted = defined(g[:, None], g[:, None], torch.ones(1, 1, dtype=g.dtype), vectors)[:, 0]
            torch.testing.assert_close(found[n], wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))
            continue
        a, out = (torch.linalg.eigh(moment(x))[1] for x in tokens[n])
        left, right = (a, out) if isinstance(model.get_submodule(n.rpartition(".")[0]), Conv1D) else (out, a)
        wanted = defined(g, g, left, right)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found[n], wanted, rtol=1e-8, atol=1e-8 * scale)
        if left.shape == right.shape:  # what would pass unseen by its shape alone is seen by its values
            square += 1
            for turned in (defined(g, g, left.T, right), defined(g, g, left, right.T), defined(g, g, right, left)):
                assert float((turned - wanted).abs().max()) > 1e-3 * scale
    assert square


def test_conv1d_and_linear_twins_have_the_same_influence():
    one = w.gpt2()
    two = deepcopy(one)
    for name, module in list(two.named_modules()):
        if isinstance(module, Conv1D):
            rows, cols = module.weight.shape
            linear = nn.Linear(rows, cols).double()
            linear.weight.data, linear.bias.data = module.weight.data.T.clone(), module.bias.data.clone()
            two.set_submodule(name, linear)
    examples, found = w.documents(LENGTHS), []
    for model in (one, two):
        tracked = track(model, r"h\.\d\.(attn|mlp).*weight")
        found.append(influence(model, w.causal(), examples, tracked, labels="sampled"))
        shapes = {tracked.layout.shape(n) for n in tracked.layout.names}
        assert (16, 16) in shapes and ((16, 48) in shapes) == (model is one) and ((48, 16) in shapes) == (model is two)
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8 * float(found[0].abs().max()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_ekfac_does_not_depend_on_padding_or_attention(attention: str, labels: str):
    examples, pattern = w.documents(LENGTHS), r"layers\.\d\.(self_attn|mlp)|embed"
    alone = w.llama(attn_implementation="eager")
    truth = influence(alone, w.causal(), examples, track(alone, pattern), budget=1, labels=labels)
    model = w.llama(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    for budget in (1, 20, 10**6):  # no padding, some, as much as there can be
        found = influence(model, w.causal(), examples, track(model, pattern), budget=budget, labels=labels)
        torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-7 * float(truth.abs().max()))


def test_curvature_does_not_grow_with_the_batch():
    """Sixteen copies of a document have the curvature of one, whatever the batch."""
    model, example = w.llama(), w.documents((7,))[0]
    tracked = track(model, "layers.0.self_attn.q_proj")
    copies = [Example(f"d{n}", n, example.ids, example.trained) for n in range(16)]
    blocks = [
        fit(model, w.causal(), examples, tracked, budget=budget).curvature.blocks[tracked.layout.names[0]].eigenvalues
        for examples, budget in (([example], 10**6), (copies, 10**6), (copies, 1))
    ]
    for found in blocks[1:]:
        torch.testing.assert_close(found, blocks[0], rtol=1e-7, atol=1e-9 * float(blocks[0].max()))


# --- half precision ---------------------------------------------------------------------------------------------


def both_precisions() -> tuple[nn.Module, nn.Module]:
    half = w.llama(torch.bfloat16)
    return half, deepcopy(half).float()


def test_half_precision_has_the_covariances_of_single():
    """4000 tokens: a sum that is kept in bfloat16 stands still long before."""
    examples, found = w.documents((40,) * 100), []
    for model in both_precisions():
        sums = CovarianceSums(track(model, r"layers\.0\.mlp").layout)
        run_pass(model, w.causal(), examples, [sums], tracked=track(model, r"layers\.0\.mlp"), token_budget=400)
        assert all(value.dtype == torch.float32 for value in sums.sums.values())
        found.append(sums.result())
    for key, side in found[1].sides.items():
        assert side.tokens == found[0].sides[key].tokens == 4000
        assert float((found[0].sides[key].moment - side.moment).norm() / side.moment.norm()) < 0.02, key


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_half_precision_has_the_influence_of_single(kind: str):
    examples, found = w.documents(LENGTHS * 4), []
    for model in both_precisions():
        tracked = track(model, r"layers\.\d\.(self_attn|mlp)")
        found.append(influence(model, w.causal(), examples, tracked, kind=kind))
    half, single = (value / value.norm() for value in found)
    assert bool(torch.isfinite(half).all())
    assert float((half - single).norm()) < 0.1
    assert float((half.roll(1, 1) - single).norm()) > 0.5


# --- what is not seen is said, what is not finite is named ------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, ".*"])
def test_experts_are_reported_as_uncovered(pattern: str | None):
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 261, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "experts_implementation": "eager",
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**settings)).double().eval()
    subject = Subject(model, ROWS[:6], CausalLM(byte_tokenizer()), parameters=pattern)
    experts = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
    assert sum(experts.values()) == 4608
    coverage = attribute(subject, Behaviour.contrast("good", QUERIES[:1]), EKFAC, token_budget=500).coverage
    assert coverage is not None
    for name, size in experts.items():
        assert coverage.uncovered[name.replace("layers.0", "layers.*")] == size
    assert coverage.covered + sum(coverage.uncovered.values()) == coverage.parameters == sum(
        p.numel() for p in model.parameters()
    )  # fmt: skip


def test_a_document_that_is_not_finite_is_named_before_any_eigenvector(monkeypatch: pytest.MonkeyPatch):
    subject, bad = s.overflowing()
    monkeypatch.setattr(kronecker, "_eigh", lambda _: pytest.fail("an eigendecomposition was begun"))
    with pytest.raises(NumericalError, match=f"not finite.*document {bad}"):
        attribute(subject, s.outputs(s.randn(1, 5)), EKFAC)


def test_documents_without_a_target_do_not_reach_the_curvature():
    """A text of one token and one cut before its reply are counted, and change nothing."""
    model, objective = tiny_llama(dtype=torch.float64), CausalLM(byte_tokenizer(bos=False), max_tokens=60)
    behaviour = Behaviour.contrast("good", QUERIES[:1])
    good = [row for row in ROWS if len(str(row)) < 150]
    empty = [{"text": "x"}, {"prompt": "a" * 70, "completion": "b"}]
    plain, more = (
        attribute(Subject(model, rows, objective, parameters="mlp"), behaviour, EKFAC, token_budget=300)
        for rows in (good, [empty[0], *good, empty[1]])
    )
    assert more.document_ids == plain.document_ids
    assert plain.values.tobytes() == more.values.tobytes()
    assert more.coverage is not None and sum(more.coverage.dropped.values()) == 2


# --- queries, signs, tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2])
def test_the_mean_of_queries_is_the_mean_of_their_scores(rank: int | None):
    subject = s.classifier(12)
    behaviour = s.outputs(s.randn(3, 5, seed=9))
    each = attribute(subject, behaviour, EKFAC, options={"queries": "each"}).values
    assert each.shape == (3, 12)
    if rank is None:
        mean = attribute(subject, behaviour, EKFAC).values
        np.testing.assert_allclose(mean, each.mean(0, keepdims=True), rtol=1e-5, atol=1e-6 * np.abs(each).max())
    for q in range(3):  # no row is another's: each equals a call with that query alone
        alone = attribute(subject, s.outputs(s.randn(3, 5, seed=9)[q : q + 1]), EKFAC, options={"rank": rank}).values
        row = attribute(subject, behaviour, EKFAC, options={"queries": "each", "rank": rank}).values[q]
        np.testing.assert_allclose(row, alone[0], rtol=1e-5, atol=1e-6 * np.abs(each).max())
        assert not np.allclose(each[q], each[(q + 1) % 3])


def test_the_score_is_the_finite_difference_of_a_refit():
    """One linear output: inputs and output gradients are independent, so EK-FAC is the Gauss-Newton matrix."""
    subject, x, y = s.ridge()
    points = s.randn(2, 3, seed=5)
    relative = s.RIDGE / float(torch.linalg.eigvalsh(moment(x)).mean())
    options = {"damping": relative, "queries": "each", "fit_labels": "exact"}
    found = attribute(subject, s.outputs(points), EKFAC, options=options).values
    step = 1e-5
    for n in range(len(x)):
        ends = [points @ s.fit(x, y, torch.ones(len(x), dtype=x.dtype).index_add(0, torch.tensor([n]), d)) for d in
                (torch.tensor([step], dtype=x.dtype), torch.tensor([-step], dtype=x.dtype))]  # fmt: skip
        # the document's share of the mean loss is weight / N, the score is for a unit of loss
        change = len(x) * (ends[0] - ends[1])[:, 0] / (2 * step)
        np.testing.assert_allclose(found[:, n], change.numpy(), rtol=1e-4, atol=1e-5)
    assert (found > 0).any() and (found < 0).any()


def test_token_scores_sum_to_the_documents_score():
    subject = Subject(
        tiny_llama(dtype=torch.float64), ROWS[:6], CausalLM(byte_tokenizer()), parameters=r"mlp|norm|q_proj"
    )
    inputs = MethodInputs(subject, Behaviour.contrast("good", QUERIES[:2]), 100)
    whole = get(EKFAC)[0].run(inputs, Config()).values[0]
    tokens = token_scores(inputs, Config(), [0, 3, 5])
    for position, row in tokens.items():
        assert len(row) == subject.encoded[position].length > 1
        np.testing.assert_allclose(row.sum(), whole[position], rtol=1e-5)
        assert np.ptp(row) > 0


# --- shards, interruptions, machines ----------------------------------------------------------------------------


class Shifted(BaseSink):
    """A sink that sees a shard's documents at their places in the whole."""

    positions = True

    def __init__(self, inner: CovarianceSums | SecondMoments, places: Sequence[int]) -> None:
        super().__init__(inner.layout)
        self.inner, self.places = inner, torch.tensor(places)

    def begin(self, block: Block) -> None:
        super().begin(block)
        self.inner.begin(
            Block(self.places[block.index], block.ids, block.mask, block.losses, block.trained, block.turn)
        )

    def consume(self, name: str, factors: Any) -> None:
        self.inner.consume(name, factors)

    def end(self) -> None:
        self.inner.end()
        super().end()


@pytest.mark.parametrize("first", [(), (3,), (5, 0, 1, 4), range(6)], ids=["none", "one", "four", "all"])
def test_uneven_shards_merge_to_the_whole(first: Sequence[int]):
    model, examples = w.gpt2(), w.documents(LENGTHS)
    tracked = track(model, r"wte|c_attn|ln_1|c_fc")
    bases = fit(model, w.causal(), examples, tracked).curvature.blocks

    def make() -> tuple[CovarianceSums, SecondMoments]:
        return CovarianceSums(tracked.layout), SecondMoments(
            tracked.layout, {n: block.basis for n, block in bases.items()}, groups=2
        )

    def feed(places: Sequence[int]) -> tuple[CovarianceSums, SecondMoments]:
        sinks = make()
        for sink in sinks:
            if len(places):
                shard = [examples[n] for n in places]
                run_pass(
                    model, w.causal(), shard, [Shifted(sink, places)], tracked=tracked, token_budget=9 + len(places)
                )
        return sinks

    whole, left, right = feed(range(6)), feed(first), feed([n for n in range(6) if n not in first])
    for mine, theirs in zip(left, right, strict=True):
        mine.merge(theirs)  # type: ignore[arg-type]
    one, other = whole[0].result(), left[0].result()
    assert one.tokens == other.tokens
    for key, side in one.sides.items():
        assert side.tokens == other.sides[key].tokens
        torch.testing.assert_close(other.sides[key].moment, side.moment)
    for name, value in whole[1].result().items():
        torch.testing.assert_close(left[1].result()[name], value)
        torch.testing.assert_close(left[1].group(1)[name], whole[1].group(1)[name])
    assert torch.equal(left[1].documents, whole[1].documents)


def tensors(fitted: Fitted) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, block in fitted.curvature.blocks.items():
        found[name] = block.eigenvalues
        found |= {f"{name}.{k}": side for k, side in enumerate(block.basis) if side is not None}
    return found


@pytest.mark.parametrize(("stop", "left"), [(1, 4), (2, 3), (3, 2), (4, 2), (5, 0)])
def test_a_fit_that_was_stopped_ends_as_one_that_was_not(stop: int, left: int, tmp_path: Path):
    """Stopped in one of four batches (one in each half of the covariances, two of eigenvalues) or after them all."""

    class Counting(CausalLM):
        stop, batches = 0, 0

        def losses(self, model: nn.Module, batch: Any) -> Tensor:
            self.batches += 1
            if self.batches == self.stop:
                raise KeyboardInterrupt
            return super().losses(model, batch)

    model, examples, objective = w.llama(), w.documents(LENGTHS), Counting(w.Tokens())
    tracked, parts = track(model, r"layers\.0"), Parts(tmp_path, "key")
    clean = fit(model, objective, examples, tracked, budget=50)
    assert objective.batches == 4
    objective.batches, objective.stop = 0, stop
    with suppress(KeyboardInterrupt):
        fit(model, objective, examples, tracked, parts=parts, budget=50)
    objective.batches, objective.stop = 0, 0
    again = fit(model, objective, examples, tracked, parts=parts, budget=50)
    assert objective.batches == left  # what was finished is not computed again
    assert tensors(again).keys() == tensors(clean).keys()
    for name, value in tensors(clean).items():
        assert torch.equal(tensors(again)[name], value), name
    assert again.record.model_copy(update={"seconds": {}}) == clean.record.model_copy(update={"seconds": {}})


def test_fitting_asks_nothing_of_cuda(monkeypatch: pytest.MonkeyPatch):
    for name in ("init", "current_device", "mem_get_info", "synchronize", "empty_cache", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(f"torch.cuda.{name} was called"))
    assert attribute(s.classifier(12), s.outputs(s.randn(2, 5)), EKFAC).values.any()


def test_the_tests_named_above_exist():
    root = Path(__file__).resolve().parents[2]
    named = re.findall(r"^    (?:(\S+\.py)::)?(test_\w+)$", __doc__ or "", re.MULTILINE)
    assert len(named) > 40
    for file, name in named:
        path = root / file if file else Path(__file__)
        assert f"def {name}(" in path.read_text(encoding="utf-8"), f"{path.name} has no {name}"
