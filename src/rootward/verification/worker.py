"""A process that retrains: reads jobs from its input, writes results to files, and ends when its input ends.

It is started as a program of its own, not forked and not through ``multiprocessing``: so it works from the ``rootward``
script, from pytest, from a notebook, and from a user's script without an ``if __name__ == "__main__"`` guard. When the
process that started it is gone, however it went, its input ends and so does the worker, in the middle of a step.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
from typing import Any, BinaryIO

_SIZE = struct.Struct("!Q")

BOOT = "import sys; sys.path[:] = {path!r}; from rootward.verification.worker import main; main()"
"""Program of a worker: the import path of the process that starts it, then `main`."""


def send(stream: BinaryIO, value: bytes) -> None:
    """One message: its length, then itself."""
    stream.write(_SIZE.pack(len(value)))
    stream.write(value)
    stream.flush()


def receive(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    (size,) = _SIZE.unpack(head)
    body = stream.read(size)
    return body if len(body) == size else None


def _listen(stream: BinaryIO, messages: queue.SimpleQueue[bytes]) -> None:
    while (message := receive(stream)) is not None:
        messages.put(message)
    os._exit(0)  # nobody is left to work for; results are written atomically, so nothing can be half done


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends the workers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to the log and not between the answers
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, messages), daemon=True).start()
    work: Any = None
    while True:
        kind, value = pickle.loads(messages.get())
        if kind == "work":
            work = pickle.loads(value)
            continue
        send(answers, pickle.dumps(_answer(work, *value)))


def _answer(work: Any, job: Any, key: str, path: Any) -> tuple[str, Any]:
    """("done", key), or ("error", (the exception or its text, traceback))."""
    from rootward.core.errors import RootwardError
    from rootward.verification.jobs import perform

    try:
        perform(work, job, key, path)
    except RootwardError as error:
        return "error", (type(error), str(error), traceback.format_exc())
    except Exception as error:  # sent to the parent, which raises it with the job's name
        return "error", (None, f"{type(error).__name__}: {error}", traceback.format_exc())
    return "done", key
