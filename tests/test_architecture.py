"""The plan of the house (docs/design.md, section 2) read from the source: who imports whom, what no one does.

A rule is a function from a tree of files to a list of complaints. Each is run on this repository, and each is
shown to be able to fail on a small bad tree below.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

# --- the plan -----------------------------------------------------------------------------------------------

BELOW_METHODS = (
    "core",
    "subject",
    "capture",
    "curvature",
    "dictionaries",
    "scoring",
    "interventions",
    "verification",
)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "core": (),
    "subject": ("core",),
    "capture": ("core", "subject", "curvature"),
    "curvature": ("core",),
    "dictionaries": ("core",),
    "scoring": ("core",),
    "interventions": ("core", "subject"),
    "verification": ("core", "subject", "interventions", "scoring"),
    "methods": BELOW_METHODS,
    "sandbox": ("core", "subject"),
    "report": ("core.records",),
    "cli": (*BELOW_METHODS, "methods", "sandbox", "report"),
}
# The public face: `__init__.py` and `api.py` may use every room but cli; `__main__.py` starts the cli.
TOP_MODULES = {"__init__", "__main__", "api"}
QUESTIONS = {
    "attribution", "discovery", "concepts", "steering", "editing", "monitoring", "tracing", "elicitation",
}  # fmt: skip
# Baselines that no paper owns may have a plain name; everything else is shortname_firstauthorYEAR.
BASELINES = {
    "bm25", "tfidf", "length", "document_length", "loss", "random", "gradient_dot", "gradient_cosine",
    "gradient_norm", "representation_dot", "representation_cosine", "embedding_cosine", "shuffled_labels",
    "equal_norm_random", "clean_regeneration",
}  # fmt: skip
PAPER = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*_[a-z]+(19|20)\d\d")
OTHER_TEST_FOLDERS = {"data", "examples", "benchmarks", "__pycache__"}
MODEL_LIBRARIES = ("transformers", "peft", "accelerate")
TORCH_LIBRARIES = ("torch", "safetensors.torch", *MODEL_LIBRARIES)
WITHOUT_MODEL = {"core", "curvature", "dictionaries", "scoring"}
FILE_LINES = 500  # the guide is 300
FUNCTION_LINES = 90  # the guide is 60


# --- reading the source -------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported module, where it stands, and whether importing the file runs it."""

    target: str
    line: int
    at_import: bool


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str  # "rootward.core.records"
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def room(self) -> str:
        """The folder under rootward, or the empty string for a file at the top."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 2 or (len(parts) == 2 and self.is_package) else ""


class House:
    """The files of a repository, and the imports among them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "src" / "rootward"
        self.tests = root / "tests"
        self.modules: dict[str, Module] = {}
        for path in sorted(self.package.rglob("*.py")):
            parts = ["rootward", *path.relative_to(self.package).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.modules[name] = Module(name, path)

    def rooms(self) -> list[str]:
        folders = (path for path in self.package.iterdir() if path.is_dir()) if self.package.is_dir() else ()
        return sorted(path.name for path in folders if path.name != "__pycache__" and any(path.rglob("*.py")))

    def outside_cli(self) -> list[Module]:
        return [module for module in self.modules.values() if module.room != "cli"]

    def place(self, module: Module, line: int) -> str:
        return f"{module.path.relative_to(self.root).as_posix()}:{line}"

    def imports(self, module: Module) -> Iterator[Import]:
        """Every import: nested in functions, relative, for type checking, by `import_module("...")`."""
        for node, at_import in statements(module.tree):
            for target in self._targets(module, node):
                yield Import(target, getattr(node, "lineno", 0), at_import)

    def _targets(self, module: Module, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                kept = parts[: len(parts) - node.level + module.is_package]
                base = ".".join([*kept, base] if base else kept)
            return [self._with_name(base, alias.name) for alias in node.names]
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                return [node.args[0].value]
        return []

    def _with_name(self, base: str, name: str) -> str:
        """`from base import name` imports the module base.name where there is one, else base."""
        full = f"{base}.{name}"
        is_room = base == "rootward" and name in MAY_IMPORT
        is_library = not base.startswith("rootward") and full in TORCH_LIBRARIES
        return full if full in self.modules or is_room or is_library else base


def statements(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `node`, with whether importing the file runs it."""
    if isinstance(node, ast.If) and is_type_checking(node.test):
        branches = [(child, False) for child in node.body] + [(child, at_import) for child in node.orelse]
    else:
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        branches = [(child, at_import and not deferred) for child in ast.iter_child_nodes(node)]
    for child, runs in branches:
        yield child, runs
        yield from statements(child, runs)


def is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def is_part_of(target: str, modules: tuple[str, ...]) -> bool:
    return any(target == module or target.startswith(f"{module}.") for module in modules)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, or the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        below = dotted(node.value)
        return f"{below}.{node.attr}" if below else ""
    return ""


def uses(module: Module, library: str, names: set[str]) -> Iterator[int]:
    """Lines that use `library.name`, under whatever name the file knows it."""
    aliases = {library}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname for alias in node.names if alias.name == library and alias.asname}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module == library:
            yield from (node.lineno for alias in node.names if alias.name in names)
        elif isinstance(node, ast.Attribute) and node.attr in names and dotted(node.value) in aliases:
            yield node.lineno


# --- the rules ----------------------------------------------------------------------------------------------


def every_room_is_in_the_table(house: House) -> list[str]:
    strangers = [f"src/rootward/{room}/ is not a room of the table" for room in house.rooms() if room not in MAY_IMPORT]
    for module in house.modules.values():
        if not module.room and module.path.stem not in TOP_MODULES:
            strangers.append(f"{house.place(module, 1)} belongs in a room, not at the top of the package")
    return strangers


def imports_follow_the_table(house: House) -> list[str]:
    complaints = []
    for module in house.modules.values():
        for found in house.imports(module):
            if is_part_of(found.target, ("rootward",)) and not may_import(module, found.target):
                complaints.append(f"{house.place(module, found.line)} may not import {found.target}")
    return complaints


def may_import(module: Module, target: str) -> bool:
    inside = target.removeprefix("rootward").removeprefix(".")
    room = inside.split(".")[0]
    if not module.room:
        return module.path.stem == "__main__" or room != "cli"
    if module.room == "cli":
        return True
    if room == module.room:
        return module.room != "methods" or module.is_package
    return bool(inside) and is_part_of(inside, MAY_IMPORT.get(module.room, ()))


def records_and_report_come_without_torch(house: House) -> list[str]:
    """What importing `core.records` or the report room sets off, packages on the way included."""
    starts = [name for name in house.modules if name == "rootward.core.records" or name.startswith("rootward.report")]
    complaints = []
    for start in starts:
        seen, waiting = set[str](), [start]
        while waiting:
            name = waiting.pop()
            parts = name.split(".")
            waiting += [above for n in range(1, len(parts)) if (above := ".".join(parts[:n])) not in seen]
            module = house.modules.get(name)
            if name in seen or module is None:
                continue
            seen.add(name)
            for found in house.imports(module):
                if is_part_of(found.target, TORCH_LIBRARIES) and (found.at_import or module.room == "report"):
                    place = house.place(module, found.line)
                    complaints.append(f"{place} imports {found.target}, so {start} does not come without torch")
                elif found.at_import and is_part_of(found.target, ("rootward",)):
                    waiting.append(found.target)
    return complaints


def rooms_of_mathematics_see_no_model(house: House) -> list[str]:
    return [
        f"{house.place(module, found.line)} imports {found.target}, but {module.room} never sees a model"
        for module in house.modules.values()
        if module.room in WITHOUT_MODEL
        for found in house.imports(module)
        if is_part_of(found.target, MODEL_LIBRARIES)
    ]


def only_cli_prints(house: House) -> list[str]:
    return [
        f"{house.place(module, node.lineno)} prints"
        for module in house.outside_cli()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in {"print", "builtins.print"}
    ]


def failures_stay_visible(house: House) -> list[str]:
    complaints = []
    for module in house.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                complaints.append(f"{house.place(module, node.lineno)} has a bare except")
            elif isinstance(node, ast.ExceptHandler) and catches_all(node.type) and all(map(does_nothing, node.body)):
                complaints.append(f"{house.place(module, node.lineno)} catches every exception and drops it")
            elif isinstance(node, ast.Call) and dotted(node.func) in {"suppress", "contextlib.suppress"}:
                suppressed = [argument for argument in node.args if catches_all(argument)]
                complaints += [f"{house.place(module, node.lineno)} suppresses every exception" for _ in suppressed]
    return complaints


def catches_all(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(catches_all(part) for part in caught.elts)
    return caught is not None and dotted(caught) in {"Exception", "BaseException"}


def does_nothing(statement: ast.stmt) -> bool:
    is_literal = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_literal or isinstance(statement, ast.Pass | ast.Continue)


def no_one_edits_sys_path(house: House) -> list[str]:
    return [
        f"{house.place(module, line)} uses sys.path"
        for module in house.modules.values()
        for line in uses(module, "sys", {"path"})
    ]


def only_cli_reads_the_environment(house: House) -> list[str]:
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    return [
        f"{house.place(module, line)} reads or writes the environment"
        for module in house.outside_cli()
        for line in uses(module, "os", names)
    ]


def files_are_short(house: House) -> list[str]:
    sizes = [(module, len(module.text.splitlines())) for module in house.modules.values()]
    return [
        f"{house.place(module, 1)} has {lines} lines, the limit is {FILE_LINES}"
        for module, lines in sizes
        if lines > FILE_LINES
    ]


def functions_are_short(house: House) -> list[str]:
    complaints = []
    for module in house.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    place = house.place(module, node.lineno)
                    complaints.append(f"{place} {node.name} has {lines} lines, the limit is {FUNCTION_LINES}")
    return complaints


def method_files(house: House) -> list[Module]:
    return [module for module in house.modules.values() if module.room == "methods" and not module.is_package]


def method_files_are_named_after_their_paper(house: House) -> list[str]:
    complaints = []
    for module in method_files(house):
        folder, stem = module.path.parent.name, module.path.stem
        if folder not in QUESTIONS or module.path.parent.parent != house.package / "methods":
            complaints.append(f"{house.place(module, 1)} is not in methods/<question>/, one of {sorted(QUESTIONS)}")
        if stem not in BASELINES and not PAPER.fullmatch(stem):
            complaints.append(f"{house.place(module, 1)} is not named shortname_firstauthorYEAR.py, nor a baseline")
    return complaints


def every_method_has_a_test(house: House) -> list[str]:
    tests = {path.stem for path in (house.tests / "methods").rglob("test_*.py")}
    return [
        f"{house.place(module, 1)} has no tests/methods/test_{module.path.stem}.py"
        for module in method_files(house)
        if f"test_{module.path.stem}" not in tests
    ]


def folders_of_tests_mirror_the_package(house: House) -> list[str]:
    with_code = {module.room for module in house.modules.values() if module.room and not module.is_package}
    complaints = [
        f"src/rootward/{room}/ has code, tests/{room}/ has no test"
        for room in sorted(with_code)
        if not any((house.tests / room).rglob("test_*.py"))
    ]
    folders = (path.name for path in house.tests.iterdir() if path.is_dir()) if house.tests.is_dir() else ()
    strangers = sorted(set(folders) - MAY_IMPORT.keys() - OTHER_TEST_FOLDERS)
    return complaints + [f"tests/{folder}/ mirrors no room of src/rootward" for folder in strangers]


Rule = Callable[[House], list[str]]
RULES: tuple[Rule, ...] = (
    every_room_is_in_the_table,
    imports_follow_the_table,
    records_and_report_come_without_torch,
    rooms_of_mathematics_see_no_model,
    only_cli_prints,
    failures_stay_visible,
    no_one_edits_sys_path,
    only_cli_reads_the_environment,
    files_are_short,
    functions_are_short,
    method_files_are_named_after_their_paper,
    every_method_has_a_test,
    folders_of_tests_mirror_the_package,
)


def name_of(rule: Rule) -> str:
    return rule.__name__


# --- this repository ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def this_house() -> House:
    return House(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_this_repository_keeps_the_rule(rule: Rule, this_house: House):
    complaints = rule(this_house)
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_table_is_the_one_in_the_design():
    page = Path(__file__).resolve().parents[1] / "docs" / "design.md"
    table = page.read_text(encoding="utf-8").split("| room | may import | never |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()[1:]]
    written = {room: cells[1] for cells in rows for room in cells[0].split(", ")}
    assert written.keys() == MAY_IMPORT.keys()
    in_words = {"nothing of rootward": (), "all the above": BELOW_METHODS, "all": MAY_IMPORT["cli"]}
    for room, text in written.items():
        assert in_words.get(text, tuple(text.split(", "))) == MAY_IMPORT[room], room


# --- every rule can fail ------------------------------------------------------------------------------------

GOOD = {
    "src/rootward/__init__.py": "def attribute():\n    from rootward.scoring import topk\n    return topk\n",
    "src/rootward/__main__.py": "from rootward.cli.main import main\n",
    "src/rootward/core/__init__.py": "",
    "src/rootward/core/records.py": (
        "from typing import TYPE_CHECKING\n"
        "from rootward.core import errors\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def load():\n    import torch\n    return torch\n"
    ),
    "src/rootward/core/errors.py": "class RootwardError(Exception):\n    pass\n",
    "src/rootward/core/types.py": "import torch\nfrom rootward.core.errors import RootwardError\n",
    "src/rootward/scoring/topk.py": "import torch\nfrom rootward.core import types\n",
    "src/rootward/methods/__init__.py": "",
    "src/rootward/methods/attribution/bm25.py": "from rootward.core import types\n",
    "src/rootward/methods/attribution/trak_park2023.py": "from rootward.scoring.topk import top\n",
    "src/rootward/report/page.py": "from rootward.core.records import load\nimport rootward.report.assets\n",
    "src/rootward/report/assets/page.js": "print('not Python')",
    "src/rootward/cli/main.py": "import os\nfrom rootward import attribute\nprint(os.environ)\n",
    "tests/core/test_records.py": "",
    "tests/scoring/test_topk.py": "",
    "tests/methods/test_bm25.py": "",
    "tests/methods/attribution/test_trak_park2023.py": "",
    "tests/report/test_page.py": "",
    "tests/cli/test_main.py": "",
}
CORE = "core/bad.py"
SCORING = "scoring/bad.py"
RECORDS = "core/records.py"
REPORT = "report/bad.py"
TRAK = "methods/attribution/trak_park2023.py"
# For each rule: a file that breaks it (under src/rootward, or tests), its text, what the complaint must say.
BAD: dict[Rule, list[tuple[str, str, str]]] = {
    every_room_is_in_the_table: [
        ("utils/x.py", "", "utils/ is not a room"),
        ("helpers.py", "", "belongs in a room"),
    ],
    imports_follow_the_table: [
        (CORE, "from rootward.subject import load\n", "bad.py:1 may not import rootward.subject"),
        (CORE, "import rootward.capture.store\n", "rootward.capture.store"),
        (CORE, "from rootward import scoring\n", "rootward.scoring"),
        (CORE, "from rootward import attribute\n", "may not import rootward"),
        (CORE, "def f():\n    import rootward.subject\n", "bad.py:2"),
        (CORE, "class A:\n    async def f(self):\n        from ..subject import b\n", "bad.py:3"),
        (CORE, "from .. import subject\n", "rootward.subject"),
        ("core/__init__.py", "from ..cli import main\n", "rootward.cli.main"),
        (CORE, "if TYPE_CHECKING:\n    from rootward.subject import S\n", "bad.py:2"),
        (CORE, "importlib.import_module('rootward.methods')\n", "rootward.methods"),
        (SCORING, "import rootward.capture\n", "rootward.capture"),
        ("verification/bad.py", "import rootward.capture\n", "rootward.capture"),
        ("sandbox/bad.py", "import rootward.methods\n", "rootward.methods"),
        (TRAK, "from rootward.methods.attribution import bm25\n", "attribution.bm25"),
        (TRAK, "from . import bm25\n", "attribution.bm25"),
        (TRAK, "import rootward.report\n", "rootward.report"),
        (REPORT, "from rootward.core import types\n", "rootward.core.types"),
        (REPORT, "import rootward.core\n", "rootward.core"),
        ("__init__.py", "from rootward.cli import main\n", "rootward.cli.main"),
    ],
    records_and_report_come_without_torch: [
        (RECORDS, "import torch\n", "imports torch"),
        (RECORDS, "try:\n    from torch import nn\nexcept E: ...\n", "records.py:2"),
        (RECORDS, "from rootward.core.types import S\n", "types.py:1 imports torch"),
        ("core/__init__.py", "import peft\n", "imports peft"),
        ("__init__.py", "from rootward.core import types\n", "types.py"),
        (REPORT, "def f():\n    from torch import nn\n", "bad.py:2"),
        (REPORT, "from safetensors import torch\n", "safetensors.torch"),
    ],
    rooms_of_mathematics_see_no_model: [
        (SCORING, "from transformers import AutoModel\n", "imports transformers"),
        ("curvature/bad.py", "def f():\n    import peft.tuners\n", "peft"),
    ],
    only_cli_prints: [
        (CORE, "def f():\n    print('x')\n", "bad.py:2 prints"),
    ],
    failures_stay_visible: [
        (CORE, "try:\n    f()\nexcept:\n    raise\n", "bad.py:3 has a bare except"),
        (CORE, "try:\n    f()\nexcept Exception:\n    pass\n", "drops it"),
        (CORE, "try:\n    f()\nexcept (OSError, BaseException) as e:\n    ...\n", "drops it"),
        ("cli/x.py", "for x in y:\n try: f()\n except Exception: continue\n", "drops it"),
        (CORE, "with contextlib.suppress(Exception):\n    f()\n", "suppresses"),
    ],
    no_one_edits_sys_path: [
        (CORE, "import sys\nsys.path.append('x')\n", "bad.py:2 uses sys.path"),
        (CORE, "from sys import path\n", "uses sys.path"),
        ("cli/x.py", "import sys as s\ns.path.insert(0, 'x')\n", "x.py:2"),
    ],
    only_cli_reads_the_environment: [
        (CORE, "import os\nos.environ['X']\n", "bad.py:2"),
        (CORE, "import os as _os\n_os.getenv('X')\n", "bad.py:2"),
        (CORE, "from os import environ as e\n", "bad.py:1"),
    ],
    files_are_short: [
        (CORE, "x = 1\n" * (FILE_LINES + 1), f"{FILE_LINES + 1} lines"),
    ],
    functions_are_short: [
        (CORE, "def f():\n" + "    x = 1\n" * FUNCTION_LINES, f"f has {FUNCTION_LINES + 1} lines"),
    ],
    method_files_are_named_after_their_paper: [
        ("methods/attribution/trak.py", "", "not named"),
        ("methods/attribution/trak_v2.py", "", "not named"),
        ("methods/attribution/_shared.py", "", "not named"),
        ("methods/trak_park2023.py", "", "not in methods/<question>"),
        ("methods/misc/trak_park2023.py", "", "<question>"),
    ],
    every_method_has_a_test: [
        ("methods/concepts/caa_rimsky2023.py", "", "test_caa_rimsky2023.py"),
    ],
    folders_of_tests_mirror_the_package: [
        ("capture/hooks.py", "", "tests/capture/ has no test"),
        ("tests/misc/test_x.py", "", "tests/misc/ mirrors no room"),
    ],
}  # fmt: skip
CASES = [
    pytest.param(rule, *bad, id=f"{name_of(rule)}-{n}") for rule in RULES for n, bad in enumerate(BAD.get(rule, []))
]


def build(root: Path, files: dict[str, str]) -> House:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return House(root)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_a_good_tree_keeps_the_rule(rule: Rule, tmp_path: Path):
    assert rule(build(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "file", "text", "complaint"), CASES)
def test_a_bad_tree_breaks_the_rule(rule: Rule, file: str, text: str, complaint: str, tmp_path: Path):
    path = file if file.startswith("tests/") else f"src/rootward/{file}"
    complaints = rule(build(tmp_path, {**GOOD, path: text}))
    assert any(complaint in found for found in complaints), complaints


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_every_rule_is_shown_to_fail(rule: Rule):
    assert BAD.get(rule)


def test_limits_are_inclusive(tmp_path: Path):
    body = "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)
    text = body + "x = 1\n" * (FILE_LINES - FUNCTION_LINES)
    house = build(tmp_path, {**GOOD, "src/rootward/core/long.py": text})
    assert files_are_short(house) == []
    assert functions_are_short(house) == []
