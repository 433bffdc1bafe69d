from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rootward.core.errors import ArtefactError, InputError
from rootward.subject.loading import context_of, load_model, model_hash
from rootward.subject.recipe import Lora, Recipe, train_folder
from tests.subject.small import byte_tokenizer, save_base, tiny_llama


@pytest.mark.parametrize("tied", [False, True])
def test_reload_equals_the_live_model(tmp_path: Path, tied: bool) -> None:
    live = tiny_llama(tied=tied)
    live.save_pretrained(str(tmp_path / "m"))
    model, tokenizer = load_model(tmp_path / "m")
    assert model_hash(model) == model_hash(live) and tokenizer is None and not model.training
    assert context_of(model) == 128
    model.get_parameter("model.norm.weight").data[3] += 1e-7
    assert model_hash(model) != model_hash(live)
    assert load_model(tmp_path / "m", dtype="bfloat16")[0].get_parameter("model.norm.weight").dtype == torch.bfloat16
    assert load_model(tmp_path / "m", attention="eager")[0].config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_missing_and_damaged_folders_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="expected a model folder with config.json"):
        load_model(tmp_path / "empty")
    for name, text, message in (
        ("config.json", "{", "config.json is damaged"),
        ("model.safetensors", "junk", "cannot be loaded as a causal language model"),
        ("tokenizer.json", "{", "the tokenizer cannot be loaded"),
    ):
        folder = shutil.copytree(base, tmp_path / name)
        (folder / name).write_text(text)
        with pytest.raises(ArtefactError, match=message):
            load_model(folder)
    folder = shutil.copytree(base, tmp_path / "none")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match="has config.json and no weights"):
        load_model(folder)


def test_a_missing_weight_is_an_error_and_not_random(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ArtefactError, match=r"1 weights are missing and would be random, first model.layers.1.mlp.up_proj"
    ):
        load_model(folder)


def test_tokenizer_with_more_ids_than_the_model(tmp_path: Path) -> None:
    save_base(tmp_path / "m", vocabulary=100)
    with pytest.raises(ArtefactError, match="highest id is 260 and the model's vocabulary has 100 entries"):
        load_model(tmp_path / "m")


def test_adapter_weights_that_do_not_arrive_are_an_error(base: Path, tmp_path: Path) -> None:
    train_folder(base, [{"text": "abc"}], tmp_path / "a", Recipe(lora=Lora(rank=2)))  # type: ignore[arg-type]
    weights = load_file(tmp_path / "a/adapter_model.safetensors")
    renamed = {name.replace("layers.0", "layers.9"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "a/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match="adapter weights did not arrive in the model"):
        load_model(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match="does not name its base model; give it: base = "):
        load_model(tmp_path / "a")


def test_an_adapter_that_names_its_base_by_a_relative_path(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "b")
    record = train_folder(tmp_path / "b", [{"text": "abc"}], tmp_path / "a", Recipe(lora=Lora(rank=2)))  # type: ignore[arg-type]
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "b"
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    assert model_hash(load_model(tmp_path / "a")[0]) == record.final_hash


def test_bad_options_are_named(base: Path) -> None:
    with pytest.raises(InputError, match="dtype: expected one of float32"):
        load_model(base, dtype="half")
    with pytest.raises(InputError, match="device: expected 'cpu'"):
        load_model(base, device="warp")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no CUDA device"):
            load_model(base, device="cuda")


def test_vocabulary_smaller_than_the_model_is_fine(tmp_path: Path) -> None:
    save_base(tmp_path / "m", vocabulary=300)
    assert load_model(tmp_path / "m")[1].get_vocab() == byte_tokenizer().get_vocab()  # type: ignore[union-attr]
