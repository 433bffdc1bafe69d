"""Rows of documents and queries against dense gradients, principal sides, second moments, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rootward.capture import projected as room
from rootward.capture.inputs import MethodInputs
from rootward.capture.moments import CovarianceSums
from rootward.capture.projected import document_rows, principal, query_rows, squared_gradients, stored_rows
from rootward.capture.projection import Projection
from rootward.capture.run import run_pass
from rootward.capture.sinks import ProjectedRows
from rootward.capture.sites import track
from rootward.capture.sketch import Masked
from rootward.capture.store import build_store
from rootward.core.errors import ArtefactError, InputError, LayoutMismatch, NumericalError
from rootward.curvature.kronecker import Eigenbases
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import CausalLM, Objective
from rootward.subject.subject import Subject
from tests.capture import worlds as w
from tests.subject.small import byte_tokenizer

ROWS = [{"text": text} for text in ("rain", "rain and sun", "sun", "no rain today")]
TOKENIZER = byte_tokenizer()
WIDE = {"vocab_size": len(TOKENIZER)}


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(w.llama(**WIDE), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]))
    return w.scattered(model.double()).eval()


MODELS = {"gpt2": lambda: w.gpt2(**WIDE), "llama": lambda: w.llama(**WIDE), "lora": lora}


def inputs_of(model: Any, behaviour: Behaviour | None = None, **changes: Any) -> MethodInputs:
    subject = Subject(model, ROWS, CausalLM(TOKENIZER), **changes)
    asked = behaviour or Behaviour.scalar("two", two, ["a", "b"])
    return MethodInputs(subject, asked, 20)


def two(model: Any) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[1, 7, 9, 4]])).logits[0]
    return torch.stack([logits[-1, 3], logits.square().mean()])


def leading(model: Any, objective: Objective, examples: list[Any], rank: int) -> tuple[Projection, Projection]:
    """A random projection of all parameters, and that to the leading eigenvectors of the documents' covariances."""
    tracked = track(model, ".*")
    sums = CovarianceSums(tracked.layout)
    run_pass(model, objective, examples, [sums], tracked=tracked, token_budget=20)
    random = Projection(tracked.layout, rank)
    return random, principal(random, Eigenbases.of(sums.result(), torch.float64))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora"])
def test_rows_of_documents_and_queries_are_those_of_dense_gradients(kind: str):
    inputs = inputs_of(MODELS[kind]())
    subject, layout = inputs.subject, inputs.tracked.layout
    dense = w.naive(subject.model, subject.objective, list(subject.encoded), layout.names)
    for sketch in (Projection(layout, 3), Masked(layout, 9)):
        found = document_rows(inputs, sketch)
        expected = torch.cat([sketch.project_one(name, dense[name]) for name in layout.names], 1)
        torch.testing.assert_close(found.rows, expected, rtol=1e-8, atol=1e-8)
        named = dict(subject.model.named_parameters())
        wanted = [named[name].requires_grad_(True) for name in layout.names]
        queries = [torch.autograd.grad(value, wanted, retain_graph=True) for value in two(subject.model)]
        rows = zip(*queries, strict=True)
        parts = [sketch.project_one(n, torch.stack(g)) for n, g in zip(layout.names, rows, strict=True)]
        torch.testing.assert_close(query_rows(inputs, sketch), torch.cat(parts, 1), rtol=1e-8, atol=1e-8)
    each = [subject.objective.losses(subject.model, subject.objective.collate([e])) for e in subject.encoded]
    torch.testing.assert_close(found.losses, torch.cat(each).detach())


def test_squared_gradients_are_means_over_documents():
    inputs = inputs_of(MODELS["gpt2"](), parameters=".*")
    subject, layout = inputs.subject, inputs.tracked.layout
    dense = w.naive(subject.model, subject.objective, list(subject.encoded), layout.names)
    for name, value in squared_gradients(inputs).items():
        torch.testing.assert_close(value, dense[name].square().mean(0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_principal_sides_of_the_rank_of_the_tokens_lose_nothing(model: str):
    # One document of four tokens: every gradient has a rank of at most 4 on both sides, in its own orientation. Square
    # matrices of Conv1D (16 x 16) would lose most of it if inputs and outputs were mixed up.
    net, objective, examples = (
        (w.gpt2(tie_word_embeddings=False) if model == "gpt2" else w.llama()),
        w.causal(),
        w.documents((4,)),
    )
    random, found = leading(net, objective, examples, 4)
    layout = found.layout
    square = [n for n in layout.names if layout.shape(n) == (16, 16)]
    assert square
    dense = w.naive(net, objective, examples, layout.names)
    sink = ProjectedRows(found, 1, torch.float64)
    run_pass(net, objective, examples, [sink], tracked=track(net, ".*"), token_budget=20)
    for name in layout.names:
        if name.endswith(
            ("wte.weight", "wpe.weight", "embed_tokens.weight")
        ):  # its side of one-hot inputs stays random
            assert torch.equal(found.sides(name)[0], random.sides(name)[0])
            continue
        kept = float(sink.rows[0, found.slices[name]].norm())
        assert kept == pytest.approx(float(dense[name].norm()), rel=1e-8, abs=1e-12), name
    lost = [float(random.project_one(n, dense[n]).norm() / dense[n].norm()) for n in square]
    assert max(abs(share - 1) for share in lost) > 0.05  # random sides do not keep norms, so the test can fail
    swapped = Projection(layout, 4, given={n: found.sides(n)[::-1] for n in square})
    assert all(float(swapped.project_one(n, dense[n]).norm() / dense[n].norm()) < 0.9 for n in square)


def test_what_does_not_fit_or_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch):
    inputs = inputs_of(MODELS["llama"]())
    sketch = Projection(inputs.tracked.layout, 3)
    with monkeypatch.context() as patch:
        patch.setattr(room, "free_memory", lambda device: 1000)
        with pytest.raises(InputError, match=r"documents: 4 projected gradients of \d+ entries .* fewer dimensions"):
            document_rows(inputs, sketch)
    huge = Projection(inputs.tracked.layout, 3, given={sketch.layout.names[0]: (torch.full((16, 1), torch.inf), None)})
    with pytest.raises(NumericalError, match="projected gradients of 4 documents are not finite, first document"):
        document_rows(inputs, huge)


def test_an_index_must_be_of_this_subject(tmp_path: Path):
    inputs = inputs_of(MODELS["llama"]())
    subject = inputs.subject
    with pytest.raises(InputError, match="no index was given"):
        stored_rows(inputs)
    inputs.store = build_store(
        tmp_path, subject.model, subject.objective, subject.encoded, inputs.tracked, subject.fingerprint(), rank=2
    )
    projection, found = stored_rows(inputs)
    passed = document_rows(inputs, projection)
    torch.testing.assert_close(found.rows, passed.rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.losses, passed.losses)
    other = inputs_of(MODELS["llama"](), parameters="mlp")
    other.store = inputs.store
    with pytest.raises(ArtefactError, match="built from something else"):
        stored_rows(other)
    changed = inputs_of(MODELS["llama"]())
    changed.store, changed.__dict__["tracked"] = inputs.store, track(changed.subject.model, "mlp")
    with pytest.raises(LayoutMismatch, match="index .*: expected parameter layout"):
        stored_rows(changed)
