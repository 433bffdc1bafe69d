"""Curvatures of methods: one fit for all dampings, keys that hold what decides the numbers, folders of other models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rootward.api import attribute
from rootward.capture import fit as fits
from rootward.capture.curvatures import FitOptions, curvature_key, fitted, joined, kept_in
from rootward.capture.fit import FitConfig
from rootward.capture.inputs import MethodInputs
from rootward.core.errors import ArtefactError, InputError
from rootward.curvature.base import Damping
from tests.methods.attribution.supervised import classifier, outputs, randn


class Log:
    def __init__(self) -> None:
        self.passes: list[str] = []

    def __call__(self, task: str, done: int, total: int) -> None:
        if done == total:
            self.passes.append(task)


def inputs_of(rows: int = 90, log: Log | None = None) -> MethodInputs:
    return MethodInputs(classifier(rows), outputs(randn(3, 5, seed=9)), progress=log or Log())


def test_every_option_of_a_fit_is_in_its_config():
    given = {"labels": "data", "draws": 3, "documents": 7, "covariance_documents": 5, "agreement": 0.5, "seed": 9}
    given |= {"bf16": "never"}
    assert {f"fit_{name}" for name in given} == set(FitOptions.model_fields)
    config = FitOptions.model_validate({f"fit_{name}": value for name, value in given.items()}).fit_config("kfac")
    assert config == FitConfig.model_validate({**given, "kind": "kfac"})
    assert FitOptions().fit_config("ekfac") == FitConfig()


def test_checkpoints_have_folders_below():
    assert kept_in(None, 2) is None
    assert kept_in("kept", None) == Path("kept")
    assert kept_in("kept", 0) == Path("kept/checkpoint-0")


@pytest.mark.parametrize("below", ["", "checkpoint-0"])
def test_a_file_in_the_folder_s_place_is_refused_before_any_pass(tmp_path: Path, below: str):
    log, file = Log(), tmp_path / "docs.jsonl"
    file.write_text("{}")
    with pytest.raises(InputError, match=r"folder: expected a folder, got a file .*docs\.jsonl"):
        fitted(inputs_of(log=log), FitConfig(), Damping(0.1), file / below)
    assert log.passes == [] and file.read_text() == "{}"


def test_dampings_share_a_fit():
    log = Log()
    inputs = inputs_of(log=log)
    first = fitted(inputs, FitConfig(), Damping(0.1))
    log.passes.clear()
    second = fitted(inputs, FitConfig(), Damping(1e-5, 2.0, "whole"))
    assert log.passes == [] and len(inputs.fits) == 1
    assert (first.curvature.damping, second.curvature.damping) == (Damping(0.1), Damping(1e-5, 2.0, "whole"))
    assert first.record == second.record
    assert first.curvature.blocks is second.curvature.blocks
    fitted(inputs, FitConfig(damping=1e-4), Damping(0.1))  # the estimate's own damping may ask for other documents
    assert len(inputs.fits) == 2


@pytest.mark.parametrize("preset", ["ekfac", "ekfac_joint"])
def test_scores_with_a_shared_fit_are_those_of_a_fit_of_their_own(preset: str):
    shared, scope = inputs_of(), {"damping_scope": "whole"}
    for damping in (0.01, 3.0):
        options = {"damping": damping, **scope}
        mine = attribute(shared.subject, shared.behaviour, preset, options=options, inputs=shared).values
        alone = inputs_of()
        theirs = attribute(alone.subject, alone.behaviour, preset, options=options, inputs=alone).values
        assert mine.tobytes() == theirs.tobytes()
    assert len(shared.fits) == (1 if preset == "ekfac" else 2)


def test_joint_entries_have_the_damping_of_the_base_at_hand():
    inputs = inputs_of()
    for relative in (0.3, 5.0):
        base = fitted(inputs, FitConfig(), Damping(relative, scope="whole"))
        assert joined(inputs, FitConfig(), base, 8).damping == Damping(relative, scope="whole")


def test_a_fit_in_memory_still_refuses_a_folder_of_another(tmp_path: Path):
    other, inputs = inputs_of(12), inputs_of()
    fitted(other, FitConfig(), Damping(), tmp_path / "other")
    before = (tmp_path / "other" / "curvature.json").read_bytes()
    fitted(inputs, FitConfig(), Damping())
    with pytest.raises(ArtefactError, match=r"(?s)another model, other documents .*documents: "):
        fitted(inputs, FitConfig(), Damping(), tmp_path / "other")
    assert (tmp_path / "other" / "curvature.json").read_bytes() == before
    fitted(inputs, FitConfig(), Damping(), tmp_path / "own")
    again = fitted(inputs_of(), FitConfig(), Damping(7.0), tmp_path / "own")  # another damping reads the same folder
    assert again.curvature.damping == Damping(7.0)


def test_the_key_holds_what_bf16_stands_for(monkeypatch: pytest.MonkeyPatch):
    wide = inputs_of(6)
    narrow = MethodInputs(classifier(6, wide.subject.model.float()), wide.behaviour)
    keys = []
    for native in (True, False):
        monkeypatch.setattr(fits, "native_bfloat16", lambda device, native=native: native)
        keys.append(curvature_key(narrow, FitConfig())["fit.bf16"])
        assert curvature_key(narrow, FitConfig(bf16="never"))["fit.bf16"] is False
    assert keys == [True, False]
    wide.subject.model.double()
    monkeypatch.setattr(fits, "native_bfloat16", lambda device: True)
    assert curvature_key(inputs_of(6), FitConfig())["fit.bf16"] is False  # float64 is never rounded


def test_the_number_of_documents_does_not_depend_on_the_methods_damping():
    numbers = {fitted(inputs_of(), FitConfig(agreement=0.999), Damping(d)).record.documents for d in (1e-4, 0.1, 10.0)}
    assert len(numbers) == 1
    few = fitted(inputs_of(), FitConfig(agreement=0.999, damping=100.0), Damping()).record.documents
    many = fitted(inputs_of(), FitConfig(agreement=0.999, damping=1e-4), Damping()).record.documents
    assert few == 64 < many


def test_sampled_labels_have_an_agreement_of_their_own():
    def record(**config):
        return fitted(inputs_of(), FitConfig(**config), Damping()).record

    one, many = record(labels="sampled"), record(labels="sampled", draws=16)
    assert one.label_agreement is not None and many.label_agreement is not None
    assert 0.3 < one.label_agreement < many.label_agreement < 1
    assert f"two seeds' correlate at {one.label_agreement:.3f} on 32 documents; raise fit_draws" in one.note
    for labels in ("data", "exact"):
        assert record(labels=labels).label_agreement is None
    assert record(labels="sampled", documents=70).label_agreement == one.label_agreement  # the same 32 documents
    assert record(labels="sampled", documents=70).documents == 70


def test_a_note_says_what_was_not_reached():
    reached, not_reached = (fitted(inputs_of(), FitConfig(agreement=a), Damping()).record for a in (0.5, 0.99999))
    assert "below the" not in reached.note
    assert not_reached.documents == not_reached.total_documents == 90
    assert "below the 0.99999 asked for; these are as many documents as there are" in not_reached.note
    part = not_reached.model_copy(update={"documents": 80, "covariance_documents": 70})
    assert "asked for; raise fit_documents and fit_covariance_documents" in part.note


def test_a_note_counts_the_documents_whose_labels_were_drawn_twice():
    record = fitted(inputs_of(), FitConfig(labels="sampled", documents=7), Damping()).record
    assert record.label_agreement is not None
    assert f"{record.label_agreement:.3f} on 4 documents" in record.note  # every second one of 7
    assert "on 1 document;" in record.model_copy(update={"documents": 1}).note


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_damping_in_the_estimate_is_a_number(dtype: torch.dtype):
    """Halves of fewer tokens than the side is wide have no inverse."""
    subject = classifier(9, torch.nn.Linear(5, 3).to(dtype))
    inputs = MethodInputs(subject, outputs(randn(2, 5).to(dtype)))
    record = fitted(inputs, FitConfig(damping=0.0, covariance_documents=6), Damping()).record
    for value in (record.input_agreement, record.agreement, record.half_agreement):
        assert value is not None and np.isfinite(value) and 0 < value <= 1
