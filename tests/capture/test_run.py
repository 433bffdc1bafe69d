"""The pass itself: what it leaves behind, what it refuses, what it does not compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rootward.capture.run import probe, run_pass
from rootward.capture.sinks import BaseSink, Losses, PooledActivations, Products, WeightedSum
from rootward.capture.sites import Tracked, track
from rootward.core.errors import ArtefactError, InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.subject.objectives import Classification
from tests.capture import worlds as w

LENGTHS = (5, 11, 3, 8, 11, 2)


def state(model: nn.Module) -> list[Any]:
    """All that a pass could leave behind on a model."""
    hooks = [
        len(getattr(m, kind))
        for m in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    ]
    params = [
        (p.requires_grad, p.grad is None, len(getattr(p, "_post_accumulate_grad_hooks", None) or {}), p._version)
        for p in model.parameters()
    ]
    return [hooks, params, [m.training for m in model.modules()]]


def mixed(model: nn.Module) -> nn.Module:
    """Flags and modes that are neither all on nor all off."""
    model.train()
    model.model.layers[1].eval()
    for n, p in enumerate(model.parameters()):
        p.requires_grad_(n % 3 == 0)
    return model


def interrupt(task: str, done: int, total: int) -> None:
    if done < total:
        raise KeyboardInterrupt


class Broken(BaseSink):
    def consume(self, name: str, factors: object) -> None:
        raise ZeroDivisionError(name)


@pytest.mark.parametrize("how", ["well", "interrupt", "nan", "sink", "no module", "probe"])
def test_nothing_is_left_behind(how: str):
    model, examples = mixed(w.llama()), w.documents(LENGTHS)
    tracked = track(model, "layers")
    sums = WeightedSum(tracked.layout, torch.ones(6, 1), torch.float64)
    pooled = PooledActivations("model.layers.0", 6)
    before = state(model)

    def go(*sinks: Any, **options: Any) -> None:
        run_pass(model, w.causal(), examples, sinks, tracked=tracked, token_budget=20, **options)

    if how == "well":
        go(sums, pooled)
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            go(sums, pooled, progress=interrupt)
    elif how == "nan":
        weight = model.model.embed_tokens.weight
        saved, rare = weight.detach().clone(), int(examples[2].ids[0])
        weight.data[rare] = torch.nan
        with pytest.raises(NumericalError, match="not finite.*d[0-9].*row"):
            go(sums, pooled)
        weight.data.copy_(saved)
    elif how == "sink":
        with pytest.raises(ZeroDivisionError):
            go(Broken(tracked.layout))
    elif how == "no module":
        with pytest.raises(ArtefactError, match="found none"):
            go(sums, pooled, PooledActivations("zzz", 6))
    else:
        probe(model, w.causal(), examples, tracked)
    assert state(model) == before
    if how == "well":
        model.eval()
        wanted = w.naive(model, w.causal(), examples, tracked.layout.names)
        for name, found in sums.result().items():
            torch.testing.assert_close(found[0], wanted[name].sum(0), rtol=1e-9, atol=1e-9)


def test_the_probe_keeps_gradients_that_were_there():
    model = w.llama()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    probe(model, w.causal(), w.documents(LENGTHS), track(model, ".*"))
    assert all(bool((p.grad == 3).all()) for p in model.parameters())


def test_the_loss_of_a_named_document_is_not_finite():
    model = nn.Sequential(nn.Linear(5, 3))
    examples = w.vectors()
    examples[4].x[0] = torch.inf
    with pytest.raises(NumericalError, match=r"1 documents.*d4 \(row 4\)"):
        run_pass(model, Classification(), examples, [Losses(6)])


def test_errors_say_what_is_missing():
    model, examples = w.llama(), w.documents(LENGTHS)
    tracked = track(model, r"layers\.1")
    sink = WeightedSum(tracked.layout, torch.ones(6, 1))
    with pytest.raises(InputError, match="tracked"):
        run_pass(model, w.causal(), examples, [sink])
    with pytest.raises(LayoutMismatch, match="not tracked.*layers.1"):
        run_pass(model, w.causal(), examples, [sink], tracked=track(model, r"layers\.0"))
    name = tracked.layout.names[0]
    wrong = WeightedSum(ParamLayout((name,), ((1, 2),)), torch.ones(6, 1))
    with pytest.raises(LayoutMismatch, match="run_pass"):
        run_pass(model, w.causal(), examples, [wrong], tracked=tracked)
    with pytest.raises(ArtefactError, match="width"):
        run_pass(model, w.causal(), examples, [PooledActivations("model.rotary_emb", 6)])


class Branches(nn.Module):
    """``unused`` never runs, ``aside`` runs without reaching the loss, ``used`` does."""

    def __init__(self, live: bool = True) -> None:
        super().__init__()
        self.used, self.unused, self.aside = (nn.Linear(5, 3) for _ in range(3))
        self.live = live

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.used(x) if self.live else F.linear(x, self.used.weight, self.used.bias)


class Heads(nn.Module):
    """A layer for every head, heads in front of or behind tokens."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.embed, self.each = nn.Embedding(w.VOCABULARY, 8), nn.Linear(4, 4)
        self.head = nn.Linear(8, w.VOCABULARY, bias=False)
        self.front = front

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        heads = x.unflatten(-1, (2, 4))
        heads = self.each(heads.transpose(1, 2)).transpose(1, 2) if self.front else self.each(heads)
        return self.head(torch.tanh(heads.flatten(2)))


