"""``rootward methods``: the table of methods, and finding one."""

from __future__ import annotations

from collections.abc import Sequence

from rootward.cli.load import quiet_libraries
from rootward.cli.output import Talk
from rootward.core.errors import InputError


def run(words: Sequence[str], talk: Talk) -> int:
    """Print all methods, or those that hold every word after ``find``."""
    if words and words[0] != "find":
        raise InputError(
            f"methods: expected `rootward methods` or `rootward methods find WORDS`, got {' '.join(words)!r}"
        )
    from rootward.core import registry

    quiet_libraries()
    asked = " ".join(words[1:])
    found = registry.find(asked) if asked else registry.methods()
    if asked and not found:
        raise InputError(
            f"methods find {asked!r}: no method's name, paper or reference holds these words; "
            "`rootward methods` lists all"
        )
    columns = [
        ("name", "left"), ("also", "left"), ("needs", "left"), ("baseline", "left"), ("cost", "left"),
        ("paper", "left"),
    ]  # fmt: skip
    cards = [method.card for method in found]
    rows = [
        (
            card.key,
            ", ".join((*card.aliases, *card.presets)) or "–",
            ", ".join(card.needs),
            "yes" if card.baseline else "",
            card.cost,
            f"{card.paper} ({card.reference})",
        )
        for card in cards
    ]
    talk.table(columns, rows)
    talk.say(
        "Papers, deviations from them and what was measured: docs/methods.md; on your own model: rootward compare."
    )
    document = [
        {
            "name": card.key,
            "label": card.label,
            "question": card.question,
            "aliases": list(card.aliases),
            "presets": {name: dict(options) for name, options in card.presets.items()},
            "paper": card.paper,
            "reference": card.reference,
            "needs": list(card.needs),
            "cost": card.cost,
            "unit": card.unit,
            "baseline": card.baseline,
            "options": list(method.config.model_fields),
        }
        for method, card in zip(found, cards, strict=True)
    ]
    talk.result("methods", {"methods": document})
    return 0
