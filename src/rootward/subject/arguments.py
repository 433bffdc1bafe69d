"""What the public verbs are given, checked by type before anything is read: a path in place of an object, say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rootward.core.errors import InputError
from rootward.core.expected import shown
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject


def check_asked(subject: object, behaviour: object) -> None:
    """`InputError` unless these are a `Subject` and a `Behaviour`; it says how one is made of what came."""
    if not isinstance(subject, Subject):
        place = repr(str(subject)) if isinstance(subject, str | Path) else "folder"
        raise InputError(
            f"subject: expected a Subject, got {shown(subject)}; use rw.Subject.load({place}, documents=...)"
        )
    if not isinstance(behaviour, Behaviour):
        place = repr(str(behaviour)) if isinstance(behaviour, str | Path) else "path"
        raise InputError(f"behaviour: expected a Behaviour, got {shown(behaviour)}; use rw.Behaviour.load({place})")


def check_options(options: object, name: str = "options") -> None:
    """`InputError` unless a method's options are a mapping from name to value, or None."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"{name}: expected a mapping such as {{'damping': 0.1}}, got {shown(options)}")


def check_several(subject: object, behaviour: object, methods: object, options: object) -> None:
    """`InputError` unless several methods and a mapping from method to its options were given; ``methods`` has names.

    None for ``methods`` passes where the verb has a default of its own for it.
    """
    check_asked(subject, behaviour)
    if isinstance(methods, str):
        raise InputError(f"methods: expected a list of names, got the text {methods!r}; write [{methods!r}]")
    if methods is not None and not isinstance(methods, Iterable):
        raise InputError(f"methods: expected a list of names, got {shown(methods)}; see `rootward methods`")
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"options: expected a mapping such as {{'ekfac': {{'damping': 0.1}}}}, got {shown(options)}")
    for name, values in (options or {}).items():
        check_options(values, f"options[{name!r}]")