@pytest.mark.parametrize("front", [False, True])
def test_layers_of_heads(front: bool):
    torch.manual_seed(0)
    model, examples = Heads(front).double(), w.documents(LENGTHS)
    tracked = track(model, "each")
    wanted = w.naive(model, w.causal(), examples, tracked.layout.names)
    found = w.captured(model, w.causal(), examples, tracked)
    torch.testing.assert_close(w.flat(found), w.flat(wanted), rtol=1e-10, atol=1e-12)
    query = {n: torch.ones(1, *tracked.layout.shape(n), dtype=torch.float64) for n in tracked.layout.names}
    sink = Products(tracked.layout, query, 6, tokens=True)
    run_pass(model, w.causal(), examples, [sink], tracked=tracked, token_budget=20)
    for n, example in enumerate(examples):  # tokens do not see one another, so only those with a target have a score
        silent = ~torch.cat([example.trained[1:], torch.zeros(1, dtype=torch.bool)])
        assert not bool(sink.by_token[n][0, silent].any())
        torch.testing.assert_close(sink.by_token[n].sum(1), sink.dots[:, n])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [w.llama, w.gpt2, w.qwen3])
def test_the_probe_leaves_sound_models_alone(make: Callable[..., nn.Module], dtype: torch.dtype):
    model = make(dtype)
    tracked = track(model, ".*")
    assert probe(model, w.causal(), w.documents(LENGTHS), tracked).uncovered == {}


def test_a_loss_that_depends_on_nothing_attributed():
    model = Branches()
    tracked = track(model, "aside")
    sink = WeightedSum(tracked.layout, torch.ones(6, 1))
    with pytest.raises(ArtefactError, match="does not depend"):
        run_pass(model, Classification(), w.vectors(), [sink], tracked=tracked)


