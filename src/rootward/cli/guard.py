"""What surrounds every command: the environment, signals, exit codes and how an error is told.

0 done   1 failed   2 usage, config or input   3 the check ran and did not pass   4 missing or mismatching artefact
5 stopped, the same command continues   130 Ctrl-C
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.core.errors import RootwardError

if TYPE_CHECKING:
    import typer

    from rootward.cli.output import Talk

DONE, FAILED, USAGE, NOT_PASSED, ARTEFACT, RESUMABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # never the network, unless the user says so
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products on an accelerator
}
CONTINUE = {
    "index": "finished shards are kept; run the same command again to continue",
    "verify": "finished retrainings are kept; run the same command again to continue",
    "compare": "finished scores and retrainings are kept; run the same command again to continue",
    "trace": "the run is marked as stopped; run the same command again, it begins anew",
    "train": "nothing was written; run the same command again, it begins anew",
}


class Terminated(BaseException):
    """SIGTERM: the machine wants the process gone; what is finished stays."""


def run_app(app: typer.Typer, argv: Sequence[str]) -> int:
    """Parse and run; usage errors end here, those of a command in `guarded`."""
    import typer

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    command = typer.main.get_command(app)
    if not argv:
        argv = ["--help"]
    try:
        code = command.main(args=list(argv), prog_name="rootward", standalone_mode=False)
    except Exception as error:
        told = getattr(error, "format_message", None)  # what typer raises lives in another module in every release
        if told is None:
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "rootward")
        _tell("UsageError", f"{told()}\nsee `{where} --help`", USAGE, as_json="--json" in argv, command=str(where))
        return USAGE
    return code if isinstance(code, int) else DONE


def guarded(command: str, given: Mapping[str, Any], work: Callable[[Talk], int]) -> int:
    """Run a command's work and turn how it ends into an exit code and, for errors, one short block on stderr."""
    from rootward.cli.output import Talk

    talk = Talk(as_json=bool(given["json"]), quiet=bool(given["quiet"]), debug=bool(given["debug"]))
    try:
        with _signals(), warnings.catch_warnings():
            if not talk.debug:
                warnings.simplefilter("ignore")  # of other libraries: ours are errors or notes in the run
            code = work(talk)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt, Terminated) as error:
        talk.stop()
        if talk.debug:
            traceback.print_exc(file=sys.stderr)
        kind, message, code = explain(command, error)
        _tell(kind, message, code, as_json=talk.as_json, command=f"rootward {command}")
        return code
    finally:
        talk.stop()


def explain(command: str, error: BaseException) -> tuple[str, str, int]:
    """Kind, message and exit code of how a command ended."""
    kind = type(error).__name__
    advice = CONTINUE.get(command, "")
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", f"stopped by Ctrl-C{'; ' + advice if advice else ''}", INTERRUPTED
    if isinstance(error, Terminated):
        return "Terminated", f"stopped by SIGTERM{'; ' + advice if advice else ''}", RESUMABLE
    if isinstance(error, RootwardError):
        return kind, str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "StorageError",
            f"the disk is full ({error.filename or 'no file named'}): free space; {advice}",
            RESUMABLE,
        )
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        return kind, f"{what}{error.strerror or error}", FAILED
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return (
            "OutOfMemory",
            f"out of memory ({str(error).splitlines()[0] if str(error) else kind}); lower --token-budget",
            FAILED,
        )
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    first = str(error).splitlines()[0] if str(error) else "no message"
    return (
        kind,
        f"unexpected {kind}{place}: {first}\nrun it again with --debug for the traceback, and report it",
        FAILED,
    )


def _tell(kind: str, message: str, code: int, *, as_json: bool, command: str) -> None:
    from rootward.cli.output import Talk, clean

    if as_json:
        Talk(as_json=True).document(
            {"error": {"type": kind, "message": message, "exit_code": code, "command": command}}
        )
    lines = clean(message, lines=True).splitlines() or [kind]
    sys.stderr.write("\n".join([f"{command}: {lines[0]}", *(f"  {line}" for line in lines[1:])]) + "\n")
    sys.stderr.flush()


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the main thread; put back afterwards."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: whoever started it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
