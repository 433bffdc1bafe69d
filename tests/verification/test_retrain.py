"""Exact retraining: same bits everywhere, nothing twice, nothing left behind, whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rootward.core.errors import ArtefactError, InputError, RootwardError
from rootward.core.records import read_model
from rootward.subject.documents import load_documents
from rootward.subject.encode import Encoded
from rootward.subject.folders import train_folder
from rootward.subject.objectives import Classification
from rootward.subject.plan import Lora
from rootward.subject.subject import Subject
from rootward.verification import retrain
from rootward.verification.evaluation import Evaluation, greedy_answers
from rootward.verification.jobs import Job, JobResult, Keys
from rootward.verification.pool import packed
from rootward.verification.removal import verify
from rootward.verification.retrain import run_jobs
from tests.verification import toy

EVERYTHING = tuple(range(72))
EVALUATION = Evaluation(toy.probes(), toy.heldout(), examples=3)
SOME = tuple(n for n in range(72) if n % 3)


def test_a_worker_gives_the_bits_of_this_process_and_of_the_recorded_training(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        Job("full", EVERYTHING, 0),
        Job("full", EVERYTHING, 1),
        Job("some", SOME, 0),
        Job("weighted", SOME, 0, {1: 0.0, 4: 2.0}),
        Job("base", (), 0, train=False),
    ]
    seen: list[tuple[int, int]] = []
    there = run_jobs(
        subject, jobs, EVALUATION, workers=1, cache=tmp_path / "a", progress=lambda _, a, b: seen.append((a, b))
    )
    here = run_jobs(subject, jobs, EVALUATION, workers=0, cache=tmp_path / "b")
    assert seen == [(n, 5) for n in range(6)]
    for name, result in here.items():
        other = there[name]
        assert (result.final_hash, result.measured, result.key) == (other.final_hash, other.measured, other.key), name
    assert subject.record is not None
    assert there["full", 0].final_hash == subject.record.final_hash
    assert len({result.final_hash for result in there.values()}) == 5
    assert there["full", 0].measured.rate == 1.0
    assert there["full", 0].measured.answers == ["wrong"] * 3

    def forbidden(*_: Any) -> None:
        raise AssertionError("a finished job was run again")

    monkeypatch.setattr(retrain, "run_pool", forbidden)
    monkeypatch.setattr(retrain, "run_here", forbidden)
    assert run_jobs(subject, jobs, EVALUATION, workers=1, cache=tmp_path / "a") == there
    again = replace(jobs[2], name="the same under another name")
    assert run_jobs(subject, [again], EVALUATION, cache=tmp_path / "a")[again.name, 0] == there["some", 0]


def test_fresh_adapters_are_repeated_bit_for_bit(world: Path, tmp_path: Path) -> None:
    recipe = toy.RECIPE.model_copy(update={"lora": Lora(rank=2), "epochs": 1})
    record = train_folder(world / "base", load_documents(toy.rows()), tmp_path / "adapter", recipe)
    subject = Subject.load(tmp_path / "adapter", toy.rows())
    jobs = [Job("full", EVERYTHING, seed) for seed in (0, 1)]
    found = run_jobs(subject, jobs, EVALUATION, workers=0, cache=tmp_path / "cache")
    assert found["full", 0].final_hash == record.final_hash != found["full", 1].final_hash


def test_the_key_changes_with_everything_that_decides_a_result(subject: Subject, world: Path) -> None:
    recipe = subject.recipe
    assert recipe is not None
    job = Job("a", SOME, 0)

    def key(job: Job = job, subject: Subject = subject, evaluation: Evaluation = EVALUATION, **change: Any) -> str:
        return Keys(subject, evaluation, change.get("base", "hash"), change.get("recipe", recipe)).of(job)

    fewer = toy.probes().subset(range(15))
    shorter = Subject.load(world / "trained", toy.rows(), max_tokens=5)
    changed = [
        key(replace(job, rows=SOME[1:])),
        key(replace(job, seed=1)),
        key(replace(job, weights={1: 0.5})),
        key(replace(job, train=False)),
        key(evaluation=replace(EVALUATION, probes=fewer)),
        key(evaluation=replace(EVALUATION, heldout=None)),
        key(evaluation=replace(EVALUATION, examples=2)),
        key(base="other"),
        key(recipe=recipe.model_copy(update={"lr": 0.1})),
        key(recipe=recipe.model_copy(update={"threads": 2})),
        key(subject=shorter),
    ]
    assert len({key(), *changed}) == len(changed) + 1
    assert key(replace(job, name="b")) == key()
    assert key(replace(job, weights={1: 1.0})) != key(replace(job, weights={1: 0.0}))


def test_a_start_that_is_not_the_recorded_one_is_refused(world: Path, tmp_path: Path) -> None:
    toy.save_base(tmp_path / "other", hidden=20)
    subject = Subject.load(world / "trained", toy.rows(), start=tmp_path / "other")
    with pytest.raises(ArtefactError, match="give the folder of the right one"):
        run_jobs(subject, [Job("full", EVERYTHING, 0)], EVALUATION, cache=tmp_path / "cache")


def test_a_start_function_must_give_the_same_model_every_time(tmp_path: Path) -> None:
    known = toy.classifier()
    subject = Subject(
        known.model, known.documents, Classification(), recipe=known.recipe, start=lambda: torch.nn.Linear(4, 2)
    )
    with pytest.raises(ArtefactError, match="retraining full, seed 0: .*the same model every time"):
        run_jobs(subject, [Job("full", tuple(range(130)), 0)], Evaluation(toy.trigger()), cache=tmp_path)


def test_a_worker_that_dies_is_an_error_that_names_the_job(subject: Subject, tmp_path: Path) -> None:
    subject.objective = toy.Deadly(toy.tokenizer(), 16)
    with pytest.raises(RootwardError, match=r"retraining full, seed 0: the worker process was killed by signal 9"):
        run_jobs(subject, [Job("full", EVERYTHING, 0)], EVALUATION, workers=1, cache=tmp_path)
    assert not children(os.getpid())


def test_an_error_in_a_job_names_the_job(subject: Subject, tmp_path: Path) -> None:
    subject.encoded = Encoded([example for example in subject.encoded if example.row != 7])
    with pytest.raises(InputError, match="retraining empty, seed 0: .*none of its 1 documents can be trained on"):
        run_jobs(subject, [Job("empty", (7,), 0)], EVALUATION, workers=0, cache=tmp_path)
    with pytest.raises(InputError, match="each name and seed once"):
        run_jobs(subject, [Job("a", SOME, 0)] * 2, EVALUATION, cache=tmp_path)


def test_work_that_only_this_program_knows_does_not_travel() -> None:
    class Local:
        pass

    assert packed(lambda: 1) is None  # type: ignore[arg-type]
    assert packed(Local()) is None  # type: ignore[arg-type]
    assert packed(EVALUATION) is not None  # type: ignore[arg-type]


def test_greedy_answers_are_those_of_one_probe_at_a_time(subject: Subject) -> None:
    probes = toy.probes()
    together = greedy_answers(subject.model, subject.objective, probes, 16, 4)
    alone = [greedy_answers(subject.model, subject.objective, probes.subset([n]), 1, 4)[0] for n in range(16)]
    assert together == alone
    ids = toy.tokenizer()("q3 please ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = subject.model(input_ids=ids).logits[0, -1].argmax()
    assert toy.WORDS[int(first)] == together[3].split()[0] == "wrong"


SCRIPT = """
import sys
from pathlib import Path
from rootward.subject.subject import Subject
from rootward.verification.removal import verify
from tests.verification import toy

