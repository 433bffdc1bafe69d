"""``rootward compare``: the table, the sentence, the page; what is finished is kept; bad input is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rootward import api
from rootward.verification import compare as verification
from tests.cli.conftest import Result, World, assert_short, done, rootward
from tests.cli.world import queries, write_jsonl

FEW = ["--subsets", "4", "--allow-few", "--workers", "0", "--token-budget", "512"]


def compare(world: World, out: Path, *more: str | Path) -> list[str | Path]:
    given = ["--documents", world.documents, "--behaviour", world.queries, "--out", out]
    return ["compare", world.model, *given, *FEW, *more]


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A comparison with everything on; tests do not write into its folder."""
    out = tmp_path_factory.mktemp("compare") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "RESAMPLES", 20)
        more = ["--method", "gradient_dot", "--method", "logra", "--removal", "10%"]
        more += ["--leave-out", "4", "--tail-patch", "2"]
        return out, done(*compare(world, out, *more, "--planted", "planted=true"))


def test_it_prints_the_table_and_what_to_take_and_writes_the_page(made: tuple[Path, Result]):
    out, result = made
    found = json.loads((out / "compare.json").read_text())
    lines = result.out.splitlines()
    ranked = [one["method"] for one in found["methods"]]
    table = [line.split() for line in lines if line.split()[:1] and line.split()[0].isdigit()]
    assert [row[1] for row in table[: len(ranked)]] == ranked
    assert found["summary"] in " ".join(lines)
    said = ("FEW: mostly noise", "without its top 6 (nats)", "AUROC of the planted", "LDS by setting", "agreement")
    said += ("4 documents left out", "drawn at random and 2 from both", "of a query's top 2", "less 2 random")
    said += ("One step: adamw, learning rate 0.005, from the final model.",)
    assert [words for words in said if words not in result.out] == []
    assert "representation_cosine *" in result.out and "logra *" not in result.out
    assert all(len(line) <= 120 for line in lines if not line.startswith(("Too few", "Cannot", "- ")))
    assert "6 queries choose, 6 others are reported" in result.err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="comparison"' in page and '"comparison":{' in page
    assert json.loads((out / "record.json").read_text())["status"] == "done"
    assert (out / "run.toml").exists()


def test_all_baselines_are_there_and_the_numbers_are_ordered(made: tuple[Path, Result]):
    found = json.loads((made[0] / "compare.json").read_text())
    by_name = {one["method"]: one for one in found["methods"]}
    assert {*api.BASELINES, "loss_at_start", "gradient_dot", "logra"} == set(by_name)
    values = [one["lds"]["value"] for one in found["methods"]]
    assert values == sorted(values, reverse=True)
    assert (found["few"], found["subsets"], found["tuning_subsets"], found["removed_documents"]) == (True, 4, 3, 6)
    assert len(by_name["logra"]["curve"]) == 6 and by_name["gradient_dot"]["curve"] == []
    assert by_name["bm25"]["auroc"]["value"] > 0.9  # the words give the habit away
    assert by_name["random"]["removal"] is None and by_name["bm25"]["removal"] is not None
    assert (len(found["left_out"]), found["left_out_at_random"], found["patched_documents"]) == (4, 2, 2)
    assert all(one["loo"]["n"] == one["loo_pearson"]["n"] == 4 for one in by_name.values())
    assert [name for name, one in by_name.items() if one["tail_patch"] is None] == ["random"]


def test_a_comparison_that_is_there_is_shown_and_replays_from_its_config(made: tuple[Path, Result]):
    out, first = made
    before = (out / "compare.json").stat().st_mtime_ns
    again = done("compare", "--config", out / "run.toml", "--json")
    assert "already" in again.err
    assert again.document["recommended"] == json.loads((out / "compare.json").read_text())["recommended"]
    assert again.document["comparison"]["summary"] in first.out
    assert (out / "compare.json").stat().st_mtime_ns == before
    listed = done("runs", out.parent, "--json").document["runs"]
    assert [row["kind"] for row in listed] == ["compare"]
    assert_short(rootward("verify", out), 4, "expected a trace")


def test_a_stopped_comparison_keeps_its_scores_and_trainings(
    made: tuple[Path, Result], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verification, "RESAMPLES", 20)
    out = Path(shutil.copytree(made[0], tmp_path / "c"))
    kept = {path: path.stat().st_mtime_ns for path in (*out.glob("scored/*"), *out.glob("retrain/jobs/*"))}

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rootward.api.write_documents", interrupt)
        stopped = rootward("compare", "--config", out / "run.toml", "--out", out, "--overwrite")
        assert_short(stopped, 130, "Ctrl-C", "finished scores and retrainings are kept")
    assert json.loads((out / "record.json").read_text())["status"] == "stopped"
    monkeypatch.setattr(api, "attribute", interrupt)  # nothing is to be scored again
    found = done("compare", "--config", out / "run.toml", "--out", out, "--no-report")
    assert "already" not in found.err
    assert json.loads((out / "record.json").read_text())["status"] == "done"
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert len(list(out.glob("retrain/jobs/*"))) == sum("jobs" in path.parts for path in kept)


def test_a_plan_says_what_it_costs_and_writes_nothing(world: World, tmp_path: Path):
    for flag in ("--dry-run", "--plan"):
        found = done(*compare(world, tmp_path / "c", "--removal", "3", flag, "--json")).document["estimate"]
        methods = len(api.COMPARED) + len(api.BASELINES) + 2  # and source, and the loss at the start
        assert found["details"]["methods"] == methods
        # tuning takes three subsets more; without random, with the full set and the control
        assert found["details"]["models"] == 4 + 3 + methods + 1
        assert found["details"]["settings tuned over"] == 6 + 6 + 6 + 5  # EK-FAC, TRAK, LoGra and SOURCE
        assert found["seconds"] > 0
    for flag, models in (("--no-tune", 4), ("--tune", 4 + 3)):
        plain = done(*compare(world, tmp_path / "c", flag, "--dry-run", "--json")).document["estimate"]["details"]
        assert (plain["models"], plain["settings tuned over"]) == (models, 23 if models > 4 else 0)
    more = ["--no-tune", "--leave-out", "5", "--tail-patch", "1", "--plan", "--json"]
    single = done(*compare(world, tmp_path / "c", *more))
    details = single.document["estimate"]["details"]
    assert (details["models"], details["documents left out one by one"]) == (4 + 1 + 5, 5)
    assert details["single steps, at most"] == 60  # every document once
    assert "single steps, at most" not in plain
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--subsets", "59"], ["at least 60, got 59", "--allow-few"]),
        (["--method", "nonsense"], ["got 'nonsense'"]),
        (["--option", "ekfac.dampin=1"], ["dampin", "options: "]),
        (["--planted", "plantd=true"], ["plantd"]),
        (["--removal", "200%"], ["removal"]),
        (["--seeds", "1,1"], ["none twice"]),
        (["--leave-out", "2"], ["leave_out"]),
        (["--leave-out", "61"], ["leave_out: expected 3 to 60"]),
        (["--tail-patch", "60"], ["tail_patch: expected 1 to 59 of 60"]),
    ],
)
def test_bad_input_is_refused_and_leaves_no_folder(world: World, tmp_path: Path, more: list[str], words: list[str]):
    given = ["--documents", world.documents, "--behaviour", world.queries, "--out", tmp_path / "c"]
    assert_short(rootward("compare", world.model, *given, *more), 2, *words)
    assert not (tmp_path / "c").exists()


def test_a_model_without_a_recipe_and_queries_that_cannot_be_divided_are_refused(world: World, tmp_path: Path):
    call = compare(world, tmp_path / "c")
    call[1] = world.base
    assert_short(rootward(*call), 2, "no recipe", "rootward train", "{documents}")
    alone = write_jsonl(tmp_path / "one.jsonl", queries(1))
    assert_short(rootward(*compare(world, tmp_path / "c", "--behaviour", alone)), 2, "cannot be split", "--no-tune")
    assert not (tmp_path / "c").exists()
