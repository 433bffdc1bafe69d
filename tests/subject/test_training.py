from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.subject.documents import load_documents, save_jsonl
from rootward.subject.loading import load_model, model_hash
from rootward.subject.objectives import CausalLM, Regression
from rootward.subject.recipe import Lora, Recipe, TrainingRecord, order, step_loss, train, train_folder
from tests.subject.small import ROWS, byte_tokenizer, save_base, tiny_llama

DOCUMENTS = load_documents(ROWS * 2)
RECIPE = Recipe(lr=1e-2, epochs=2, batch_size=5, clip=1.0, schedule="linear", warmup_steps=1, checkpoints=3, seed=7)


def encoded() -> tuple[CausalLM, Any]:
    objective = CausalLM(byte_tokenizer())
    return objective, objective.encode(DOCUMENTS)


@pytest.mark.parametrize("options", [{}, {"optimiser": "sgd", "momentum": 0.9, "clip": None}, {"lora": Lora(rank=2)}])
def test_retraining_is_bitwise_equal(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = RECIPE.model_copy(update=options)
    first = train_folder(base, DOCUMENTS, tmp_path / "a", recipe)
    torch.manual_seed(99)  # the global state must not matter
    torch.set_num_threads(2)
    second = train_folder(base, DOCUMENTS, tmp_path / "b", recipe)
    assert torch.get_num_threads() == 2
    assert first.final_hash == second.final_hash != first.base_hash and first.losses == second.losses
    assert train_folder(base, DOCUMENTS, tmp_path / "c", recipe.with_seed(8)).final_hash != first.final_hash
    assert model_hash(load_model(tmp_path / "a")[0]) == first.final_hash
    assert TrainingRecord.load(tmp_path / "a") == first


def test_retraining_in_a_fresh_process_is_bitwise_equal(base: Path, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"lora": Lora(rank=2, dropout=0.1)})
    record = train_folder(base, DOCUMENTS, tmp_path / "here", recipe)
    save_jsonl(DOCUMENTS, tmp_path / "d.jsonl")
    code = (
        "import sys, json\nfrom rootward.subject.recipe import Recipe, train_folder\n"
        "print(train_folder(sys.argv[1], sys.argv[2], sys.argv[3], Recipe.parse(json.loads(sys.argv[4]))).final_hash)"
    )
    arguments = [
        str(base),
        str(tmp_path / "d.jsonl"),
        str(tmp_path / "there"),
        json.dumps(recipe.model_dump(mode="json")),
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == record.final_hash
    assert done.stderr == ""  # no progress bars, no warnings


def test_global_state_is_left_alone() -> None:
    objective, examples = encoded()
    model = tiny_llama()
    state = torch.get_rng_state()
    train(model, examples, objective, RECIPE)
    assert torch.equal(torch.get_rng_state(), state) and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_training_equals_a_plain_loop() -> None:
    objective, examples = encoded()
    model, twin = tiny_llama(), tiny_llama()
    recipe = Recipe(lr=1e-2, epochs=2, batch_size=5, weight_decay=0.1, betas=(0.8, 0.9), reduction="document", seed=3)
    record = train(model, examples, objective, recipe)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), foreach=False)
    for epoch in range(2):
        rank = order(3, epoch, examples.ids)
        for start in range(0, len(rank), 5):
            batch = [examples[n] for n in rank[start : start + 5]]
            optimiser.zero_grad()
            loss = sum(objective.losses(twin, objective.collate([x])).sum() for x in batch) / len(batch)
            loss.backward()  # type: ignore[union-attr]
            optimiser.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert record.steps == 6 and len(record.losses) == 2 and record.losses[1] < record.losses[0]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), st.data())
def test_order_of_what_stays_is_stable_under_removal(ids: list[str], data: st.DataObject) -> None:
    ranking = order(1, 2, ids)
    assert sorted(ranking) == list(range(len(ids))) and ranking == order(1, 2, ids)
    gone = data.draw(st.sampled_from(sorted(set(ids))))
    kept = [n for n in range(len(ids)) if ids[n] != gone]
    assert [kept[n] for n in order(1, 2, [ids[n] for n in kept])] == [n for n in ranking if ids[n] != gone]
    last = max(n for n in range(len(ids)) if ids[n] == gone)  # the later of two duplicates goes
    assert order(1, 2, [x for n, x in enumerate(ids) if n != last]) == [n - (n > last) for n in ranking if n != last]


def test_order_depends_on_seed_and_epoch() -> None:
    ids = [str(n) for n in range(50)]
    assert len({tuple(order(s, e, ids)) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize("reduction", ["token", "document"])
def test_first_gradient_is_linear_in_the_weights(reduction: str) -> None:
    objective, examples = encoded()
    model, recipe = tiny_llama(dtype=torch.float64), Recipe.parse({"reduction": reduction})

    def gradient(weights: dict[int, float] | None) -> torch.Tensor:
        model.zero_grad()
        step_loss(model, list(examples), objective, recipe, weights).backward()
        return torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])

    plain = gradient(None)
    torch.testing.assert_close(gradient(dict.fromkeys(range(len(examples)), 1.0)), plain)
    parts = [gradient({n: float(n == m) for n in range(len(examples))}) for m in range(len(examples))]
    torch.testing.assert_close(torch.stack(parts).sum(0), plain)
    torch.testing.assert_close(gradient({3: -1.5}), plain - 2.5 * parts[3])


