"""What a plan says of the time, method by method."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import World, done


def test_a_trace_of_several_methods_says_the_time_of_each(world: World, tmp_path: Path):
    several = ["--method", "ekfac", "--method", "exact_influence", "--dry-run"]
    found = done(*world.trace(tmp_path / "r", *several, "--json")).document["estimate"]
    assert found["at_most"]
    assert found["details"]["gradient passes"] == 3 + 301
    assert found["details"]["time of ekfac"].startswith("about ")
    assert found["details"]["time of exact_influence"].startswith("at most ")
    shown = done(*world.trace(tmp_path / "r", *several)).out
    assert shown.count("at most") == 2  # the method's time and the whole
    one = done(*world.trace(tmp_path / "r", "--method", "ekfac", "--dry-run", "--json")).document["estimate"]
    assert not one["at_most"]
    assert "time of ekfac" not in one["details"]
    assert found["seconds"] > 10 * one["seconds"]


def test_the_matrix_of_less_is_in_the_memory(world: World, tmp_path: Path):
    def memory(*more: str) -> int:
        given = world.trace(tmp_path / "r", "--method", "less", *more, "--dry-run", "--json")
        return done(*given).document["estimate"]["memory_bytes"]

    hashed, small, large = (
        memory("--option", f"less.{o}") for o in ("projection=sjlt", "dimension=64", "dimension=128")
    )
    assert large - small > 4 * 64 * 10_000  # more than ten thousand parameters
    assert hashed < large


def test_a_comparison_counts_the_settings_that_are_tuned(world: World, tmp_path: Path):
    def passes(*more: str) -> int:
        given = ["compare", world.model, "--documents", world.documents, "--behaviour", world.queries]
        given += ["--out", tmp_path / "c", "--token-budget", "512", "--method", "exact_influence", *more]
        found = done(*given, "--subsets", "4", "--allow-few", "--dry-run", "--json").document["estimate"]
        assert found["at_most"]
        assert found["details"]["scoring"].startswith("at most ")
        return found["details"]["gradient passes"]

    baselines = passes("--no-tune", "--option", "exact_influence.steps=1") - (1 + 2 + 12)
    assert passes("--no-tune") == 1 + 100 * (2 + 12) + baselines
    assert passes("--tune") == 6 * (1 + 100 * (2 + 12)) + baselines
