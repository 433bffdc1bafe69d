from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from rootward.core.errors import ArtefactError, InputError
from rootward.subject.documents import load_documents
from rootward.subject.loading import model_hash
from rootward.subject.objectives import Regression
from rootward.subject.recipe import Lora, Recipe, train, train_folder
from rootward.subject.subject import Subject, check_retrain
from tests.subject.small import ROWS

DOCUMENTS = load_documents(ROWS)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_subject_that_was_trained_here_can_be_trained_again(base: Path, tmp_path: Path, lora: Lora | None) -> None:
    recipe = Recipe(lr=1e-2, batch_size=2, checkpoints=2, lora=lora)
    record = train_folder(base, DOCUMENTS, tmp_path / "m", recipe, max_tokens=40)
    subject = Subject.load(tmp_path / "m", DOCUMENTS)
    assert subject.recipe == recipe and subject.base == base.resolve() and subject.notes == () and subject.can_retrain
    assert subject.objective.describe()["max_tokens"] == 40 and subject.name == "m"
    model = subject.start_model()
    assert train(model, subject.encoded, subject.objective, recipe).final_hash == record.final_hash
    assert model_hash(subject.model) == record.final_hash
    print_of = subject.fingerprint()
    assert print_of["model"] == record.final_hash and print_of["documents"] == DOCUMENTS.hash
    assert ("lora" in (subject.parameters or "")) == (lora is not None)
    for index, same in ((0, False), (1, True), (-1, True)):
        with subject.at_checkpoint(index) as there:
            assert (model_hash(there.model) == record.final_hash) == same
        assert subject.fingerprint() == print_of
    with pytest.raises(InputError, match="expected a checkpoint from 0 to 1, got 2"), subject.at_checkpoint(2):
        pass


def test_at_checkpoint_puts_the_weights_back_after_an_error(base: Path, tmp_path: Path) -> None:
    train_folder(base, DOCUMENTS, tmp_path / "m", Recipe(checkpoints=1, epochs=2))
    subject = Subject.load(tmp_path / "m", DOCUMENTS)
    before = model_hash(subject.model)
    with pytest.raises(KeyError), subject.at_checkpoint(0):
        subject.model.get_parameter("model.norm.weight").data.zero_()
        raise KeyError
    assert model_hash(subject.model) == before


def test_other_documents_and_a_moved_base_are_told(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "b")
    train_folder(tmp_path / "b", DOCUMENTS, tmp_path / "m", Recipe())
    (tmp_path / "b").rename(tmp_path / "c")
    subject = Subject.load(tmp_path / "m", DOCUMENTS.subset([0, 1]))
    assert "the documents differ" in subject.notes[0]
    with pytest.raises(ArtefactError, match="not there any more; give its folder: start"):
        subject.start_model()
    assert Subject.load(tmp_path / "m", DOCUMENTS, start=tmp_path / "c").start_model() is not None


def test_a_subject_from_elsewhere_has_its_owners_command(base: Path) -> None:
    subject = Subject.load(base, DOCUMENTS, retrain="train.sh {documents} {out} --seed {seed}", parameters="mlp")
    assert subject.retrain_command is not None and subject.can_retrain and subject.parameters == "mlp"
    plain = Subject.load(base, DOCUMENTS)
    assert not plain.can_retrain and plain.recipe is None and plain.checkpoints == () and plain.parameters is None
    with pytest.raises(InputError, match="cannot be retrained here; give retrain"):
        plain.start_model()
    with pytest.raises(InputError, match="max_tokens: expected at most the model's context of 128, got 129"):
        Subject.load(base, DOCUMENTS, max_tokens=129)
    assert Subject.load(base, DOCUMENTS, limit=2).documents.ids == DOCUMENTS.ids[:2]


def test_a_known_start_of_a_model_from_elsewhere(base: Path, tmp_path: Path) -> None:
    train_folder(base, DOCUMENTS, tmp_path / "m", Recipe(epochs=2))
    (tmp_path / "m" / "rootward_training.json").unlink()
    subject = Subject.load(tmp_path / "m", DOCUMENTS, start=base)
    before = model_hash(subject.model)
    assert model_hash(subject.start_model()) == model_hash(Subject.load(base, DOCUMENTS).model) != before
    with subject.at_start() as start:
        assert model_hash(start.model) != before
    assert model_hash(subject.model) == before and not subject.can_retrain
    with pytest.raises(InputError, match="start = .*none: no such folder"):
        Subject.load(tmp_path / "m", DOCUMENTS, start=tmp_path / "none")


def test_the_origin_goes_by_bytes_and_not_by_names(base: Path, tmp_path: Path) -> None:
    train_folder(base, DOCUMENTS, tmp_path / "m", Recipe(checkpoints=2, epochs=2))
    shutil.copytree(base, tmp_path / "moved")
    subject = Subject.load(tmp_path / "m", DOCUMENTS)
    found = subject.origin()
    assert set(found) == {"start", "checkpoint 0", "checkpoint 1", "recipe"} and len(set(found.values())) == 4
    assert Subject.load(tmp_path / "m", DOCUMENTS, start=tmp_path / "moved").origin() == found
    assert Subject.load(tmp_path / "m", DOCUMENTS, start=tmp_path / "m").origin()["start"] != found["start"]
    shutil.rmtree(tmp_path / "moved")
    subject.base = tmp_path / "moved"
    assert subject.origin()["start"] == "missing"
    assert Subject.load(base, DOCUMENTS).origin() == {}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("run {documents} {out} {base}", "unknown placeholder {base}"),
        ("run {model}", "expected {documents} in"),
        ("run {documents} {out} {}", "unknown placeholder {}"),
        ("run {documents!r} {out}", "unknown placeholder {documents}"),
        ("run {documents.x} {out}", "unknown placeholder"),
        ("run {documents}", "expected {out} in"),
        ("run", "expected {documents} and {out} in"),
        ("run {documents} {out", "retrain: "),
        ("run '{documents} {out}", "retrain: No closing quotation"),
    ],
)
def test_bad_retrain_commands_are_refused(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_retrain(template)


def test_good_retrain_commands() -> None:
    for template in (
        "run {documents} {out}",
        "run {documents} --out {model}",
        "run '{out}' {documents} {seed} {seed} {{x}}",
    ):
        assert check_retrain(template) == template


def test_any_module_with_an_objective() -> None:
    documents = [{"x": [float(n)], "y": 2.0 * n} for n in range(8)]

    def fresh() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(1, 1)

    recipe, objective = Recipe(optimiser="sgd", lr=0.01, epochs=3, batch_size=4), Regression()
    model = fresh()
    record = train(model, objective.encode(load_documents(documents)), objective, recipe)
    subject = Subject(model, documents, objective, recipe=recipe, start=fresh)
    again = subject.start_model()
    assert train(again, subject.encoded, objective, recipe).final_hash == record.final_hash == model_hash(subject.model)
    assert subject.fingerprint()["objective"] and subject.can_retrain and subject.device.type == "cpu"


def test_missing_tokenizer_is_named(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ArtefactError, match="expected a tokenizer beside the model"):
        Subject.load(folder, DOCUMENTS)