class Mixture(nn.Module):
    """One expert sees a gathered subset of all documents' tokens, another all of them in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(w.VOCABULARY, 8)
        self.some, self.sorted, self.plain, self.flat = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, w.VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        rows = x.flatten(0, 1)
        chosen = (input_ids.flatten() % 3 == 0).nonzero().flatten()
        order = input_ids.flatten().argsort(stable=True)
        extra = torch.zeros_like(rows).index_add(0, chosen, self.some(rows[chosen]))
        extra = extra.index_add(0, order, self.sorted(rows[order]))
        extra = (extra + self.flat(rows)).view_as(x)
        return self.head(torch.tanh(self.plain(x) + extra))


def test_the_probe_reports_modules_that_mix_documents():
    torch.manual_seed(0)
    model, examples = Mixture().double(), w.documents((4, 7, 7, 9))
    tracked = track(model, ".*")
    with pytest.raises(ArtefactError, match="module some .Linear."):
        run_pass(model, w.causal(), examples, [w.Collect(tracked.layout, 4)], tracked=tracked)
    sure = probe(model, w.causal(), examples, tracked)
    # `some` has rows of no document; `sorted` has the right number of rows in the wrong order: only values tell
    assert sure.uncovered == {"some.weight": 64, "some.bias": 8, "sorted.weight": 64, "sorted.bias": 8}
    assert sure.covered == sure.total - 144
    wanted = w.naive(model, w.causal(), examples, sure.layout.names)
    found = w.captured(model, w.causal(), examples, sure)
    torch.testing.assert_close(w.flat(found), w.flat(wanted), rtol=1e-10, atol=1e-10)


def test_the_probe_reports_what_never_fires():
    model = Branches()
    sure = probe(model, Classification(), w.vectors(), track(model, ".*"))
    assert sure.uncovered == {"unused.weight": 15, "unused.bias": 3, "aside.weight": 15, "aside.bias": 3}
    with pytest.raises(ArtefactError, match="none of 2 parameters|does not depend"):
        probe(model, Classification(), w.vectors(), track(model, "unused"))


def test_the_probe_reports_a_weight_used_outside_its_module():
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.linear(torch.tanh(self.a(x)), self.a.weight))

    model = Outside().double()
    sure = probe(model, Classification(), w.vectors(), track(model, ".*"))
    assert sure.uncovered == {"a.weight": 25}


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Nothing(BaseSink):
    """Wants factors and makes nothing of them."""


def costs(model: nn.Module, tracked: Tracked) -> tuple[int, int]:
    """FLOPs of a plain forward and backward, and of a pass."""
    objective, examples = w.causal(), w.documents((16,) * 4)
    batch = objective.collate(examples)
    plain = flops(lambda: objective.losses(model, batch).sum().backward())
    model.zero_grad()
    sink = Nothing(tracked.layout)
    return plain, flops(lambda: run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=10**6))


def test_the_weight_half_of_the_backward_pass_is_not_computed():
    # untied and without a head of its own size, so that nearly all products are those of weight matrices
    model = w.llama(hidden_size=64, intermediate_size=128)
    plain, passed = costs(model, track(model, ".*"))
    assert passed / plain == pytest.approx(2 / 3, abs=0.02)


def test_layers_below_the_first_wanted_one_are_not_back_propagated():
    model = w.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=6)
    _, every = costs(model, track(model, r"layers\."))
    plain, last = costs(model, track(model, r"layers\.5\.mlp\.down_proj"))
    with torch.no_grad():
        batch = w.causal().collate(w.documents((16,) * 4))
        forward = flops(lambda: w.causal().losses(model, batch))
    head = 2 * batch.keep.numel() * w.VOCABULARY * 64
    assert last - forward == pytest.approx(head, rel=0.05), "only the head is passed through backwards"
    assert every > 1.8 * forward
    assert forward < last < plain / 2


def test_no_sink_is_given_what_it_does_not_want():
    model, examples = w.llama(), w.documents(LENGTHS)
    tracked = track(model, ".*")
    few = track(model, r"layers\.1\.mlp")
    collect = w.Collect(few.layout, 6)
    run_pass(model, w.causal(), examples, [collect, Losses(6)], tracked=tracked, token_budget=20)
    assert set(collect.factors) == set(few.layout.names)


def test_transformers_gradient_checkpointing_is_off_during_a_pass_and_on_again():
    model, examples = w.llama(), w.documents(LENGTHS)
    tracked = track(model, ".*")
    wanted = w.captured(model, w.causal(), examples, tracked)
    model.activation_checkpointing_enable()
    model.train()
    found = w.captured(model, w.causal(), examples, tracked)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert model.training


class Checkpointed(nn.Module):
    """Recomputes its middle whatever its mode."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        middle = checkpoint(lambda v: torch.tanh(self.b(v)), torch.tanh(self.a(x)), use_reentrant=self.use_reentrant)
        return self.c(middle)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_other_checkpointing_is_right_too(use_reentrant: bool):
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant).double()
    examples, tracked = w.vectors(), track(model, ".*")
    found = w.captured(model, Classification(), examples, tracked, 4)
    twin = Checkpointed(False).double()
    twin.load_state_dict(model.state_dict())
    wanted = w.naive(twin, Classification(), examples, tracked.layout.names)
    torch.testing.assert_close(w.flat(found), w.flat(wanted), rtol=1e-10, atol=1e-12)


def test_progress_counts_documents():
    seen: list[tuple[str, int, int]] = []
    run_pass(
        w.llama(), w.causal(), w.documents(LENGTHS), [Losses(6)], token_budget=22, task="walk",
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert seen[-1] == ("walk", 6, 6)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert len(seen) > 1


def test_no_documents_is_no_work():
    model = w.llama()
    tracked = track(model)
    sink = WeightedSum(tracked.layout, torch.ones(0, 2))
    run_pass(model, w.causal(), [], [sink], tracked=tracked)
    assert all(not bool(v.any()) for v in sink.result().values())
    products = Products(tracked.layout, sink.result(), 0)
    run_pass(model, w.causal(), [], [products], tracked=tracked, packing=True)
    assert products.dots.shape == (2, 0)
