"""What the optimiser remembers goes by parameter name; checkpoints on disk and in memory give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rootward.core.errors import ArtefactError, InputError
from rootward.subject.checkpoints import (
    OPTIMISER,
    Checkpoint,
    Moments,
    check_moments,
    checkpoint_of,
    moments_of,
    read_moments,
    save_moments,
)
from rootward.subject.documents import load_documents
from rootward.subject.loading import model_hash
from rootward.subject.objectives import CausalLM, Regression
from rootward.subject.recipe import Lora, Recipe, step_loss, train, train_folder
from rootward.subject.subject import Subject
from tests.subject.small import ROWS, byte_tokenizer, tiny_llama

DOCUMENTS = load_documents(ROWS)
POINTS = [{"x": [float(n), 1.0], "y": [2.0 * n, -1.0]} for n in range(8)]


def tiny_gpt2() -> GPT2LMHeadModel:
    """Square Conv1D weights (``[16, 16]``), where a transposed moment would fit and be wrong."""
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=261, n_embd=16, n_layer=1, n_head=2, n_positions=128, n_inner=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def kept_moments(model: nn.Module, objective: Any, examples: Any, recipe: Recipe) -> list[Moments | None]:
    found: list[Moments | None] = []
    train(model, examples, objective, recipe, on_checkpoint=lambda step, there, moments: found.append(moments))
    return found


@pytest.mark.parametrize("pattern", [".*", r"attn\.c_proj|mlp"])
def test_moments_after_one_step_are_those_of_the_parameter_of_that_name(pattern: str) -> None:
    objective, model = CausalLM(byte_tokenizer()), tiny_gpt2()
    examples = objective.encode(DOCUMENTS)
    recipe = Recipe(batch_size=len(examples), checkpoints=1, betas=(0.9, 0.99), parameters=pattern, clip=None)
    named = dict(model.named_parameters())
    loss = step_loss(model, list(examples), objective, recipe)
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    (moments,) = kept_moments(model, objective, examples, recipe)
    assert moments is not None
    assert moments.step == 1
    assert set(moments.values) == {n for n in named if pattern == ".*" or "attn.c_proj" in n or "mlp" in n}
    assert any(v.dim() == 2 and v.shape[0] == v.shape[1] for v in moments.first.values())
    for name, (first, second) in moments.values.items():
        # the batch's order of documents differs, so equal to rounding
        torch.testing.assert_close(first, 0.1 * gradients[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(second, 0.01 * gradients[name] ** 2, rtol=1e-9, atol=1e-14)


def test_groups_and_their_order_do_not_mix_parameters_up() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    named = dict(model.named_parameters())
    groups = [{"params": [named["1.bias"], named["0.weight"]], "weight_decay": 0.0}, {"params": [named["1.weight"]]}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    model(torch.randn(4, 3)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    optimiser.step()
    moments = moments_of(optimiser, named, Recipe(), 1)
    assert moments is not None
    for name in ("1.bias", "0.weight", "1.weight"):
        torch.testing.assert_close(moments.values[name][0], 0.1 * gradients[name])
    assert not moments.values["0.bias"][0].any()  # it was in no group and has no state: zeros


def test_moments_are_a_copy_and_survive_the_disk(tmp_path: Path) -> None:
    objective, model = CausalLM(byte_tokenizer()), tiny_llama()
    found = kept_moments(model, objective, objective.encode(DOCUMENTS), Recipe(batch_size=2, checkpoints=2))
    assert [m.step for m in found if m] == [2, 3]
    first, last = found
    assert first is not None
    assert last is not None
    assert not torch.equal(first.second["model.norm.weight"], last.second["model.norm.weight"])
    save_moments(first, tmp_path)
    again = read_moments(tmp_path)
    assert again is not None
    assert (again.step, again.betas, again.eps) == (2, (0.9, 0.999), 1e-8)
    assert set(again.first) == set(first.first)
    assert all(torch.equal(a, b) for n in first.first for a, b in zip(again.values[n], first.values[n], strict=True))
    content = (tmp_path / OPTIMISER).read_bytes()
    save_moments(first, tmp_path)
    assert (tmp_path / OPTIMISER).read_bytes() == content


@pytest.mark.parametrize(
    ("options", "kept"), [({"momentum": 0.9}, True), ({}, False)], ids=["momentum", "plain descent"]
)
def test_sgd_keeps_its_momentum_and_has_no_second_moments(options: dict[str, Any], kept: bool) -> None:
    objective, model = Regression(), nn.Linear(2, 2)
    recipe = Recipe(optimiser="sgd", lr=1e-3, batch_size=8, checkpoints=1, **options)
    examples = objective.encode(load_documents(POINTS))
    loss = step_loss(model, list(examples), objective, recipe)
    (weight,) = torch.autograd.grad(loss, [model.weight])
    (moments,) = kept_moments(model, objective, examples, recipe)
    assert (moments is not None) == kept
    if moments is not None:
        torch.testing.assert_close(moments.first["weight"], weight)
        with pytest.raises(ArtefactError, match="SGD, which has no second moments"):
            _ = moments.values


def test_a_damaged_or_foreign_state_is_named(base: Path, tmp_path: Path) -> None:
    train_folder(base, DOCUMENTS, tmp_path / "m", Recipe(checkpoints=1))
    subject = Subject.load(tmp_path / "m", DOCUMENTS)
    found = subject.moments(0)
    assert found is not None
    assert set(found.values) == {name for name, _ in subject.model.named_parameters()}
    path = tmp_path / "m/checkpoints/000001" / OPTIMISER
    before, origin = path.read_bytes(), subject.origin()
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ArtefactError, match=r"optimiser.safetensors is damaged: .*train again"):
        subject.moments(0)
    assert subject.origin()["checkpoint 0"] != origin["checkpoint 0"]
    path.unlink()
    assert subject.moments(0) is None
    wrong = Moments(1, (0.9, 0.999), 1e-8, {"weight": torch.zeros(2, 3)}, {"weight": torch.zeros(2, 3)})
    with pytest.raises(ArtefactError, match=r"state of weight has shape \(2, 3\), the model's parameter \(3, 2\)"):
        check_moments(wrong, nn.Linear(2, 3), "here")
    with pytest.raises(InputError, match="expected a checkpoint from 0 to 0, got 1"):
        subject.moments(1)


def test_the_moments_of_an_adapter_are_found_after_loading_it_again(base: Path, tmp_path: Path) -> None:
    train_folder(base, DOCUMENTS, tmp_path / "m", Recipe(checkpoints=1, lora=Lora(rank=2)))
    subject = Subject.load(tmp_path / "m", DOCUMENTS)
    found = subject.moments(-1)
    assert found is not None
    assert set(found.values) == {name for name, _ in subject.model.named_parameters() if "lora_" in name}


# --- subjects in memory ------------------------------------------------------------------------------------------


def fresh() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))


RECIPE = Recipe(lr=1e-2, epochs=2, batch_size=3, checkpoints=(0.4, 1.0))


def test_a_subject_trained_in_memory_has_its_start_and_checkpoints() -> None:
    subject = Subject.trained(fresh, POINTS, Regression(), RECIPE, name="net")
    twin, kept = fresh(), dict[int, str]()
    train(twin, subject.encoded, Regression(), RECIPE, on_checkpoint=lambda s, m, _: kept.update({s: model_hash(m)}))
    own = model_hash(subject.model)
    assert own == model_hash(twin)
    assert subject.record is not None
    assert subject.record.final_hash == own
    assert subject.can_retrain
    assert list(kept) == [c.step for c in subject.checkpoints if isinstance(c, Checkpoint)] == [3, 6]
    for index, expected in enumerate(kept.values()):
        with subject.at_checkpoint(index) as there:
            assert model_hash(there.model) == expected
        found = subject.moments(index)
        assert found is not None
        assert found.step == [3, 6][index]
    with subject.at_start() as there:
        assert model_hash(there.model) == model_hash(fresh())
    assert model_hash(subject.model) == own


def test_the_origin_of_a_subject_in_memory_goes_by_weights_and_moments() -> None:
    subject, again = (Subject.trained(fresh, POINTS, Regression(), RECIPE) for _ in range(2))
    assert set(subject.origin()) == {"start", "checkpoint 0", "checkpoint 1", "recipe"}
    assert subject.origin() == again.origin()
    first = subject.checkpoints[0]
    assert isinstance(first, Checkpoint)
    assert first.moments is not None
    second = {name: 2 * value for name, value in first.moments.second.items()}
    other = Moments(3, (0.9, 0.999), 1e-8, first.moments.first, second)
    again.checkpoints = (Checkpoint(3, first.state, other), again.checkpoints[1])
    different = {key for key in subject.origin() if subject.origin()[key] != again.origin()[key]}
    assert different == {"checkpoint 0"}


def test_what_cannot_be_started_again_is_refused() -> None:
    model = fresh()
    with pytest.raises(InputError, match="start function gave the subject's own model"):
        Subject(model, POINTS, Regression(), recipe=RECIPE, start=lambda: model).start_model()
    with pytest.raises(InputError, match="has to build the adapters itself"):
        Subject.trained(fresh, POINTS, Regression(), Recipe(lora=Lora()))
    foreign = checkpoint_of(nn.Linear(2, 2), 1, None)
    subject = Subject(model, POINTS, Regression(), checkpoints=[foreign])
    with pytest.raises(ArtefactError, match="checkpoint 0: holds other weights"), subject.at_checkpoint(0):
        pass
    assert subject.moments(0) is None


def test_a_checkpoint_does_not_change_with_the_model() -> None:
    model = fresh()
    kept = checkpoint_of(model, 0, None)
    before: Tensor = kept.state["0.weight"].clone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(kept.state["0.weight"], before)
