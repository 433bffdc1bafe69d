"""docs/methods.md says what the cards and the measured results say, as `Table.write` writes these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_digits_lds, bench_lm_lds, lds_table, methods_page
from benchmarks.lds_table import Ours, Peer, Table
from benchmarks.methods_page import BENCHMARKS, PAGE, RESULTS, interval, number, page, paragraph, results, stem
from rootward.core import registry
from rootward.core.errors import InputError
from rootward.subject.behaviour import Behaviour
from rootward.verification.lds import lds
from rootward.verification.subsets import draw_subsets, retrain_subsets
from tests.verification import convex

WORLD = {"name": "a line", "documents": convex.N, "recipe": {"lr": 0.4}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder with ``digits_lds.json`` of a small world, written by the table itself, and that document."""
    folder = tmp_path_factory.mktemp("results")
    line, generator = convex.subject(), np.random.default_rng(5)
    x = generator.normal(size=(6, convex.WIDTH)).astype(np.float32)
    asked = Behaviour.loss("loss", [{"x": row, "y": [float(row.sum())], "name": str(n)} for n, row in enumerate(x)])
    truth = retrain_subsets(line, draw_subsets(line, 64), asked, seeds=(0, 1), cache=folder / "cache", workers=0)
    table = Table(line, asked, 3, truth, 60)
    entries = (
        Ours("ekfac", "ekfac_grosse2023", {}, "damping", (0.01, 0.1)),
        Ours("kfac_influence", "kfac_influence", {}, "damping", (0.5, 5.0)),
        Ours("gradient_cosine", "gradient_cosine"),
        Ours("logra_ekfac", "logra_choe2024", {"fisher": "ekfac", "rank": 1}, "damping", (0.1, 1.0)),
        Ours("random", "random"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds_table, "lds", lambda *a, **more: lds(*a, **{"resamples": 20, "permutations": 2, **more}))
        patch.setattr(lds_table, "RUNS", 1)
        patch.setattr(lds_table, "CURVE_RESAMPLES", 20)
        for entry in entries:
            table.add(entry)
    peer = Peer("their_ekfac", "kronfluence_ekfac", "ekfac", (0.01, 0.1))
    table.rows["their_ekfac"] = replace(table.rows["ekfac"], entry=peer)
    table.refuse("bm25", "points have no text")
    table.refuse("logra", "no room")
    table.refuse("their_trak", "values that are not finite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds_table, "RESULTS", folder)
        written = table.write("digits_lds", WORLD)
    return folder, json.loads(written.read_text())


def section(text: str, key: str) -> str:
    return text.split(f'<a id="{key}"></a>')[1].split("\n<a id=")[0].split("\n## ")[0]


def cells(text: str, start: str) -> list[str]:
    """The cells of the one table line that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return line.strip("| ").split(" | ")


def test_the_page_is_up_to_date():
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(results(RESULTS)), "run python benchmarks/methods_page.py and commit docs/methods.md"


def test_smooth_runs_have_a_table_and_stand_in_for_rows_that_are_not_there(made: tuple[Path, dict[str, Any]]):
    _, document = made

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 64}

    measured = {
        "lds_magic": figure(0.9),
        "lds_magic_lm_90": figure(0.8),
        "lds_magic_digits_90": figure(0.7),
        "lds_random_lm_50": figure(0.0),
        "magic_trainings_per_query_lm": figure(5.0),
    }
    world = {**document["world"], "smooth_run": measured}
    found = {"digits_lds": document, "lm_lds": {**document, "world": world}}
    text = page(found)
    assert cells(text, "[exact metagradient")[2:] == [
        "0.70 [0.60, 0.80] (a smooth run)",
        "0.90 [0.80, 1.00] (a smooth run)",
        "5 trainings a query",
    ]
    assert cells(text, "method | small classifier, 10 % removed")[1:] == [
        "small classifier, 10 % removed", "small language model, 10 % removed", "small language model, 50 % removed",
    ]  # fmt: skip
    assert cells(text, "magic |")[1:] == ["0.70 [0.60, 0.80]", "0.80 [0.70, 0.90]", "0.90 [0.80, 1.00]"]
    assert cells(text, "random | —")[1:] == ["—", "—", "0.00 [−0.10, 0.10]"]
    assert "smooth" not in cells(page({"digits_lds": document}), "[exact metagradient")[2]


def test_every_method_has_its_section_and_a_page_without_results_says_so():
    text = page({})
    for method in registry.methods():
        own = section(text, method.card.key)
        assert method.card.paper in own or method.card.reference == "none"
        for name in method.card.names:
            assert f"`{name}`" in own
        assert f"**Cost:** {method.card.cost}" in own
        assert "not measured yet" in own
        for preset in method.card.presets:
            assert cells(text, f"↳ `{preset}`")[2:4] == ["not measured yet"] * 2
    assert text.count("\nNot measured yet.\n") == len(BENCHMARKS) + 1
    assert "[arXiv:2303.14186](https://arxiv.org/abs/2303.14186)" in section(text, "trak_park2023")
    assert "`rate`, over 0.1, 0.3, 1, 3, 10" in section(text, "source_bae2024")


def test_methods_presets_and_rows_with_options_have_lines_of_their_own(made: tuple[Path, dict[str, Any]]):
    folder, document = made
    rows, text = document["methods"], page(results(folder))
    lines = {
        "[EK-FAC influence function]": "ekfac",
        "↳ `kfac_influence`": "kfac_influence",
        "↳ `gradient_cosine`": "gradient_cosine",
        "↳ with fisher = 'ekfac', rank = 1 (`logra_ekfac`)": "logra_ekfac",
        "[random order]": "random",
    }
    for start, name in lines.items():
        _, needs, small, large, passes = cells(text, start)
        assert needs == ", ".join(registry.get(stem(name))[0].card.needs)
        assert (small, large) == (interval(rows[name]["lds"]), "not measured yet")
        assert passes == f"{number(rows[name]['cost_ratio'])} / —"
    # a preset's number is not the default's, and what was not run says why
    assert cells(text, "[gradient dot product (TracIn)]")[2:] == ["— (not run)", "not measured yet", "—"]
    assert cells(text, "[BM25")[2] == "— (points have no text)"
    assert cells(text, "[LoGra]")[2] == "— (no room)"
    assert cells(text, "↳ `logra_random`")[2] == "— (no room)"
    assert cells(text, "↳ `diagonal_influence`")[2] == "— (not run)"


def test_a_section_says_what_was_taken_and_how_the_lds_depends_on_it(made: tuple[Path, dict[str, Any]]):
    folder, document = made
    rows, text = document["methods"], page(results(folder))
    own = section(text, "ekfac_grosse2023")
    taken = {name: row["options"].get("damping") for name, row in rows.items()}
    assert taken["ekfac"] in (0.01, 0.1) and taken["kfac_influence"] in (0.5, 5.0)
    said = f"small classifier: {interval(rows['ekfac']['lds'])} with damping = {taken['ekfac']}; small language"
    assert f"**LDS:** {said}" in own
    points = ", ".join(f"{damping:g}: {number(lds)}" for damping, lds in rows["ekfac"]["damping_curve"])
    assert f"**LDS by damping, small classifier:** {points}\n" in own
    assert rows["ekfac"]["note"] and f"**Notes, small classifier:** {rows['ekfac']['note']}\n" in own
    said = f"{interval(rows['kfac_influence']['lds'])} with damping = {taken['kfac_influence']}"
    assert f"**Preset `kfac_influence`:** curvature = 'kfac'; LDS small classifier: {said}" in own
    assert "**`kfac_influence`: LDS by damping, small classifier:** 0.5: " in own
    said = f"fisher = 'ekfac', rank = 1; LDS small classifier: {interval(rows['logra_ekfac']['lds'])}"
    assert f"**As `logra_ekfac`:** {said}" in section(text, "logra_choe2024")


def test_the_benchmark_says_how_it_came_about_and_peers_stand_at_the_end(made: tuple[Path, dict[str, Any]]):
    folder, document = made
    text = page(results(folder))
    measured = text.split("## Measured: small classifier")[1].split("\n## ")[0]
    assert document["noise_ceiling"] is not None
    assert f"Noise ceiling {interval(document['noise_ceiling'])}." in measured
    assert "name a line, documents 40. 3 queries; 60 random subsets, each trained with 2 seeds;" in measured
    assert "3 other queries and 4 other subsets" in measured and "recipe" not in measured
    assert f"torch {document['versions']['torch']}" in measured
    names = [line.split(" | ")[0].removeprefix("| ") for line in measured.splitlines() if line.startswith("| ")][1:]
    mine = {name: row["lds"]["value"] for name, row in document["methods"].items() if row["peer"] is None}
    assert names == sorted(mine, key=lambda name: -mine[name]) and "their_ekfac" not in names
    end = text.split("## Other libraries")[1]
    row = document["methods"]["their_ekfac"]
    taken = f"{interval(row['lds'])} (damping = {row['options']['damping']})"
    assert cells(end, "`their_ekfac`")[1:] == [taken, "not measured yet", f"{number(row['cost_ratio'])} / —"]
    assert cells(end, "`their_trak`")[1] == "— (values that are not finite)"
    assert "bm25" not in end and "## " not in end


@pytest.mark.parametrize("bench", [bench_digits_lds, bench_lm_lds])
def test_the_rows_of_the_benchmarks_are_named_as_the_registry_names_them(bench: Any):
    entries = bench.ours()
    assert len({entry.name for entry in entries}) == len(entries)
    known = {name for method in registry.methods() for name in method.card.names}
    for entry in entries:
        method, preset = registry.get(entry.method)
        for value in entry.values:
            method.configure({**preset, **entry.options, entry.tuned: value})
        assert registry.get(stem(entry.name)) == (method, preset), entry.name
        assert entry.name in known or entry.options, f"{entry.name} is {entry.method} and should be called so"
    peers = {peer.name for peer in bench_digits_lds.peers()} | {"dattri_arnoldi"}
    assert not peers & known
    said = {registry.get(entry.method)[0].card.key for entry in entries}
    said |= {registry.get(name)[0].card.key for name in bench.NOT_HERE if name not in peers}
    attribution = {method.card.key for method in registry.methods() if method.card.question == "attribution"}
    assert said <= attribution
    if bench is bench_digits_lds:
        assert said == attribution


def test_a_row_of_a_method_that_is_gone_is_an_error(made: tuple[Path, dict[str, Any]]):
    assert [stem(name) for name in ("logra_ekfac", "ekfac_joint", "ekfac", "gone")] == [
        "logra", "ekfac_joint", "ekfac", "gone",
    ]  # fmt: skip
    document = {**made[1], "methods": {"gone": made[1]["methods"]["random"]}}
    with pytest.raises(InputError, match="got 'gone'"):
        page({"digits_lds": document})


def test_deviations_and_exactness_come_from_the_docstring():
    text = "Title.\n\nDeviations: first ``x``,\nsecond.\n\nExact when: always.\n"
    assert paragraph(text, "Deviations") == "first `x`, second."
    assert paragraph(text, "Exact when") == "always."
    assert paragraph(text, "Other") == ""
    own = section(page({}), "datainf_kwon2023")
    assert "**Deviations:** a document's loss" in own
    assert "**Exact when:** " in own


def test_results_are_read_from_their_folder(made: tuple[Path, dict[str, Any]], tmp_path: Path):
    assert results(tmp_path) == {}
    (tmp_path / "lm_lds.json").write_text(json.dumps(made[1]))
    (tmp_path / "else.json").write_text("{")
    assert list(results(tmp_path)) == ["lm_lds"]


def test_it_is_written_where_the_docs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods_page, "ROOT", tmp_path)
    monkeypatch.setattr(methods_page, "PAGE", tmp_path / "methods.md")
    assert methods_page.main() == 0
    assert (tmp_path / "methods.md").read_text(encoding="utf-8") == page(results(RESULTS))
