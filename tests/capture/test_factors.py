"""Every kind of module: the pass's per-document gradients are those of plain autograd, one document at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rootward.capture.projection import Projection
from rootward.capture.run import probe, run_pass
from rootward.capture.sinks import ProjectedRows
from rootward.capture.sites import track
from rootward.core.errors import InputError
from rootward.subject.encode import Example
from rootward.subject.objectives import Classification, Objective
from tests.capture import worlds as w

LENGTHS = (5, 11, 3, 8, 11, 2)
World = tuple[nn.Module, Objective, list[Example]]


def peft_model(**options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj"]
    model = get_peft_model(w.llama(), LoraConfig(r=3, lora_alpha=7, target_modules=targets, **options))
    return w.scattered(model.double()).eval()


class Little(nn.Module):
    """A language model of plain modules: embedding with a padding row, both kinds of norm, a bias-free layer."""

    def __init__(self, head_tied: bool = False, padding_idx: int | None = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(w.VOCABULARY, 8, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(8)
        self.bare = nn.LayerNorm(8, bias=False)
        self.rms = nn.RMSNorm(8)
        self.up = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, w.VOCABULARY, bias=False)
        if head_tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        x = x + x.cumsum(1) / count  # causal mixing, so that padding on the right cannot be seen
        x = self.norm(x) + self.rms(x)
        x = torch.tanh(self.up(input=x))
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(self.bare(x))


def little(**options: Any) -> nn.Module:
    torch.manual_seed(5)
    return w.scattered(Little(**options).double())


def two_linears_tied() -> nn.Module:
    model = little()
    model.up.weight = model.twice.weight
    return model


WORLDS: dict[str, Callable[[], World]] = {
    "llama": lambda: (w.llama(), w.causal(), w.documents(LENGTHS)),
    "llama-tied-biased": lambda: (
        w.llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True), w.causal(), w.documents(LENGTHS)
    ),
    "gpt2": lambda: (w.gpt2(), w.causal(), w.documents(LENGTHS)),
    "gpt2-untied": lambda: (w.gpt2(tie_word_embeddings=False), w.causal(keep_logits=False), w.documents(LENGTHS)),
    "qwen3": lambda: (w.qwen3(), w.causal(), w.documents(LENGTHS)),
    "lora": lambda: (peft_model(), w.causal(), w.documents(LENGTHS)),
    "little": lambda: (little(), w.causal(), w.documents(LENGTHS)),
    "tied-head": lambda: (little(head_tied=True), w.causal(), w.documents(LENGTHS)),
    "tied-linears": lambda: (two_linears_tied(), w.causal(), w.documents(LENGTHS)),
    "perceptron": lambda: (w.perceptron(), Classification(), w.vectors()),
    "cnn": lambda: (w.digits_cnn(), Classification(), w.images()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", WORLDS)
def test_per_document_gradients_are_those_of_autograd(name: str):
    model, objective, examples = WORLDS[name]()
    tracked = track(model, ".*")
    names = tracked.layout.names
    wanted = w.naive(model, objective, examples, names)
    assert all(bool(g.any()) for g in wanted.values()), "a parameter that does not matter tests nothing"

    budget = 4 if isinstance(objective, Classification) else 24
    weighted = w.captured(model, objective, examples, tracked, budget)
    collect = w.Collect(tracked.layout, len(examples))
    rows = ProjectedRows(Projection(tracked.layout, None), len(examples), torch.float64)
    run_pass(model, objective, examples, [collect, rows], tracked=tracked, token_budget=budget)
    assert collect.blocks > 1
    for n in names:
        scale = float(wanted[n].abs().max())
        torch.testing.assert_close(weighted[n], wanted[n], rtol=0, atol=1e-10 * max(scale, 1))
        torch.testing.assert_close(collect.dense[n], wanted[n], rtol=0, atol=1e-10 * max(scale, 1))
    torch.testing.assert_close(rows.rows, w.flat(wanted), rtol=1e-10, atol=1e-10)
    losses = [float(objective.losses(model, objective.collate([e])).sum().detach()) for e in examples]
    torch.testing.assert_close(rows.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=0)
    assert probe(model, objective, examples, tracked).layout == tracked.layout


def test_the_comparison_can_fail():
    model, objective, examples = WORLDS["little"]()
    tracked = track(model, "up.weight")
    right = w.captured(model, objective, examples, tracked)["up.weight"]
    assert not torch.allclose(right.roll(1, 0), right)
    assert not torch.allclose(right.transpose(1, 2), right)


def test_square_conv1d_is_not_transposed():
    model, objective, examples = WORLDS["gpt2"]()
    name = "transformer.h.0.attn.c_proj.weight"
    tracked = track(model, "attn.c_proj.weight")
    wanted = w.naive(model, objective, examples, [name])[name]
    assert wanted.shape[1] == wanted.shape[2]
    found = w.captured(model, objective, examples, tracked)[name]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found.transpose(1, 2), wanted)


def test_position_embeddings_have_their_own_gradient_per_document():
    model, objective, examples = WORLDS["gpt2"]()
    name = "transformer.wpe.weight"
    found = w.captured(model, objective, examples, track(model, "wpe"), 2**20)[name]
    torch.testing.assert_close(found, w.naive(model, objective, examples, [name])[name], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[0, :2], found[1, :2])


def test_padding_row_has_no_gradient():
    examples = w.documents((6, 9))
    examples[0].ids[2] = 7
    for padding_idx, expected in ((7, 0), (None, 1)):
        model = little(padding_idx=padding_idx)
        found = w.captured(model, w.causal(), examples, track(model, "embed"))["embed.weight"]
        wanted = w.naive(model, w.causal(), examples, ["embed.weight"])["embed.weight"]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        assert bool(found[0, 7].any()) == bool(expected)


def test_factors_at_padding_are_exactly_zero():
    model, objective, examples = WORLDS["llama"]()
    tracked = track(model, ".*")
    collect = w.Collect(tracked.layout, len(examples))
    run_pass(model, objective, examples, [collect], tracked=tracked, token_budget=2**20)
    mask = objective.collate(sorted(examples, key=lambda e: -e.length)).mask
    assert not bool(mask.all())
    for name, factors in collect.factors.items():
        for factor in factors:
            g = getattr(factor, "left", None) if "weight" in name and hasattr(factor, "left") else None
            rows = factor.rows if hasattr(factor, "rows") else factor.right if g is None else g
            if rows.shape[1] == mask.shape[1]:
                assert not bool(rows[~mask].any()), name


def test_default_of_an_adapter_is_its_matrices():
    model = peft_model()
    names = track(model).layout.names
    assert len(names) == 8
    assert all("lora_A" in n or "lora_B" in n for n in names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


def test_adapter_base_weights_on_request():
    model, objective, examples = WORLDS["lora"]()
    tracked = track(model, r"layers\.1\..*(q_proj\.base|gate_proj|lora_B)")
    wanted = w.naive(model, objective, examples, tracked.layout.names)
    found = w.captured(model, objective, examples, tracked)
    assert len(found) == 4
    torch.testing.assert_close(w.flat(found), w.flat(wanted), rtol=1e-10, atol=1e-10)


def test_default_of_a_model_leaves_out_embeddings_and_head():
    names = track(w.gpt2()).layout.names
    assert names == tuple(
        f"transformer.h.{layer}.{m}.weight"
        for layer in range(2)
        for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    assert not any("embed" in n or "norm" in n or "lm_head" in n for n in track(w.llama()).layout.names)


class GemmaRMSNorm(nn.Module):
    """``x / rms(x) * (1 + w)``"""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class SquaredRMSNorm(GemmaRMSNorm):
    """Another formula under a familiar name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.square()


