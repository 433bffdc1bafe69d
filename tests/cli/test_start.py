"""What a run depends on beside the model itself: its start, its checkpoints; and models trained elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rootward.cli.output import Talk
from rootward.cli.verify import show_arms
from rootward.core.records import Arm, Cost, Interval, Verdict
from tests.cli.conftest import World, assert_short, done, rootward


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """A copy of the small world whose parts may be changed."""
    for name in ("base", "tuned"):
        shutil.copytree(world.root / name, tmp_path / name)
    for path in (world.documents, world.queries):
        shutil.copy(path, tmp_path)
    record = json.loads((tmp_path / "tuned" / "rootward_training.json").read_text())
    record["base"] = str(tmp_path / "base")
    (tmp_path / "tuned" / "rootward_training.json").write_text(json.dumps(record))
    return World(tmp_path)


def shake(path: Path) -> None:
    """Other weights of the same shapes."""
    weights = load_file(path)
    save_file({name: value + 0.1 * torch.ones_like(value) for name, value in weights.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("part", ["start", "checkpoint 0"])
def test_a_trace_of_another_start_or_checkpoint_is_another_run(own: World, part: str):
    given = own.trace(own.traced, "--method", "tracin_cp", "--no-report")
    done(*given)
    assert "holds this run already" in done(*given).err
    checkpoint = sorted((own.model / "checkpoints").iterdir())[0]
    shake((own.base if part == "start" else checkpoint) / "model.safetensors")
    assert_short(rootward(*given), 4, f"inputs.{part}", "--overwrite")
    done(*given, "--overwrite")


def test_a_moved_start_is_the_same_run(own: World):
    given = own.trace(own.traced, "--no-report")
    done(*given)
    own.base.rename(own.root / "moved")
    assert "holds this run already" in done(*given, "--start", own.root / "moved").err
    assert_short(rootward(*given, "--start", own.root / "nothing"), 2, "nothing", "no such folder")


def test_the_estimate_counts_the_start_and_every_checkpoint(world: World, tmp_path: Path):
    def passes(method: str) -> int:
        given = world.trace(tmp_path / "r", "--method", method, "--dry-run", "--json")
        return done(*given).document["estimate"]["details"]["gradient passes"]

    assert [passes(m) for m in ("gradient_dot", "gradient_dot_at_start", "tracin_cp")] == [1, 1, 3]


def test_whole_documents_are_another_objective(world: World, tmp_path: Path):
    found = done(*world.trace(tmp_path / "r", "--whole", "--no-report", "--json")).document["coverage"]
    assert (
        found["trained_tokens"] > json.loads((world.traced / "record.json").read_text())["coverage"]["trained_tokens"]
    )
    index = [*world.index(tmp_path / "i"), "--whole"]
    done(*index)
    assert_short(rootward(*world.trace(tmp_path / "s", "--index", tmp_path / "i")), 4, "objective")
    done(*world.trace(tmp_path / "s", "--index", tmp_path / "i", "--whole", "--no-report"))


def test_a_model_trained_elsewhere_with_a_known_start(own: World):
    (own.model / "rootward_training.json").unlink()
    given = own.trace(own.traced, "--no-report")
    done(*given, "--start", own.base, "--method", "gradient_dot_at_start")
    methods = json.loads((own.traced / "trace.json").read_text())["methods"]
    assert "loss_at_start" in {found["method"] for found in methods}
    command = f"{sys.executable} -S -c \"import shutil; shutil.copytree('{own.model}', '{{model}}')\" {{documents}}"
    plan = done("verify", own.traced, "--retrain", command, "--dry-run", "--json")
    assert plan.document["estimate"]["seconds"] is None
    assert "takes no {seed}" in plan.err
    assert "unknown" in done("verify", own.traced, "--retrain", command, "--dry-run").out
    result = rootward("verify", own.traced, "--retrain", command, "--json")
    assert result.code == 3, result.err
    verdict = result.document["verdict"]
    arms = {arm["name"]: arm for arm in verdict["arms"]}
    assert arms["base"]["values"]
    assert arms["gradient_dot_at_start"]["predicted"] is not None
    assert sum("cannot hold" in note for note in verdict["notes"]) >= 1
    assert_short(rootward("verify", own.traced, "--start", own.root / "nothing"), 2, "nothing")


def test_start_may_be_given_to_verify(own: World):
    (own.model / "rootward_training.json").unlink()
    done(*own.trace(own.traced, "--no-report"))
    command = (
        f"{sys.executable} -S -c \"import shutil; shutil.copytree('{own.model}', '{{out}}')\" {{documents}} {{seed}}"
    )
    given = ("verify", own.traced, "--retrain", command, "--dry-run", "--json")
    assert done(*given).document["estimate"]["details"]["arms"] == 4
    assert done(*given, "--start", own.base).document["estimate"]["details"]["arms"] == 5


def test_what_is_finished_costs_nothing(own: World):
    done(*own.trace(own.traced, "--no-report"))
    verify = ["verify", own.traced, "--seeds", "0", "--workers", "0"]
    before = done(*verify, "--dry-run", "--json").document["estimate"]
    assert before["details"]["models still to make"] == before["details"]["models"] == 5
    assert before["seconds"] > 0
    told = rootward(*verify)
    assert told.code == 3
    after = done(*verify, "--dry-run", "--json").document["estimate"]
    assert (after["details"]["models still to make"], after["seconds"]) == (0, 0)


def test_one_seed_has_no_bracket(capsys: pytest.CaptureFixture[str]):
    def arm(n: int) -> Arm:
        effect = Interval(value=-1, low=-1, high=-1, n=n)
        return Arm(
            name="a", label="A", kind="method", action="drop", documents=1, seeds=[0], values=[0.0], effect=effect
        )

    def told(n: int) -> str:
        verdict = Verdict(
            behaviour="b", measure="m", unit="share", main="a", arms=[arm(n)], holds=False, summary="",
            cost=Cost(seconds=0),
        )  # fmt: skip
        show_arms(verdict, Talk())
        return capsys.readouterr().out.replace("change [95 %]", "")

    assert "[" in told(3)
    assert "-1" in told(1)
    assert "[" not in told(1)
