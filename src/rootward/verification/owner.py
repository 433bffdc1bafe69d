"""Retraining with the owner's command: for a model that Rootward did not train."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from rootward.core.errors import ArtefactError, InputError, RootwardError
from rootward.core.records import write_model
from rootward.subject.documents import save_jsonl
from rootward.subject.loading import load_model, model_hash
from rootward.subject.subject import Subject
from rootward.verification.evaluation import Evaluation
from rootward.verification.jobs import Job, JobResult, known_versions

_LINES = 20


def command_of(template: str, documents: Path, out: Path, seed: int) -> list[str]:
    """The command's words. It is split before the paths are put in, so a path may hold spaces; no shell sees it."""
    values = {"documents": str(documents), "out": str(out), "model": str(out), "seed": str(seed)}
    return [word.format(**values) for word in shlex.split(template)]


def perform_owner(subject: Subject, job: Job, key: str, path: Path, evaluation: Evaluation) -> JobResult:
    """One job by the owner's command, measured and written to ``path``.

    The documents are written as JSONL, the command's output goes to ``<cache>/owner/<key>/log.txt``, and the model
    that it left in ``{out}`` is removed once it was measured.

    Raises:
        RootwardError: the command ended with a code other than 0, or left no model; with the last lines of its log.
        InputError: weights, which a list of documents cannot carry, or no start model to measure.
    """
    began = time.perf_counter()
    if job.weights is not None:
        raise InputError(f"{job.label}: the owner's command takes documents, not weights; use Drop or Keep")
    folder = path.parent.parent / "owner" / key
    source: Path
    if not job.train:
        if subject.base is None:
            raise InputError(f"{subject.name}: no start model is known; give its folder: start = ...")
        source = subject.base
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of this attempt's own: a killed attempt may have left another one half full.
        source = (folder / f"model-{os.getpid()}").resolve()
        shutil.rmtree(source, ignore_errors=True)
        documents = (folder / "documents.jsonl").resolve()
        save_jsonl(subject.documents.subset(job.rows), documents)
        _run(subject, job, command_of(str(subject.retrain_command), documents, source, job.seed), folder / "log.txt")
    dtype = str(next(subject.model.parameters()).dtype).removeprefix("torch.")
    try:
        model = load_model(source, base=subject.adapter_base, device=subject.device, dtype=dtype)[0]
    except ArtefactError as error:
        raise ArtefactError(
            f"{job.label}: the command succeeded and its model cannot be used: {error}\n{_tail(folder / 'log.txt')}"
        ) from error
    threads = subject.recipe.threads if subject.recipe is not None else 1
    result = JobResult(
        key=key,
        name=job.name,
        seed=job.seed,
        documents=len(job.rows),
        steps=0,
        seconds=round(time.perf_counter() - began, 3),
        final_hash=model_hash(model) if job.train else None,
        measured=evaluation.measure(model, subject.objective, threads=threads),
        versions=known_versions(),
    )
    write_model(path, result)
    if job.train:
        shutil.rmtree(source, ignore_errors=True)
    return result


def _run(subject: Subject, job: Job, words: list[str], log: Path) -> None:
    """Run the command to its end; Ctrl-C ends it and all that it started."""
    with log.open("wb") as output:
        output.write((shlex.join(words) + "\n").encode())
        output.flush()
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise InputError(
                f"{job.label}: cannot start {words[0]!r} of the retrain command: {error.strerror or error}"
            ) from error
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if code != 0:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise RootwardError(f"retraining {job.label} of {subject.name}: the command {how}\n{_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the command's process group to end; kill it after ten seconds."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, kind)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
        return


def _tail(log: Path) -> str:
    if not log.exists():
        return "it has no log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"last lines of {log}:\n" + "\n".join(lines[-_LINES:])
