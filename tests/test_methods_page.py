"""docs/methods.md says what the cards and the measured results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods_page
from benchmarks.methods_page import BENCHMARKS, PAGE, RESULTS, page, paragraph, results
from rootward.core import registry


def result(**methods: Any) -> dict[str, Any]:
    return {
        "benchmark": "digits_lds",
        "machine": {"processor": "a quick one"},
        "versions": {"torch": "2.13.0"},
        "noise_ceiling": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 64},
        "methods": methods,
    }


def one(value: float | None, **more: Any) -> dict[str, Any]:
    lds = None if value is None else {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 64}
    return {"lds": lds, "cost_ratio": 3.14159, "options": {}, "damping_curve": None, "note": "", **more}


def section(text: str, key: str) -> str:
    return text.split(f'<a id="{key}"></a>')[1].split("\n<a id=")[0].split("\n## ")[0]


def test_the_page_is_up_to_date():
    found = results(RESULTS)
    if not found:
        pytest.skip(f"nothing is measured yet: none of {', '.join(BENCHMARKS)} is in {RESULTS.name}/")
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(found), "run python benchmarks/methods_page.py and commit docs/methods.md"


def test_every_method_has_its_section_and_a_page_without_results_says_so():
    text = page({})
    for method in registry.methods():
        own = section(text, method.card.key)
        assert method.card.paper in own or method.card.reference == "none"
        for name in method.card.names:
            assert f"`{name}`" in own
        assert f"**Cost:** {method.card.cost}" in own
        assert "not measured yet" in own
    assert text.count("\nNot measured yet.\n") == len(BENCHMARKS)
    assert "[arXiv:2303.14186](https://arxiv.org/abs/2303.14186)" in section(text, "trak_park2023")


def test_results_stand_where_they_belong():
    curve = [[0.01, 0.25], [0.1, -0.125]]
    made = result(
        ekfac=one(0.5, options={"damping": 0.01}, damping_curve=curve),
        tracin_cp=one(0.25),
        bm25=one(None, note="digits have no text"),
        mystery=one(-0.25),
    )
    text = page({"digits_lds": made})
    own = section(text, "ekfac_grosse2023")
    assert "small classifier: 0.50 [0.40, 0.60]; small language model: not measured yet" in own
    assert "**Measured cost, in plain passes:** 3.14" in own
    assert "**LDS by damping, small classifier:** 0.01: 0.25, 0.1: −0.125" in own
    tracin = section(text, "tracin_pruthi2020")
    assert "**Preset `tracin_cp`:** checkpoints = 'all'; LDS small classifier: 0.25 [0.15, 0.35]" in tracin
    assert "small classifier: — (not run)" in tracin  # the preset's number is not the default's
    assert "small classifier: — (digits have no text)" in section(text, "bm25")
    measured = text.split("## Measured: small classifier")[1].split("## Measured")[0]
    assert "Noise ceiling 0.90 [0.80, 0.95]. processor a quick one; torch 2.13.0." in measured
    rows = [line.split(" | ")[0] for line in measured.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| ekfac", "| tracin_cp", "| mystery", "| bm25"]
    assert "damping = 0.01" in measured


def test_deviations_and_exactness_come_from_the_docstring():
    text = "Title.\n\nDeviations: first ``x``,\nsecond.\n\nExact when: always.\n"
    assert paragraph(text, "Deviations") == "first `x`, second."
    assert paragraph(text, "Exact when") == "always."
    assert paragraph(text, "Other") == ""
    own = section(page({}), "datainf_kwon2023")
    assert "**Deviations:** a document's loss" in own
    assert "**Exact when:** " in own


def test_results_are_read_from_their_folder(tmp_path: Path):
    assert results(tmp_path) == {}
    (tmp_path / "lm_lds.json").write_text(json.dumps(result()))
    (tmp_path / "else.json").write_text("{")
    assert list(results(tmp_path)) == ["lm_lds"]


def test_it_is_written_where_the_docs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods_page, "ROOT", tmp_path)
    monkeypatch.setattr(methods_page, "PAGE", tmp_path / "methods.md")
    assert methods_page.main() == 0
    assert (tmp_path / "methods.md").read_text(encoding="utf-8") == page(results(RESULTS))
