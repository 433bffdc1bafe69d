"""Flags over file over defaults: how a command's settings are found, and how they are written down again.

A config file is TOML. It holds one command's settings at its top level, or those of several in tables named after
the commands (``[train]``, ``[index]``, ``[trace]``, ``[verify]``, ``[compare]``), with what they share at the top.
Paths in it are relative to the file. Keys that no command knows are refused.
"""

from __future__ import annotations

import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rootward.cli.settings import COMMANDS, Settings
from rootward.cli.toml import dumps
from rootward.core.errors import InputError
from rootward.core.expected import nearest
from rootward.core.records import write_text

S = TypeVar("S", bound=Settings)


def resolve(command: str, given: Mapping[str, Any], file: Path | None) -> Any:
    """The settings of ``command``: flags (those that are not None), then the file, then defaults; paths are absolute.

    Raises:
        InputError: the file cannot be read, a key is unknown (the nearest known one is named), or a value is wrong or
            missing.
    """
    kind = COMMANDS[command]
    values = read_config(command, kind, file) if file is not None else {}
    for key, value in given.items():
        if value is None or value == []:
            continue
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            value = _merged(values[key], value)
        values[key] = value
    for key in path_keys(kind):
        if values.get(key) is not None:
            values[key] = Path(os.path.abspath(Path(str(values[key])).expanduser()))  # noqa: PTH100 - keeps links
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_problems(command, error, file)) from error


def read_config(command: str, kind: type[Settings], file: Path) -> dict[str, Any]:
    """The part of a config file that concerns one command; relative paths joined to the file's folder."""
    if not file.is_file():
        raise InputError(f"{file}: no such config file; expected TOML")
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: not TOML: {error}") from error
    made_by = raw.pop("command", command)
    if made_by != command:
        raise InputError(f"{file}: expected the config of `rootward {command}`, got that of `rootward {made_by}`")
    own = set(kind.model_fields)
    # `index = "folder"` is a setting of a trace, `[index]` the settings of another command
    sections = {name: raw.pop(name) for name in COMMANDS if isinstance(raw.get(name), dict)}
    known = set(own)
    if sections:  # a file for several commands: what stands at the top may be for any of them
        known |= {key for name in sections for key in COMMANDS[name].model_fields}
    _refuse_unknown(raw, known, str(file))
    for name, section in sections.items():
        _refuse_unknown(section, set(COMMANDS[name].model_fields), f"{file}: [{name}]")
    values = {key: value for key, value in raw.items() if key in own} | sections.get(command, {})
    for key in path_keys(kind):
        if isinstance(values.get(key), str):
            values[key] = file.resolve().parent / Path(values[key]).expanduser()
    return values


def write_config(command: str, settings: Settings, path: Path) -> None:
    """The resolved settings as a config file that replays the command."""
    write_text(path, config_text(command, settings))


def config_text(command: str, settings: Settings) -> str:
    """The resolved settings as TOML."""
    replay = f"# rootward {command} --config THIS_FILE runs this again\n"
    return replay + dumps({"command": command, **settings.model_dump(mode="json")})


def key_config(settings: Settings) -> dict[str, Any]:
    """What of the settings decides the result."""
    return {k: v for k, v in settings.model_dump(mode="json").items() if k not in settings.volatile and v is not None}


def path_keys(kind: type[Settings]) -> list[str]:
    """Settings that are paths."""
    return [name for name, info in kind.model_fields.items() if Path in _alternatives(info.annotation)]


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            listed = ", ".join(sorted(known))
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, known)}\nknown keys: {listed}")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _problems(command: str, error: ValidationError, file: Path | None) -> str:
    lines: list[str] = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else command
        if problem["type"] == "missing":
            lines.append(f"{name} is missing: give {flag_of(command, name)}, or {name} = ... in a config file")
        else:
            where = ".".join(map(str, problem["loc"]))
            lines.append(f"{where} ({flag_of(command, name)}): {problem['msg']}, got {problem['input']!r}")
    unique = list(dict.fromkeys(lines))
    return (f"{file}: " if file is not None else "") + "\n".join(unique)


def flag_of(command: str, name: str) -> str:
    """How a setting is called on the command line."""
    positional = {("index", "model"), ("trace", "model"), ("verify", "run"), ("compare", "model")}
    special = {"methods": "--method", "options": "--option", "baselines": "--baseline", "recipe": "--recipe"}
    if (command, name) in positional:
        return name.upper()
    return special.get(name, "--" + name.replace("_", "-"))


def parse_options(items: Iterable[str] | None, what: str, *, depth: int) -> dict[str, Any] | None:
    """``method.key=value`` items (depth 2) or ``key=value`` items (depth 1) as nested mappings; values are TOML.

    A value that is no TOML value is text: ``bm25.k1=1.2``, ``gradient_dot.queries=mean``.
    """
    if not items:
        return None
    result: dict[str, Any] = {}
    form = "method.key=value" if depth == 2 else "key=value"
    for item in items:
        name, equals, text = item.partition("=")
        parts = [part.strip() for part in (name.rsplit(".", 1) if depth == 2 else name.split("."))]
        if not equals or len(parts) < depth or not all(parts):
            raise InputError(f"{what}: expected {form}, got {item!r}")
        place = result
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = toml_value(text)
    return result


def toml_value(text: str) -> Any:
    """A TOML value, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
