"""The house stands: the command line starts fast, nothing unasked-for is installed, no link leads nowhere."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "sklearn", "scipy")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


# --- the command line ---------------------------------------------------------------------------------------


def test_help_answers_without_importing_torch():
    code = f"""
import sys
from rootward.cli.main import main
sys.argv = ["rootward", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = sorted(set({HEAVY!r}) & set(sys.modules))
sys.exit(f"imported for --help: {{heavy}}" if heavy else 0)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_help_takes_little_processor_time():
    # The aim is half a second on the clock. Processor time is measured instead, and the bound is doubled, so
    # that neighbours on the same cores do not fail the test.
    code = """
import resource, subprocess, sys
program = "import sys; from rootward.cli.main import main; sys.argv = ['rootward', '--help']; main()"
subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print(use.ru_utime + use.ru_stime)
"""
    seconds = []
    for _ in range(3):
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < 1.0, f"rootward --help took {seconds} s of processor time"


# --- what is installed --------------------------------------------------------------------------------------


def test_a_cpu_build_of_torch_brings_no_cuda_packages():
    import torch

    if torch.version.cuda is not None:
        pytest.skip(f"torch {torch.__version__} is a CUDA build: CUDA packages are expected")
    names = sorted(canonicalize_name(found.metadata["Name"]) for found in distributions())
    assert [name for name in names if name.startswith("nvidia-")] == []


def project_requirements() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    named = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in named}


def test_every_requirement_is_pinned_within_its_bounds():
    pinned = pins()
    for requirement in project_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is required in pyproject.toml but not pinned in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{name} {pinned[name]} is outside {requirement.specifier}"


def test_pins_name_no_local_build_and_no_torchvision():
    for name, version in pins().items():
        assert version.local is None, f"{name} is pinned to the local build {version}"
    assert not {"torchvision", "torchaudio"} & pins().keys()


# --- the pages ----------------------------------------------------------------------------------------------

PAGES = sorted({*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")})


def broken_links(page: Path) -> list[str]:
    """Targets of relative links on `page` that lead to no file; code blocks and code spans are not read."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "`code`", text)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    paths = [target.split("#")[0] for target in targets if not re.match(r"[a-z][a-z+.-]*:", target)]
    return [path for path in paths if path and not (page.parent / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_relative_links_lead_to_files(page: Path):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("[a](missing.md#there) [b](page.md) [c](https://x.org) `[d](no.md)` [e](#here)\n")
    assert broken_links(page) == ["missing.md"]


def test_the_readme_names_the_two_commands():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


# --- the Makefile -------------------------------------------------------------------------------------------


def test_make_bench_runs_every_benchmark_and_distclean_removes_both_environments():
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"^BENCHMARKS := (.*)$", text, re.MULTILINE)
    assert named is not None
    there = {path.stem.removeprefix("bench_") for path in (REPOSITORY / "benchmarks").glob("bench_*.py")}
    assert set(named[1].split()) == there
    assert "distclean: clean\n\trm -rf $(VENV) $(PEERS)\n" in text