class GatedRMSNorm(GemmaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x * gate)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 4


def test_gemma_norm_is_covered():
    model = little()
    model.rms = GemmaRMSNorm(8).double()
    w.scattered(model)
    examples = w.documents(LENGTHS)
    tracked = track(model, "rms")
    found = w.captured(model, w.causal(), examples, tracked)
    wanted = w.naive(model, w.causal(), examples, ["rms.weight"])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [SquaredRMSNorm, GatedRMSNorm])
def test_a_norm_with_another_formula_is_reported(norm: type[GemmaRMSNorm]):
    model = little()
    model.rms = norm(8).double()
    tracked = track(model, ".*")
    assert tracked.uncovered == {"rms.weight": 8}
    assert tracked.covered == tracked.total - 8


def test_a_subclass_that_computes_otherwise_is_reported():
    model = little()
    model.embed = ScaledEmbedding(w.VOCABULARY, 8).double()
    assert set(track(model, ".*").uncovered) == {"embed.weight"}


def test_what_cannot_be_covered_is_counted():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.GRUCell(3, 3), nn.Linear(3, 3, bias=False))
    tracked = track(model, ".*")
    assert tracked.layout.names == ("2.weight",)
    assert sum(tracked.uncovered.values()) == tracked.total - 9
    assert tracked.total == sum(p.numel() for p in model.parameters())


def test_a_parameter_tied_to_an_unsupported_use_is_reported_and_its_neighbour_stays():
    class Odd(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    linear = nn.Linear(4, 4)
    tracked = track(nn.Sequential(linear, Odd(linear.weight)), ".*")
    assert tracked.layout.names == ("0.bias",)
    assert tracked.uncovered == {"0.weight": 16}


def test_errors_of_track_name_what_there_is():
    with pytest.raises(InputError, match="no covered module.*GRUCell"):
        track(nn.GRUCell(3, 3))
    with pytest.raises(InputError, match=r"matching some of 3 supported.*0.weight.*'nothing'"):
        track(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)), "nothing")
    with pytest.raises(InputError, match="regular expression"):
        track(nn.Linear(2, 2), "(")
    with pytest.raises(InputError, match="no parameters"):
        track(nn.ReLU())


@pytest.mark.parametrize(("dtype", "loose"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_precision(dtype: torch.dtype, loose: float):
    examples = w.documents(LENGTHS)
    model = w.llama(dtype)
    tracked = track(model, ".*")
    found = w.captured(model, w.causal(), examples, tracked, dtype=torch.float32 if loose > 1e-9 else torch.float64)
    wanted = w.naive(model, w.causal(), examples, tracked.layout.names)
    got, true = w.flat(found), w.flat(wanted).to(next(iter(found.values())).dtype)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((got - true).norm() / true.norm()) < loose


def test_half_precision_is_summed_in_float32():
    """2048 equal documents: a bfloat16 sum stands still at 256 times the first."""
    from rootward.capture.sinks import WeightedSum

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).to(torch.bfloat16)
    x = torch.ones(2048, 4)
    examples = w.pairs(x, torch.zeros(2048, dtype=torch.int64))
    tracked = track(model)
    one, many = (WeightedSum(tracked.layout, torch.ones(n, 1)) for n in (1, 2048))
    run_pass(model, Classification(), examples[:1], [one], tracked=tracked)
    run_pass(model, Classification(), examples, [many], tracked=tracked, token_budget=64)
    name = tracked.layout.names[0]
    assert many.sums[name].dtype == torch.float32
    torch.testing.assert_close(many.sums[name], 2048 * one.sums[name], rtol=1e-5, atol=0)
