"""Write docs/methods.md from the methods' cards and the measured results: ``python benchmarks/methods_page.py``.

A result is ``benchmarks/results/<name>.json``: ``{"benchmark", "machine", "versions", "noise_ceiling", "methods":
{name: {"lds": {"value", "low", "high", "n"} or null, "cost_ratio", "options", "damping_curve": [[damping, lds], ...] or
null, "note"}}}``. What is not measured is said to be so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
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
QUESTIONS = {"attribution": "Which documents?"}
INTRO = """\
# Methods

*Written by `python benchmarks/methods_page.py` from the methods' own cards and the measured results; edit those.*

What ranks documents, with its paper, its price and how well it predicts retraining. **LDS** (linear datamodeling score)
is the rank correlation of a method's scores, summed over random subsets of the documents, with what training on those
subsets gave: 1 is perfect, 0 is chance. **Passes** is the time taken over that of one plain forward and backward pass
over the same documents. Both depend on the model: `rootward compare` measures them on yours. Terms:
[glossary](glossary.md).
"""


def results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The results that are there, by file name without its ending."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page."""
    methods = registry.methods()
    parts = [INTRO]
    for question in sorted({method.card.question for method in methods}):
        own = [method for method in methods if method.card.question == question]
        own.sort(key=lambda method: (method.card.baseline, method.card.key))
        parts += [f"## {QUESTIONS.get(question, question.capitalize())}\n", table(own, found)]
        parts += [section(method, found) for method in own]
    parts += [benchmark(name, found.get(name)) for name in BENCHMARKS]
    return "\n".join(parts)


def table(methods: Sequence[Method], found: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a method."""
    heads = ["method", "needs", *(f"LDS, {words}" for words in BENCHMARKS.values()), "passes"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in methods:
        card = method.card
        name = f"[{card.label}](#{card.key})" + (" (baseline)" if card.baseline else "")
        cells = [lds_cell(own_result(card, found.get(bench)), bench in found) for bench in BENCHMARKS]
        lines.append("| " + " | ".join([name, ", ".join(card.needs), *cells, passes(card, found)]) + " |")
    return "\n".join(lines) + "\n"


def section(method: Method, found: Mapping[str, Mapping[str, Any]]) -> str:
    """All that is known of one method."""
    card = method.card
    text = sys.modules[method.run.__module__].__doc__ or ""
    names = ", ".join(f"`{name}`" for name in (card.key, *card.aliases))
    facts = [("Names", names), ("Paper", paper(card)), ("Question", card.question), ("Needs", ", ".join(card.needs))]
    facts += [("Cost", card.cost), ("Measured cost, in plain passes", passes(card, found)), ("Unit", card.unit)]
    facts += [("LDS", "; ".join(f"{words}: {lds_text(card, found, bench)}" for bench, words in BENCHMARKS.items()))]
    for preset, options in card.presets.items():
        given = ", ".join(f"{key} = {value!r}" for key, value in options.items())
        facts.append((f"Preset `{preset}`", f"{given}; {preset_lds(preset, found)}"))
    for bench, words in BENCHMARKS.items():
        curve = (own_result(card, found.get(bench)) or {}).get("damping_curve")
        if curve:
            points = ", ".join(f"{number(damping)}: {number(value)}" for damping, value in curve)
            facts.append((f"LDS by damping, {words}", points))
    facts += [(word, said) for word in ("Deviations", "Exact when") if (said := paragraph(text, word))]
    if card.notes:
        facts.append(("Note", card.notes))
    lines = [
        f'<a id="{card.key}"></a>',
        "",
        f"### {card.label}",
        "",
        *(f"- **{name}:** {said}" for name, said in facts),
    ]
    return "\n".join(lines) + "\n"


def benchmark(name: str, result: Mapping[str, Any] | None) -> str:
    """How the numbers of one benchmark came about, and what was run in it under other names."""
    head = f"## Measured: {BENCHMARKS[name]} (`{name}`)\n"
    if result is None:
        return f"{head}\nNot measured yet.\n"
    ceiling = result.get("noise_ceiling")
    said = f"Noise ceiling {interval(ceiling)}. " if ceiling else ""
    lines = [head, f"{said}{flat(result.get('machine'))}; {flat(result.get('versions'))}.", ""]
    lines += ["| method | LDS [95 %] | passes | options | note |", "|---|---|---|---|---|"]
    order = sorted(result["methods"].items(), key=lambda item: -(item[1]["lds"] or {"value": -2})["value"])
    for method, one in order:
        options = ", ".join(f"{key} = {value}" for key, value in (one.get("options") or {}).items())
        cells = [
            method,
            interval(one["lds"]),
            number(one.get("cost_ratio")),
            options or "defaults",
            one.get("note", ""),
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def own_result(card: Card, result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What was measured under the card's key or an alias (not a preset, which has other options)."""
    names = {name.lower() for name in (card.key, *card.aliases)}
    measured = (result or {"methods": {}})["methods"]
    return next((one for name, one in measured.items() if name.lower() in names), None)


def lds_cell(one: Mapping[str, Any] | None, measured: bool) -> str:
    """The LDS, or a dash."""
    if one is None:
        return "—" if measured else "not measured yet"
    return interval(one["lds"])


def lds_text(card: Card, found: Mapping[str, Mapping[str, Any]], bench: str) -> str:
    """The LDS with its interval, or a dash with the reason."""
    if bench not in found:
        return "not measured yet"
    one = own_result(card, found[bench])
    if one is None:
        return "— (not run)"
    note = f" ({one['note']})" if one.get("note") else ""
    return f"{interval(one['lds'])}{note}"


def preset_lds(preset: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """LDS of a preset wherever it was run."""
    said = [
        f"LDS {words}: {interval(one['lds'])}"
        for bench, words in BENCHMARKS.items()
        for name, one in found.get(bench, {"methods": {}})["methods"].items()
        if name.lower() == preset.lower()
    ]
    return "; ".join(said) or "not measured yet"


def passes(card: Card, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Measured costs of both benchmarks, in their order."""
    ratios = [one.get("cost_ratio") for bench in BENCHMARKS if (one := own_result(card, found.get(bench)))]
    known = [number(ratio) for ratio in ratios if ratio is not None]
    return " / ".join(known) or "not measured yet"


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


def interval(found: Mapping[str, Any] | None) -> str:
    """``0.41 [0.30, 0.52]``, or a dash."""
    if found is None:
        return "—"
    return "{} [{}, {}]".format(*(f"{found[key]:.2f}".replace("-", "−") for key in ("value", "low", "high")))


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return "—" if value is None else f"{value:.3g}".replace("-", "−")


def flat(value: Any) -> str:
    """A mapping as text."""
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(results(RESULTS)), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
