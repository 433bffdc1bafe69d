"""``rootward doctor``: can this machine run Rootward?"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from rootward.cli.guard import DONE, FAILED
from rootward.cli.output import Talk, size

NEEDED = (
    "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "scipy", "pydantic", "pyarrow",
    "bm25s", "psutil", "rich", "typer",
)  # fmt: skip
LOW_DISK = 2 * 10**9
LOW_MEMORY = 2 * 10**9
Check = tuple[str, str, str]
"""(what, "ok", "note" or "broken", detail)"""


def run(talk: Talk) -> int:
    """Look at everything; `FAILED` if something that is needed does not work."""
    checks = [*_imports(), *_devices(), *_space(), *_environment()]
    broken = [name for name, state, _ in checks if state == "broken"]
    talk.table([("check", "left"), ("", "left"), ("found", "left")], checks)
    talk.say(f"Broken: {', '.join(broken)}." if broken else "All that is needed works.")
    document = [{"check": name, "state": state, "found": detail} for name, state, detail in checks]
    talk.result("doctor", {"ok": not broken, "checks": document})
    return FAILED if broken else DONE


def _imports() -> list[Check]:
    from rootward.core.records import machine, versions

    found = versions()
    here = machine()
    checks: list[Check] = [
        ("rootward", "ok", f"{_rootward()}, Python {found['python']}"),
        ("processor", "ok", f"{here['processor']}, {here['cores']} cores, {here['system']}"),
    ]
    for name in NEEDED:
        try:
            importlib.import_module(name)
            checks.append((name, "ok", _version(name)))
        except Exception as error:  # a broken install raises anything
            checks.append((name, "broken", f"{type(error).__name__}: {error}; pip install --force-reinstall {name}"))
    return checks


def _rootward() -> str:
    from rootward import __version__

    return __version__


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _devices() -> list[Check]:
    try:
        import torch
    except Exception:
        return [("devices", "broken", "torch does not import")]
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    works = bool((product == 2).all())
    checks: list[Check] = [("cpu", "ok" if works else "broken", f"{torch.get_num_threads()} threads of torch")]
    if not torch.cuda.is_available():
        return [*checks, ("cuda", "note", "none; everything runs on the CPU")]
    for n in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(n)
        checks.append((f"cuda:{n}", "ok", f"{torch.cuda.get_device_name(n)}, {size(free)} of {size(total)} free"))
    return checks


def _space() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    checks: list[Check] = [("free disk here", "ok" if free > LOW_DISK else "note", size(free))]
    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd()):
            checks.append(("can write here", "ok", str(Path.cwd())))
    except OSError as error:
        checks.append(("can write here", "note", f"{Path.cwd()}: {error.strerror}; use --out elsewhere"))
    try:
        import psutil

        memory = psutil.virtual_memory()
        state = "ok" if memory.available > LOW_MEMORY else "note"
        checks.append(("free memory", state, f"{size(memory.available)} of {size(memory.total)}"))
    except ImportError:
        checks.append(("free memory", "note", "unknown without psutil"))
    return checks


def _environment() -> list[Check]:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    online = "the hub may be asked (HF_HUB_OFFLINE is 0), though Rootward itself reads local files only"
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    text = ", ".join(f"{name}={value}" for name, value in threads.items()) or "not limited by the environment"
    return [
        ("network", "ok" if offline else "note", "not used (HF_HUB_OFFLINE=1)" if offline else online),
        ("threads", "ok", text),
        ("browser", "ok", "not needed: the page is one file that any browser opens"),
    ]
