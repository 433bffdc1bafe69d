"""An eigendecomposition that fails and is repeated with a jitter is said in the scores' notes, whoever needed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rootward.api import attribute
from rootward.curvature.kronecker import JITTERED
from rootward.curvature.low_rank import LowRankCurvature
from tests.methods.attribution.supervised import classifier, outputs, randn

METHODS: dict[str, dict[str, Any]] = {
    "ekfac": {},
    "ekfac_joint": {},
    "trak": {},
    "logra": {},
    "logra_random": {"fisher": "ekfac"},
    "trackstar": {"scaling": "none"},
    "grass": {},
    "arnoldi": {"iterations": 5, "top": 2},
    "exact_influence": {"solver": "dense"},
    "if_cg": {"solver": "low_rank", "rank": 2},
    "exact_influence_koh2017": {"solver": "lissa", "damping": 1.0, "depth": 100},
}


def failing(monkeypatch: pytest.MonkeyPatch, width: int | None = None) -> None:
    """The first decomposition of every matrix (of this width) fails, the second is as always."""
    real, failed = torch.linalg.eigh, [False]

    def eigh(matrix: Tensor) -> Any:
        if width is None or len(matrix) == width:
            failed[0] = not failed[0]
            if failed[0]:
                raise RuntimeError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_in_the_notes(name: str, monkeypatch: pytest.MonkeyPatch):
    subject, asked = classifier(12), outputs(randn(3, 5, seed=9))
    before = attribute(subject, asked, name, options=METHODS[name])
    assert not [note for note in before.notes if "jitter" in note]
    failing(monkeypatch)
    after = attribute(subject, asked, name, options=METHODS[name])
    assert [note for note in after.notes if "jitter" in note]


def test_the_joint_entries_have_a_note_of_their_own(monkeypatch: pytest.MonkeyPatch):
    subject, asked = classifier(12), outputs(randn(3, 5, seed=9))
    failing(monkeypatch, 9)  # 12 documents with 3 labels are enough for 9 joint entries; no side is so wide
    (note,) = [n for n in attribute(subject, asked, "ekfac_joint").notes if "jitter" in n]
    assert f"joint entries: {JITTERED}" in note


def test_low_rank_curvatures_say_so_and_keep_it_when_merged(monkeypatch: pytest.MonkeyPatch):
    layout = attribute_layout()
    plain = LowRankCurvature.of_rows(layout, randn(6, layout.size), 2)
    assert plain.notes == ()
    with monkeypatch.context() as context:
        failing(context)
        rough = LowRankCurvature.of_rows(layout, randn(6, layout.size), 2)
    assert rough.notes == (f"2 of 2 blocks: {JITTERED}",)
    assert rough.merge(plain, 2).notes == plain.merge(rough, 2).notes == rough.notes


def attribute_layout() -> Any:
    from rootward.core.layout import ParamLayout

    return ParamLayout(("a", "b"), ((3, 4), (5,)))
