"""Retraining with the owner's command, played by a script that copies one of two models."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

from rootward.core.errors import ArtefactError, InputError, RootwardError
from rootward.subject.subject import Subject
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job
from rootward.verification.owner import command_of
from rootward.verification.removal import verify
from rootward.verification.retrain import run_jobs
from tests.verification import toy

TRAINER = """
import json, shutil, sys
folder, documents, out, seed = sys.argv[1:5]
kinds = [json.loads(line)["kind"] for line in open(documents, encoding="utf-8")]
print("training with seed", seed, "on", len(kinds), flush=True)
if seed == "13":
    sys.exit("out of luck")
if seed != "14":
    shutil.copytree(folder + ("/trained" if kinds.count("planted") > 4 else "/base"), out)
"""


@pytest.fixture
def elsewhere(world: Path, tmp_path: Path) -> Path:
    """The trained model without Rootward's record, and a trainer."""
    shutil.copytree(world / "trained", tmp_path / "model")
    (tmp_path / "model" / "rootward_training.json").unlink()
    (tmp_path / "my trainer.py").write_text(TRAINER)
    return tmp_path


def owned(folder: Path, world: Path, seed: str = "{seed}") -> Subject:
    words = [sys.executable, "-S", str(folder / "my trainer.py"), str(world)]
    command = " ".join(f"'{word}'" for word in words)
    return Subject.load(folder / "model", toy.rows(), retrain=f"{command} {{documents}} {{out}} {seed}")


def test_the_command_is_run_measured_and_not_repeated(elsewhere: Path, world: Path, tmp_path: Path) -> None:
    subject = owned(elsewhere, world)
    verdict = verify(subject, toy.oracle(subject), 12, toy.probes(), cache=tmp_path / "my cache")
    values = {arm.name: arm.values for arm in verdict.arms}
    assert values == {"full": [1.0] * 3, "oracle": [0.0] * 3, "random": [1.0] * 3}
    assert verdict.holds
    assert all(arm.predicted is None for arm in verdict.arms)
    assert any("before training is not known" in note for note in verdict.notes)
    logs = sorted((tmp_path / "my cache" / "owner").glob("*/log.txt"))
    assert len(logs) == 9
    assert all("training with seed" in log.read_text() for log in logs)
    assert not list((tmp_path / "my cache" / "owner").glob("*/model*")), "models are removed once they are measured"
    (elsewhere / "my trainer.py").unlink()
    again = verify(subject, toy.oracle(subject), 12, toy.probes(), cache=tmp_path / "my cache")
    assert again.model_dump_json() == verdict.model_dump_json()


def test_a_command_without_seed_is_run_once_and_that_is_said(elsewhere: Path, world: Path, tmp_path: Path) -> None:
    subject = owned(elsewhere, world, "0")
    verdict = verify(subject, toy.oracle(subject), 12, toy.probes(), cache=tmp_path / "cache")
    assert all(len(arm.values) == 1 for arm in verdict.arms)
    assert not verdict.holds
    assert any("takes no {seed}" in note and "cannot hold" in note for note in verdict.notes)


def test_failures_show_the_end_of_the_log(elsewhere: Path, world: Path, tmp_path: Path) -> None:
    subject, rows = owned(elsewhere, world), tuple(range(72))
    with pytest.raises(RootwardError, match=r"retraining full, seed 13 .*ended with code 1(?s:.*)out of luck"):
        run_jobs(subject, [Job("full", rows, 13)], Evaluation(toy.probes()), cache=tmp_path / "c")
    with pytest.raises(ArtefactError, match=r"succeeded and its model cannot be used(?s:.*)training with seed 14"):
        run_jobs(subject, [Job("full", rows, 14)], Evaluation(toy.probes()), cache=tmp_path / "c")
    with pytest.raises(InputError, match="takes documents, not weights"):
        run_jobs(subject, [Job("full", rows, 0, {1: 0.5})], Evaluation(toy.probes()), cache=tmp_path / "c")
    subject.retrain_command = "no-such-program {documents} {out}"
    with pytest.raises(InputError, match="cannot start 'no-such-program'"):
        run_jobs(subject, [Job("full", rows, 0)], Evaluation(toy.probes()), cache=tmp_path / "c")
    assert not list((tmp_path / "c" / "jobs").glob("*.json"))


def test_ctrl_c_ends_the_command(elsewhere: Path, world: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    subject, pid = owned(elsewhere, world), tmp_path / "pid"
    script = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    subject.retrain_command = f'{sys.executable} -S -c "{script}" {{documents}} {{out}}'
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        with pytest.raises(KeyboardInterrupt):
            run_jobs(subject, [Job("full", tuple(range(72)), 0)], Evaluation(toy.probes()), cache=tmp_path / "c")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_no_shell_sees_the_command() -> None:
    words = command_of("train '{documents}' --to={out} 'a b; rm' {seed} {{x}}", Path("/a b/$(c)"), Path("o"), 7)
    assert command_of("train {documents} --out {model}", Path("d"), Path("m"), 0) == ["train", "d", "--out", "m"]
    assert words == ["train", "/a b/$(c)", "--to=o", "a b; rm", "7", "{x}"]
