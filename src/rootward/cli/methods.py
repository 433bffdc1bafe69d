"""``rootward methods``: the table of methods, one method's card with its options, and finding some by words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rootward.cli.load import quiet_libraries
from rootward.cli.output import Talk
from rootward.core.errors import InputError

if TYPE_CHECKING:
    from rootward.core.registry import Method


def run(words: Sequence[str], talk: Talk) -> int:
    """Print all methods, those that hold every word after ``find``, or the card of the one that is named."""
    if len(words) > 1 and words[0] != "find":
        raise InputError(
            "methods: expected `rootward methods`, `rootward methods NAME` or `rootward methods find WORDS`, "
            f"got {' '.join(words)!r}"
        )
    from rootward.core import registry

    quiet_libraries()
    if words and words[0] != "find":
        method, preset = registry.get(words[0])
        _show(words[0], method, preset, talk)
        return 0
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
    talk.note(
        "A method's options: rootward methods NAME; papers, deviations from them and what was measured: "
        "docs/methods.md; on your own model: rootward compare."
    )
    document = [{**_described(method), "options": list(method.config.model_fields)} for method in found]
    talk.result("methods", {"methods": document})
    return 0


def _described(method: Method) -> dict[str, Any]:
    """A card as JSON holds it."""
    card = method.card
    return {
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
    }


def _show(name: str, method: Method, preset: Mapping[str, Any], talk: Talk) -> None:
    """One method's card and all its options; a preset's values stand in place of the defaults."""
    from rootward.core.expected import expected

    card, tuned = method.card, method.config.TUNED
    options = [
        {
            "name": key,
            "default": preset.get(key, field.default),
            "expected": expected(field),
            "meaning": field.description or "",
        }
        for key, field in method.config.model_fields.items()
    ]
    talk.say(f"{card.label}{' (a baseline)' if card.baseline else ''}")
    talk.say(f"Name:   {', '.join((card.key, *card.aliases))}")
    for other, values in card.presets.items():
        talk.say(f"Preset: {other}: {', '.join(f'{key} = {_value(value)}' for key, value in values.items())}")
    talk.say(f"Paper:  {card.paper} ({card.reference})")
    talk.say(f"Needs:  {', '.join(card.needs)}")
    talk.say(f"Cost:   {card.cost}")
    talk.say(f"Unit:   {card.unit}")
    if tuned is not None:
        values = ", ".join(f"{value:g}" for value in tuned.values)
        talk.say(f"Tuned:  `rootward compare` chooses {tuned.option} from {values}")
    if card.notes:
        talk.say(f"Notes:  {card.notes}")
    columns = [("option", "left"), ("default", "left"), ("expected", "left"), ("meaning", "left")]
    rows = [(each["name"], _value(each["default"]), each["expected"], each["meaning"]) for each in options]
    if preset:
        talk.say(f"Defaults below are those of {name}.")
    if rows:
        talk.table(columns, rows)
        talk.note(f"Given as --option {name}.{options[0]['name']}=VALUE, or options={{...}} of rw.attribute.")
    else:
        talk.say("No options.")
    found = {**_described(method), "notes": card.notes, "options": options}
    found["tuned"] = None if tuned is None else {"option": tuned.option, "values": list(tuned.values)}
    talk.result("methods", {"asked": name, "method": found})


def _value(value: object) -> str:
    """A value as it is written in TOML; None, which TOML has not, as a dash."""
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)
