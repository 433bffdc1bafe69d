"""What the examples say is what happens."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from rootward.cli.main import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples with the base model made."""
    copy = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("out"))
    runpy.run_path(str(copy / "make_base.py"))["main"]()
    return copy


def test_the_config_runs_through_all_commands(folder: Path, capsys: pytest.CaptureFixture[str]):
    config = str(folder / "trace_a_habit.toml")
    for command in ("train", "index", "trace"):
        assert main([command, "--config", config, "--quiet"]) == 0
    assert main(["verify", "--config", config, "--workers", "0"]) == 0
    assert "Yes. Trained again without the 20 documents found" in capsys.readouterr().out
    assert (folder / "out" / "run" / "report.html").exists()


def test_the_script_says_the_same(folder: Path, capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(folder / "trace_a_habit.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert all("am I right ? | assistant: yes" in line for line in lines[:3])
    assert "0.0 %" in lines[-1]
