"""Worker processes for retraining: started once, used for many jobs, gone when the call ends, however it ends."""

from __future__ import annotations

import io
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import spawn
from pathlib import Path
from types import FunctionType
from typing import Any

from rootward.core.errors import RootwardError
from rootward.verification.jobs import Job, Work, perform
from rootward.verification.worker import BOOT, receive, send

Task = tuple[Job, str, Path]
"""A job, its key, and the file for its result."""
_LINES = 20
"""Lines of a worker's log that an error shows."""


class _Pickler(pickle.Pickler):
    """Refuses what only this program's ``__main__`` defines: another process could not find it."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__":
            raise pickle.PicklingError(f"{obj.__qualname__} is defined in __main__")
        return NotImplemented


def packed(work: Work) -> bytes | None:
    """The work as bytes for another process; None where it cannot travel (a lambda, a class of ``__main__``)."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(work)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return buffer.getvalue()


def run_here(work: Work, tasks: Sequence[Task], done: Callable[[Job], None]) -> None:
    """All jobs in this process, one after another."""
    for job, key, path in tasks:
        try:
            perform(work, job, key, path)
        except RootwardError as error:
            raise type(error)(f"retraining {job.label}: {error}") from error
        done(job)


def import_path() -> list[str]:
    """Where this process finds its modules, as ``multiprocessing`` tells it to the processes that it spawns."""
    return list(spawn.get_preparation_data("rootward worker")["sys_path"])


class _Worker:
    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT.format(path=import_path())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C reaches this process alone, and it ends the workers
        )

    def ask(self, kind: str, value: Any) -> None:
        assert self.process.stdin is not None
        send(self.process.stdin, pickle.dumps((kind, value)))  # type: ignore[arg-type]

    def answer(self) -> Any:
        assert self.process.stdout is not None
        message = receive(self.process.stdout)  # type: ignore[arg-type]
        if message is None:
            raise EOFError
        return pickle.loads(message)

    def end(self, *, now: bool) -> None:
        """Close its input, upon which it ends; ``now`` kills it in the middle of a job."""
        if now:
            self.process.kill()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # what it did not read any more
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        for stream in (self.process.stdout, self.log):
            if stream is not None:
                stream.close()

    def last_words(self) -> str:
        """How it ended and the end of its log."""
        code = self.process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        if code == -9:
            how += " (often: out of memory; use fewer workers)"
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").splitlines()[-_LINES:]
        return how + ("; its last lines:\n" + "\n".join(lines) if lines else "; it wrote nothing")


def _serve(worker: _Worker, work: bytes, tasks: queue.SimpleQueue[Task], results: queue.SimpleQueue[Any]) -> None:
    """Feed one worker; runs in a thread of its own."""
    task: Task | None = None
    try:
        worker.ask("work", work)
        while True:
            try:
                task = tasks.get_nowait()
            except queue.Empty:
                return
            worker.ask("job", task)
            results.put((worker, task, worker.answer()))
    except (EOFError, OSError, ValueError):  # it died, or was ended (then nobody reads this)
        results.put((worker, task, None))
    except Exception:  # a fault of this thread must not leave the caller waiting
        results.put((worker, task, ("error", (None, "in the parent process", traceback.format_exc()))))


def run_pool(work: bytes, tasks: Sequence[Task], workers: int, done: Callable[[Job], None]) -> None:
    """All jobs in ``workers`` processes; ``done`` is called here for each as it finishes.

    When this returns or raises (Ctrl-C among it) no worker is left; results that were finished stay.

    Raises:
        RootwardError: a job failed or its worker died; the message names the job.
    """
    todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        todo.put(task)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    crew: list[_Worker] = []
    threads: list[threading.Thread] = []
    now = True
    try:
        for _ in range(min(workers, len(tasks))):
            crew.append(_Worker())
            threads.append(threading.Thread(target=_serve, args=(crew[-1], work, todo, results), daemon=True))
            threads[-1].start()
        for _ in tasks:
            worker, task, answer = results.get()
            if answer is None or answer[0] != "done":
                raise _failure(worker, task, answer)
            done(task[0])
        now = False
    finally:
        for worker in crew:
            worker.end(now=now)
        for thread in threads:
            thread.join()
        for worker in crew:
            worker.close()


def _failure(worker: _Worker, task: Task | None, answer: Any) -> RootwardError:
    what = "starting a worker" if task is None else f"retraining {task[0].label}"
    if answer is None:
        worker.end(now=False)
        return RootwardError(
            f"{what}: the worker process {worker.last_words()}\nFinished jobs stay; the same call goes on from there"
        )
    kind, text, trace = answer[1]
    if kind is not None:
        return kind(f"{what}: {text}")
    return RootwardError(f"{what}: {text}\n{trace}")