def test_rates_and_checkpoints_are_spread_evenly() -> None:
    recipe = Recipe(lr=1.0, warmup_steps=2, schedule="linear", checkpoints=3)
    assert [recipe.rate(n, 6) for n in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = Recipe(lr=1.0, schedule="cosine")
    assert math.isclose(cosine.rate(5, 10), 0.5) and cosine.rate(0, 10) == 1.0
    assert recipe.checkpoint_steps(10) == (4, 7, 10) and recipe.checkpoint_steps(2) == (1, 2)
    assert Recipe(checkpoints=(0.05, 0.3, 1.0)).checkpoint_steps(10) == (1, 3, 10)
    assert Recipe().checkpoint_steps(10) == () and recipe.steps(33) == 2


def test_callbacks_and_stopping(base: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    record = train_folder(base, DOCUMENTS, tmp_path / "whole", RECIPE, progress=lambda *step: told.append(step))
    assert told == [("train", n, 6) for n in range(1, 7)]
    assert record.checkpoints == ["checkpoints/000002", "checkpoints/000004", "checkpoints/000006"]
    assert model_hash(load_model(tmp_path / "whole/checkpoints/000006")[0]) == record.final_hash
    assert model_hash(load_model(tmp_path / "whole/checkpoints/000002")[0]) != record.final_hash
    stopped = train_folder(base, DOCUMENTS, tmp_path / "part", RECIPE, should_stop=lambda: len(told) > 0)
    assert stopped.stopped and stopped.steps == 0
    with pytest.raises(InputError, match="whole: exists already"):
        train_folder(base, DOCUMENTS, tmp_path / "whole", RECIPE)

    def interrupt(task: str, done: int, total: int, /) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_folder(base, DOCUMENTS, tmp_path / "part", RECIPE, progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole"]  # nothing half-done is left


def test_only_the_parameters_named_are_trained() -> None:
    objective, examples = encoded()
    model, before = tiny_llama(), tiny_llama()
    train(model, examples, objective, Recipe(parameters=r"layers\.1\.mlp"))
    for (name, mine), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, other) != ("layers.1.mlp" in name), name
        assert mine.requires_grad
    with pytest.raises(InputError, match="matches no parameter"):
        train(model, examples, objective, Recipe(parameters="nothing"))


def test_a_loss_that_is_not_finite_names_step_and_documents() -> None:
    model = nn.Linear(1, 1)
    documents = load_documents([{"x": [float(n + 1)], "y": 0.0} for n in range(4)])
    examples = Regression().encode(documents)
    recipe = Recipe(optimiser="sgd", lr=1e30, epochs=3, batch_size=2)
    with pytest.raises(
        NumericalError, match=r"loss of step \d+ is (inf|nan); documents of its batch: [0-9a-f]{16} \(row \d\)"
    ):
        train(model, examples, Regression(), recipe)
    assert all(p.grad is None for p in model.parameters())
    model = nn.Linear(1, 1)
    huge = load_documents([{"x": [1e6], "y": 0.0}])  # the loss is finite, the step is not
    with pytest.raises(NumericalError, match="after step 1 the parameter weight is not finite"):
        train(model, Regression().encode(huge), Regression(), Recipe(optimiser="sgd", lr=1e38))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1}, "learning_rate: Extra inputs"),
        ({"lr": -1}, "lr: Input should be greater"),
        ({"dtype": "float8"}, "dtype: .*expected one of float32"),
        ({"parameters": "("}, "parameters: .*not a regular expression"),
        ({"optimiser": "lion"}, "optimiser: Input should be 'adamw' or 'sgd'"),
    ],
)
def test_bad_recipes_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.parse(options)


def test_lora_reload_equals_the_live_model_and_missing_bases_are_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    recipe = Recipe(lr=1e-2, batch_size=4, lora=Lora(rank=2, targets=("q_proj", "down_proj")))
    record = train_folder(base, DOCUMENTS, tmp_path / "lora", recipe)
    objective, examples = encoded()
    from rootward.subject.recipe import start_model

    live, _ = start_model(base, recipe)
    assert train(live, examples, objective, recipe).final_hash == record.final_hash
    again, tokenizer = load_model(tmp_path / "lora")
    assert model_hash(again) == model_hash(live) == record.final_hash and tokenizer is not None
    batch = objective.collate(list(examples))
    assert torch.equal(objective.losses(again, batch), objective.losses(live, batch))
    trainable = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    with pytest.raises(InputError, match="is an adapter already"):
        start_model(tmp_path / "lora", recipe)
    with pytest.raises(InputError, match="recipe.lora.targets"):
        start_model(base, Recipe(lora=Lora(targets=("no_such_module",))))
    base.rename(tmp_path / "moved")
    with pytest.raises(ArtefactError, match='base model could not be loaded; give its folder: base = "path'):
        load_model(tmp_path / "lora")
    assert model_hash(load_model(tmp_path / "lora", base=tmp_path / "moved")[0]) == record.final_hash
    with pytest.raises(ArtefactError, match="no such folder; it should hold the model"):
        load_model(tmp_path / "lora", base=tmp_path / "nowhere")
    further = train_folder(tmp_path / "lora", DOCUMENTS, tmp_path / "more", Recipe(), adapter_base=tmp_path / "moved")
    assert further.base_hash == record.final_hash
