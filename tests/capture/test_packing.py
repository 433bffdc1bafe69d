"""Packing: several documents in one row give what each gives alone, and models that cannot are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rootward.capture.packing import collate_packed
from rootward.capture.projection import Projection
from rootward.capture.run import run_pass
from rootward.capture.sinks import Losses, Products, ProjectedRows
from rootward.capture.sites import track
from rootward.core.errors import InputError
from rootward.subject.objectives import Classification
from tests.capture import worlds as w

LENGTHS = (5, 11, 3, 8, 11, 2, 4, 4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gpt2"])
def test_packed_gradients_are_those_of_documents_alone(family: str, attention: str):
    options = {"attn_implementation": attention}
    make = {"gpt2": w.gpt2, "qwen3": w.qwen3}.get(family, w.llama)
    model = make(**options, tie_word_embeddings=family != "llama")
    examples = w.documents(LENGTHS)
    tracked = track(model, ".*")
    # Llama's eager attention takes its softmax in float32
    loose = 1e-5 if attention == "eager" and family != "gpt2" else 1e-10
    wanted = w.flat(w.naive(model, w.causal(), examples, tracked.layout.names))
    for budget in (11, 22, 10**6):
        found = w.flat(w.captured(model, w.causal(), examples, tracked, budget, packing=True))
        torch.testing.assert_close(found, wanted, rtol=loose, atol=loose)
    dense = Products(tracked.layout, {n: p[None] for n, p in model.named_parameters()}, 8, tokens=True, norms=True)
    rows = ProjectedRows(Projection(tracked.layout, 3), 8, torch.float64)
    run_pass(model, w.causal(), examples, [dense, rows], tracked=tracked, token_budget=22, packing=True)
    torch.testing.assert_close(dense.squared, wanted.square().sum(1), rtol=10 * loose, atol=loose)
    for n, e in enumerate(examples):
        assert dense.by_token[n].shape == (1, e.length)
        torch.testing.assert_close(dense.by_token[n].sum(1), dense.dots[:, n])


def test_the_mask_is_block_diagonal():
    """The logits of a document do not feel the document in front of it, and do feel its own front."""
    model, examples = w.llama(), w.documents((4, 5))
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        inner, outer = collate_packed([examples], "cpu")
        assert inner.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
        with torch.no_grad():
            before = model(**inner.inputs, use_cache=False).logits
            for place, moves in ((0, range(4)), (4, range(4, 9))):
                ids = inner.inputs["input_ids"].clone()
                ids[0, place] = (ids[0, place] + 1) % w.VOCABULARY
                after = model(input_ids=ids, position_ids=inner.inputs["position_ids"], use_cache=False).logits
                moved = (after != before).any(-1)[0].nonzero().flatten().tolist()
                assert moved == list(moves)
        assert outer.unpack.tolist() == [[0, 1, 2, 3, -1], [4, 5, 6, 7, 8]]


def test_packing_runs_fewer_rows():
    examples = w.documents((12, 2, 2, 2, 2, 2, 2))
    calls: list[int] = []
    model = w.llama()
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: calls.append(out.shape[0] * out.shape[1]))
    sink = Losses(7)
    run_pass(model, w.causal(), examples, [sink], token_budget=10**6, packing=True)
    assert calls[-1] == 24
    alone = Losses(7)
    run_pass(model, w.causal(), examples, [alone], token_budget=10**6)
    assert calls[-1] == 84
    torch.testing.assert_close(sink.losses, alone.losses, rtol=1e-12, atol=0)


class Mixing(nn.Module):
    """A recurrent model: no mask keeps its documents apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(w.VOCABULARY, 8), nn.Linear(8, w.VOCABULARY)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self.head(self.embed(input_ids).cumsum(1))


def test_models_and_objectives_that_cannot_pack_are_refused():
    with pytest.raises(InputError, match="keep packed documents apart"):
        run_pass(Mixing(), w.causal(), w.documents(LENGTHS), [Losses(8)], packing=True)
    with pytest.raises(InputError, match="token_losses.*Classification"):
        run_pass(nn.Linear(5, 3), Classification(), w.vectors(), [Losses(6)], packing=True)
    same = w.documents((4, 4))
    for example in same:
        example.ids.fill_(3)
    with pytest.raises(InputError, match="keep packed documents apart"):
        run_pass(Mixing(), w.causal(), same, [Losses(2)], packing=True)