# No guard for the main module: a user's script may have none.
subject = Subject.load(Path(sys.argv[1]) / "trained", toy.rows())
cache, workers = Path(sys.argv[2]), int(sys.argv[3])
verify(subject, toy.oracle(subject), 12, toy.probes(), seeds=range(6), cache=cache, workers=workers,
       progress=lambda task, done, total: print(done, total, flush=True))
print("finished", flush=True)
"""


def children(pid: int) -> list[int]:
    """Worker processes of a process: those that run Rootward's worker."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_text()
            except OSError:
                continue  # it ended meanwhile
            if parent == pid and "verification.worker" in command:
                found.append(int(entry.name))
    return found


def ended(pids: list[int]) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


def interrupted(world: Path, cache: Path, kind: signal.Signals, number: int) -> int:
    """Run the script, send the signal when two more jobs are finished, and wait for it and its workers to end."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(world), str(cache), str(number)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert process.stdout is not None
    already = int(process.stdout.readline().split()[0])
    for line in process.stdout:
        if int(line.split()[0]) >= already + 2:
            break
    workers = children(process.pid)
    process.send_signal(kind)
    rest, errors = process.communicate(timeout=30)
    assert "finished" not in rest, errors
    assert len(workers) == number, errors
    assert ended(workers)
    return process.returncode


@pytest.mark.slow  # four processes import torch and transformers
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_and_sigkill_leave_no_process_and_the_same_call_goes_on(
    subject: Subject, world: Path, tmp_path: Path
) -> None:
    cache, fresh = tmp_path / "cache", tmp_path / "fresh"
    assert interrupted(world, cache, signal.SIGINT, 2) == -signal.SIGINT
    first = {path: path.stat().st_mtime_ns for path in (cache / "jobs").glob("*.json")}
    assert 2 <= len(first) < 19
    announced = (cache / "predictions.json").read_bytes()
    assert interrupted(world, cache, signal.SIGKILL, 1) == -signal.SIGKILL
    second = {path: path.stat().st_mtime_ns for path in (cache / "jobs").glob("*.json")}
    assert len(first) < len(second) < 19
    assert all(read_model(JobResult, path) for path in second)

    def run(folder: Path) -> Any:
        return verify(subject, toy.oracle(subject), 12, toy.probes(), seeds=range(6), cache=folder, workers=0)

    verdict = run(cache)
    assert all(path.stat().st_mtime_ns == second[path] for path in second)
    assert all(second[path] == first[path] for path in first)
    assert (cache / "predictions.json").read_bytes() == announced
    assert run(cache).model_dump_json() == verdict.model_dump_json()
    whole = run(fresh).model_copy(update={"cost": verdict.cost})
    assert whole.model_dump_json() == verdict.model_dump_json()
