"""Write docs/methods.md from the methods' cards and the measured results: ``python benchmarks/methods_page.py``.

A result is ``benchmarks/results/<name>.json`` as `benchmarks.lds_table.Table.write` writes it. A row named by a
method's key, alias or preset is that method or preset; with a word more (``logra_ekfac``) it is that one with the row's
options. What is not measured is said to be so, with the reason where ``not_applicable`` has one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from rootward.core import registry  # noqa: E402 - the folder above holds the package
from rootward.core.registry import Card, Method  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = {"digits_lds": "small classifier", "lm_lds": "small language model"}
"""File in `RESULTS` -> what it is called on the page."""
SMOOTH = ("magic", "ekfac", "gradient_dot", "random")
"""What was measured on runs that are smooth in the documents' weights."""
QUESTIONS = {"attribution": "Which documents?"}
UNKNOWN = "not measured yet"
INTRO = """\
# Methods

*Written by `python benchmarks/methods_page.py` from the methods' own cards and the measured results; edit those.*

What ranks documents, with its paper, its price and how well it predicts retraining. **LDS** (linear datamodeling score)
is the rank correlation of a method's scores, summed over random subsets of the documents, with what training on those
subsets gave: 1 is perfect, 0 is chance. **Passes** is the time taken over that of one plain forward and backward pass
over the same documents, on both models in the order of the columns, for scores of each of about a hundred queries by
itself, on models whose plain pass takes milliseconds: for 16 queries on a larger one EK-FAC takes 2.05 passes
(`benchmarks/run.py ekfac_speed`). Both depend on the model: `rootward compare` measures them on yours.
Terms: [glossary](glossary.md).
"""
GUIDE = {
    "checkpoints of the training": ("ekfac_checkpoints", "tracin_cp"),
    "the final weights alone": ("ekfac", "gradient_cosine"),
    "the final weights of a training by SGD": ("ekfac_joint", "ekfac"),
    "a run that can be repeated exactly, and few queries": ("magic",),
    "no time for gradients": ("bm25", "representation_cosine"),
}
"""What somebody has -> what to begin with, the best first and then the cheaper one."""

Results = Mapping[str, Mapping[str, Any]]
"""Benchmark -> its document."""


@dataclass(frozen=True)
class Line:
    """A method, a preset of it or a row that is it with options, and where to look that up in a result.

    ``reasons``: names under which ``not_applicable`` may say why there is no row, the nearest first.
    """

    title: str
    names: tuple[str, ...]
    reasons: tuple[str, ...]
    options: Mapping[str, Any]

    def row(self, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What was measured under one of the names."""
        wanted = {name.lower() for name in self.names}
        return next((row for name, row in ours(result) if name.lower() in wanted), None)

    def lds(self, found: Results, bench: str) -> str:
        """The LDS with its interval, or a dash with the reason."""
        if bench not in found:
            return UNKNOWN
        row = self.row(found[bench])
        if row is not None:
            return interval(row["lds"])
        own = self.smooth(found)
        if bench in own:
            return f"{interval(own[bench][-1][1])} (a smooth run)"
        refused = {name.lower(): reason for name, reason in found[bench]["not_applicable"].items()}
        return f"— ({next((refused[n] for name in self.reasons if (n := name.lower()) in refused), 'not run')})"

    def smooth(self, found: Results) -> Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]:
        """The line's part of `smooth`."""
        measured = smooth(found)
        return next((measured[name] for name in self.names if name in measured), {})

    def passes(self, found: Results) -> str:
        """Measured costs by benchmark."""
        trainings = self.smooth(found).get("trainings")
        if trainings:
            return " / ".join(f"{number(one['value'])} trainings" for _, one in trainings) + " a query"
        return ratios([self.row(found[bench]) if bench in found else None for bench in BENCHMARKS])

    def details(self, found: Results) -> Iterator[tuple[str, str]]:
        """How the LDS depends on the damping, and what the runs noted, by benchmark."""
        for bench, words in BENCHMARKS.items():
            row = self.row(found[bench]) if bench in found else None
            if row is None:
                continue
            if row["damping_curve"]:
                points = ", ".join(f"{number(damping)}: {number(lds)}" for damping, lds in row["damping_curve"])
                yield f"LDS by damping, {words}", points
            if row["note"]:
                yield f"Notes, {words}", row["note"]


def smooth(found: Results) -> dict[str, dict[str, list[tuple[str, Mapping[str, Any]]]]]:
    """Method -> benchmark (or "trainings" a query) -> (what was done, figure) of the runs smooth in the weights.

    Only where MAGIC was measured; the figure nearest to the benchmark's own is the last.
    """
    figures = found.get("lm_lds", {}).get("world", {}).get("smooth_run", {})
    result: dict[str, dict[str, list[tuple[str, Mapping[str, Any]]]]] = {}
    for world, bench in (("digits", "digits_lds"), ("lm", "lm_lds")):
        for name in SMOOTH:
            for kept in (90, 50):
                key = f"lds_{name}_{world}_{kept}"
                figure = figures.get(key) or (figures.get(f"lds_{name}") if (world, kept) == ("lm", 50) else None)
                if figure is not None:
                    done = f"{BENCHMARKS[bench]}, {100 - kept} % removed"
                    result.setdefault(name, {}).setdefault(bench, []).append((done, figure))
        if f"magic_trainings_per_query_{world}" in figures:
            entry = (world, figures[f"magic_trainings_per_query_{world}"])
            result["magic"].setdefault("trainings", []).append(entry)
    return {"magic": result["magic"]} | {n: result[n] for n in SMOOTH[1:] if n in result} if "magic" in result else {}


def results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The results that are there, by file name without its ending."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def page(found: Results) -> str:
    """The whole page."""
    methods = registry.methods()
    parts = [INTRO, guide(found)]
    for question in sorted({method.card.question for method in methods}):
        own = [method for method in methods if method.card.question == question]
        own.sort(key=lambda method: (method.card.baseline, method.card.key))
        parts += [f"## {QUESTIONS.get(question, question.capitalize())}\n", table(own, found)]
        parts += [section(method, found) for method in own]
    parts += [benchmark(name, found.get(name)) for name in BENCHMARKS]
    parts.append(peers(found))
    return "\n".join(parts)


def guide(found: Results) -> str:
    """Where to begin, with what was measured beside it."""
    lines = ["Where to begin; two small models are all that stands behind it:", ""]
    lines += heading(["what you have", "begin with", *(f"LDS, {words}" for words in BENCHMARKS.values())])
    for have, names in GUIDE.items():
        every = [line for name in names for line in lines_with(name, found)]
        cells = [" / ".join(line.lds(found, bench) for line in every) for bench in BENCHMARKS]
        lines.append(cells_text([have, " / ".join(f"`{name}`" for name in names), *cells]))
    last = (
        "Then let `rootward compare` say which of them holds on a replica of yours (it tunes `ekfac_joint`'s damping, "
        "which that one needs), and `rootward verify` whether the answer is true."
    )
    return "\n".join([*lines, "", last]) + "\n"


def lines_with(name: str, found: Results) -> list[Line]:
    """The line of a method or preset by name."""
    own, presets, _ = lines_of(registry.get(name)[0].card, found)
    return [line for line in (own, *presets) if name in line.names][:1]


def lines_of(card: Card, found: Results) -> tuple[Line, list[Line], list[Line]]:
    """The method itself, its presets, and the rows that are it or a preset with options."""
    names = (card.key, *card.aliases)
    own = Line(f"[{card.label}](#{card.key})" + (" (baseline)" if card.baseline else ""), names, names, {})
    presets = [Line(f"↳ `{p}`", (p,), (p, *names), options) for p, options in card.presets.items()]
    taken = {name.lower() for name in card.names}
    others: dict[str, Line] = {}
    for result in found.values():
        for name, row in ours(result):
            method, preset = registry.get(stem(name))
            if method.card.key != card.key or name.lower() in taken:
                continue
            options = preset | {key: value for key, value in row["options"].items() if key != row["tuned"]}
            others[name] = Line(f"↳ with {written(options)} (`{name}`)", (name,), (name, *names), options)
    return own, presets, list(others.values())


def stem(name: str) -> str:
    """The longest name of the registry that a row's name is, or begins with; the name itself where there is none."""
    known = {other.lower() for method in registry.methods() for other in method.card.names}
    parts = name.split("_")
    longest = ("_".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((start for start in longest if start.lower() in known), name)


def table(methods: Sequence[Method], found: Results) -> str:
    """One line a method, one for each of its presets and one where it was run with other options."""
    lines = heading(["method", "needs", *(f"LDS, {words}" for words in BENCHMARKS.values()), "passes"])
    for method in methods:
        own, presets, others = lines_of(method.card, found)
        for line in (own, *presets, *others):
            cells = [line.lds(found, bench) for bench in BENCHMARKS]
            lines.append(cells_text([line.title, ", ".join(method.card.needs), *cells, line.passes(found)]))
    return "\n".join(lines) + "\n"


def section(method: Method, found: Results) -> str:
    """All that is known of one method."""
    card = method.card
    own, presets, others = lines_of(card, found)
    text = sys.modules[method.run.__module__].__doc__ or ""
    names = ", ".join(f"`{name}`" for name in (card.key, *card.aliases))
    facts = [("Names", names), ("Paper", paper(card)), ("Question", card.question), ("Needs", ", ".join(card.needs))]
    facts += [("Cost", card.cost), ("Measured cost, in plain passes", own.passes(found)), ("Unit", card.unit)]
    if method.config.TUNED is not None:
        values = ", ".join(f"{value:g}" for value in method.config.TUNED.values)
        facts.append(("Tuned by `compare`", f"`{method.config.TUNED.option}`, over {values}"))
    facts.append(("LDS", all_lds(own, found)))
    facts += own.details(found)
    for preset, line in zip(card.presets, presets, strict=True):
        facts.append((f"Preset `{preset}`", f"{written(line.options)}; LDS {all_lds(line, found)}"))
        facts += [(f"`{preset}`: {what}", said) for what, said in line.details(found)]
    for line in others:
        facts.append((f"As `{line.names[0]}`", f"{written(line.options)}; LDS {all_lds(line, found)}"))
        facts += [(f"`{line.names[0]}`: {what}", said) for what, said in line.details(found)]
    facts += [(word, said) for word in ("Deviations", "Exact when") if (said := paragraph(text, word))]
    if card.notes:
        facts.append(("Note", card.notes))
    lines = [f'<a id="{card.key}"></a>', "", f"### {card.label}", ""]
    return "\n".join([*lines, *(f"- **{name}:** {said}" for name, said in facts)]) + "\n"


def benchmark(name: str, result: Mapping[str, Any] | None) -> str:
    """How the numbers of one benchmark came about, and our rows of it by LDS."""
    head = f"## Measured: {BENCHMARKS[name]} (`{name}`)\n"
    if result is None:
        return f"{head}\nNot measured yet.\n"
    world = {key: value for key, value in result["world"].items() if isinstance(value, str | int | float)}
    said = (
        f"{flat(world)}. {result['queries']} queries; {result['subsets']} random subsets, each trained with "
        f"{result['seeds']} seeds; settings were chosen on {result['tuning_queries']} other queries and "
        f"{result['tuning_subsets']} other subsets. A plain pass takes {1e3 * result['plain_pass_seconds']:.3g} ms. "
    )
    if result["noise_ceiling"] is not None:
        said += f"Noise ceiling {interval(result['noise_ceiling'])}. "
    lines = [head, f"{said}{flat(result['machine'])}; {flat(result['versions'])}.", ""]
    lines += heading(["method", "LDS [95 %]", "passes", "options"])
    for method, row in sorted(ours(result), key=lambda item: -item[1]["lds"]["value"]):
        lines.append(cells_text([method, interval(row["lds"]), number(row["cost_ratio"]), setting(row) or "defaults"]))
    return "\n".join([*lines, *smooth_runs(name, result)]) + "\n"


def smooth_runs(name: str, result: Mapping[str, Any]) -> list[str]:
    """MAGIC and what stands beside it, where documents are removed by weight 0 from a run that is smooth in them."""
    found = smooth({name: result})
    if not found:
        return []
    columns = [done for bench in BENCHMARKS for done, _ in found["magic"].get(bench, [])]
    lines = [
        "",
        "Runs that are smooth in the documents' weights, documents removed by weight 0, LDS [95 %]; the others are not "
        "tuned here:",
        "",
        *heading(["method", *columns]),
    ]
    for method, by_bench in found.items():
        cells = {done: interval(figure) for bench in BENCHMARKS for done, figure in by_bench.get(bench, [])}
        lines.append(cells_text([method, *(cells.get(column, "—") for column in columns)]))
    return lines


def peers(found: Results) -> str:
    """Other libraries on the same models, documents and queries."""
    head = "## Other libraries\n"
    rows = {bench: {n: row for n, row in result["methods"].items() if row["peer"]} for bench, result in found.items()}
    known = {name.lower() for method in registry.methods() for name in method.card.names}
    named = {name for result in found.values() for name, _ in ours(result)}
    absent = {
        bench: {n: said for n, said in result["not_applicable"].items() if n.lower() not in known and n not in named}
        for bench, result in found.items()
    }
    names = dict.fromkeys(name for part in (*rows.values(), *absent.values()) for name in part)
    if not names:
        return f"{head}\nNot measured yet.\n"
    lines = [head, "The same model, documents, queries and retrainings; dampings chosen as for ours.", ""]
    lines += heading(["method", *(f"LDS, {words}" for words in BENCHMARKS.values()), "passes"])

    def cell(name: str, bench: str) -> str:
        if bench not in found:
            return UNKNOWN
        row = rows[bench].get(name)
        if row is None:
            return f"— ({absent[bench].get(name, 'not run')})"
        taken = setting(row)
        return interval(row["lds"]) + (f" ({taken})" if taken else "")

    for name in names:
        both = [rows.get(bench, {}).get(name) for bench in BENCHMARKS]
        lines.append(cells_text([f"`{name}`", *(cell(name, bench) for bench in BENCHMARKS), ratios(both)]))
    return "\n".join(lines) + "\n"


def ours(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows that are not a peer's."""
    return ((name, row) for name, row in result["methods"].items() if row["peer"] is None)


def all_lds(line: Line, found: Results) -> str:
    """LDS on every benchmark, with the setting that was taken."""
    said: list[str] = []
    for bench, words in BENCHMARKS.items():
        row = line.row(found[bench]) if bench in found else None
        taken = "" if row is None else setting(row)
        said.append(f"{words}: {line.lds(found, bench)}" + (f" with {taken}" if taken else ""))
    return "; ".join(said)


def setting(row: Mapping[str, Any]) -> str:
    """The options of a row, what was tuned among them."""
    return ", ".join(f"{key} = {value}" for key, value in row["options"].items())


def written(options: Mapping[str, Any]) -> str:
    """Options as they are given."""
    return ", ".join(f"{key} = {value!r}" for key, value in options.items()) or "the defaults"


def ratios(rows: Sequence[Mapping[str, Any] | None]) -> str:
    """Costs of the benchmarks in their order."""
    return " / ".join("—" if row is None else number(row["cost_ratio"]) for row in rows) if any(rows) else "—"


def heading(names: Sequence[str]) -> list[str]:
    """The head of a table."""
    return [cells_text(names), "|" + "---|" * len(names)]


def cells_text(cells: Sequence[str]) -> str:
    """A table's line."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def paper(card: Card) -> str:
    """The title, linked where there is an address."""
    arxiv = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", card.reference)
    if arxiv:
        return f"{card.paper}, [{card.reference}](https://arxiv.org/abs/{arxiv[1]})"
    return "none: a baseline" if card.reference == "none" else f"{card.paper}, {card.reference}"


def paragraph(text: str, word: str) -> str:
    """The docstring's paragraph that begins with ``word:``, in one line; empty without one."""
    for part in text.split("\n\n"):
        line = " ".join(part.split())
        if line.startswith(f"{word}:"):
            return line.removeprefix(f"{word}:").strip().replace("``", "`")
    return ""


def interval(found: Mapping[str, Any]) -> str:
    """``0.41 [0.30, 0.52]``."""
    return "{} [{}, {}]".format(*(f"{found[key] + 0.0:.2f}".replace("-", "−") for key in ("value", "low", "high")))


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}".replace("-", "−")


def flat(value: Mapping[str, Any]) -> str:
    """A mapping as text."""
    return ", ".join(f"{key} {item}" for key, item in value.items())


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(results(RESULTS)), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
